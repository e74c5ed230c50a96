"""Files of texts as tables: Parquet, JSONL, CSV and plain text."""

import csv
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from modernbert_small.run.errors import UserError

logger = logging.getLogger(__name__)

ROWS_PER_READ = 1000
Values = Iterator[tuple[Any, ...]]


class Table(NamedTuple):
    """A file or hub dataset.

    columns: their names. values: a function that yields the rows' values of some columns. Its second argument is a seed
    for the order of the parts, or None to keep it.
    """

    columns: list[str]
    values: Callable[[Sequence[str], int | None], Values]


def find_files(name: str, path: Path) -> list[Path]:
    """The files of a folder that can be read, or the one file.

    Args:
        name: of the source, for messages.
        path: a file or a folder. Files in hidden folders are left out, others of unknown kinds are logged.

    Raises:
        UserError: there is no file of a known kind, or a symbolic link leads out of the folder.
    """
    expected = f"expected {', '.join(READERS)}"
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UserError(f"--sources {name}={path}: found a {path.suffix or 'nameless'} file; {expected}")
        return [path]
    visible = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    files = [file for file in visible if file.suffix.lower() in READERS]
    others = sorted({file.suffix or file.name for file in visible if file not in set(files)})
    if not files:
        raise UserError(f"--sources {name}={path}: found {', '.join(others) or 'no files'} in the folder; {expected}")
    require_inside(name, path, files)
    if others:
        logger.info("%s: %d files of other kinds not read: %s", name, len(visible) - len(files), ", ".join(others))
    return files


def require_inside(name: str, folder: Path, files: Iterable[Path]) -> None:
    """Refuse files outside a source's folder, which nobody named and which its hash does not cover.

    A snapshot in the hub's cache consists of links to the repository's `blobs`, which belong to it.

    Raises:
        UserError: with the first such file.
    """
    top = folder.resolve()
    if top.parent.name == "snapshots":
        top = top.parents[1]
    for file in files:
        if not file.resolve().is_relative_to(top):
            raise UserError(
                f"--sources {name}={folder}: {file} leads to {file.resolve()}, outside this folder; expected only "
                "files in it: name the other place as a source of its own"
            )


def open_file(path: Path) -> Table:
    """A file's columns and rows, by the ending of its name."""
    return READERS[path.suffix.lower()](path)


def _open_parquet(path: Path) -> Table:
    with pq.ParquetFile(path) as file:
        columns = file.schema_arrow.names

    def values(wanted: Sequence[str], _seed: int | None) -> Values:
        # pre_buffer, the default, keeps every row group that was read until the file is closed.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(ROWS_PER_READ, columns=list(wanted)):
                yield from zip(*(batch.column(name).to_pylist() for name in wanted), strict=True)

    return Table(columns, values)


def _open_jsonl(path: Path) -> Table:
    def objects() -> Iterator[dict[str, Any]]:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise UserError(f"{path}: line {number}: expected a JSON object, found {line.strip():.60}")
                    yield value

    def values(wanted: Sequence[str], _seed: int | None) -> Values:
        return (tuple(map(row.get, wanted)) for row in objects())

    return Table(list(next(objects(), {})), values)


def _open_csv(path: Path) -> Table:
    csv.field_size_limit(1 << 30)  # the default, 131,072 characters, is shorter than an article

    def values(wanted: Sequence[str], _seed: int | None) -> Values:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            for number, row in enumerate(reader, 1):
                if None in row:  # where DictReader puts cells beyond the header's
                    cells = len(row) - 1 + len(row[None])
                    raise UserError(
                        f"{path}: row {number}: {cells} cells, but the header has {len(columns)}; texts with commas "
                        'must stand in quotes: "one, two"'
                    )
                yield tuple(map(row.get, wanted))

    with path.open(encoding="utf-8-sig", newline="") as stream:
        columns = next(csv.reader(stream, strict=True), [])
    return Table(columns, values)


def _open_txt(path: Path) -> Table:
    """A text file is one document."""

    def values(_wanted: Sequence[str], _seed: int | None) -> Values:
        yield (path.read_text(encoding="utf-8-sig"),)

    return Table(["text"], values)


READERS = {".parquet": _open_parquet, ".jsonl": _open_jsonl, ".csv": _open_csv, ".txt": _open_txt}
