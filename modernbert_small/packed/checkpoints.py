"""Checkpoints: one is saved before a signal stops the program, and those that are not whole are recognised."""

import json
import logging
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from modernbert_small.run.errors import raise_stop
from modernbert_small.run.manifest import MANIFEST, damage
from modernbert_small.run.processes import any_process

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """Stops the program at SIGINT or SIGTERM, after the step in progress has ended and a checkpoint is saved.

    A second signal stops it at once. Signals are noted within the context of this object; one that comes after the
    last step stops the program where the context ends.
    """

    def __init__(self) -> None:
        self._number: int | None = None  # of the signal that came
        self._is_asked = False  # whether a signal came to any of the processes
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        self._earlier = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        self._restore_handlers()
        if self._number is not None and kind is None:
            raise_stop(self._number, None)

    def _restore_handlers(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self._number = number
        self._restore_handlers()
        logger.info(
            "%s: the program stops when this step is saved; a second signal stops it at once",
            signal.Signals(number).name,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint; after an epoch's last step `on_epoch_end` asks for it, when the epoch is counted."""
        self._is_asked = any_process(self._number is not None)
        if self._is_asked and state.epoch % 1:
            control.should_save = True

    on_evaluate = on_step_end

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint."""
        if self._is_asked:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the program, now that its state is saved."""
        if self._is_asked:
            raise_stop(self._number or signal.SIGTERM, None)


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-*` folder whose files are whole, or None if there is none.

    A folder gets this name only when it is complete, but power, a disk or a copy may fail later. A checkpoint without
    the state of optimizer, scheduler or random numbers is not whole: training would begin its schedule a second time.
    """
    for path in _newest_first(folder):
        found = _damage_of(path)
        if not found:
            return str(path)
        logger.warning("%s is not whole and is not used: %s", path, "; ".join(found))
    return None


def remove_later_checkpoints(folder: Path, step: int) -> None:
    """Remove checkpoints of later steps than one that was just saved. They are damaged, else training had begun there.

    If they stayed, they would count among those to keep, and the whole one would be removed as the oldest.
    """
    for path in _newest_first(folder):
        if checkpoint_step(path) > step:
            shutil.rmtree(path)


def _newest_first(folder: Path) -> list[Path]:
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(checkpoints, key=checkpoint_step, reverse=True)


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, by its name."""
    return int(checkpoint.name.rpartition("-")[2])


def _damage_of(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, and with the best one so far, whose weights it refers to."""
    found = _damage_of_files(checkpoint)
    if found:
        return found
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    best = Path(state.get("best_model_checkpoint") or checkpoint)
    if best.name == checkpoint.name:
        return []
    return [f"{best.name}, the best so far: {words}" for words in _damage_of_files(checkpoint.with_name(best.name))]


def _damage_of_files(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint's files, a few words for each."""
    missing = [f"{name} is missing" for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (checkpoint / name).exists()]
    if not any(checkpoint.glob("rng_state*.pth")):
        missing.append("the state of the random numbers is missing")
    if missing:
        return missing
    if (checkpoint / MANIFEST).exists():
        return damage(checkpoint)
    logger.warning("%s has no %s: only the form of its files can be checked", checkpoint, MANIFEST)
    return [] if _has_right_form(checkpoint) else ["some of its files are missing or cut off"]


def _has_right_form(checkpoint: Path) -> bool:
    """Whether the state is JSON, the weights are as long as their header says, and torch's archives have their end."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        for file in (weights := list(checkpoint.rglob("*.safetensors"))):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return bool(weights) and all(zipfile.is_zipfile(file) for file in checkpoint.glob("*.pt*"))
