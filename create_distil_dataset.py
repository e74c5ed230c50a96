"""Phase 4: label the corpus with a large embedding model, reduced to the student's width.

In:   data/corpus (phase 1), a SentenceTransformer as teacher.
Out:  data/distil: the corpus's rows as `sentence`, with `label`, a float16 unit vector;
      checkpoints/teacher: the teacher with its projection, whose `encode` gives the labels.

    python create_distil_dataset.py                                          # gte-modernbert-base, one CUDA GPU
    torchrun --nproc_per_node 4 create_distil_dataset.py                     # four
    python create_distil_dataset.py --teacher_name_or_path <folder> --tokens_per_batch 4096   # a CPU

A random sample is encoded, the projection fitted on it and added to the teacher as a Dense module; then all other
rows are labelled in batches of similar length, shard by shard, so that a killed run goes on at the first
missing shard. LEAF (https://arxiv.org/abs/2509.12539) is the recipe to train on such labels.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize

from modernbert_small.algebra import unit_vectors
from modernbert_small.evaluation.account import WIDTHS, account, format_account, is_reduced_teacher
from modernbert_small.evaluation.sets import load_evaluation_sets
from modernbert_small.label.labeller import (
    Labeller,
    Sample,
    read_blocks,
    require_vectors,
    sample_texts,
    text_prompts,
    write_shard,
)
from modernbert_small.label.projection import fit_projection, projection_quality
from modernbert_small.packed.attention import ATTN_IMPLEMENTATIONS, choose_attn_implementation
from modernbert_small.run.artefacts import Run, begin, content_hash, describe_shards
from modernbert_small.run.devices import best_device, peak_memory_bytes
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_sentence_transformer, require_finite
from modernbert_small.run.prefetch import ahead
from modernbert_small.run.processes import rank, wait_for_all, world_size
from modernbert_small.run.progress import ProgressBar
from modernbert_small.run.script import next_command, run_script
from modernbert_small.run.settings import parse_settings
from modernbert_small.run.shards import check_splits, count_rows, split_files

logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 32_768  # what a killed run may lose: seconds on a GPU, minutes on a CPU
QUALITY_ROWS = 2_000  # held-out texts whose cosines and neighbours measure the projection
COLUMNS = ("text", "source", "kind")
SAMPLE_FILE = "sample.npz"  # in the unfinished output folder


@dataclass
class DistilDatasetArguments:
    """Settings of phase 4."""

    teacher_name_or_path: str = field(
        default="Alibaba-NLP/gte-modernbert-base",
        metadata={"help": "embedding model with the quality to keep, hub id or folder"},
    )
    train_file: str = field(default="data/corpus", metadata={"help": "phase 1's corpus"})
    output_dir: str = field(default="data/distil", metadata={"help": "folder to write: sentences with labels"})
    teacher_output_dir: str = field(
        default="checkpoints/teacher", metadata={"help": "folder to write: the teacher with its projection"}
    )
    embedding_dim: int = field(default=384, metadata={"help": "width of the labels, the student's hidden_size"})
    eval_datasets: list[str] = field(
        default_factory=list,
        metadata={"help": "sets to show on what the projection costs, as in phase 5: the ceiling of any student"},
    )
    pca_sample_size: int = field(default=100_000, metadata={"help": "texts the projection is fitted on"})
    tokens_per_batch: int = field(default=65_536, metadata={"help": "tokens in a batch, padding included"})
    attn_implementation: str = field(
        default="auto",
        metadata={"help": f"for a ModernBERT teacher: {', '.join(ATTN_IMPLEMENTATIONS)}; auto takes what runs best"},
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
                f"pca_sample_size: {self.pca_sample_size} texts do not fix {self.embedding_dim} directions; use more"
            )
        if self.tokens_per_batch < 1:
            found.append(f"tokens_per_batch: {self.tokens_per_batch}, expected at least 1")
        try:
            choose_attn_implementation(self.attn_implementation, best_device())
        except ValueError as error:
            found.append(str(error))
        return found


def check_teacher(teacher: SentenceTransformer, args: DistilDatasetArguments) -> int:
    """The teacher's width, refused if the labels would be wider."""
    width = teacher.get_embedding_dimension()
    if width is None or width < args.embedding_dim:
        raise UserError(
            f"embedding_dim: {args.embedding_dim} is wider than the teacher's {width}; use at most {width}, or a wider "
            "--teacher_name_or_path"
        )
    require_finite(teacher, f"--teacher_name_or_path {args.teacher_name_or_path}")
    return int(width)


