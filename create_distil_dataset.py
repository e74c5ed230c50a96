"""Phase 4: label the corpus with a large embedding model, reduced to the student's width.

In:   data/corpus (phase 1), a SentenceTransformer as teacher.
Out:  data/distil: the corpus's rows as `sentence`, with `label`, a float16 unit vector;
      checkpoints/teacher: the teacher with its projection, whose `encode` gives the labels.

    python create_distil_dataset.py                                          # gte-modernbert-base, one CUDA GPU
    torchrun --nproc_per_node 4 create_distil_dataset.py                     # four
    python create_distil_dataset.py --teacher_name_or_path <folder> --tokens_per_batch 4096   # a CPU

The projection is fitted on a random sample of the corpus and added to the teacher as a Dense module. Then the rows
that are not in the sample are labelled in batches of similar length, shard by shard, so that a killed run goes on at
the first missing shard. Training on such labels follows LEAF (https://arxiv.org/abs/2509.12539).
"""

from modernbert_small.settings.parse import check_command_line, parse_settings, require_inputs

if __name__ == "__main__":
    check_command_line("create_distil_dataset", __doc__)  # before the imports below, which take seconds

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sentence_transformers import SentenceTransformer

from modernbert_small.evaluation.account import account
from modernbert_small.evaluation.embedder import KnownVectors, save_vectors
from modernbert_small.evaluation.own_sets import HELDOUT, set_inputs, set_locations
from modernbert_small.evaluation.sets import PairSet, RetrievalSet, load_evaluation_sets
from modernbert_small.evaluation.systems import is_reduced_teacher
from modernbert_small.evaluation.tables import format_account
from modernbert_small.label.labeller import Labeller
from modernbert_small.label.sample import Sample
from modernbert_small.label.shards import count_labels, label_split
from modernbert_small.label.teacher import embed_sample, reduce_teacher, with_projection
from modernbert_small.packed.attention import choose_attn_implementation
from modernbert_small.plan import note_without_gpu
from modernbert_small.reporting.card import write_teacher_card
from modernbert_small.run.artefacts import Run, begin
from modernbert_small.run.content import content_hash, describe_shards
from modernbert_small.run.devices import best_device, can_compile, compute_dtype, peak_memory_bytes
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_sentence_transformer, require_finite
from modernbert_small.run.processes import rank, wait_for_all
from modernbert_small.run.saving import save_embedding_model
from modernbert_small.run.script import next_command, run_script
from modernbert_small.run.shards import check_splits
from modernbert_small.settings.create_distil_dataset import DistilDatasetArguments

logger = logging.getLogger(__name__)

SAMPLE_FILE = "sample.npz"  # the sample's labels, kept in the output folder until it is finished


def load_teacher(args: DistilDatasetArguments) -> SentenceTransformer:
    """The embedding model whose vectors become labels, refused if they are narrower than the labels."""
    flag = "--teacher_name_or_path"
    teacher = load_sentence_transformer(flag, args.teacher_name_or_path, trust_remote_code=args.trust_remote_code)
    width = teacher.get_embedding_dimension()
    if width is None or width < args.embedding_dim:
        raise UserError(
            f"embedding_dim: {args.embedding_dim} is wider than the teacher's {width}; use at most {width}, or a wider "
            f"{flag}"
        )
    require_finite(teacher, f"{flag} {args.teacher_name_or_path}")
    return teacher


def new_labeller(teacher: SentenceTransformer, args: DistilDatasetArguments) -> Labeller:
    """The teacher on this process's device, ready to embed."""
    device = best_device()
    compiled = can_compile(device) if args.torch_compile is None else args.torch_compile
    return Labeller(teacher, device, args.tokens_per_batch, args.attn_implementation, compiled)


def begin_teacher(args: DistilDatasetArguments, inputs: dict[str, str]) -> Run | None:
    """The run that makes the reduced teacher, None if it is there already."""
    folder, flag = args.teacher_output_dir, "--teacher_output_dir"
    return begin("reduced_teacher", folder, asdict(args), inputs, args.overwrite, flag)


def make_or_load_reduced_teacher(
    teacher: SentenceTransformer, args: DistilDatasetArguments, inputs: dict[str, str], sample_file: Path
) -> SentenceTransformer:
    """Make the reduced teacher, or find it where an earlier run left it.

    If it has to be made, labels in the output folder are an earlier teacher's, and are removed.
    """
    run = begin_teacher(args, inputs)
    if run is not None:
        run.start()
        if rank() == 0:
            for shard in sample_file.parent.glob("*.parquet"):
                shard.unlink()
        save_reduced_teacher(run, teacher, args, sample_file)
    return load_sentence_transformer(
        "--teacher_output_dir", args.teacher_output_dir, trust_remote_code=args.trust_remote_code
    )


