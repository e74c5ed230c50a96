"""A corpus without duplicates in an order fixed by a seed, in bounded memory.

The corpus is built in two passes. The first pass cleans each source and writes its texts to temporary files, sorted
by a seeded 64-bit hash of the text. The range of the hash is divided into 256 buckets. The second pass reads one bucket
at a time from all these files, drops equal texts, which are in the same bucket, and sorts the rest by the hash. It
drops them first within each file, so that a text that occurs very often does not fill the memory.

A seeded hash puts each text at a random place. So the buckets one after another are a uniform shuffle of the whole
corpus, and its first rows, the validation split, are a uniform sample. The order depends only on seed and texts.

The first pass holds two batches of texts and a buffer of 64 MB in memory, the second a 256th of the corpus and one row
group. With the libraries the peak was 0.85 GiB, for half a million rows and for five million. On disk the temporary
files take as much as the texts, compressed, until the second pass is done.
"""

import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from modernbert_small.corpus.sources import Row, Source
from modernbert_small.corpus.text import Chunker, is_trivial, normalise
from modernbert_small.run.durable import sync_tree
from modernbert_small.run.manifest import damage, write_manifest
from modernbert_small.run.prefetch import ahead
from modernbert_small.run.records import write_json
from modernbert_small.run.shards import RowStream
from modernbert_small.run.tables import counted

logger = logging.getLogger(__name__)

SCHEMA = pa.schema({"text": pa.string(), "source": pa.string(), "kind": pa.string()})
# large_string: a text file read whole can pass the 2 GiB that the offsets of `string` reach.
_SPILL_SCHEMA = pa.schema({"text": pa.large_string(), "kind": pa.string(), "hash": pa.uint64()})
_BUCKET_BITS = 8
_BUCKETS = 1 << _BUCKET_BITS
_SPILL_BYTES = 64 << 20
_BATCH_ROWS = 20_000
_BATCH_CHARACTERS = 4_000_000
_ROWS_PER_GROUP = 10_000
_ROWS_PER_SHARD = 250_000
_ROWS_PER_MESSAGE = 100_000
_COUNTS = "counts.json"
_COUNTED = ("rows", "texts", "empty", "too_short", "split_texts", "chunks", "spilled")


def spill_source(source: Source, folder: Path, chunker: Chunker, max_rows: int | None, seed: int) -> dict[str, Any]:
    """First pass over one source: clean, chunk, hash, write to `folder`.

    A folder that agrees with its manifest is complete and not made again; another one is begun anew.

    Returns:
        Counts: rows, texts, empty, too_short, split_texts, chunks (that split texts became) and spilled; skipped, rows
        that cannot be used; and first_skipped, what is wrong with the first of them.

    Raises:
        UserError: what `Source.rows` raises.
    """
    if folder.exists():
        if not (found := damage(folder)):
            logger.info("%s: read completely by the interrupted run", source.name)
            return json.loads((folder / _COUNTS).read_text(encoding="utf-8"))
        logger.warning(
            "%s: its texts in %s are not whole, so it is read again: %s", source.name, folder, "; ".join(found)
        )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    counts = Counter(dict.fromkeys(_COUNTED, 0))
    pending: list[pa.Table] = []
    files = 0
    # Read and cleaned by Python in one thread, chunked by Rust in this one.
    for batch in ahead(_normalised(_batches(source.rows(max_rows, seed), counts, source.name), counts)):
        pending.append(_hashed(_chunked(batch, chunker, counts), seed))
        if sum(table.nbytes for table in pending) >= _SPILL_BYTES:
            _write_sorted(folder / f"{files:05d}.arrow", pending)
            pending, files = [], files + 1
    if pending:
        _write_sorted(folder / f"{files:05d}.arrow", pending)
    logger.info("%s: %s of %s", source.name, counted(counts["spilled"], "text"), counted(counts["rows"], "row"))
    skipped = source.skipped
    if skipped.count:
        logger.warning("%s: rows skipped: %s; the first: %s", source.name, f"{skipped.count:,}", skipped.first)
    described = {**counts, "skipped": skipped.count, "first_skipped": skipped.first}
    write_json(folder / _COUNTS, described)
    sync_tree(folder)
    write_manifest(folder)
    return described


