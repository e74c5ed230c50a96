"""run.json: what a phase records about a run, written, read, and found behind an artefact."""

import importlib.metadata
import json
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modernbert_small.run.durable import publish, share_file
from modernbert_small.run.errors import UserError

RUN_FILE = "run.json"


_LIBRARIES = ("torch", "transformers", "sentence-transformers", "datasets", "accelerate", "numpy", "pyarrow")


def read_run(folder: str | Path) -> dict[str, Any]:
    """The record of an artefact folder.

    Raises:
        UserError: no run.json there, or not one of ours.
    """
    path = Path(folder) / RUN_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected the record of a finished phase") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(record).__name__}")
    return record


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name of its own first, so that a file with its final name is whole."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        share_file(Path(temporary))
        publish(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def temporary_files(folder: Path, of: str = "*") -> list[Path]:
    """What `write_text` left below a folder when it was killed, of files with a certain name or of all."""
    return [path for path in folder.rglob(f".{of}.????????") if path.is_file()]


PHASES = {
    "create_dataset": "Phase 1, corpus",
    "init_model_mlm": "Phase 2, first weights",
    "pre_train": "Phase 3, masked language modelling",
    "reduced_teacher": "Phase 4, reduced teacher",
    "create_distil_dataset": "Phase 4, labels",
    "distil_train": "Phase 5, distillation",
}


def find_records(roots: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Find the records of all phases behind some artefacts, by following the inputs that each record names.

    Args:
        roots: folders to start from. Of two records of one phase the one nearer to the first root counts.

    Returns:
        By PHASES' names, in their order, the records with the `folder` that each was found in.
    """
    found: dict[str, dict[str, Any]] = {}
    waiting = [Path(root) for root in roots]
    for folder in waiting:
        if not (folder / RUN_FILE).is_file():
            continue
        record = read_run(folder)
        phase = str(record.get("phase"))
        if phase not in PHASES or phase in found:
            continue
        found[phase] = record | {"folder": str(folder)}
        # Phases 2's and 4's teacher may be another student, with phases of its own.
        followed = [value for name, value in record["inputs"].items() if name != "teacher" or phase == "distil_train"]
        waiting += [Path(value["path"]) for value in followed if "path" in value]
    return {phase: found[phase] for phase in PHASES if phase in found}


def versions() -> dict[str, str]:
    """Python's and the libraries' versions."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def git_state() -> dict[str, Any]:
    """The commit of the checkout that this code runs from, and whether files were changed since; nothing outside one.

    An installed package may lie inside another project's repository, which does not know its files.
    """
    try:
        _git("ls-files", "--error-unmatch", __file__)
        changed = bool(_git("status", "--porcelain", "--untracked-files=no"))
        return {"git_commit": _git("rev-parse", "HEAD"), "git_dirty": changed}
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}


def _git(*command: str) -> str:
    """What a git command says in this file's folder."""
    words = ["git", "-C", str(Path(__file__).parent), *command]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
