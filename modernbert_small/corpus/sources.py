"""Where text comes from: the four sets of the recipe, docstrings, and people's own files.

A source gives rows; a row gives one or more texts, each a `query` or a `document`. Columns are known by their names,
or named by a mapping: see `run.columns`. A row without its texts is skipped and counted.
"""

import errno
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from huggingface_hub import constants, snapshot_download

from modernbert_small.corpus.docstrings import PACKAGES, python_files, read_docstrings
from modernbert_small.corpus.files import find_files, require_inside
from modernbert_small.run.columns import LAYOUTS, NAMES, UnusableError, find_columns, listed_columns, split_mapping
from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import is_of_the_network, is_own, reason, why_the_hub_failed
from modernbert_small.run.readers import ROWS_PER_READ, BadRow, Piece, Table, Values, ending, open_file
from modernbert_small.run.shards import count_rows

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset

logger = logging.getLogger(__name__)

QUERY, DOCUMENT = "query", "document"
PYTHON_DOCS = "python_docs"
# name: (hub id, config)
KNOWN_SOURCES: dict[str, tuple[str, str | None]] = {
    "msmarco": ("sentence-transformers/msmarco-msmarco-MiniLM-L6-v3", "triplet"),
    "sep": ("johnnyboycurtis/Philosophical-Triplets-Retrieval", None),
    "npr": ("sentence-transformers/npr", None),
    "finewiki": ("HuggingFaceFW/finewiki", "en"),
}

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_SHUFFLE_BUFFER = 10_000

_UNITS = 64  # of work in a source, at least, unless they were too small
_UNIT_BYTES = (1 << 20, 64 << 20)  # of a unit of work, which several small files or pieces make

Row = list[tuple[str, str]]  # (kind, text) of each text of a row


class Part(NamedTuple):
    """A file or hub dataset.

    rows: from a seed (None: keep the order) to its rows. size: bytes, roughly. pieces: parts that hold the same rows
    together; none if it can only be read from its beginning.
    """

    rows: Callable[[int | None], Iterator[Row]]
    size: int = 0
    pieces: "Sequence[Part]" = ()


class Unit(NamedTuple):
    """Rows of a source that one process reads. size: bytes, roughly."""

    rows: Callable[[], Iterator[Row]]
    size: int


class Field(NamedTuple):
    """Columns that make one text, a title before the text, and its kind. Lists in the last one make several texts."""

    columns: tuple[str, ...]
    kind: str


@dataclass
class Skipped:
    """Rows that cannot be used.

    Attributes:
        is_strict: they are refused.
        count: of them.
        first: what is wrong with the first of them.
    """

    is_strict: bool = False
    count: int = 0
    first: str = ""

    def note(self, what: str) -> None:
        """Count a row.

        Raises:
            UserError: such rows are refused.
        """
        if self.is_strict:
            raise UserError(f"{what}; without --strict such rows are skipped and counted")
        self.first = self.first or what
        self.count += 1