def discard_spill(folder: Path) -> None:
    """Remove spilled texts. Renamed first: a kill meanwhile must not leave half of them looking whole."""
    discarded = folder.with_name(folder.name + ".discarded")
    shutil.rmtree(discarded, ignore_errors=True)
    if folder.exists():
        folder.rename(discarded)
        shutil.rmtree(discarded)


def merge(folders: Mapping[str, Path], duplicates: Counter[str]) -> Iterator[pa.Table]:
    """Second pass: the corpus in its final order, a bucket at a time.

    Args:
        folders: source -> its spilled texts. Of equal texts the one of the first source stays.
        duplicates: source -> texts dropped, counted here.

    Yields:
        Tables of `SCHEMA`.
    """
    for bucket in range(_BUCKETS):
        tables = [
            _without_repeats(_read_bucket(path, bucket, source), duplicates)
            for source, folder in folders.items()
            for path in sorted(folder.glob("*.arrow"))
        ]
        if tables:
            yield _deduplicated(pa.concat_tables(tables), duplicates)


def write_splits(tables: Iterable[pa.Table], folder: Path, validation_rows: int) -> dict[str, int]:
    """Write the first rows as validation split and the rest as train, in shards of bounded size.

    Shards are named when their number is known; files that an interrupted run left are removed first.

    Returns:
        Rows by file name.
    """
    for stale in folder.glob("*.parquet"):
        stale.unlink()
    stream = RowStream(tables)
    validation = folder / "validation-00000-of-00001.parquet"
    rows = {validation.name: _write_shard(stream, validation, validation_rows)}
    shards: list[int] = []
    while count := _write_shard(stream, folder / f"train-{len(shards):05d}.parquet", _ROWS_PER_SHARD):
        shards.append(count)
    (folder / f"train-{len(shards):05d}.parquet").unlink()
    for index, count in enumerate(shards):
        name = f"train-{index:05d}-of-{len(shards):05d}.parquet"
        (folder / f"train-{index:05d}.parquet").rename(folder / name)
        rows[name] = count
    return rows


def shrink_validation(folder: Path, files: Mapping[str, int], validation_rows: int) -> dict[str, int]:
    """Divide a small corpus again, whose validation split takes half of it or more; both are held in memory.

    Args:
        folder: of the splits that `write_splits` wrote.
        files: what it returned, the validation split first.
        validation_rows: fewer than it was given.

    Returns:
        As `write_splits`.
    """
    return write_splits([pq.ParquetFile(folder / name).read() for name in files], folder, validation_rows)


def _batches(rows: Iterable[Row], counts: Counter[str], name: str) -> Iterator[Row]:
    """The texts of many rows at a time; counts rows and texts and says how far it is."""
    batch: Row = []
    characters = 0
    for row in rows:
        counts["rows"] += 1
        counts["texts"] += len(row)
        batch += row
        characters += sum(len(text) for _, text in row)
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        if counts["rows"] % _ROWS_PER_MESSAGE == 0:
            logger.info("%s: %s read", name, counted(counts["rows"], "row"))
    if batch:
        yield batch


def _normalised(batches: Iterable[Row], counts: Counter[str]) -> Iterator[Row]:
    """Normalise texts and drop what says nothing."""
    for batch in batches:
        kept: Row = []
        for kind, text in batch:
            normal = normalise(text)
            if not normal:
                counts["empty"] += 1
            elif is_trivial(normal):
                counts["too_short"] += 1
            else:
                kept.append((kind, normal))
        yield kept