def reduce_teacher(
    teacher: SentenceTransformer, args: DistilDatasetArguments, sample_file: Path
) -> tuple[SentenceTransformer, dict[str, Any]]:
    """The teacher with its projection, and what that keeps; the vectors it was fitted on go to `sample_file`."""
    if teacher.get_embedding_dimension() == args.embedding_dim:
        logger.info("the teacher is %d wide already: no projection", args.embedding_dim)
        return with_projection(teacher, None), {"projection": None}
    labeller = Labeller(teacher, best_device(), args.tokens_per_batch, args.attn_implementation)
    _, texts, kinds = sample_texts(args.train_file, "validation", QUALITY_ROWS, args.seed)
    heldout = labeller.embed(labeller.tokenize(texts, kinds))
    require_vectors(heldout, texts, "validation split")
    rows, texts, kinds = sample_texts(args.train_file, "train", args.pca_sample_size, args.seed)
    logger.info("fitting %d -> %d on %s texts", heldout.shape[1], args.embedding_dim, f"{len(texts):,}")
    with ProgressBar(len(texts), "embedding the sample", "text") as bar:
        sample = labeller.embed(labeller.tokenize(texts, kinds), bar)
    require_vectors(sample, texts, "sample of the training split")
    basis, energy = fit_projection(sample, args.embedding_dim)
    logger.info("explained energy: %.2f %%", 100 * energy.sum())
    Sample(rows, (sample @ basis).astype(np.float32)).save(sample_file)
    report = {
        "sample_texts": len(texts),
        "explained_energy": round(float(energy.sum()), 6),
        "heldout_texts": len(heldout),
        "quality": measure_quality(heldout, basis),
        "spectrum": [round(float(share), 8) for share in energy],
        **labeller.speed,
    }
    return with_projection(teacher, basis), {"projection": report}


def measure_quality(heldout: NDArray[np.float32], basis: NDArray[np.float64]) -> dict[int, dict[str, float]]:
    """What the projection keeps of held-out vectors (N, D_T), whole and cut shorter; logged too."""
    after = unit_vectors(heldout) @ basis
    D = basis.shape[1]
    widths = sorted({D, *WIDTHS}, reverse=True)
    quality = {width: projection_quality(heldout, after[:, :width]) for width in widths if width <= D}
    logger.info("on %d held-out texts:", len(heldout))
    for width, kept in quality.items():
        correlation, neighbours = kept["cosine_correlation"], 100 * kept["neighbour_recall"]
        logger.info(
            "  %4d values: correlation of cosines %.4f, neighbours kept %.1f %%", width, correlation, neighbours
        )
    return quality


def with_projection(teacher: SentenceTransformer, basis: NDArray[np.float64] | None) -> SentenceTransformer:
    """The teacher with its vectors reduced to unit length D.

    A teacher that cuts its vectors by itself (`truncate_dim`) does so after its last module. Here the projection reads
    the first values alone, which is the same.

    Args:
        teacher: any.
        basis: (D_T, D), None for a teacher whose vectors are D wide already.
    """
    modules = list(teacher)
    while isinstance(modules[-1], Normalize):
        modules.pop()
    if basis is None and teacher.truncate_dim is not None:
        basis = np.eye(teacher.truncate_dim)
    if basis is not None:
        with teacher.truncate_embeddings(None):
            width = teacher.get_embedding_dimension()
        dense = Dense(width, basis.shape[1], bias=False, activation_function=torch.nn.Identity())
        dense.linear.weight.data.zero_()[:, : len(basis)] = torch.from_numpy(basis.T).float()
        modules.append(dense)
    if getattr(teacher[0], "do_lower_case", False):
        # sentence-transformers keeps it in tokenizer.json alone, whose normalizer a BertTokenizer replaces by its own.
        teacher[0].config_keys = [*teacher[0].config_keys, "do_lower_case"]
    return SentenceTransformer(
        modules=[*modules, Normalize()],
        prompts=teacher.prompts | text_prompts(teacher),  # under the names that encode_query and encode_document use
        default_prompt_name=teacher.default_prompt_name,
        similarity_fn_name="cosine",
        device=str(best_device()),
    )


def save_reduced_teacher(
    teacher: SentenceTransformer, args: DistilDatasetArguments, inputs: dict[str, str], sample_file: Path
) -> SentenceTransformer:
    """The reduced teacher, made now or found where an interrupted run left it."""
    run = begin(
        "create_distil_dataset", args.teacher_output_dir, asdict(args), inputs, args.overwrite, "--teacher_output_dir"
    )
    if run is not None:
        run.start()
        if rank() == 0:
            for shard in sample_file.parent.glob("*.parquet"):  # labels of an earlier reduced teacher
                shard.unlink()
            teacher, report = reduce_teacher(teacher, args, sample_file)
            require_finite(teacher, "the reduced teacher")
            teacher.save_pretrained(str(run.folder))
            run.finish(report)
        wait_for_all()
        if rank() == 0:
            return teacher
    return load_sentence_transformer(
        "--teacher_output_dir", args.teacher_output_dir, trust_remote_code=args.trust_remote_code
    )


