"""Phase 5: teach the small model the teacher's embeddings.

In:   checkpoints/mlm (phase 3), data/distil and checkpoints/teacher (phase 4).
Out:  checkpoints/ModernBERT-small-v2, which SentenceTransformer(folder) loads, with a model card and a report;
      checkpoints/ModernBERT-small-v2.training: the Trainer's checkpoint-*, and logs.

    python distil_train.py                                                      # one CUDA GPU
    torchrun --nproc_per_node 4 distil_train.py                                 # four
    python distil_train.py --tokens_per_batch 4096 --eval_datasets <folder>     # a laptop without the hub

The student is the encoder with pooling and Normalize, and the loss is the squared distance to the labels. During
training the held-out similarity and nDCG@10 on the sets of --eval_datasets are measured, and the checkpoint of the best
held-out similarity is kept. At the end, student and teacher are compared. --push_to_hub uploads the finished folder
once; it also uploads a folder that an earlier run finished.
"""

from modernbert_small.settings.parse import check_command_line, parse_settings, require_inputs

if __name__ == "__main__":
    check_command_line("distil_train", __doc__)  # before the imports below, which take seconds

import json
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MSELoss

from modernbert_small.distil.alignment import align
from modernbert_small.distil.labels import DistillationDataset, load_labels
from modernbert_small.distil.static import start_static
from modernbert_small.distil.trainer import DistillationTrainer
from modernbert_small.evaluation.account import account_after_training
from modernbert_small.evaluation.embedder import load_vectors
from modernbert_small.evaluation.overlap import warn_of_overlap
from modernbert_small.evaluation.own_sets import set_inputs, set_locations
from modernbert_small.evaluation.sets import RetrievalSet, load_evaluation_sets
from modernbert_small.evaluation.systems import is_reduced_teacher
from modernbert_small.evaluation.tables import format_account
from modernbert_small.evaluation.watched import PackedEvaluator
from modernbert_small.packed.arguments import PackedTrainingArguments
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.compiling import compile_layers
from modernbert_small.packed.tokens import tokenize_shares, tokenize_split
from modernbert_small.packed.trainer import (
    compare_held_out_losses,
    last_evaluation,
    note_if_worse,
    require_context,
    train,
    worse_notice,
)
from modernbert_small.plan import note_without_gpu
from modernbert_small.report import REPORT_FILE, write_report
from modernbert_small.reporting.card import write_model_card
from modernbert_small.run.artefacts import Run, begin, move_leftovers
from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import prepare_upload
from modernbert_small.run.loading import load_pooled, load_sentence_transformer, require_finite
from modernbert_small.run.processes import first_process_first, rank, world_size
from modernbert_small.run.records import RUN_FILE, read_run, temporary_files
from modernbert_small.run.saving import save_embedding_model
from modernbert_small.run.script import run_script
from modernbert_small.run.shards import check_splits
from modernbert_small.settings.distil_train import DistilTrainSettings

logger = logging.getLogger(__name__)

TRAINING_FILES = ("checkpoint-*", "runs", "eval")  # which only training needs


@dataclass
class DistilTrainArguments(DistilTrainSettings, PackedTrainingArguments, SentenceTransformerTrainingArguments):
    """Settings of phase 5: those of modernbert_small/settings/distil_train.py, and sentence-transformers'."""


def load_student(args: DistilTrainArguments, teacher: SentenceTransformer) -> SentenceTransformer:
    """The student with packed attention, as wide as the teacher."""
    flag = "--model_name_or_path"
    pooling = None if args.pooling == "auto" else args.pooling
    student = load_pooled(flag, args.model_name_or_path, args.max_seq_length, str(args.device), pooling)
    encoder = student[0].auto_model
    if encoder.config.model_type != "modernbert":
        raise UserError(
            f"{flag} {args.model_name_or_path}: the model is a {encoder.config.model_type}, expected a ModernBERT; "
            "make one with mlm/init_model_mlm.py"
        )
    require_context(args.max_seq_length, encoder.config)
    if student.get_embedding_dimension() != teacher.get_embedding_dimension():
        raise UserError(
            f"{flag} {args.model_name_or_path}: the student is {student.get_embedding_dimension()} wide, but the "
            f"teacher's vectors are {teacher.get_embedding_dimension()}; expected phase 4's reduced teacher, made with "
            f"--embedding_dim {student.get_embedding_dimension()}"
        )
    require_finite(student, f"{flag} {args.model_name_or_path}")
    use_packed_attention(encoder, args.attn_implementation, args.device, args.compute_dtype)
    if args.torch_compile:
        compile_layers(encoder, args.torch_compile_mode)
    return student


def check_teacher(args: DistilTrainArguments, teacher: dict[str, str]) -> None:
    """Refuse a reduced teacher that did not make the labels.

    This is not checked for labels without a record of their teacher, nor for a teacher from the hub.

    Args:
        args: the settings.
        teacher: the teacher as this run's record describes it; one from the hub has no `hash`.
    """
    if not Path(args.train_file, RUN_FILE).exists() or "hash" not in teacher:
        return
    made_by = read_run(args.train_file).get("reduced_teacher")
    if made_by is not None and made_by != teacher["hash"]:
        raise UserError(
            f"--teacher_name_or_path {args.teacher_name_or_path}: not the reduced teacher that made the labels in "
            f"{args.train_file}; expected phase 4's --teacher_output_dir of the same run; make both "
            "again with create_distil_dataset.py"
        )


