"""The settings that phases 3 and 5 share: transformers' TrainingArguments that this project sets or checks.

`packed.arguments` joins them with all other TrainingArguments, whose import takes seconds.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

ATTN_IMPLEMENTATIONS = ("auto", "varlen", "packed_sdpa", "flash_attention_2")
# The Trainer has these settings, but packed batches do not use them.
UNUSED = {
    "per_device_train_batch_size": "batches are counted in tokens here; use tokens_per_batch",
    "per_device_eval_batch_size": "batches are counted in tokens here; use tokens_per_batch",
    "resume_from_checkpoint": "a killed run goes on by itself; leave this setting out",
    "torch_compile_backend": "the layers are compiled by inductor; leave this setting out",
    "save_only_model": "a checkpoint without the state of the optimiser cannot be resumed from; leave this setting out",
}
_SHORTEST_MAX_SEQ_LENGTH = 8


def attention_problems(requested: str) -> list[str]:
    """What is wrong with a setting of attn_implementation on any machine."""
    if requested in ATTN_IMPLEMENTATIONS:
        return []
    return [f"attn_implementation: {requested}, expected {', '.join(ATTN_IMPLEMENTATIONS)}"]


@dataclass
class TrainingSettings:
    """Settings of phases 3 and 5. Each phase adds its paths, and sets the defaults in which it differs."""

    METRICS: ClassVar[tuple[str, ...]] = ("loss",)  # what can choose the best checkpoint, without `eval_`

    max_seq_length: int = field(default=1024, metadata={"help": "longest text in tokens; longer texts are cut"})
    tokens_per_batch: int = field(
        default=65_536,
        metadata={"help": "tokens in a batch, which all processes share: max_seq_length or more for each"},
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "batches in a step; more of them where a larger batch does not fit into memory"}
    )
    attn_implementation: str = field(
        default="auto",
        metadata={"help": f"one of {', '.join(ATTN_IMPLEMENTATIONS)}; auto takes the fastest that can run"},
    )
    max_steps: int = field(default=-1, metadata={"help": "steps to train for; -1: as many as num_train_epochs needs"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the texts"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak; ModernBERT-family encoders want high rates"})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "any of transformers' schedules"})
    warmup_steps: float = field(default=0.05, metadata={"help": "number of steps, or below 1 a share of all steps"})
    weight_decay: float = field(default=0.01, metadata={"help": "decay of weights; biases and norms have none"})
    torch_compile: bool | None = field(
        default=None, metadata={"help": "compile the model's layers; by default on CUDA"}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bf16 autocast; by default it is on where the hardware computes in bf16"}
    )
    logging_steps: float = field(default=50, metadata={"help": "steps between log lines"})
    eval_strategy: Literal["no", "steps", "epoch"] = field(default="steps", metadata={"help": "when to evaluate"})
    eval_steps: float | None = field(
        default=1000, metadata={"help": "steps between evaluations, or below 1 a share of all steps"}
    )
    save_steps: float = field(
        default=1000, metadata={"help": "steps between checkpoints; a killed run resumes at the last one"}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "checkpoints to keep; the best one so far is among them"}
    )
    load_best_model_at_end: bool = field(default=False, metadata={"help": "keep the best checkpoint, not the last"})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "what the best checkpoint is best in; eval_loss if none is named"}
    )
    report_to: str | None = field(
        default="tensorboard", metadata={"help": "tools that receive the metrics: transformers' integrations, or none"}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "replace a result that was made with other settings or inputs"}
    )

    def problems(self) -> list[str]:
        """Values outside their range, or that contradict each other, on any machine; a sentence for each."""
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
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
                metric in self.METRICS or not self.load_best_model_at_end,
                f"metric_for_best_model: {metric}, expected {' or '.join(self.METRICS)}",
            ),
        ]
        problems = [problem for is_possible, problem in checks if not is_possible]
        return problems + attention_problems(self.attn_implementation)
