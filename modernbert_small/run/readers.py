"""Files of texts as tables: Parquet, Arrow, JSON, CSV, and documents that are a file each.

A row that cannot be read comes as a `BadRow`, so that whoever reads decides whether to skip it.
"""

import codecs
import csv
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import is_own, reason

logger = logging.getLogger(__name__)

ROWS_PER_READ = 1000
_DELIMITERS = ",;\t|"
_DETECTION_BYTES = 1 << 16


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, and why."""

    why: str


Values = Iterator[tuple[Any, ...] | BadRow]


class Piece(NamedTuple):
    """Some rows of a table, which are read without the others.

    values: as a Table's. size: bytes, roughly. first_row: their first row's place in the table, counted from 0.
    """

    values: Callable[[Sequence[str], int | None], Values]
    size: int
    first_row: int = 0


class Table(NamedTuple):
    """A file or hub dataset.

    columns: their names. values: a function that yields the rows' values of some columns. Its second argument is a seed
    for the order of the parts, or None to keep it. is_document: the file is one text, which is read only when needed.
    pieces: all rows, in pieces that several processes can read; none if the file can only be read from its beginning.
    """

    columns: list[str]
    values: Callable[[Sequence[str], int | None], Values]
    is_document: bool = False
    pieces: Sequence[Piece] = ()


Reader = Callable[[Path, str | None], Table]


def ending(path: Path) -> str | None:
    """The ending of a file's name that says its format, such as `.csv.gz`; None if nothing here reads it."""
    return next((known for known in READERS if path.name.lower().endswith(known)), None)


def open_file(path: Path, encoding: str | None = None) -> Table:
    """A file's columns and rows.

    Args:
        path: a file with an `ending`.
        encoding: of its text. None: UTF-8, or if it is not, what its bytes look like. Parquet, Arrow and PDF know
            theirs, and an HTML page may say it.

    Raises:
        UserError: no JSON objects, CSV rows that do not fit their header, or an encoding that nothing tells.
        Exception: of the format's library, for a file that is damaged as a whole.
    """
    return READERS[ending(path) or ""](path, encoding)


def _open_parquet(path: Path, _encoding: str | None) -> Table:
    with pq.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]

    def values(wanted: Sequence[str], _seed: int | None, row_groups: list[int] | None = None) -> Values:
        # pre_buffer, the default, keeps every row group that was read until the file is closed.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(ROWS_PER_READ, row_groups=row_groups, columns=list(wanted)):
                yield from _rows_of(batch, wanted)

    starts = accumulate((rows for rows, _ in sizes), initial=0)
    pieces = [
        Piece(partial(values, row_groups=[index]), size, start)
        for index, ((_, size), start) in enumerate(zip(sizes, starts, strict=False))
    ]
    return Table(columns, values, pieces=pieces)


def _open_arrow(path: Path, _encoding: str | None) -> Table:
    def values(wanted: Sequence[str], _seed: int | None) -> Values:
        with _arrow_batches(path) as (_, batches):
            for batch in batches:
                yield from _rows_of(batch, wanted)

    with _arrow_batches(path) as (columns, _):
        return Table(columns, values)


@contextmanager
def _arrow_batches(path: Path) -> Iterator[tuple[list[str], Iterable[pa.RecordBatch]]]:
    """Columns and batches of an Arrow file, or of a stream, the form in which datasets stores its cache."""
    with pa.memory_map(str(path)) as stored:
        if stored.read(6) == b"ARROW1":
            file = pa.ipc.open_file(stored)
            yield file.schema.names, map(file.get_batch, range(file.num_record_batches))
        else:
            stored.seek(0)
            stream = pa.ipc.open_stream(stored)
            yield stream.schema.names, stream


