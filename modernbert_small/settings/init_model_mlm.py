"""The settings of phase 2."""

from dataclasses import dataclass, field
from typing import Literal

Init = Literal["guide", "random", "embeddings", "all_layers"]


@dataclass
class InitModelArguments:
    """Settings of phase 2. Sizes are ModernBERT-small-v2's: 12 layers x 384."""

    teacher_name_or_path: str = field(
        default="answerdotai/ModernBERT-base",
        metadata={"help": "large encoder, hub id or folder; of one that is no ModernBERT only the embeddings transfer"},
    )
    output_dir: str = field(default="checkpoints/init", metadata={"help": "folder to write"})
    hidden_size: int = field(default=384, metadata={"help": "width of the student"})
    num_hidden_layers: int = field(default=12, metadata={"help": "layers of the student"})
    num_attention_heads: int = field(
        default=6,
        metadata={
            "help": "heads of the student; hidden_size / heads must be the teacher's head_dim with guide and all_layers"
        },
    )
    intermediate_size: int = field(
        default=768, metadata={"help": "GeGLU neurons of each layer; the defaults make 37 M parameters in all"}
    )
    max_position_embeddings: int = field(default=1024, metadata={"help": "longest input, in tokens"})
    init: Init = field(
        default="guide",
        metadata={
            "help": "what comes from the teacher. guide: embeddings, first layer, norms and head; embeddings: the "
            "embeddings alone; random: nothing; all_layers: every layer, fitted on a sample of train_file"
        },
    )
    mlm_head_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "for --init all_layers from an embedding model: a ModernBERT of the same vocabulary, whose head "
            "the student gets, so that phase 3 can train it; without one, phase 5 takes the student as it is"
        },
    )
    train_file: str = field(
        default="data/corpus",
        metadata={"help": "corpus for all_layers' sample and the report's losses; other --init values work without it"},
    )
    seed: int = field(default=42, metadata={"help": "seed of the layers that start at random, and of the sample"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that the teacher's repository brings"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier result of other settings"})

    def problems(self) -> list[str]:
        """What is wrong with these settings; what the teacher must fit is checked later."""
        found = [
            f"{name}: {getattr(self, name)}, expected at least 1"
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
            if getattr(self, name) < 1
        ]
        if self.mlm_head_name_or_path and self.init != "all_layers":
            found.append(f"mlm_head_name_or_path: is for --init all_layers alone, found --init {self.init}")
        if self.max_position_embeddings < 8:
            found.append(f"max_position_embeddings: {self.max_position_embeddings}, expected at least 8")
        if not found and self.hidden_size % (2 * self.num_attention_heads):
            found.append(
                f"num_attention_heads: hidden_size {self.hidden_size} / {self.num_attention_heads} heads is not an "
                "even whole number, which RoPE needs; ModernBERT's heads are 64 wide, so use "
                f"{max(1, self.hidden_size // 64)}"
            )
        return found
