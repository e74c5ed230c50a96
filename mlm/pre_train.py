"""Phase 3: teach the small model language, by masked language modelling on the corpus.

In:   checkpoints/init (phase 2), data/corpus (phase 1).
Out:  checkpoints/mlm, which ModernBertForMaskedLM.from_pretrained loads, with the Trainer's checkpoint-*.

    python mlm/pre_train.py                                        # one CUDA GPU
    torchrun --nproc_per_node 4 mlm/pre_train.py                   # four; tokens_per_batch is each one's
    python mlm/pre_train.py --tokens_per_batch 4096 --max_steps 200   # a laptop

30 % of the tokens are hidden, as ModernBERT does (https://arxiv.org/abs/2412.13663). Rows are packed, with
no padding, and logits exist at hidden tokens only. --push_to_hub uploads the finished folder, once, also one
that an earlier run finished.
"""

import logging
from dataclasses import dataclass, field

from transformers import ModernBertForMaskedLM, PreTrainedTokenizerBase, Trainer, TrainingArguments

from modernbert_small.evaluation.metrics import perplexity
from modernbert_small.packed.attention import ATTN_IMPLEMENTATIONS, use_packed_attention
from modernbert_small.packed.tokens import tokenize_split
from modernbert_small.packed.trainer import (
    PackedTrainerMixin,
    last_evaluation,
    require_context,
    resolve_hardware,
    train,
    training_problems,
)
from modernbert_small.pretrain.loss import masked_cross_entropy
from modernbert_small.pretrain.masking import MaskedLMDataset
from modernbert_small.run.artefacts import begin
from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import prepare_upload
from modernbert_small.run.loading import load_masked_lm, load_tokenizer, require_finite
from modernbert_small.run.processes import first_process_first, rank, world_size
from modernbert_small.run.script import next_command, run_script
from modernbert_small.run.settings import parse_settings
from modernbert_small.run.shards import check_splits

logger = logging.getLogger(__name__)


