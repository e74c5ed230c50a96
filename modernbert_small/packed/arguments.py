"""The training settings that phases 3 and 5 share: transformers' TrainingArguments for packed batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from modernbert_small.packed.attention import ATTN_IMPLEMENTATIONS, choose_attn_implementation
from modernbert_small.run.devices import best_device, can_compile, has_bf16
from modernbert_small.run.errors import UserError

# The Trainer has these settings, but packed batches do not use them.
_UNUSED = {
    "per_device_train_batch_size": "batches are counted in tokens here; use tokens_per_batch",
    "per_device_eval_batch_size": "batches are counted in tokens here; use tokens_per_batch",
    "resume_from_checkpoint": "a killed run goes on by itself; leave this setting out",
    "torch_compile_backend": "the layers are compiled by inductor; leave this setting out",
    "save_only_model": "a checkpoint without the state of the optimiser cannot be resumed from; leave this setting out",
}
_SHORTEST_MAX_SEQ_LENGTH = 8


@dataclass
class PackedTrainingArguments(TrainingArguments):
    """Settings of phases 3 and 5. Each phase adds its paths, and sets the defaults in which it differs."""

    max_seq_length: int = field(default=1024, metadata={"help": "longest text in tokens; longer texts are cut"})
    tokens_per_batch: int = field(
        default=65_536, metadata={"help": "tokens in a batch on each device; at least max_seq_length"}
    )
    attn_implementation: str = field(
        default="auto",
        metadata={"help": f"one of {', '.join(ATTN_IMPLEMENTATIONS)}; auto takes the fastest that can run"},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "peak; ModernBERT-family encoders want high rates"})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "any of transformers' schedules"})
    warmup_steps: float = field(default=0.05, metadata={"help": "number of steps, or below 1 a share of all steps"})
    weight_decay: float = field(default=0.01, metadata={"help": "decay of weights; biases and norms have none"})
    torch_compile: bool | None = field(
        default=None,
        metadata={"help": "compile the model's layers; by default on CUDA"},
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bf16 autocast; by default it is on where the hardware computes in bf16"}
    )
    logging_steps: float = field(default=50, metadata={"help": "steps between log lines"})
    eval_strategy: str = field(default="steps", metadata={"help": "no, steps or epoch"})
    eval_steps: float | None = field(
        default=1000, metadata={"help": "steps between evaluations, or below 1 a share of all steps"}
    )
    save_steps: float = field(
        default=1000, metadata={"help": "steps between checkpoints; a killed run resumes at the last one"}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "checkpoints to keep; the best one so far is among them"}
    )
    report_to: str | None = field(
        default="tensorboard", metadata={"help": "tools that receive the metrics: transformers' integrations, or none"}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "replace a result that was made with other settings or inputs"}
    )

    def __post_init__(self) -> None:
        """Fill in what depends on the hardware, then let TrainingArguments check itself."""
        _fill_in_hardware(self)
        # From these the Trainer would compile the whole model, and again for each batch; see `compile_layers`.
        asked = self.torch_compile, self.torch_compile_mode  # type: ignore[has-type]
        self.torch_compile, self.torch_compile_mode = False, None
        super().__post_init__()
        self.torch_compile, self.torch_compile_mode = asked
        self.logging_nan_inf_filter = False  # it waits for every loss; the PackedTrainer itself logs finite ones alone

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the model's matrix products run in, under the Trainer's autocast."""
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    def shared_problems(self, metrics: Sequence[str]) -> list[str]:
        """Problems with the settings, beyond those that TrainingArguments finds.

        Args:
            metrics: names of the metrics that can choose the best checkpoint, without `eval_`.

        Returns:
            One sentence for each problem; an empty list if the settings are possible.
        """
        return [
            *self._unused_settings(),
            *self._impossible_values(metrics),
            *self._reporting_problems(),
            *self._hardware_problems(),
        ]

    def _unused_settings(self) -> list[str]:
        """Settings that have no effect here, but differ from the default of TrainingArguments: the user set them."""
        return [
            f"{name}: {advice}"
            for name, advice in _UNUSED.items()
            if getattr(self, name) != getattr(TrainingArguments, name)
        ]

    def _impossible_values(self, metrics: Sequence[str]) -> list[str]:
        """Values outside their range, or that contradict each other."""
        metric = str(self.metric_for_best_model).removeprefix("eval_")
        checks = [
            (
                self.tokens_per_batch >= self.max_seq_length,
                f"tokens_per_batch: {self.tokens_per_batch} is less than max_seq_length {self.max_seq_length}; "
                "a batch must hold the longest text",
            ),
            (
                self.max_seq_length >= _SHORTEST_MAX_SEQ_LENGTH,
                f"max_seq_length: {self.max_seq_length}, expected at least {_SHORTEST_MAX_SEQ_LENGTH}",
            ),
            (
                self.num_train_epochs > 0 or self.max_steps > 0,
                f"num_train_epochs: {self.num_train_epochs}, expected more than 0",
            ),
            (
                self.gradient_accumulation_steps >= 1,
                f"gradient_accumulation_steps: {self.gradient_accumulation_steps}, expected at least 1",
            ),
            (self.learning_rate > 0, f"learning_rate: {self.learning_rate}, expected more than 0"),
            (
                metric in metrics or not self.load_best_model_at_end,
                f"metric_for_best_model: {metric}, expected {' or '.join(metrics)}",
            ),
        ]
        return [problem for is_possible, problem in checks if not is_possible]

    def _reporting_problems(self) -> list[str]:
        """Why a tool in `report_to` cannot be used: transformers does not know it, or it is not installed."""
        try:
            for callback in get_reporting_integration_callbacks(self.report_to):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            return [f"report_to: {error}"]
        return []

    def _hardware_problems(self) -> list[str]:
        """Settings that this machine cannot run."""
        found = []
        try:
            choose_attn_implementation(self.attn_implementation, self.device, self.compute_dtype)
        except UserError as error:
            found.append(str(error))
        if self.torch_compile and self.device.type == "cuda" and not can_compile(self.device):
            found.append("torch_compile: needs triton, which is not installed or does not know this GPU; leave it out")
        if self.n_gpu > 1:
            found.append(
                f"one process sees {self.n_gpu} GPUs, expected one GPU for each process; use torchrun "
                f"--nproc_per_node {self.n_gpu}, or CUDA_VISIBLE_DEVICES=0"
            )
        return found


def _fill_in_hardware(args: TrainingArguments) -> None:
    """Choose the device, and bf16 and compilation if the hardware gains by them and nothing else was asked."""
    args.use_cpu = args.use_cpu or best_device().type == "cpu"
    device = torch.device("cpu") if args.use_cpu else best_device()
    if args.bf16 is None:
        args.bf16 = not args.fp16 and has_bf16(device)
    if args.torch_compile is None:
        args.torch_compile = can_compile(device) or args.torch_compile_mode is not None
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every parameter gets a gradient, so DDP need not search
