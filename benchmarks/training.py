"""What both ways of training share: the clock, the device, the precision, and settings without side work."""

import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modernbert_small.run.devices import best_device, has_bf16

# Settings of TrainingArguments that switch off checkpoints, evaluation and reports.
QUIET: dict[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "use_cpu": not torch.cuda.is_available(),
}


def device() -> torch.device:
    """The CUDA device if there is one, else the CPU."""
    return best_device()


def bf16() -> bool:
    """Whether both ways compute under bf16 autocast."""
    return has_bf16(best_device())


def synchronise() -> None:
    """Wait until the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch(TrainerCallback):
    """Measures the time from when a Trainer asks for its first batch to the end of its last step."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        synchronise()
        self.began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock at the last step, when the device has finished it."""
        if state.global_step == state.max_steps:
            synchronise()
            self.seconds = time.perf_counter() - self.began

    @classmethod
    def train(cls, trainer: Trainer) -> float:
        """Train, and return the seconds that it took."""
        stopwatch = cls()
        trainer.add_callback(stopwatch)
        trainer.train()
        return stopwatch.seconds