@dataclass
class PreTrainArguments(TrainingArguments):
    """Settings of phase 3; the rest are transformers' TrainingArguments."""

    model_name_or_path: str = field(default="checkpoints/init", metadata={"help": "phase 2's student"})
    train_file: str = field(default="data/corpus", metadata={"help": "phase 1's corpus"})
    output_dir: str = field(default="checkpoints/mlm", metadata={"help": "folder to write"})
    mlm_probability: float = field(default=0.3, metadata={"help": "share of the tokens to hide (ModernBERT: 0.3)"})
    max_seq_length: int = field(default=1024, metadata={"help": "longest text in tokens; longer ones are cut"})
    tokens_per_batch: int = field(
        default=65_536, metadata={"help": "tokens in a batch on each device; a full text's length at least"}
    )
    attn_implementation: str = field(
        default="auto", metadata={"help": f"{', '.join(ATTN_IMPLEMENTATIONS)}; auto takes what runs best here"}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the corpus"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak; ModernBERT-family encoders want high rates"})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "any of transformers' schedules"})
    warmup_steps: float = field(default=0.05, metadata={"help": "steps, or below 1 a share of all"})
    weight_decay: float = field(default=0.01, metadata={"help": "of weights; not of biases and norms"})
    adam_beta2: float = field(default=0.98, metadata={"help": "as ModernBERT"})
    bf16: bool | None = field(default=None, metadata={"help": "bf16 autocast; by default where the hardware has it"})
    logging_steps: float = field(default=50, metadata={"help": "steps between log lines"})
    eval_strategy: str = field(default="steps", metadata={"help": "no, steps or epoch"})
    eval_steps: float | None = field(default=1000, metadata={"help": "steps between held-out losses"})
    save_steps: float = field(
        default=1000, metadata={"help": "steps between checkpoints, which a killed run resumes from"}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    report_to: str | None = field(default="tensorboard", metadata={"help": "transformers' integrations"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier result of other settings"})

    def __post_init__(self) -> None:
        """Settle what depends on the hardware, then let TrainingArguments check itself."""
        resolve_hardware(self)
        super().__post_init__()

    def problems(self) -> list[str]:
        """What is wrong with these settings, before anything is loaded."""
        found = training_problems(self, ("loss",))
        if not 0 < self.mlm_probability < 1:
            found.append(f"mlm_probability: {self.mlm_probability}, expected a share between 0 and 1")
        return found


class MaskedLMTrainer(PackedTrainerMixin, Trainer):
    """transformers' Trainer on packed, masked batches."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer, with the perplexity beside a held-out loss."""
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        super().log(logs, start_time)


def load_student(args: PreTrainArguments) -> tuple[ModernBertForMaskedLM, PreTrainedTokenizerBase]:
    """The student with packed attention, and its tokenizer."""
    flag = "--model_name_or_path"
    tokenizer = load_tokenizer(flag, args.model_name_or_path)
    student = load_masked_lm(flag, args.model_name_or_path)
    if len(tokenizer) > student.config.vocab_size:
        raise UserError(
            f"{flag} {args.model_name_or_path}: the tokenizer has {len(tokenizer)} entries, the model's embeddings "
            f"{student.config.vocab_size}; expected a tokenizer that fits the model"
        )
    require_context(args.max_seq_length, student.config)
    require_finite(student, f"{flag} {args.model_name_or_path}")
    student.sparse_prediction = True  # logits where labels are, nowhere else
    student.loss_function = masked_cross_entropy
    use_packed_attention(student, args.attn_implementation, args.device)
    return student, tokenizer


def load_data(args: PreTrainArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[MaskedLMDataset, MaskedLMDataset]:
    """Training and held-out text, tokenised."""
    train_data, heldout = (
        MaskedLMDataset(
            tokenize_split(args.train_file, split, "text", tokenizer, args.max_seq_length),
            tokenizer,
            args.mlm_probability,
        )
        for split in ("train", "validation")
    )
    logger.info("%s training rows, %s tokens", f"{len(train_data):,}", f"{train_data.store.offsets[-1]:,}")
    return train_data, heldout


def main() -> None:
    """Student and corpus in, trained student out."""
    args = parse_settings(PreTrainArguments, "pre_train", __doc__)
    output_dir = args.output_dir
    inputs = {"model": args.model_name_or_path, "corpus": args.train_file}
    run = begin("pre_train", output_dir, args.to_dict() | {"processes": world_size()}, inputs, args.overwrite)
    if run is None:
        prepare_upload(args)(output_dir)
        return
    check_splits(args.train_file)
    student, tokenizer = load_student(args)
    upload = prepare_upload(args)
    run.start()
    args.output_dir = str(run.folder)
    with first_process_first():
        train_data, heldout = load_data(args, tokenizer)
    trainer = MaskedLMTrainer(
        model=student,
        args=args,
        train_dataset=train_data,
        eval_dataset=heldout,
        processing_class=tokenizer,
    )
    measurements = train(trainer, run.folder, student.config, args.mlm_probability)
    metrics = last_evaluation(trainer)
    require_finite(student, "the trained student")
    if rank() > 0:
        return

    student.save_pretrained(run.folder)
    tokenizer.save_pretrained(run.folder)
    run.finish(
        {
            **measurements,
            "heldout_mlm_loss": metrics["eval_loss"],
            "rows": {"train": len(train_data), "validation": len(heldout)},
            "tokens": {"train": int(train_data.store.offsets[-1]), "validation": int(heldout.store.offsets[-1])},
            "truncated_rows": train_data.store.truncated,
        }
    )
    upload(output_dir)
    logger.info(
        "wrote %s, held-out loss %.4f; next: %s",
        output_dir,
        metrics["eval_loss"],
        next_command("create_distil_dataset.py"),
    )


if __name__ == "__main__":
    run_script(main)
