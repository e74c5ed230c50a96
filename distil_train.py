"""Phase 5: teach the small model the teacher's embeddings.

In:   checkpoints/mlm (phase 3), data/distil and checkpoints/teacher (phase 4).
Out:  checkpoints/ModernBERT-small-v2, which SentenceTransformer(folder) loads, with a model card and a report.

    python distil_train.py                                                      # one CUDA GPU
    torchrun --nproc_per_node 4 distil_train.py                                 # four
    python distil_train.py --tokens_per_batch 4096 --eval_datasets <folder>     # a laptop without the hub

The student is the encoder, mean pooling and Normalize; the loss is the mean squared error to the labels.
Held-out similarity and NanoBEIR are watched, the best checkpoint by held-out similarity is kept, and student
and teacher are compared at the end. --push_to_hub uploads the finished folder, once, also one that an earlier run
finished.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import SequentialEvaluator
from sentence_transformers.sentence_transformer.losses import MSELoss

from modernbert_small.distil.trainer import DistillationDataset, DistillationTrainer, align, load_labels
from modernbert_small.evaluation.account import account, format_account, is_reduced_teacher
from modernbert_small.evaluation.overlap import texts_in_training
from modernbert_small.evaluation.sets import PairSet, RetrievalSet, evaluator, load_evaluation_sets
from modernbert_small.packed.attention import ATTN_IMPLEMENTATIONS, use_packed_attention
from modernbert_small.packed.tokens import tokenize_split
from modernbert_small.packed.trainer import last_evaluation, require_context, resolve_hardware, train, training_problems
from modernbert_small.report import REPORT_FILE, write_report
from modernbert_small.reporting.card import write_model_card
from modernbert_small.run.artefacts import RUN_FILE, begin, read_run
from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import prepare_upload
from modernbert_small.run.loading import load_mean_pooled, load_sentence_transformer, require_finite
from modernbert_small.run.processes import first_process_first, rank, world_size
from modernbert_small.run.script import run_script
from modernbert_small.run.settings import parse_settings
from modernbert_small.run.shards import check_splits, split_files

logger = logging.getLogger(__name__)


@dataclass
class DistilTrainArguments(SentenceTransformerTrainingArguments):
    """Settings of phase 5; the rest are sentence-transformers' and transformers' training arguments."""

    model_name_or_path: str = field(default="checkpoints/mlm", metadata={"help": "phase 3's student"})
    teacher_name_or_path: str = field(
        default="checkpoints/teacher", metadata={"help": "phase 4's reduced teacher, compared with at the end"}
    )
    train_file: str = field(default="data/distil", metadata={"help": "phase 4's labels"})
    output_dir: str = field(default="checkpoints/ModernBERT-small-v2", metadata={"help": "folder to write"})
    eval_datasets: list[str] = field(
        default_factory=lambda: ["msmarco", "hotpotqa"],
        metadata={"help": "sets to report: NanoBEIR names, folders laid out like it, stsb, files of pairs"},
    )
    max_seq_length: int = field(default=1024, metadata={"help": "longest text in tokens; longer ones are cut"})
    tokens_per_batch: int = field(
        default=16_384, metadata={"help": "tokens in a batch on each device; small batches distil best (LEAF)"}
    )
    attn_implementation: str = field(
        default="auto", metadata={"help": f"{', '.join(ATTN_IMPLEMENTATIONS)}; auto takes what runs best here"}
    )
    num_train_epochs: float = field(default=2.0, metadata={"help": "passes over the labels"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak; ModernBERT-family encoders want high rates"})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "any of transformers' schedules"})
    warmup_steps: float = field(default=0.05, metadata={"help": "steps, or below 1 a share of all"})
    weight_decay: float = field(default=0.01, metadata={"help": "of weights; not of biases and norms"})
    bf16: bool | None = field(default=None, metadata={"help": "bf16 autocast; by default where the hardware has it"})
    logging_steps: float = field(default=50, metadata={"help": "steps between log lines"})
    eval_strategy: str = field(default="steps", metadata={"help": "no, steps or epoch"})
    eval_steps: float | None = field(default=1000, metadata={"help": "steps between evaluations"})
    save_steps: float = field(default=1000, metadata={"help": "steps between checkpoints; a killed run resumes there"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep, the best among them"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "keep the best checkpoint, not the last"})
    metric_for_best_model: str | None = field(
        default="eval_similarity", metadata={"help": "held-out cosine to the labels; reported sets are not chosen on"}
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "of metric_for_best_model; by default unless it is a loss"}
    )
    report_to: str | None = field(default="tensorboard", metadata={"help": "transformers' integrations"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that the teacher's folder brings"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier result of other settings"})

    def __post_init__(self) -> None:
        """Settle what depends on the hardware, then let TrainingArguments check itself."""
        resolve_hardware(self)
        super().__post_init__()

    def problems(self) -> list[str]:
        """What is wrong with these settings, before anything is loaded."""
        return training_problems(self, ("similarity", "loss"))


def load_student(args: DistilTrainArguments, teacher: SentenceTransformer) -> SentenceTransformer:
    """The student with packed attention, as wide as the teacher."""
    flag = "--model_name_or_path"
    student = load_mean_pooled(flag, args.model_name_or_path, args.max_seq_length)
    encoder = student[0].auto_model
    if encoder.config.model_type != "modernbert":
        raise UserError(f"{flag} {args.model_name_or_path}: a {encoder.config.model_type}, expected a ModernBERT")
    require_context(args.max_seq_length, encoder.config)
    if student.get_embedding_dimension() != teacher.get_embedding_dimension():
        raise UserError(
            f"{flag} {args.model_name_or_path}: {student.get_embedding_dimension()} wide, but the teacher's vectors "
            f"are {teacher.get_embedding_dimension()}; expected phase 4's reduced teacher, made with --embedding_dim "
            f"{student.get_embedding_dimension()}"
        )
    require_finite(student, f"{flag} {args.model_name_or_path}")
    use_packed_attention(encoder, args.attn_implementation, args.device)
    return student


def check_teacher(args: DistilTrainArguments, teacher: dict[str, str]) -> None:
    """Refuse a reduced teacher that did not make the labels, as far as their record says.

    Args:
        args: the settings.
        teacher: as this run's record describes it; a hub id has no hash.
    """
    made_by = read_run(args.train_file).get("reduced_teacher") if Path(args.train_file, RUN_FILE).exists() else None
    if made_by and teacher.get("hash", made_by) != made_by:
        raise UserError(
            f"--teacher_name_or_path {args.teacher_name_or_path}: not the reduced teacher that made the labels in "
            f"{args.train_file}; expected phase 4's --teacher_output_dir of the same run; make both "
            "again with create_distil_dataset.py"
        )


def warn_of_reported_texts(
    args: DistilTrainArguments, retrieval_sets: list[RetrievalSet], pair_sets: list[PairSet]
) -> dict[str, int]:
    """Say which sets are reported whose queries are training texts; returns how many by set."""
    overlap = texts_in_training(split_files(args.train_file, "train"), "sentence", retrieval_sets, pair_sets)
    for name, count in overlap.items():
        logger.warning(
            "%s training texts equal a query of %s, so its score will say more than is true; keep them out with "
            "--eval_datasets of phase 1",
            f"{count:,}",
            name,
        )
    return overlap


def load_data(args: DistilTrainArguments, student: SentenceTransformer, split: str) -> DistillationDataset:
    """A split's sentences, tokenised, with their labels."""
    labels = load_labels(args.train_file, split)
    if labels.shape[1] != student.get_embedding_dimension():
        raise UserError(
            f"--train_file {args.train_file}: labels are {labels.shape[1]} wide, the student "
            f"{student.get_embedding_dimension()}; make them again with create_distil_dataset.py"
        )
    store = tokenize_split(args.train_file, split, "sentence", student.tokenizer, args.max_seq_length)
    logger.info("%s: %s rows, %s tokens", split, f"{len(store):,}", f"{store.offsets[-1]:,}")
    return DistillationDataset(store, labels)


