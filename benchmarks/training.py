"""What both ways of training share: the clock, the device, the precision, and settings without side work."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
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


def seconds_of(step: Callable[[], object]) -> float:
    """The seconds of one call, including the device's work."""
    synchronise()
    began = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - began


def matrix_product_rate(repeats: int = 10) -> float:
    """FLOP/s of a product of two large square matrices in the precision of training, the best of `repeats` times."""
    size = 8192 if device().type == "cuda" else 2048
    dtype = torch.bfloat16 if bf16() else torch.float32
    a = torch.randn(size, size, device=device()).to(dtype)
    b = torch.randn(size, size, device=device()).to(dtype)
    return 2 * size**3 / min(seconds_of(lambda: a @ b) for _ in range(repeats))


def busy_seconds(step: Callable[[], object]) -> float:
    """The seconds for which kernels and copies run on the GPU in one call; the profiler does not slow those down."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        step()
        synchronise()
    on_gpu = (e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    return sum(event.self_device_time_total for event in on_gpu) / 1e6


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
