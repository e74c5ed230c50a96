"""What both ways of training share: the clock, the precision, and a Trainer that does nothing but train."""

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modernbert_small.run.devices import best_device, has_bf16

# Flags of TrainingArguments: no checkpoints, no evaluation, no reports.
QUIET: dict[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "use_cpu": not torch.cuda.is_available(),
}


def device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return best_device()


def bf16() -> bool:
    """Whether both ways run under bf16 autocast."""
    return has_bf16(best_device())


def synchronise() -> None:
    """Wait until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch(TrainerCallback):
    """The time between a Trainer's first batch being asked for and its last step's end."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        synchronise()
        self.began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the time so far; on CUDA the device is waited for at the last step only."""
        if state.global_step == state.max_steps:
            synchronise()
            self.seconds = time.perf_counter() - self.began

    @classmethod
    def train(cls, trainer: Any) -> float:
        """Train and return the seconds it took."""
        stopwatch = cls()
        trainer.add_callback(stopwatch)
        trainer.train()
        return stopwatch.seconds