def new_trainer(
    args: DistilTrainArguments,
    student: SentenceTransformer,
    train_data: DistillationDataset,
    heldout: DistillationDataset,
    datasets: list[RetrievalSet],
) -> DistillationTrainer:
    """Sentence-transformers' trainer with MSE, watched on held-out labels and the retrieval sets."""
    return DistillationTrainer(
        model=student,
        args=args,
        train_dataset=train_data,
        eval_dataset=heldout,
        loss=MSELoss(student),
        evaluator=SequentialEvaluator([evaluator(dataset) for dataset in datasets]) if datasets else None,
    )


def save(args: DistilTrainArguments, student: SentenceTransformer, folder: Path, record: dict[str, Any]) -> None:
    """Write the final model and its card."""
    student.save_pretrained(str(folder), create_model_card=False)
    write_model_card(folder, args, record, student.get_embedding_dimension())


def main() -> None:
    """Student, labels and teacher in, embedding model out."""
    args = parse_settings(DistilTrainArguments, "distil_train", __doc__)
    output_dir = args.output_dir
    inputs = {"model": args.model_name_or_path, "teacher": args.teacher_name_or_path, "labels": args.train_file}
    run = begin("distil_train", output_dir, args.to_dict() | {"processes": world_size()}, inputs, args.overwrite)
    if run is None:
        if rank() == 0 and not (Path(output_dir) / REPORT_FILE).exists():  # killed between the model and its report
            write_report(output_dir)
        prepare_upload(args)(output_dir)
        return
    check_splits(args.train_file)
    check_teacher(args, run.record["inputs"]["teacher"])
    teacher = load_sentence_transformer(
        "--teacher_name_or_path", args.teacher_name_or_path, trust_remote_code=args.trust_remote_code
    )
    student = load_student(args, teacher)
    retrieval_sets, pair_sets = load_evaluation_sets("--eval_datasets", args.eval_datasets)
    overlap = warn_of_reported_texts(args, retrieval_sets, pair_sets)
    upload = prepare_upload(args)
    run.start()
    args.output_dir = str(run.folder)
    with first_process_first():
        train_data, heldout = (load_data(args, student, split) for split in ("train", "validation"))

    similarity = align(student, train_data, args.tokens_per_batch)
    logger.info("turned to the teacher's axes: cosine to the labels %(before).3f -> %(after).3f", similarity)

    trainer = new_trainer(args, student, train_data, heldout, retrieval_sets)
    measurements = train(trainer, run.folder, student[0].auto_model.config)
    trainer.evaluator = None  # the sets are compared next, with the teacher beside
    heldout_metrics = last_evaluation(trainer)
    require_finite(student, "the trained student")
    if rank() > 0:
        return
    reduced = is_reduced_teacher(args.teacher_name_or_path)
    comparison = account(student, teacher, reduced, retrieval_sets, pair_sets)
    measurements |= {
        "alignment_similarity": similarity,
        "heldout_similarity": heldout_metrics["eval_similarity"],
        "account": comparison,
        "rows": {"train": len(train_data), "validation": len(heldout)},
        "truncated_rows": train_data.store.truncated,
        "reported_texts_in_training": overlap,
    }
    save(args, student, run.folder, measurements)
    run.finish(measurements)
    report = write_report(output_dir)
    print(
        f"\nheld-out cosine to the labels: {heldout_metrics['eval_similarity']:.4f}\n\n{format_account(comparison)}\n"
    )
    upload(output_dir)
    logger.info('wrote %s; look at %s; next, in Python: SentenceTransformer("%s")', output_dir, report, output_dir)


if __name__ == "__main__":
    run_script(main)