@dataclass
class Source:
    """One opened source.

    Attributes:
        name: what the corpus calls it.
        location: local path or hub id; None for docstrings.
        parts: its files, or its hub dataset.
        skipped: rows, documents and files with docstrings that cannot be used, as they are met.
        has_pairs: some rows begin with a query and a document that answers it.
    """

    name: str
    location: str | None
    parts: list[Part] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)
    has_pairs: bool = False

    def rows(self, max_rows: int | None, seed: int) -> Iterator[Row]:
        """All rows in order, or `max_rows` of them from a shuffle of the files and a buffer of rows.

        Raises:
            UserError: a file that breaks off, a hub that goes away, a row that cannot be used if such are refused.
        """
        self.skipped.count, self.skipped.first = 0, ""
        if max_rows is None:
            return chain.from_iterable(part.rows(None) for part in self.parts)
        order = random.Random(seed)
        shuffled_parts = order.sample(self.parts, len(self.parts))
        rows = chain.from_iterable(part.rows(seed) for part in shuffled_parts)
        return islice(_shuffled(rows, order), max_rows)

    def units(self, max_rows: int | None, seed: int) -> list[Unit]:
        """The rows in units of work, which are the same for any number of processes.

        A unit holds some megabytes: files, row groups of a Parquet file, or shards of a hub dataset. `max_rows` of all
        rows are one unit, since which rows they are depends on the order of reading. `skipped` counts for the unit
        that is read.

        Args:
            max_rows: as in `rows`.
            seed: as in `rows`.
        """
        size = sum(part.size for part in self.parts)
        if max_rows is not None:
            return [Unit(partial(self.rows, max_rows, seed), size)]
        least = max(_UNIT_BYTES[0], min(_UNIT_BYTES[1], size // _UNITS))
        units: list[Unit] = []
        held, size = [], 0
        for piece in chain.from_iterable(part.pieces or [part] for part in self.parts):
            held.append(piece)
            size += piece.size
            if size >= least:
                units.append(Unit(partial(self._rows_of, held), size))
                held, size = [], 0
        return [*units, Unit(partial(self._rows_of, held), size)] if held else units

    def _rows_of(self, pieces: Sequence[Part]) -> Iterator[Row]:
        self.skipped.count, self.skipped.first = 0, ""
        return chain.from_iterable(piece.rows(None) for piece in pieces)


def source_locations(specs: Sequence[str]) -> dict[str, str | None]:
    """Each source's name and its local path or hub id; None for docstrings.

    Args:
        specs: `name`, or `name=<local path or hub id>`, which a mapping may follow.

    Raises:
        UserError: an unknown or repeated name, or a mapping that was cut at its comma.
    """
    locations: dict[str, str | None] = {}
    for spec in specs:
        name, _, given = spec.partition("=")
        if name in NAMES and locations:
            raise UserError(
                f"--sources {spec!r}: looks like a part of the mapping before it; in a recipe put quotes around a "
                "source with its mapping, as in 'faq=faq.csv:query=question,positive=answer'"
            )
        if not _NAME.fullmatch(name) or spec.endswith("="):
            raise UserError(f"--sources {spec!r}: expected NAME or NAME=PATH_OR_HUB_ID, names of letters and digits")
        if name in locations:
            raise UserError(f"--sources: {name} is named twice; each source needs its own name")
        if not given and name not in (PYTHON_DOCS, *KNOWN_SOURCES):
            known = ", ".join([*KNOWN_SOURCES, PYTHON_DOCS])
            raise UserError(f"--sources {name}: not a known source ({known}); for your own text: {name}=PATH_OR_HUB_ID")
        locations[name] = os.path.expanduser(given) if given else KNOWN_SOURCES.get(name, (None, None))[0]
    return locations


def is_local(location: str | None) -> bool:
    """Whether a source needs no hub: docstrings, files and folders."""
    return location is None or Path(split_mapping("--sources", location).path).exists()


def open_sources(locations: Mapping[str, str | None], is_strict: bool = False) -> list[Source]:
    """Open every source and look for its first row; nothing is written.

    Args:
        locations: as `source_locations` gives them, with mappings or without.
        is_strict: refuse rows and files that cannot be used, which are skipped otherwise.

    Raises:
        UserError: a missing path, a hub out of reach, columns of no known names, a corrupt file, no row that can be
            used.
    """
    return [_open_source(name, location, is_strict) for name, location in locations.items()]


def recognise(columns: Sequence[str], where: str, mapping: Mapping[str, str] = MappingProxyType({})) -> list[Field]:
    """The texts of a row: a query with documents, or else one document.

    Args:
        columns: of the table.
        where: what the table is, for errors.
        mapping: of `split_mapping`.

    Raises:
        UnusableError: no column holds a text, or the mapping names a column that is not there.
    """
    found = find_columns(columns, where, mapping)
    answers = [(column,) for column in found["positive"]]
    texts = [(*found["title"][:1], column) for column in found["text"][:1]]
    if found["query"]:
        documents = [*(answers or texts), *((column,) for column in found["negative"])]
        return [Field((found["query"][0],), QUERY), *(Field(document, DOCUMENT) for document in documents)]
    if texts:
        return [Field(texts[0], DOCUMENT)]
    raise UnusableError(f"{where}: {listed_columns(columns)}; expected {LAYOUTS}")


def _open_source(name: str, location: str | None, is_strict: bool) -> Source:
    source = Source(name, location, skipped=Skipped(is_strict))
    if location is None:
        source.parts = [
            Part(partial(_docstring_rows, path, source.skipped), path.stat().st_size) for path in python_files(PACKAGES)
        ]
        source.has_pairs = True
        return source
    place = split_mapping("--sources", location)
    path = Path(place.path)
    configs = _hub_configs(path)
    for pattern in _strings(configs):
        if "://" in pattern or "::" in pattern or pattern.startswith("/") or ".." in Path(pattern).parts:
            raise UserError(
                f"--sources {name}={location}: its README.md names files outside the folder ({pattern}); expected only "
                "files in it: name the other place as a source of its own"
            )
    if path.exists() and configs is None:
        openers = {str(file): partial(open_file, file, place.encoding) for file in find_files(name, path)}
    elif path.exists() or (_HUB_ID.fullmatch(place.path) and not ending(path) and name not in NAMES):
        _, config = KNOWN_SOURCES.get(name, (None, None))
        openers = {f"{name} ({place.path})": partial(_open_dataset, name, place.path, config)}
    else:
        quotes = "; in a recipe put quotes around a whole source with a mapping" if name in NAMES else ""
        raise UserError(f"--sources {name}={location}: no such file or folder; looked at {path.absolute()}{quotes}")
    _open_parts(source, openers, place.columns)
    return source


def _open_parts(source: Source, openers: Mapping[str, Callable[[], Table]], mapping: Mapping[str, str]) -> None:
    """Open the tables of a source, and say what is read of them. Of several, those without texts are left out.

    Args:
        source: gets `parts` and `has_pairs`.
        openers: by what to call the table in messages.
        mapping: of `split_mapping`.
    """
    layouts: Counter[str] = Counter()
    for where, opener in openers.items():
        with _explained(where):
            table = opener()
        try:
            fields = recognise(table.columns, where, {} if table.is_document else mapping)
            if not table.is_document:  # which takes time to read, and cannot be anything else
                _require_a_row(table, fields, where, source.skipped.is_strict)
        except UnusableError as error:
            if source.skipped.is_strict or len(openers) == 1:
                raise
            logger.warning("%s: not read: %s", source.name, error)
            continue
        source.parts.append(_part(table, fields, where, source.skipped))
        source.has_pairs |= len(fields) > 1
        layouts["each file as document" if table.is_document else _layout(table.columns, fields)] += 1
    if not source.parts:
        raise UserError(f"--sources {source.name}={source.location}: no file in it holds texts; expected {LAYOUTS}")
    for layout, count in layouts.items():
        logger.info("%s: read: %s%s", source.name, layout, f" ({count} files)" if count > 1 else "")


def _part(table: Table, fields: list[Field], where: str, skipped: Skipped) -> Part:
    """A table's rows as texts, whole and in pieces. Of a file that has no pieces the size on disk counts."""
    pieces = [
        Part(
            partial(_rows, table._replace(values=piece.values), fields, where, skipped, first=piece.first_row + 1),
            piece.size,
        )
        for piece in table.pieces
    ]
    size = sum(piece.size for piece in pieces) or (Path(where).stat().st_size if Path(where).is_file() else 0)
    return Part(partial(_rows, table, fields, where, skipped), size, pieces)


def _require_a_row(table: Table, fields: list[Field], where: str, is_strict: bool) -> None:
    """Refuse a table none of whose rows can be used, unless it has no rows."""
    trial = Skipped(is_strict)
    if next(_rows(table, fields, where, trial, None), None) is None and trial.count:
        raise UnusableError(f"{trial.first}; none of its {trial.count} rows can be used")


def _layout(columns: Sequence[str], fields: list[Field]) -> str:
    """What is read of a table, for the log."""
    used = ", ".join(f"{' with '.join(field.columns)} as {field.kind}" for field in fields)
    unused = [column for column in columns if not any(column in field.columns for field in fields)]
    return used + (f"; not used: {', '.join(unused)}" if unused else "")


def _rows(
    table: Table, fields: list[Field], where: str, skipped: Skipped, seed: int | None, first: int = 1
) -> Iterator[Row]:
    """The rows of a table as texts, numbered from `first` on in messages."""
    wanted = list(dict.fromkeys(column for one in fields for column in one.columns))
    with _explained(where):
        for number, values in enumerate(table.values(wanted, seed), first):
            if isinstance(values, BadRow):
                skipped.note(f"{where}: {'' if table.is_document else f'row {number}: '}{values.why}")
                continue
            row = dict(zip(wanted, values, strict=True))
            try:
                # A row may lack negatives, but not its text, or its query and the answer.
                if empty := [columns[-1] for columns, _ in fields[:2] if row[columns[-1]] == []]:
                    raise _NoTextError(f"column {empty[0]!r}: an empty list; expected a text")
                yield [(kind, text) for columns, kind in fields for text in _texts(row, columns)]
            except _NoTextError as error:
                skipped.note(f"{where}: row {number}, {error}")


class _NoTextError(Exception):
    """A value that is no text."""


def _texts(row: Mapping[str, object], columns: Sequence[str]) -> list[str]:
    """One text, or one for each item of a list.

    Raises:
        _NoTextError: a null or something else that is no string.
    """
    *titles, column = columns
    value = row[column]
    title = next((title.strip() for title in map(row.get, titles) if isinstance(title, str)), "")
    texts = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            found = "null" if text is None else f"{type(text).__name__} {text!r:.60}"
            raise _NoTextError(f"column {column!r}: {found}; expected a string")
        has_title = not title or text.lstrip("# \n").startswith(title)  # some texts begin with their title
        texts.append(text if has_title else f"# {title}\n\n{text}")
    return texts


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn what goes wrong in reading `where` into one line.

    Readers and the hub client raise whatever the layer below did, so anything goes, except a full disk.

    Raises:
        UserError: the reading failed.
    """
    try:
        yield
    except Exception as error:
        if is_own(error) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise
        logger.debug("%s", where, exc_info=True)
        again = "; the connection broke off: run the same command again" if is_of_the_network(error) else ""
        raise UserError(f"{where}: cannot be read: {reason(error)}{again}") from error


def _shuffled(rows: Iterable[Row], order: random.Random) -> Iterator[Row]:
    """Shuffle through a buffer, as datasets' streaming shuffle does."""
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < _SHUFFLE_BUFFER:
            buffer.append(row)
            continue
        place = order.randrange(_SHUFFLE_BUFFER)
        buffer[place], row = row, buffer[place]
        yield row
    order.shuffle(buffer)
    yield from buffer


def _docstring_rows(path: Path, skipped: Skipped, _seed: int | None) -> Iterator[Row]:
    docstrings = read_docstrings(path)
    if docstrings is None:
        skipped.note(f"{path}: does not parse")
    for summary, body in docstrings or []:
        yield [(kind, text) for kind, text in ((QUERY, summary), (DOCUMENT, body)) if text]


def _hub_configs(path: Path) -> object:
    """What a folder's README.md declares as `configs:`, as datasets on the hub do; None if it declares nothing."""
    readme = path / "README.md"
    if not readme.is_file():
        return None
    front_matter = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        declared = yaml.safe_load(front_matter[1]) if front_matter else None
    except yaml.YAMLError:
        return None
    return declared.get("configs") if isinstance(declared, dict) else None


def _strings(value: object) -> Iterator[str]:
    """All strings in nested lists and mappings, such as the patterns of `configs:`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _open_dataset(name: str, location: str, config: str | None) -> Table:
    """A dataset on the hub, or a local folder laid out like one, streamed.

    Offline (HF_HUB_OFFLINE) it is read from the copy in the hub's cache. datasets would find there only what it has
    prepared itself, and it prepares nothing when it streams.

    Raises:
        UserError: it cannot be reached, has no such config or no split `train`, or has files outside its folder.
    """
    from datasets import load_dataset_builder  # local files do without datasets

    try:
        folder = _local_folder(location) or location
        builder = load_dataset_builder(folder, config)
        if Path(folder).exists():
            files = chain.from_iterable((builder.config.data_files or {}).values())
            require_inside(name, Path(folder), map(Path, files))
        dataset = builder.as_streaming_dataset(split="train")
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except Exception as error:  # datasets and the hub's client raise many kinds
        if is_own(error):
            raise
        logger.debug("--sources %s", name, exc_info=True)
        raise UserError(f"--sources {name}: {location}: {_why_not(name, location, config, error)}") from error

    return Table(columns, **_rows_and_pieces(dataset, builder, folder, config))


def _rows_and_pieces(
    dataset: "IterableDataset", builder: "DatasetBuilder", folder: str, config: str | None
) -> dict[str, Any]:
    """What a Table of a streamed dataset has beside its columns."""
    from datasets import load_dataset
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    is_parquet = isinstance(builder.config, ParquetConfig)

    @cache
    def chosen(wanted: tuple[str, ...]) -> "IterableDataset":
        if is_parquet:
            # Fetches these columns alone, unlike select_columns: finewiki's `wikitext` outweighs its `text`.
            return load_dataset(folder, config, split="train", streaming=True, columns=list(wanted))
        return dataset

    def values(wanted: Sequence[str], seed: int | None, shard: int | None = None) -> Values:
        rows = chosen(tuple(wanted))
        if shard is not None:
            rows = rows.shard(dataset.num_shards, shard)
        if seed is not None:
            # The order of the shards; `_shuffled` does the rows.
            for row in rows.shuffle(seed=seed, buffer_size=1):
                yield tuple(row[column] for column in wanted)
            return
        for table in rows.with_format("arrow").iter(batch_size=ROWS_PER_READ):
            yield from zip(*(table[column].to_pylist() for column in wanted), strict=True)

    if is_parquet and Path(folder).exists():
        pieces = _row_groups(builder.config.data_files["train"])
    else:  # the size of a hub's files is not known here: each is a unit of work
        pieces = [Piece(partial(values, shard=index), _UNIT_BYTES[1]) for index in range(dataset.num_shards)]
    return {"values": values, "pieces": pieces}


def _row_groups(files: Iterable[str]) -> list[Piece]:
    """The pieces of several Parquet files that are one table."""
    pieces: list[Piece] = []
    first = 0
    for file in map(Path, files):
        pieces += [piece._replace(first_row=first + piece.first_row) for piece in open_file(file).pieces]
        first += count_rows([file])
    return pieces


def _local_folder(location: str) -> str | None:
    """A dataset's folder on this machine: the one that was named, or offline the hub's cache of it.

    Raises:
        LocalEntryNotFoundError: offline, and the cache has none.
    """
    if Path(location).exists():
        return location
    if constants.HF_HUB_OFFLINE:
        return snapshot_download(location, repo_type="dataset", local_files_only=True)
    return None


def _why_not(name: str, location: str, config: str | None, error: Exception) -> str:
    """Why a dataset cannot be opened, and what to do."""
    if Path(location).exists():
        of_config = f" of config {config}" if config else ""
        return f"cannot be opened ({reason(error)}); expected split train{of_config}"
    or_path, not_here = f"or pass --sources {name}=<local path>", f"no such folder here ({Path(location).absolute()})"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{not_here}, HF_HUB_OFFLINE is set, and the hub's cache holds no copy; fetch one with "
            f"`hf download --repo-type dataset {location}`, {or_path}"
        )
    return f"{not_here}, and {why_the_hub_failed(error)}, {or_path}"
