"""The settings of phase 3."""

from dataclasses import dataclass, field

from modernbert_small.settings.training import TrainingSettings


@dataclass
class PreTrainSettings(TrainingSettings):
    """Settings of phase 3."""

    model_name_or_path: str = field(default="checkpoints/init", metadata={"help": "phase 2's student"})
    train_file: str = field(default="data/corpus", metadata={"help": "phase 1's corpus"})
    output_dir: str = field(default="checkpoints/mlm", metadata={"help": "folder to write"})
    mlm_probability: float = field(default=0.3, metadata={"help": "share of the tokens to mask (ModernBERT: 0.3)"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the corpus"})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's beta2 (ModernBERT: 0.98)"})

    def problems(self) -> list[str]:
        """What is wrong with these settings."""
        found = super().problems()
        if not 0 < self.mlm_probability < 1:
            found.append(f"mlm_probability: {self.mlm_probability}, expected a share between 0 and 1")
        return found
