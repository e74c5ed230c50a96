"""The records (run.json) of a real run of all five phases at tiny size, and what such a run is too short for.

They lie in fixtures/records, as the scripts wrote them for test_pipeline's `finished`. After a change of what a phase
records, replace them by those of a new run: `python tests/records.py FOLDER`, with the folder that the scripts ran in.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures" / "records"
FOLDERS = (
    "data/corpus",
    "checkpoints/init",
    "checkpoints/mlm",
    "checkpoints/teacher",
    "data/distil",
    "checkpoints/model",
)
LOGGED_EVERY, EVALUATED_EVERY, STEPS = 20, 100, 1000  # of a made-up history


def fixture(folder: str) -> Path:
    """The file that holds a folder's record."""
    return FIXTURES / f"{Path(folder).name}.json"


def write_records(root: Path) -> str:
    """Write the records below a folder as the real run left them; returns the final model's folder, relative to it."""
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
        shutil.copy(fixture(folder), root / folder / "run.json")
    return FOLDERS[-1]


def edit(folder: str | Path, change: Any) -> None:
    """Change a written record."""
    path = Path(folder) / "run.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def lengthen_history(record: dict[str, Any]) -> None:
    """Replace a Trainer's log by a MADE-UP longer one; evaluations have the real ones' names and values near them."""
    evaluations = [entry for entry in record["history"] if "eval_loss" in entry]
    history = []
    for step in range(LOGGED_EVERY, STEPS + 1, LOGGED_EVERY):
        share = step / STEPS
        at = {"epoch": share, "step": step}
        decay = 1 + np.exp(-7 * share) + 0.02 * np.sin(step)
        loss = evaluations[-1]["eval_loss"] * decay
        history.append({"loss": loss, "grad_norm": 0.4, "learning_rate": 1e-3 * (1 - share)} | at)
        if step % EVALUATED_EVERY == 0:
            history.append({name: value / decay for name, value in evaluations[-1].items()} | {"eval_loss": loss} | at)
    record["history"] = [*history, record["history"][-1] | {"step": STEPS}]


def names(value: Any, prefix: str = "") -> set[str]:
    """The names in a record, with those that they lie in: `account.cost.teacher.parameters`. Energy needs a GPU."""
    found = {prefix}
    if isinstance(value, list):
        for item in value:
            found |= names(item, f"{prefix}[]")
    elif isinstance(value, dict):
        for key, item in value.items():
            found |= names(item, f"{prefix}.{key}".lstrip(".")) if key != "gpu_joules" else set()
    return found


if __name__ == "__main__":
    for folder in FOLDERS:
        shutil.copy(Path(sys.argv[1]) / folder / "run.json", fixture(folder))