def restore_reduced_teacher(args: DistilDatasetArguments, inputs: dict[str, str]) -> None:
    """Make the reduced teacher of finished labels again, if it is not there."""
    run = begin_teacher(args, inputs)
    if run is None:
        return
    logger.info("the labels are finished, but their reduced teacher is not there: making it again")
    run.start()
    with TemporaryDirectory() as folder:
        save_reduced_teacher(run, load_teacher(args), args, Path(folder, SAMPLE_FILE))


def save_reduced_teacher(
    run: Run, teacher: SentenceTransformer, args: DistilDatasetArguments, sample_file: Path
) -> None:
    """Bring the teacher to the labels' width, write it and finish its run.

    Every process must call this: they embed the sample together, and the first one fits the projection and writes.
    """
    is_wider = teacher.get_embedding_dimension() != args.embedding_dim
    if is_wider:
        labeller = new_labeller(teacher, args)
        sample = embed_sample(labeller, args.train_file, args.pca_sample_size, args.seed)
    if rank() == 0:
        if is_wider:
            reduced, report = reduce_teacher(labeller, sample, args.embedding_dim, sample_file)
        else:
            logger.info("the teacher is %d wide already and needs no projection", args.embedding_dim)
            reduced, report = with_projection(teacher, None), None
        require_finite(reduced, "the reduced teacher")
        save_embedding_model(reduced, run.folder)
        write_teacher_card(run.folder, run.record["inputs"]["teacher"], report, args.embedding_dim)
        run.finish({"projection": report})
    wait_for_all()


def measure_ceiling(
    reduced: SentenceTransformer,
    args: DistilDatasetArguments,
    sets: tuple[list[RetrievalSet], list[PairSet]],
    folder: Path,
) -> dict[str, Any]:
    """What the projection costs on the evaluation sets; the teacher's vectors of them are kept for phase 5.

    No student can be expected to do better.
    """
    is_reduced, vectors = is_reduced_teacher(args.teacher_output_dir), KnownVectors()
    ceiling = account(None, reduced, is_reduced, *sets, flag="--eval_datasets", teacher_vectors=vectors)
    if vectors:
        save_vectors(folder, vectors)
    print(format_account(ceiling))
    return ceiling


def finish(args: DistilDatasetArguments, run: Run, labeller: Labeller, ceiling: dict[str, Any]) -> None:
    """Count the labels, say which texts were cut, and mark the folder as complete."""
    counts = {split: count_labels(run.folder, split) for split in ("validation", "train")}
    if truncated := counts["train"]["truncated_rows"]:
        logger.warning(
            "%s texts are longer than the teacher's %d tokens, and only their beginning is labelled; lower "
            "--max_seq_length of phase 1",
            f"{truncated:,}",
            labeller.max_seq_length,
        )
    if (heldout := Path(args.train_file, HELDOUT)).is_dir():  # for phase 5, which does not read the corpus
        shutil.copytree(heldout, run.folder / HELDOUT, dirs_exist_ok=True)
    run.finish(
        {
            "ceiling": ceiling,
            "counts": counts,
            "files": describe_shards(run.folder),
            "reduced_teacher": content_hash(Path(args.teacher_output_dir)),
            **labeller.speed,
            "peak_memory_bytes": peak_memory_bytes(),
        }
    )


def main() -> None:
    """Reduce the teacher, measure what that costs, label both splits."""
    args = parse_settings(DistilDatasetArguments, "create_distil_dataset", __doc__)
    require_inputs("create_distil_dataset", args)
    choose_attn_implementation(args.attn_implementation, best_device(), compute_dtype(best_device()))
    inputs = {"teacher": args.teacher_name_or_path, "corpus": args.train_file}
    set_paths = set_locations(args.eval_datasets, args.train_file)
    label_inputs = inputs | set_inputs(set_paths)
    run = begin("create_distil_dataset", args.output_dir, asdict(args), label_inputs, args.overwrite)
    if run is None:
        restore_reduced_teacher(args, inputs)
        return
    note_without_gpu("create_distil_dataset", vars(args))
    check_splits(args.train_file, ["text", "source", "kind"], args.embedding_dim)
    sets = load_evaluation_sets("--eval_datasets", list(set_paths.values()))
    teacher = load_teacher(args)
    run.start()

    sample_file = run.folder / SAMPLE_FILE
    reduced = make_or_load_reduced_teacher(teacher, args, inputs, sample_file)
    ceiling = measure_ceiling(reduced, args, sets, run.folder) if rank() == 0 else {}
    labeller = new_labeller(reduced, args)
    not_sampled = Sample.none(args.embedding_dim)  # the sample is of the training split
    label_split(args.train_file, "validation", labeller, not_sampled, run.folder)
    label_split(args.train_file, "train", labeller, Sample.load(sample_file, args.embedding_dim), run.folder)

    wait_for_all()
    if rank() == 0:
        sample_file.unlink(missing_ok=True)
        finish(args, run, labeller, ceiling)
        following = next_command("distil_train.py")
        logger.info("wrote %s and %s; next: %s", args.output_dir, args.teacher_output_dir, following)


if __name__ == "__main__":
    run_script(main)