def _chunked(batch: Row, chunker: Chunker, counts: Counter[str]) -> Row:
    """Split what is too long."""
    rows: Row = []
    for (kind, _), chunks in zip(batch, chunker.split([text for _, text in batch]), strict=True):
        if len(chunks) > 1:
            counts["split_texts"] += 1
            counts["chunks"] += len(chunks)
        rows += [(kind, chunk) for chunk in chunks]
    counts["spilled"] += len(rows)
    return rows


def _hashed(texts: Row, seed: int) -> pa.Table:
    hashes = (xxhash.xxh3_64_intdigest(text.encode(), seed) for _, text in texts)
    return pa.table(
        {
            "text": pa.array([text for _, text in texts], pa.large_string()),
            "kind": pa.array([kind for kind, _ in texts], pa.string()),
            "hash": np.fromiter(hashes, np.uint64, len(texts)),
        },
        _SPILL_SCHEMA,
    )


def _write_sorted(path: Path, tables: Sequence[pa.Table]) -> None:
    """Write an Arrow file of one record batch per bucket, in the order of reading within each."""
    table = pa.concat_tables(tables)
    buckets = table["hash"].to_numpy() >> np.uint64(64 - _BUCKET_BITS)
    order = np.argsort(buckets, kind="stable")
    starts = np.searchsorted(buckets[order], np.arange(_BUCKETS + 1, dtype=np.uint64))
    rows = table.take(order).combine_chunks()
    columns = [column.chunk(0) if column.num_chunks else pa.array([], column.type) for column in rows.columns]
    whole = pa.RecordBatch.from_arrays(columns, schema=_SPILL_SCHEMA)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(str(path), _SPILL_SCHEMA, options=options) as writer:
        for start, end in itertools.pairwise(starts):
            writer.write_batch(whole.slice(start, end - start))


def _read_bucket(path: Path, bucket: int, source: str) -> pa.Table:
    with pa.OSFile(str(path)) as stream:
        batch = pa.ipc.open_file(stream).get_batch(bucket)
    return pa.table(batch).append_column("source", pa.repeat(pa.scalar(source), batch.num_rows))


def _without_repeats(table: pa.Table, duplicates: Counter[str]) -> pa.Table:
    """The rows of one bucket in one file, of equal texts the first alone.

    All copies of a text are in one bucket. Since they are dropped file by file, masses of them are never in memory
    together.
    """
    hashes = table["hash"].to_numpy()
    if len(np.unique(hashes)) == len(hashes):
        return table
    return _first_of_equals(table, duplicates)


def _deduplicated(table: pa.Table, duplicates: Counter[str]) -> pa.Table:
    """The rows of one bucket as the corpus has them: sorted by hash, the first of equal texts alone."""
    return _first_of_equals(table, duplicates).select(SCHEMA.names).cast(SCHEMA)


def _first_of_equals(table: pa.Table, duplicates: Counter[str]) -> pa.Table:
    """Sort by hash and keep the first of equal texts, which are neighbours then."""
    positions = table.append_column("position", pa.array(np.arange(table.num_rows)))
    positions = positions.sort_by([("hash", "ascending"), ("text", "ascending"), ("position", "ascending")])
    rows = positions.drop_columns("position")
    # Texts are compared, not hashes alone.
    repeats = pc.equal(rows["text"][1:], rows["text"][:-1])
    first = pa.chunked_array([[True], *pc.invert(repeats).chunks]) if rows.num_rows else pa.array([], pa.bool_())
    for dropped in rows["source"].filter(pc.invert(first)).value_counts().to_pylist():
        duplicates[dropped["values"]] += dropped["counts"]
    return rows.filter(first)


def _write_shard(stream: RowStream, path: Path, max_rows: int) -> int:
    """Write the next rows of the stream to a Parquet file, a row group at a time; returns how many."""
    written = 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd", use_dictionary=["source", "kind"]) as writer:
        while (group := stream.take(min(_ROWS_PER_GROUP, max_rows - written))) is not None:
            writer.write_table(group)
            written += group.num_rows
    return written
