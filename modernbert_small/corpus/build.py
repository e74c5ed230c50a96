"""Second pass over a corpus: without duplicates, in an order fixed by a seed, in bounded memory.

The first pass has written the texts in buckets of a seeded 64-bit hash. This one reads one bucket at a time from all
files, drops equal texts, which are in the same bucket, and sorts the rest by the hash. It drops them first within each
file, so that a text that occurs very often does not fill the memory. Of equal texts the one of the first source stays,
and within a source a query rather than a document.

A seeded hash puts each text at a random place. So the buckets one after another are a uniform shuffle of the whole
corpus, and its first rows, the validation split, are a uniform sample. The order depends only on seed and texts.

A shard is a group of buckets. Whichever process is free writes the next one, so the bytes are the same for any number
of processes. A large corpus has more buckets than the 256 in which its texts were spilled. Then a bucket is a part of
one of those, which is read as often as it has parts.

A process holds one bucket, at most 128 MB of texts or 250,000 of them, and one row group. On disk the temporary files
take as much as the texts, compressed, until the second pass is done.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from modernbert_small.corpus import spill
from modernbert_small.corpus.decontaminate import Contamination
from modernbert_small.corpus.tally import Tally
from modernbert_small.run.content import content_hash
from modernbert_small.run.durable import publish
from modernbert_small.run.errors import UserError
from modernbert_small.run.processes import dealt, from_first, gathered
from modernbert_small.run.records import write_json
from modernbert_small.run.shards import RowStream

SCHEMA = pa.schema({"text": pa.string(), "source": pa.string(), "kind": pa.string()})
_BUCKET_BYTES = 128 << 20
_ROWS_PER_GROUP = 10_000
_ROWS_PER_SHARD = 250_000
_SHARDS_TO_SHARE, _LEAST_ROWS_PER_SHARD = 8, 10_000  # a smaller corpus has shards too, for processes to share
_NOTES = ".shards"  # in the folder of spilled texts; no source has this name


class _Range(NamedTuple):
    """Buckets from `first` up to `end`, without the first `skip` rows. Whole rows of the corpus, in its order."""

    first: int
    end: int
    skip: int = 0


class SpilledCorpus:
    """The corpus that spilled texts make, ready to be written.

    Args:
        folder: of `spill.spill_sources`.
        counts: what it returned, by source. Of equal texts the one of the first source stays.
        contamination: what must not be in the corpus, None for nothing.
    """

    def __init__(
        self, folder: Path, counts: Mapping[str, Mapping[str, Any]], contamination: Contamination | None = None
    ) -> None:
        self._contamination, self._notes = contamination, folder / _NOTES
        self._files = [
            (path, order, source)
            for order, source in enumerate(counts)
            for path in sorted((folder / source).glob("*/*.arrow"))
        ]
        rows, size, files = (sum(count[what] for count in counts.values()) for what in ("spilled", "bytes", "files"))
        if len(self._files) != files:
            raise UserError(
                f"{folder}: {len(self._files)} files of texts are seen here, but {files} were written; the file system "
                "shows new files late, or others were put there: run the same command again"
            )
        self._buckets = 1 << spill.BUCKET_BITS
        while size > self._buckets * _BUCKET_BYTES or rows > self._buckets * _ROWS_PER_SHARD:
            self._buckets *= 2
        shared = min(_SHARDS_TO_SHARE, rows // _LEAST_ROWS_PER_SHARD)
        self._shards = max(1, shared, math.ceil(rows / _ROWS_PER_SHARD))

    def write(self, folder: Path, validation_rows: int) -> Tally:
        """Write the first rows as validation split and the rest as train; every process must call this.

        Shards that an interrupted run has finished are not made again.

        Returns:
            What the corpus holds, and what was dropped.
        """
        names = [f"train-{index:05d}-of-{self._shards:05d}.parquet" for index in range(self._shards)]
        first, skip, tally = from_first(lambda: self._write_validation(folder, validation_rows, names))
        edges = [first + (self._buckets - first) * index // self._shards for index in range(self._shards + 1)]
        made: dict[int, Tally] = {}
        for index in dealt(self._shards):
            part = _Range(edges[index], edges[index + 1], skip if edges[index] == first else 0)
            made[index] = self._write_train(folder / names[index], part)
        for others in gathered(made):
            made |= others
        return sum((made[index] for index in range(self._shards)), start=tally)

    def _write_validation(self, folder: Path, rows: int, names: list[str]) -> tuple[int, int, Tally]:
        """Write the validation split; returns the bucket at which train begins, and how many of its rows to skip."""
        validation = folder / "validation-00000-of-00001.parquet"
        for path in folder.glob("*.parquet"):
            if path.name not in names:
                path.unlink()
        tally, end = Tally(), _Range(self._buckets, self._buckets)

        def tables() -> Iterator[pa.Table]:
            nonlocal tally, end
            missing = rows
            for bucket in range(self._buckets):
                of_bucket = Tally()
                table = self._read(bucket, of_bucket)
                if table.num_rows > missing:  # what this bucket dropped is counted with its other rows
                    of_bucket, end = Tally(), _Range(bucket, self._buckets, missing)
                tally += of_bucket
                yield tally.count(table.slice(0, missing))
                missing -= min(missing, table.num_rows)
                if end.first == bucket:
                    return

        _write_shard(RowStream(tables()), validation)
        return end.first, end.skip, tally

    def _write_train(self, path: Path, part: _Range) -> Tally:
        """Write a shard of the train split, or find it as an interrupted run has written it."""
        notes = self._notes / f"{path.name}.json"
        if notes.exists() and path.exists():
            known = json.loads(notes.read_text(encoding="utf-8"))
            if known["part"] == list(part) and known["hash"] == content_hash(path):
                return Tally.from_json(known["tally"])
        tally = Tally(self._shards)

        def tables() -> Iterator[pa.Table]:
            for bucket in range(part.first, part.end):
                table = self._read(bucket, tally)
                yield tally.count(table.slice(part.skip if bucket == part.first else 0))

        _write_shard(RowStream(tables()), path)
        notes.parent.mkdir(exist_ok=True)
        write_json(notes, {"part": list(part), "hash": content_hash(path), "tally": tally.as_json()})
        return tally

    def _read(self, bucket: int, tally: Tally) -> pa.Table:
        """The rows of one bucket in their final order; what is dropped is counted."""
        tables = []
        for path, order, source in self._files:
            table = spill.read_bucket(path, bucket, self._buckets)
            columns = {"source": pa.repeat(pa.scalar(source), len(table)), "order": np.full(len(table), order)}
            for name, values in columns.items():
                table = table.append_column(name, pa.array(values))
            tables.append(_without_repeats(table, tally.duplicates))
        if not tables:
            return SCHEMA.empty_table()
        table = _first_of_equals(pa.concat_tables(tables), tally.duplicates).select(SCHEMA.names).cast(SCHEMA)
        if self._contamination is not None:
            table = self._contamination.drop(table, tally.contaminated)
        return table


def _without_repeats(table: pa.Table, duplicates: Counter[str]) -> pa.Table:
    """The rows of one bucket in one file, of equal texts the first alone.

    All copies of a text are in one bucket. Since they are dropped file by file, masses of them are never in memory
    together.
    """
    hashes = table["hash"].to_numpy()
    if len(np.unique(hashes)) == len(hashes):
        return table
    return _first_of_equals(table, duplicates)


def _first_of_equals(table: pa.Table, duplicates: Counter[str]) -> pa.Table:
    """Sort by hash and keep the first of equal texts, which are neighbours then.

    Which one is first depends on source and kind, and not on the order of reading: processes share that.
    """
    rows = table.sort_by([("hash", "ascending"), ("text", "ascending"), ("order", "ascending"), ("kind", "descending")])
    # Texts are compared, not hashes alone.
    repeats = pc.equal(rows["text"][1:], rows["text"][:-1])
    first = pa.chunked_array([[True], *pc.invert(repeats).chunks]) if rows.num_rows else pa.array([], pa.bool_())
    for dropped in rows["source"].filter(pc.invert(first)).value_counts().to_pylist():
        duplicates[dropped["values"]] += dropped["counts"]
    return rows.filter(first)


def _write_shard(stream: RowStream, path: Path) -> None:
    """Write all rows of a stream to a Parquet file, a row group at a time, under a temporary name first."""
    temporary = path.with_suffix(".tmp")
    with pq.ParquetWriter(temporary, SCHEMA, compression="zstd", use_dictionary=["source", "kind"]) as writer:
        while (group := stream.take(_ROWS_PER_GROUP)) is not None:
            writer.write_table(group)
    publish(temporary, path)
