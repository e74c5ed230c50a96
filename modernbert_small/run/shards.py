"""The Parquet shards of a corpus or of labels: finding, checking, reading and counting them."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from modernbert_small.run.errors import UserError
from modernbert_small.run.records import RUN_FILE

logger = logging.getLogger(__name__)

LEAST_VALIDATION_ROWS = 3  # between two texts there is one cosine, and no correlation
_ROWS_PER_READ = 16_384
_TEXT_COLUMNS = ("text", "sentence", "source", "kind")
# What data that were made elsewhere may lack: a constant stands for it, or another column.
_CONSTANTS = {"kind": "document", "source": "unknown"}
_OTHER_NAMES = {"sentence": "text"}


def split_files(data: str | Path, split: str, flag: str = "--train_file") -> list[Path]:
    """The Parquet shards of one split of a corpus or of distillation data.

    Those of a phase are named `train-00000-of-00001.parquet`. Data that were made elsewhere may also lie in
    `train*.parquet` or in a folder `train`.

    Raises:
        UserError: no such folder, no shards, or some of the `-of-000NN` shards are missing.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder; expected the output of an earlier phase")
    files = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    if files and len(files) != (expected := int(files[0].stem.rsplit("-", 1)[1])):
        raise UserError(f"{flag} {folder}: {len(files)} {split} shards, expected {expected} by their names")
    files = files or sorted(folder.glob(f"{split}*.parquet")) or sorted(folder.glob(f"{split}/**/*.parquet"))
    if not files:
        raise UserError(
            f"{flag} {folder}: no {split}-*.parquet in it, nor {split}/*.parquet; expected the output of an earlier "
            "phase, or data in two splits, train and validation"
        )
    return files


def check_splits(data: str | Path, columns: Sequence[str], least_rows: int = 1, flag: str = "--train_file") -> None:
    """See that a data folder has both splits, whole and not empty, before anything is loaded.

    Of data that no phase made, it says what they are taken for.

    Args:
        data: folder of Parquet shards.
        columns: that are read from it.
        least_rows: of the train split.
        flag: named in errors.

    Raises:
        UserError: what `split_files` and `read_table` find, or a split with too few rows.
    """
    rows = {}
    for split, least in (("train", least_rows), ("validation", LEAST_VALIDATION_ROWS)):
        files = split_files(data, split, flag)
        rows[split] = count_rows(files)
        if rows[split] < least:
            raise UserError(f"{flag} {data}: its {split} split has {rows[split]} rows, expected at least {least}")
        next(read_table(files, columns))
    if not Path(data, RUN_FILE).exists():
        found = pq.read_schema(files[0]).names
        missing = [column for column in columns if column not in found]
        logger.info(
            "%s has no %s, so it was made elsewhere: %s train and %s validation rows%s",
            data,
            RUN_FILE,
            *(f"{count:,}" for count in rows.values()),
            "".join(f"; no column {name}: {_stands_for(name)}" for name in missing),
        )


def _stands_for(column: str) -> str:
    """What stands for a column that data may lack, for people."""
    return f"{_OTHER_NAMES[column]} is read" if column in _OTHER_NAMES else f"each is {_CONSTANTS[column]!r}"


def read_table(
    files: Sequence[Path], columns: Sequence[str], rows: int = _ROWS_PER_READ, first: int = 0
) -> Iterator[pa.Table]:
    """Some columns of Parquet files, some rows at a time.

    Args:
        files: the shards.
        columns: their names.
        rows: of a table at most.
        first: the row to begin with. Row groups before it are not read.

    Raises:
        UserError: a file that is not whole Parquet, a missing column, text that is not of strings, or a null.
    """
    for file in files:
        with _explained(file), pq.ParquetFile(file) as parquet:
            schema, (groups, position) = parquet.schema_arrow, _groups_from(parquet.metadata, first)
            skipped, first = first - position, max(0, first - parquet.metadata.num_rows)
            stored = {column: _stored_column(schema, column, file) for column in columns}
            wanted = [name for name in stored.values() if name is not None]
            for batch in parquet.iter_batches(rows, row_groups=groups, columns=wanted):
                for column in wanted:
                    if batch[column].null_count:
                        row = position + batch[column].is_null().index(True).as_py()
                        raise UserError(f"{file}: column {column!r} is null in row {row}; expected a value")
                position += len(batch)
                if skipped < len(batch):
                    yield _as_asked(batch.slice(skipped), stored)
                skipped = max(0, skipped - len(batch))


def _stored_column(schema: pa.Schema, column: str, file: Path) -> str | None:
    """The name under which a file has a column; None for one that it lacks and that has a constant value then.

    Raises:
        UserError: there is no such column, or it is of another type.
    """
    if column not in schema.names and column in _CONSTANTS:
        return None
    name = column if column in schema.names else _OTHER_NAMES.get(column, column)
    if name not in schema.names:
        raise UserError(f"{file}: no column {column!r}; found {', '.join(schema.names)}")
    kind = schema.field(name).type
    if column in _TEXT_COLUMNS and not is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
        raise UserError(f"{file}: column {name!r} is of {kind}, expected string")
    return name


def _as_asked(batch: pa.RecordBatch, stored: Mapping[str, str | None]) -> pa.Table:
    """Rows under the names that were asked for; text is of `string`, however the file's writer stored it."""
    columns = {}
    for column, name in stored.items():
        values = pa.repeat(_CONSTANTS[column], len(batch)) if name is None else batch[name]
        columns[column] = values.cast(pa.string()) if column in _TEXT_COLUMNS else values
    return pa.table(columns)


def _groups_from(metadata: pq.FileMetaData, first: int) -> tuple[list[int], int]:
    """The row groups of a file from the one that holds row `first` on, and the row with which that one begins."""
    position = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if position + rows > first:
            return list(range(group, metadata.num_row_groups)), position
        position += rows
    return [], position


class RowStream:
    """Tables read as one long table, so many rows at a time."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._tables = iter(tables)
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def take(self, rows: int) -> pa.Table | None:
        """The next `rows` rows in one chunk, fewer at the end, None if there are none."""
        while self._rows < rows and (table := next(self._tables, None)) is not None:
            self._waiting.append(table)
            self._rows += table.num_rows
        taken = min(rows, self._rows)
        if not taken:
            return None
        whole = pa.concat_tables(self._waiting)
        self._waiting, self._rows = [whole.slice(taken)], self._rows - taken
        return whole.slice(0, taken).combine_chunks()


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def count_rows(files: Sequence[Path]) -> int:
    """Rows of Parquet files, from their footers."""
    rows = 0
    for file in files:
        with _explained(file):
            rows += pq.read_metadata(file).num_rows
    return rows


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Say of a broken Parquet file which it is."""
    try:
        yield
    except PermissionError:
        raise  # which says nothing of the file
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: not a whole Parquet file ({reason}); make it again") from error
