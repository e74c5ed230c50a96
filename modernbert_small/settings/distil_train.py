"""The settings of phase 5."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from modernbert_small.settings.training import TrainingSettings


@dataclass
class DistilTrainSettings(TrainingSettings):
    """Settings of phase 5."""

    METRICS: ClassVar[tuple[str, ...]] = ("similarity", "loss")

    model_name_or_path: str = field(default="checkpoints/mlm", metadata={"help": "phase 3's student"})
    teacher_name_or_path: str = field(
        default="checkpoints/teacher",
        metadata={"help": "phase 4's reduced teacher, with which the student is compared"},
    )
    train_file: str = field(default="data/distil", metadata={"help": "phase 4's labels"})
    output_dir: str = field(default="checkpoints/ModernBERT-small-v2", metadata={"help": "folder to write"})
    model_name: str | None = field(
        default=None, metadata={"help": "what card and report call the model; by default the folder's name"}
    )
    eval_datasets: list[str] = field(
        default_factory=lambda: ["msmarco", "hotpotqa"],
        metadata={"help": "sets to report on: NanoBEIR names, folders, stsb, files of queries or pairs, heldout"},
    )
    tokens_per_batch: int = field(
        default=16_384,
        metadata={
            "help": "tokens in a batch, which all processes share: max_seq_length or more for each; small batches "
            "distil best (LEAF)"
        },
    )
    num_train_epochs: float = field(default=2.0, metadata={"help": "passes over the labels"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "keep the best checkpoint, not the last"})
    metric_for_best_model: str | None = field(
        default="eval_similarity",
        metadata={"help": "eval_similarity, the held-out cosine to the labels, or eval_loss; never a reported set"},
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "whether a greater metric_for_best_model is better; by default not for a loss"}
    )
    pooling: Literal["auto", "cls", "mean"] = field(
        default="auto",
        metadata={
            "help": "how the student's vector is made of its tokens' states; auto: as its first weights pool, or mean"
        },
    )
    start: Literal["rotation", "static"] = field(
        default="rotation",
        metadata={
            "help": "before training, rotation turns the student to the labels' axes, if it is nearer to them then; "
            "static makes it the best static model of the labels, if phase 3 has not trained it"
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that the teacher's folder contains"})
