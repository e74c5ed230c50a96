"""Checkpoints: saved before a signal stops the program, recognised when they are not whole."""

import json
import logging
import signal
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from modernbert_small.run.errors import raise_stop
from modernbert_small.run.processes import any_process

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """SIGINT or SIGTERM: the step in progress ends, a checkpoint is saved, then the program stops. A second: at once.

    A context, in which signals are noted; one that came too late for a step stops the program at its end.
    """

    def __init__(self) -> None:
        self._number, self._is_asked = 0, False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        self._earlier = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        self._give_back()
        if self._number and kind is None:
            raise_stop(self._number, None)

    def _give_back(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self._number = number
        self._give_back()
        logger.info("%s: stopping when this step is saved; again: at once", signal.Signals(number).name)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint, but not before what happens at an epoch's end."""
        self._is_asked = any_process(self._number > 0)
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
        """Stop, now that nothing is lost."""
        if self._is_asked:
            raise_stop(self._number or signal.SIGTERM, None)


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-*` whose files are whole, None if there is none.

    A folder gets this name when it is complete, but disks and copies fail.
    """
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if _is_whole(path):
            return str(path)
        logger.warning("%s is half-written and left out", path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the state parses, weights are as long as their header says, and torch's archives have their end."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        for file in (weights := list(checkpoint.rglob("*.safetensors"))):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return bool(weights) and all(zipfile.is_zipfile(file) for file in checkpoint.glob("*.pt*"))
