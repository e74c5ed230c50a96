"""Where text comes from: the four sets of the recipe, docstrings, and people's own files.

A source gives rows; a row gives one or more texts, each a `query` or a `document`. Columns are recognised
by name: `text`, or `query, positive[, negative][, text_chunk]`, or `title, body`.
"""

import errno
import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import constants, snapshot_download

from modernbert_small.corpus.docstrings import python_files, read_docstrings
from modernbert_small.corpus.files import (
    READERS,
    ROWS_PER_READ,
    Table,
    Values,
    find_files,
    open_file,
    require_inside,
)
from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import is_of_the_network, is_own, reason, why_the_hub_failed

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
LAYOUTS = "`text`, or `query, positive[, negative]`, or `title, body`"

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_SHUFFLE_BUFFER = 10_000

Row = list[tuple[str, str]]  # (kind, text) of each text of a row


class Field(NamedTuple):
    """Columns that make one text, and its kind."""

    columns: tuple[str, ...]
    kind: str


@dataclass
class Source:
    """One opened source.

    Attributes:
        name: what the corpus calls it.
        location: local path or hub id; None for docstrings.
        parts: one function a file or hub dataset, from a seed (None: keep the order) to its rows.
        skipped_files: docstring files that do not parse, as they are met.
    """

    name: str
    location: str | None
    parts: list[Callable[[int | None], Iterator[Row]]]
    skipped_files: list[Path] = field(default_factory=list)

    def rows(self, max_rows: int | None, seed: int) -> Iterator[Row]:
        """All rows in order, or `max_rows` of them from a shuffle of the files and a buffer of rows.

        Raises:
            UserError: a null, a text that is not a string, a file that breaks off, a hub that goes away.
        """
        if max_rows is None:
            return chain.from_iterable(part(None) for part in self.parts)
        order = random.Random(seed)
        shuffled_parts = order.sample(self.parts, len(self.parts))
        rows = chain.from_iterable(part(seed) for part in shuffled_parts)
        return islice(_shuffled(rows, order), max_rows)


def source_locations(specs: Sequence[str]) -> dict[str, str | None]:
    """Each source's name and its local path or hub id; None for docstrings.

    Args:
        specs: `name`, or `name=<local path or hub id>`.

    Raises:
        UserError: an unknown or repeated name.
    """
    locations: dict[str, str | None] = {}
    for spec in specs:
        name, _, given = spec.partition("=")
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
    return location is None or Path(location).exists()


def open_sources(locations: Mapping[str, str | None]) -> list[Source]:
    """Open every source and look at its first row; nothing is written.

    Args:
        locations: as `source_locations` gives them.

    Raises:
        UserError: a missing path, a hub out of reach, columns of no known layout, a corrupt file.
    """
    return [_open_source(name, location) for name, location in locations.items()]


def recognise(columns: Sequence[str], where: str) -> list[Field]:
    """The texts of a row by the names of its columns, `text` before the other layouts.

    Raises:
        UserError: no layout fits.
    """
    present = set(columns)
    if "text" in present:
        return [Field(("text",), DOCUMENT)]
    if {"query", "positive"} <= present:
        documents = [name for name in ("positive", "negative", "text_chunk") if name in present]
        return [Field(("query",), QUERY), *(Field((name,), DOCUMENT) for name in documents)]
    if {"title", "body"} <= present:
        return [Field(("title", "body"), DOCUMENT)]
    raise UserError(f"{where}: found columns {', '.join(columns) or 'none'}; expected {LAYOUTS}")


def _open_source(name: str, location: str | None) -> Source:
    if location is None:
        source = Source(name, None, [])
        source.parts = [partial(_docstring_rows, path, source.skipped_files) for path in python_files()]
        return source
    path = Path(location)
    configs = _hub_configs(path)
    for pattern in _strings(configs):
        if "://" in pattern or "::" in pattern or pattern.startswith("/") or ".." in Path(pattern).parts:
            raise UserError(
                f"--sources {name}={location}: its README.md names files outside the folder ({pattern}); expected only "
                "files in it: name the other place as a source of its own"
            )
    if path.exists() and configs is None:
        files = find_files(name, path)
        return Source(name, location, [_open_part(str(file), partial(open_file, file)) for file in files])
    if not path.exists() and (not _HUB_ID.fullmatch(location) or path.suffix.lower() in READERS):
        raise UserError(f"--sources {name}={location}: no such file or folder")
    _, config = KNOWN_SOURCES.get(name, (None, None))
    opener = partial(_open_dataset, name, location, config)
    return Source(name, location, [_open_part(f"{name} ({location})", opener)])


def _open_part(where: str, opener: Callable[[], Table]) -> Callable[[int | None], Iterator[Row]]:
    """Open a table, check its layout and its first row."""
    with _explained(where):
        table = opener()
    part = partial(_rows, table, recognise(table.columns, where), where)
    next(part(None), None)
    return part


def _rows(table: Table, fields: list[Field], where: str, seed: int | None) -> Iterator[Row]:
    """The rows of a table as texts."""
    wanted = list(dict.fromkeys(column for one in fields for column in one.columns))
    with _explained(where):
        for number, values in enumerate(table.values(wanted, seed), 1):
            for column, value in zip(wanted, values, strict=True):
                if not isinstance(value, str):
                    found = "null" if value is None else f"{type(value).__name__} {value!r:.60}"
                    raise UserError(f"{where}: row {number}, column {column!r}: {found}; expected a string")
            row = dict(zip(wanted, values, strict=True))
            yield [(kind, _join(*(row[column] for column in columns))) for columns, kind in fields]


def _join(first: str, body: str | None = None) -> str:
    return first if body is None else f"# {first}\n\n{body}"


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


def _docstring_rows(path: Path, skipped: list[Path], _seed: int | None) -> Iterator[Row]:
    docstrings = read_docstrings(path)
    if docstrings is None:
        skipped.append(path)
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
    from datasets import load_dataset, load_dataset_builder  # local files do without datasets
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

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

    def values(wanted: Sequence[str], seed: int | None) -> Values:
        if isinstance(builder.config, ParquetConfig):
            # Fetches these columns alone, unlike select_columns: finewiki's `wikitext` outweighs its `text`.
            chosen = load_dataset(folder, config, split="train", streaming=True, columns=list(wanted))
        else:
            chosen = dataset
        if seed is not None:
            # The order of the shards; `_shuffled` does the rows.
            for row in chosen.shuffle(seed=seed, buffer_size=1):
                yield tuple(row[column] for column in wanted)
            return
        for table in chosen.with_format("arrow").iter(batch_size=ROWS_PER_READ):
            yield from zip(*(table[column].to_pylist() for column in wanted), strict=True)

    return Table(columns, values)


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
    or_path = f"or pass --sources {name}=<local path>"
    if constants.HF_HUB_OFFLINE:
        return (
            "no such folder here, HF_HUB_OFFLINE is set, and the hub's cache holds no copy; fetch one with "
            f"`hf download --repo-type dataset {location}`, {or_path}"
        )
    return f"no such folder here, and {why_the_hub_failed(error)}, {or_path}"
