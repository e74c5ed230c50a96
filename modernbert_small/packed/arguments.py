"""The settings of phases 3 and 5 with all of transformers' TrainingArguments, and what depends on the hardware."""

from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from modernbert_small.packed.attention import choose_attn_implementation
from modernbert_small.run.devices import best_device, can_compile, has_bf16
from modernbert_small.run.errors import UserError
from modernbert_small.settings.training import ATTN_IMPLEMENTATIONS, TrainingSettings


@dataclass
class PackedTrainingArguments(TrainingSettings, TrainingArguments):
    """TrainingArguments for packed batches."""

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

    @property
    def tokens_per_process(self) -> int:
        """This process's share of a batch, in tokens."""
        return self.tokens_per_batch // self.world_size

    def problems(self) -> list[str]:
        """What is wrong with the settings, beyond what TrainingArguments finds: on any machine, and on this one."""
        return [*super().problems(), *self._reporting_problems(), *self._hardware_problems()]

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
            if self.attn_implementation in ATTN_IMPLEMENTATIONS:
                choose_attn_implementation(self.attn_implementation, self.device, self.compute_dtype)
        except UserError as error:
            found.append(str(error))
        if self.torch_compile and self.device.type == "cuda" and not can_compile(self.device):
            found.append("torch_compile: needs triton, which is not installed or does not know this GPU; leave it out")
        size, share, longest = self.tokens_per_batch, self.tokens_per_process, self.max_seq_length
        if share < longest <= size:
            found.append(
                f"tokens_per_batch: {size} on {self.world_size} processes is {share} for each, less than "
                f"max_seq_length {longest}; use at most {size // longest} processes, or a larger batch, which changes "
                "the model"
            )
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
