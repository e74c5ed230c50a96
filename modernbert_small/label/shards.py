"""Labels on disk: a shard of sentences with their vectors for each block of the corpus's rows.

The shards of a split are numbered blocks of `ROWS_PER_SHARD` rows; those of a small split have fewer, so that several
processes have work. Processes deal them in turn, and a run that goes on makes those that are missing or damaged.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from modernbert_small.algebra import unit_vectors
from modernbert_small.label.labeller import Labeller, require_vectors
from modernbert_small.label.sample import Sample
from modernbert_small.run.durable import publish
from modernbert_small.run.prefetch import ahead
from modernbert_small.run.processes import rank, world_size
from modernbert_small.run.progress import ProgressBar
from modernbert_small.run.shards import RowStream, count_rows, read_table, split_files

logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 32_768  # what a killed run may lose: seconds on a GPU, minutes on a CPU
_SHARDS_TO_SHARE, _LEAST_ROWS_PER_SHARD = 64, 1024  # of a small split
_COLUMNS = ("text", "source", "kind")
_HASH = "labels_xxh3"  # in a shard's metadata


class _Block(NamedTuple):
    """The rows of one shard. tokens: their token ids, None if the shard is there already.

    first: their first row's place in the split.
    """

    path: Path
    table: pa.Table
    tokens: list[NDArray[np.int64]] | None
    truncated: int
    first: int


def label_split(data: str, split: str, labeller: Labeller, known: Sample, folder: Path) -> None:
    """Write the shards of a split that are missing or damaged and fall to this process.

    The next shard is tokenised while the device works on this one.

    Args:
        data: the corpus's folder.
        split: train or validation.
        labeller: the reduced teacher's.
        known: vectors (n, D) of rows that are not to be embedded again.
        folder: where the shards go.
    """
    files = split_files(data, split)
    rows, width = count_rows(files), known.vectors.shape[1]
    with ProgressBar(rows, f"labelling {split}") as bar:
        for block in ahead(_blocks(files, split, labeller, folder)):
            bar.update(block.first - bar.done, "others by another process")
            if block.tokens is None:
                bar.update(len(block.table), "labelled before")
                continue
            vectors = labeller.embed_rest(block.tokens, known.within(block.first, len(block.table)), bar)
            counts = {"tokens": sum(map(len, block.tokens)), "truncated_rows": block.truncated}
            write_shard(block.path, block.table, vectors, width, counts)
        bar.update(rows - bar.done)


def rows_per_shard(rows: int) -> int:
    """The rows of a shard of a split with so many rows, whatever the number of processes."""
    return min(ROWS_PER_SHARD, max(_LEAST_ROWS_PER_SHARD, math.ceil(rows / _SHARDS_TO_SHARE)))


def _blocks(files: Sequence[Path], split: str, labeller: Labeller, folder: Path) -> Iterator[_Block]:
    """The rows of this process's shards in order, tokenised where a shard is missing."""
    rows = count_rows(files)
    size = rows_per_shard(rows)
    shards = math.ceil(rows / size)
    for index in range(rank(), shards, world_size()):
        path = folder / f"{split}-{index:05d}-of-{shards:05d}.parquet"
        table = RowStream(read_table(files, _COLUMNS, first=index * size)).take(size)
        assert table is not None, "as many rows as were counted"
        tokens, before = None, labeller.truncated
        if not _is_whole(path, table):
            tokens = labeller.tokenize(table["text"].to_pylist(), table["kind"].to_pylist())
        yield _Block(path, table, tokens, labeller.truncated - before, index * size)


def _is_whole(path: Path, table: pa.Table) -> bool:
    """Whether a shard is there, with these rows of the corpus and with the labels that were written.

    Args:
        path: of the shard.
        table: N rows with `text`, `source` and `kind`.
    """
    if not path.exists():
        return False
    try:
        with pq.ParquetFile(path) as file:
            shard = file.read()
        rows = shard.select(["sentence", *_COLUMNS[1:]]).rename_columns(_COLUMNS)
        labels = shard["label"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        written = (shard.schema.metadata or {}).get(_HASH.encode(), b"").decode()
        if rows.equals(table.select(_COLUMNS)) and _labels_hash(labels) == written:
            return True
        found = "its rows or labels are not those that were written"
    except (pa.ArrowException, OSError, KeyError) as error:
        found = " ".join(str(error).split())[:200]
    logger.warning("%s is damaged and is made again: %s", path, found)
    return False


def _labels_hash(labels: NDArray[np.float16]) -> str:
    return xxhash.xxh3_128_hexdigest(labels.tobytes())


def write_shard(
    path: Path, table: pa.Table, embeddings: NDArray[np.float32], width: int, counts: Mapping[str, int]
) -> None:
    """Write labels beside their sentences, under a temporary name first, with a hash of the labels as metadata.

    Args:
        path: of the shard.
        table: N rows with `text`, `source` and `kind`.
        embeddings: (N, D), of any length above 0; written as float16 unit vectors.
        width: D, as every shard has it.
        counts: for the file's metadata.

    Raises:
        ValueError: the embeddings' shape is not (N, D).
        UserError: an embedding has no finite length.
    """
    if embeddings.shape != (len(table), width):
        raise ValueError(f"{path.name}: labels {embeddings.shape}, expected ({len(table)}, {width})")
    require_vectors(embeddings, table["text"], path.name)
    labels = unit_vectors(embeddings).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(labels.ravel()), width)
    shard = pa.table({"sentence": table["text"], "label": column, "source": table["source"], "kind": table["kind"]})
    notes = {_HASH: _labels_hash(labels), **{name: str(value) for name, value in counts.items()}}
    shard = shard.replace_schema_metadata(notes)
    pq.write_table(shard, path.with_suffix(".tmp"), compression="zstd")
    publish(path.with_suffix(".tmp"), path)


def count_labels(folder: Path, split: str) -> dict[str, int]:
    """The rows of a labelled split, their tokens, and how many of them the teacher cut."""
    files = sorted(folder.glob(f"{split}-*.parquet"))
    notes = [pq.read_schema(file).metadata for file in files]
    sums = {name: sum(int(note[name.encode()]) for note in notes) for name in ("tokens", "truncated_rows")}
    return {"rows": count_rows(files), **sums}