def _rows_of(batch: pa.RecordBatch, wanted: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    return zip(*(batch.column(name).to_pylist() for name in wanted), strict=True)


def _open_jsonl(path: Path, encoding: str | None) -> Table:
    def objects() -> Iterator[object]:
        for number, line in enumerate(_lines(path, encoding), 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    yield BadRow(f"line {number} is not JSON: {error}")

    return _table_of_objects(path, objects)


def _open_json(path: Path, encoding: str | None) -> Table:
    """An array of objects, one object, or JSON lines under another name."""

    def objects() -> Iterator[object]:
        found = json.loads(_read_text(path, encoding))
        yield from found if isinstance(found, list) else [found]

    try:
        return _table_of_objects(path, objects)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        return _open_jsonl(path, encoding)


def _table_of_objects(path: Path, objects: Callable[[], Iterator[object]]) -> Table:
    """A table of JSON objects; its columns are the keys of the first of them, of which some may lack some."""
    first = list(islice(objects(), ROWS_PER_READ))
    columns = dict.fromkeys(chain.from_iterable(value for value in first if isinstance(value, dict)))
    if first and not columns:
        raise UserError(f"{path}: {_not_an_object(first[0]).why}")

    def values(wanted: Sequence[str], _seed: int | None) -> Values:
        for value in objects():
            yield tuple(map(value.get, wanted)) if isinstance(value, dict) else _not_an_object(value)

    return Table(list(columns), values)


def _not_an_object(value: object) -> BadRow:
    return value if isinstance(value, BadRow) else BadRow(f"expected a JSON object, found {json.dumps(value):.60}")


def _open_csv(path: Path, encoding: str | None) -> Table:
    """A file with a header; its delimiter is the one that divides the header into the most cells."""
    csv.field_size_limit(1 << 30)  # the default, 131,072 characters, is shorter than an article

    def values(wanted: Sequence[str], _seed: int | None) -> Values:
        reader = csv.DictReader(_lines(path, encoding), strict=True, delimiter=delimiter)
        for number, row in enumerate(reader, 1):
            if None in row:  # where DictReader puts cells beyond the header's
                cells = len(row) - 1 + len(row[None])
                raise UserError(
                    f"{path}: row {number}: {cells} cells, but the header has {len(columns)}; texts with commas "
                    'must stand in quotes: "one, two"'
                )
            yield tuple(map(row.get, wanted))

    headers = {one: next(csv.reader(_lines(path, encoding), delimiter=one), []) for one in _DELIMITERS}
    delimiter, columns = max(headers.items(), key=lambda item: len(item[1]))
    return Table(columns, values)


def _open_document(read: Callable[[Path, str | None], str], path: Path, encoding: str | None) -> Table:
    """A file that is one document, in the column `text`."""

    def values(_wanted: Sequence[str], _seed: int | None) -> Values:
        try:
            yield (read(path, encoding),)
        except Exception as error:  # extractors raise many kinds
            if is_own(error) or isinstance(error, ImportError):  # a missing package is no fault of the file
                raise
            yield BadRow(f"cannot be read: {reason(error)}")

    return Table(["text"], values, is_document=True)


def _read_text(path: Path, encoding: str | None) -> str:
    return "".join(_lines(path, encoding))


def _read_html(path: Path, encoding: str | None) -> str:
    """The main text of a page, without menus and the like."""
    import trafilatura  # only pages need it, and it is slow to import

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # what it has to say is said here
    with pa.input_stream(str(path)) as stream:
        page = stream.read()
    text = trafilatura.extract(page.decode(encoding) if encoding else page, include_comments=False)
    if text is None:
        raise ValueError("no main text found in the page")
    return text


def _open_pdf(path: Path, encoding: str | None) -> Table:
    try:
        import pypdf
    except ImportError as error:
        raise UserError(
            f"{path}: to read PDF, the package pypdf is missing; install it with: pip install -e .[pdf]"
        ) from error

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of files that it reads all the same

    def read(path: Path, _encoding: str | None) -> str:
        text = "\n\n".join(page.extract_text() for page in pypdf.PdfReader(path).pages)
        if not text.strip():
            raise ValueError("no text in its pages, which may be pictures")
        return text

    return _open_document(read, path, encoding)


def _lines(path: Path, encoding: str | None) -> Iterator[str]:
    """A file's lines with their ends, decompressed if its name says so.

    If no encoding is given, the file is UTF-16 if it has a byte-order mark. Otherwise each line is UTF-8, or of the
    encoding that the first lines that are not UTF-8 look like. So a file may hold both.

    Raises:
        UserError: they look like nothing.
    """
    with io.BufferedReader(pa.input_stream(str(path)), _DETECTION_BYTES) as stream:
        beginning = stream.peek(3)
        if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"
        if beginning.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        if encoding is not None:
            yield from io.TextIOWrapper(stream, encoding, newline="")
            return
        detected = ""
        for line in stream:
            try:
                yield line.decode()
            except UnicodeDecodeError:
                detected = detected or _detect(path, [line, *stream.peek().splitlines(keepends=True)[:-1]])
                yield line.decode(detected)


def _detect(path: Path, lines: Iterable[bytes]) -> str:
    """The encoding that those of some lines that are not UTF-8 look like."""
    import charset_normalizer

    sample = b"".join(line for line in lines if not _is_utf8(line))
    # Western texts also look like other code pages, so the commonest is asked for first.
    western = charset_normalizer.from_bytes(sample, cp_isolation=["cp1252"])
    found = western.best() or charset_normalizer.from_bytes(sample).best()
    if found is None:
        raise UserError(f"{path}: not UTF-8, and no other encoding fits; name it: NAME=PATH:encoding=cp1252")
    _say_detected(path.with_name(f"*{path.suffix}"), found.encoding)
    return found.encoding


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


@cache
def _say_detected(files: Path, encoding: str) -> None:
    """Log an encoding once for the files of a folder, which may be many."""
    logger.warning(
        "%s: what is not UTF-8 is read as %s, which its bytes look like; name another one with NAME=PATH:encoding=...",
        files,
        encoding,
    )


COMPRESSIONS = (".gz", ".bz2", ".zst")
_OF_TEXT: dict[str, Reader] = {
    ".jsonl": _open_jsonl,
    ".json": _open_json,
    ".csv": _open_csv,
    ".tsv": _open_csv,
    ".txt": partial(_open_document, _read_text),
    ".md": partial(_open_document, _read_text),
    ".html": partial(_open_document, _read_html),
    ".htm": partial(_open_document, _read_html),
}
READERS: dict[str, Reader] = {
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
    ".pdf": _open_pdf,
    **{ending + packed: reader for ending, reader in _OF_TEXT.items() for packed in ("", *COMPRESSIONS)},
}
KNOWN_ENDINGS = f"{', '.join([*_OF_TEXT, '.parquet', '.arrow', '.pdf'])}, or {', '.join(COMPRESSIONS)} of text"