def load_data(args: DistilTrainArguments, student: SentenceTransformer, split: str) -> DistillationDataset:
    """The texts of one split, tokenised, with their labels."""
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
    """The trainer with its loss. DistillationTrainer computes the held-out cosine from it, so change both."""
    watched = (
        PackedEvaluator(datasets, student.tokenizer, args.max_seq_length, args.tokens_per_process) if datasets else None
    )
    return DistillationTrainer(
        model=student,
        args=args,
        train_dataset=train_data,
        eval_dataset=heldout,
        loss=MSELoss(student),
        evaluator=watched,
    )


def distil(
    args: DistilTrainArguments,
    run: Run,
    student: SentenceTransformer,
    teacher: SentenceTransformer,
    retrieval_sets: list[RetrievalSet],
) -> dict[str, Any]:
    """Start and train the student, in the run's folder; returns the measurements for run.json."""
    tokenize_shares(args.train_file, "train", "sentence", student.tokenizer, args.max_seq_length)
    with first_process_first():
        train_data = load_data(args, student, "train")
        heldout = load_data(args, student, "validation")
    if args.start == "static":
        similarity = start_static(student, teacher, train_data, heldout, args.tokens_per_process)
    else:
        similarity = align(student, train_data, heldout, args.tokens_per_process)

    trainer = new_trainer(args, student, train_data, heldout, retrieval_sets)
    measurements = train(trainer, run, student[0].auto_model.config)
    trainer.evaluator = None  # the retrieval sets are measured later, together with the teacher
    heldout_metrics = last_evaluation(trainer)
    require_finite(student, "the trained student")
    ended = heldout_metrics["eval_similarity"]
    measurements |= compare_held_out_losses(measurements["history"], heldout_metrics)
    measurements |= note_if_worse("held-out cosine to the labels", max(similarity.values()), ended)
    return measurements | {
        "alignment_similarity": similarity,
        "heldout_similarity": ended,
        "rows": {"train": len(train_data), "validation": len(heldout)},
        "truncated_rows": train_data.store.truncated,
    }


def write_report_and_upload(args: DistilTrainArguments) -> None:
    """For a model that is finished already: do what a kill right before its end has left, and upload."""
    if rank() == 0:
        move_leftovers("distil_train", args.output_dir, TRAINING_FILES)
    if rank() == 0 and not Path(args.output_dir, REPORT_FILE).exists():
        for path in temporary_files(Path(args.output_dir), REPORT_FILE):
            path.unlink()
        write_report(args.output_dir)
    upload = prepare_upload(args)
    upload(args.output_dir)


def main() -> None:
    """Check and load teacher and student, train, compare both, write model, card and report, upload if asked to."""
    args = parse_settings(DistilTrainArguments, "distil_train", __doc__)
    require_inputs("distil_train", args)
    output_dir = args.output_dir
    inputs = {"model": args.model_name_or_path, "teacher": args.teacher_name_or_path, "labels": args.train_file}
    set_paths = set_locations(args.eval_datasets, args.train_file)
    inputs |= set_inputs(set_paths)
    run = begin("distil_train", output_dir, args.to_dict() | {"processes": world_size()}, inputs, args.overwrite)
    if run is None:
        write_report_and_upload(args)
        return
    note_without_gpu("distil_train", vars(args))
    check_splits(args.train_file, ["sentence", "label"])
    check_teacher(args, run.record["inputs"]["teacher"])
    teacher = load_sentence_transformer(
        "--teacher_name_or_path", args.teacher_name_or_path, str(args.device), args.trust_remote_code
    )
    student = load_student(args, teacher)
    sets = load_evaluation_sets("--eval_datasets", list(set_paths.values()))
    overlap = warn_of_overlap(args.train_file, *sets)
    upload = prepare_upload(args)
    run.aside = TRAINING_FILES
    run.start()
    args.output_dir = str(run.folder)  # the Trainer writes its checkpoints there
    measurements = distil(args, run, student, teacher, sets[0])
    if rank() > 0:
        return
    save_embedding_model(student, run.folder)
    is_reduced = is_reduced_teacher(args.teacher_name_or_path)
    again = ["python", "-m", "modernbert_small.evaluate", output_dir, args.teacher_name_or_path, "--datasets"]
    again += set_paths.values()
    known = load_vectors(args.train_file, run.record["inputs"]["teacher"].get("hash"))
    comparison = account_after_training(student, teacher, is_reduced, *sets, shlex.join(again), known)
    measurements |= {"account": comparison, "reported_texts_in_training": overlap}
    write_model_card(run.folder, args, measurements, student.get_embedding_dimension())
    run.finish(measurements)
    report = write_report(output_dir)
    print(
        f"\nheld-out cosine to the labels: {measurements['heldout_similarity']:.4f}\n\n{format_account(comparison)}\n"
    )
    upload(output_dir)
    done = f"wrote {output_dir}; look at {report}; next, in Python: SentenceTransformer({json.dumps(output_dir)})"
    logger.info("%s%s", worse_notice(measurements), done)


if __name__ == "__main__":
    run_script(main)
