"""First pass over a corpus: cleaned texts on disk, in 256 buckets of a seeded hash.

Each source is divided into units of work, which do not depend on the number of processes. Whichever process is free
takes the next unit, and writes its texts into a folder of their own. A folder that is whole is not made again, so a
killed run goes on with the units that are missing.

A process holds two batches of texts and a buffer of 64 MB.
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
import xxhash

from modernbert_small.corpus.sources import Row, Source, Unit
from modernbert_small.corpus.text import Chunker, is_trivial, normalise
from modernbert_small.run.durable import sync_tree
from modernbert_small.run.manifest import damage, write_manifest
from modernbert_small.run.prefetch import ahead
from modernbert_small.run.processes import dealt, gathered, rank
from modernbert_small.run.records import write_json
from modernbert_small.run.tables import counted

logger = logging.getLogger(__name__)

BUCKET_BITS = 8
# large_string: a text file read whole can pass the 2 GiB that the offsets of `string` reach.
_SCHEMA = pa.schema({"text": pa.large_string(), "kind": pa.string(), "hash": pa.uint64()})
_SPILL_BYTES = 64 << 20
_BATCH_ROWS = 20_000
_BATCH_CHARACTERS = 4_000_000
_ROWS_PER_MESSAGE = 100_000
_COUNTS = "counts.json"
_COUNTED = ("rows", "texts", "empty", "too_short", "split_texts", "chunks", "spilled", "bytes", "files", "skipped")


def spill_sources(
    sources: Sequence[Source], folder: Path, chunker: Chunker, max_rows: int | None, seed: int
) -> dict[str, dict[str, Any]]:
    """Clean, chunk and hash the texts of all sources, and write them to `folder`; every process must call this.

    Returns:
        Counts by source: rows, texts, empty, too_short, split_texts, chunks (that split texts became), spilled and
        their bytes; skipped, rows that cannot be used; and first_skipped, what is wrong with the first of them.

    Raises:
        UserError: what `Source.rows` raises.
    """
    units = {source.name: source.units(max_rows, seed) for source in sources}
    jobs = [(source, number) for source in sources for number in range(len(units[source.name]))]
    jobs.sort(key=lambda job: -units[job[0].name][job[1]].size)  # the largest first: no process begins one at the end
    counts: dict[tuple[str, int], dict[str, Any]] = {}
    for job in dealt(len(jobs)):
        source, number = jobs[job]
        unit = units[source.name][number]
        counts[source.name, number] = _spill_unit(source, unit, folder / source.name / f"{number:05d}", chunker, seed)
    for others in gathered(counts):
        counts |= others
    return {
        source.name: _summed(source.name, [counts[source.name, number] for number in range(len(units[source.name]))])
        for source in sources
    }


def _summed(name: str, counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of a source's units together, logged."""
    total = {what: sum(count[what] for count in counts) for what in _COUNTED}
    first = next((count["first_skipped"] for count in counts if count["skipped"]), "")
    logger.info("%s: %s of %s", name, counted(total["spilled"], "text"), counted(total["rows"], "row"))
    if total["skipped"] and rank() == 0:
        logger.warning("%s: rows skipped: %s; the first: %s", name, f"{total['skipped']:,}", first)
    return {**total, "first_skipped": first}


def _spill_unit(source: Source, unit: Unit, folder: Path, chunker: Chunker, seed: int) -> dict[str, Any]:
    """The texts of one unit.

    A folder that agrees with its manifest is complete and not made again; another one is begun anew.
    """
    if folder.exists():
        if not (found := damage(folder)):
            logger.info("%s, part %s: read by the interrupted run", source.name, folder.name)
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
    for batch in ahead(_normalised(_batches(unit.rows(), counts, source.name), counts)):
        pending.append(_hashed(_chunked(batch, chunker, counts), seed))
        counts["bytes"] += pending[-1].nbytes
        if sum(table.nbytes for table in pending) >= _SPILL_BYTES:
            _write_buckets(folder / f"{files:05d}.arrow", pending)
            pending, files = [], files + 1
    if pending:
        _write_buckets(folder / f"{files:05d}.arrow", pending)
    counts["files"], counts["skipped"] = files + bool(pending), source.skipped.count
    described = {**counts, "first_skipped": source.skipped.first}
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


def read_bucket(path: Path, bucket: int, buckets: int) -> pa.Table:
    """The texts of one bucket in one file.

    Args:
        path: a file of spilled texts.
        bucket: its number.
        buckets: how many there are: those of the file, or twice, four times, ... as many.

    Returns:
        Columns text, kind and hash.
    """
    finer = buckets >> BUCKET_BITS
    with pa.OSFile(str(path)) as stream:
        table = pa.table(pa.ipc.open_file(stream).get_batch(bucket // finer))
    if finer == 1:
        return table
    bits = buckets.bit_length() - 1
    return table.filter(pa.array(table["hash"].to_numpy() >> np.uint64(64 - bits) == bucket))


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
        _SCHEMA,
    )


def _write_buckets(path: Path, tables: Sequence[pa.Table]) -> None:
    """Write an Arrow file of one record batch per bucket, in the order of reading within each."""
    table = pa.concat_tables(tables)
    buckets = table["hash"].to_numpy() >> np.uint64(64 - BUCKET_BITS)
    order = np.argsort(buckets, kind="stable")
    starts = np.searchsorted(buckets[order], np.arange((1 << BUCKET_BITS) + 1, dtype=np.uint64))
    rows = table.take(order).combine_chunks()
    columns = [column.chunk(0) if column.num_chunks else pa.array([], column.type) for column in rows.columns]
    whole = pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(str(path), _SCHEMA, options=options) as writer:
        for start, end in itertools.pairwise(starts):
            writer.write_batch(whole.slice(start, end - start))
