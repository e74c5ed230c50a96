"""The settings of phase 4."""

from dataclasses import dataclass, field

from modernbert_small.run.places import overlap
from modernbert_small.settings.training import ATTN_IMPLEMENTATIONS, attention_problems


@dataclass
class DistilDatasetArguments:
    """Settings of phase 4."""

    teacher_name_or_path: str = field(
        default="Alibaba-NLP/gte-modernbert-base",
        metadata={"help": "embedding model whose vectors become the labels, hub id or folder"},
    )
    train_file: str = field(default="data/corpus", metadata={"help": "phase 1's corpus"})
    output_dir: str = field(default="data/distil", metadata={"help": "folder to write: sentences with labels"})
    teacher_output_dir: str = field(
        default="checkpoints/teacher", metadata={"help": "folder to write: the teacher with its projection"}
    )
    embedding_dim: int = field(default=384, metadata={"help": "width of the labels, the student's hidden_size"})
    eval_datasets: list[str] = field(
        default_factory=list,
        metadata={"help": "evaluation sets on which to measure what the projection costs, as in phase 5"},
    )
    pca_sample_size: int = field(default=100_000, metadata={"help": "texts the projection is fitted on"})
    tokens_per_batch: int = field(default=65_536, metadata={"help": "tokens in a batch, padding included"})
    attn_implementation: str = field(
        default="auto",
        metadata={"help": f"for a ModernBERT teacher: {', '.join(ATTN_IMPLEMENTATIONS)}; auto takes what runs best"},
    )
    torch_compile: bool | None = field(
        default=None, metadata={"help": "compile the layers of a ModernBERT teacher; by default on CUDA"}
    )
    seed: int = field(default=42, metadata={"help": "of the sample"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that the teacher's repository brings"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier result of other settings"})

    def problems(self) -> list[str]:
        """What is wrong with these settings, before anything is loaded."""
        found = []
        if self.embedding_dim < 2:
            found.append(f"embedding_dim: {self.embedding_dim}, expected at least 2")
        if self.pca_sample_size < self.embedding_dim:
            found.append(
                f"pca_sample_size: {self.pca_sample_size} texts are too few for {self.embedding_dim} directions"
            )
        if overlap(self.output_dir, self.teacher_output_dir):
            found.append(
                f"teacher_output_dir: {self.teacher_output_dir} overlaps with output_dir {self.output_dir}; name a "
                "folder of its own"
            )
        if self.tokens_per_batch < 1:
            found.append(f"tokens_per_batch: {self.tokens_per_batch}, expected at least 1")
        return found + attention_problems(self.attn_implementation)