def label_split(labeller: Labeller, args: DistilDatasetArguments, run: Run, split: str, known: Sample) -> None:
    """Label one split, tokenising the next shard while the device works on this one; processes deal the shards."""
    files = split_files(args.train_file, split)
    total = count_rows(files)
    shards = math.ceil(total / ROWS_PER_SHARD)
    paths = [run.folder / f"{split}-{index:05d}-of-{shards:05d}.parquet" for index in range(shards)]
    blocks = ((path, table) for path, table in zip(paths, read_blocks(files, COLUMNS, ROWS_PER_SHARD), strict=True))
    with ProgressBar(total, f"labelling {split}") as bar:
        for index, (path, table, rows, truncated) in enumerate(ahead(tokenized(labeller, blocks))):
            if rows:
                vectors = labeller.embed_rest(rows, known.within(index * ROWS_PER_SHARD, len(rows)), bar)
                counts = {"tokens": sum(map(len, rows)), "truncated_rows": truncated}
                write_shard(path, table, vectors, args.embedding_dim, counts)
            else:
                bar.update(len(table), "labelled before or elsewhere")


def count(folder: Path, split: str) -> dict[str, int]:
    """Rows, tokens and rows that the teacher cut, of a labelled split."""
    files = sorted(folder.glob(f"{split}-*.parquet"))
    notes = [pq.read_schema(file).metadata for file in files]
    return {"rows": count_rows(files)} | {
        name: sum(int(note[name.encode()]) for note in notes) for name in ("tokens", "truncated_rows")
    }


def tokenized(
    labeller: Labeller, blocks: Iterator[tuple[Path, pa.Table]]
) -> Iterator[tuple[Path, pa.Table, list[NDArray[np.int64]], int]]:
    """Blocks with their token ids and how many rows the teacher cuts.

    No ids for shards that are there already or are another process's.
    """
    for index, (path, table) in enumerate(blocks):
        missing = index % world_size() == rank() and not path.exists()
        before = labeller.truncated
        rows = labeller.tokenize(table["text"].to_pylist(), table["kind"].to_pylist()) if missing else []
        yield path, table, rows, labeller.truncated - before


def main() -> None:
    """Corpus and teacher in, labels and reduced teacher out."""
    args = parse_settings(DistilDatasetArguments, "create_distil_dataset", __doc__)
    inputs = {"teacher": args.teacher_name_or_path, "corpus": args.train_file}
    run = begin("create_distil_dataset", args.output_dir, asdict(args), inputs, args.overwrite)
    if run is None:
        return
    check_splits(args.train_file, args.embedding_dim)
    retrieval_sets, pair_sets = load_evaluation_sets("--eval_datasets", args.eval_datasets)
    teacher = load_sentence_transformer(
        "--teacher_name_or_path", args.teacher_name_or_path, trust_remote_code=args.trust_remote_code
    )
    check_teacher(teacher, args)
    run.start()
    sample_file = run.folder / SAMPLE_FILE
    reduced = save_reduced_teacher(teacher, args, inputs, sample_file)
    if rank() == 0:
        ceiling = account(None, reduced, is_reduced_teacher(args.teacher_output_dir), retrieval_sets, pair_sets)
        print(format_account(ceiling))
    labeller = Labeller(reduced, best_device(), args.tokens_per_batch, args.attn_implementation)
    label_split(labeller, args, run, "validation", Sample.none(args.embedding_dim))
    label_split(labeller, args, run, "train", Sample.load(sample_file, args.embedding_dim))

    wait_for_all()
    if rank() > 0:
        return
    sample_file.unlink(missing_ok=True)
    counts = {split: count(run.folder, split) for split in ("validation", "train")}
    if truncated := counts["train"]["truncated_rows"]:
        logger.warning(
            "%s texts are longer than the teacher's %d tokens: only their beginning is labelled; see --max_seq_length "
            "of phase 1",
            f"{truncated:,}",
            labeller.max_seq_length,
        )
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
    following = next_command("distil_train.py")
    logger.info("wrote %s and %s; next: %s", args.output_dir, args.teacher_output_dir, following)


if __name__ == "__main__":
    run_script(main)
