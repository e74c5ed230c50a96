"""Which columns of a table hold which texts: by their names, or as the user says."""

import codecs
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from modernbert_small.run.errors import UserError

# What a column may hold, and the names by which it is known, the first of them first.
NAMES = {
    "query": ("query", "question", "anchor"),
    "positive": ("positive", "answer", "passage", "context"),
    "negative": ("negative", "text_chunk"),
    "text": ("text", "content", "body", "passage", "document", "sentence"),
    "title": ("title",),
    "score": ("score",),
}
LAYOUTS = (
    f"one of {', '.join(NAMES['text'])} (and title), or one of {', '.join(NAMES['query'])} with one of "
    f"{', '.join(NAMES['positive'])}, or a mapping such as PATH:query=COLUMN,positive=COLUMN"
)
_MAPPED = re.compile(r"(.+?):(\w+=.*)")


class UnusableError(UserError):
    """A table without texts."""


class Place(NamedTuple):
    """A file, folder or hub id, and what the user says about it.

    path: without the mapping. columns: a column for each of some NAMES; empty: they are known by their names.
    encoding: of text files; None: to be detected.
    """

    path: str
    columns: Mapping[str, str]
    encoding: str | None


def split_mapping(flag: str, given: str) -> Place:
    """Take `PATH:query=COLUMN,positive=COLUMN,encoding=NAME` apart.

    Args:
        flag: that gave it, for errors.
        given: a path or hub id, with a mapping or without.

    Raises:
        UserError: a part of the mapping is unknown, empty or repeated, or there is no such encoding.
    """
    match = _MAPPED.fullmatch(given)
    if match is None:
        return Place(given, {}, None)
    path, mapping = match.groups()
    columns: dict[str, str] = {}
    for part in mapping.split(","):
        name, _, column = part.partition("=")
        if name not in (*NAMES, "encoding") or not column or name in columns:
            raise UserError(
                f"{flag} {given}: found {part!r}; expected {', '.join(NAMES)} or encoding, each once and with a value, "
                "as in PATH:query=COLUMN,positive=COLUMN"
            )
        columns[name] = column
    encoding = columns.pop("encoding", None)
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError as error:
        raise UserError(f"{flag} {given}: Python knows no encoding {encoding}; use one such as cp1252") from error
    return Place(path, columns, encoding)


def listed(columns: Sequence[str]) -> str:
    """The names of columns for an error of one line, whatever is in them."""
    return ", ".join(" ".join(column.split()) or repr(column) for column in columns) or "none"


def listed_columns(columns: Sequence[str]) -> str:
    """What columns a table has, for an error of one line."""
    return f"found columns {listed(columns)}" if columns else "is empty: it has neither columns nor rows"


def find_columns(columns: Sequence[str], where: str, mapping: Mapping[str, str]) -> dict[str, list[str]]:
    """The columns of each of NAMES, as many as there are.

    A name is known in the plural too, and in upper case.

    Args:
        columns: of the table.
        where: what the table is, for errors.
        mapping: of `split_mapping`; if it is not empty, no other columns count.

    Raises:
        UnusableError: the mapping names a column that is not there.
    """
    if absent := [column for column in mapping.values() if column not in columns]:
        raise UnusableError(f"{where}: no column {absent[0]!r}; found {listed(columns)}")
    if mapping:
        return {name: [mapping[name]] if name in mapping else [] for name in NAMES}
    plain = {_singular(column.strip().lower()): column for column in reversed(columns)}
    return {name: [plain[known] for known in names if known in plain] for name, names in NAMES.items()}


def _singular(name: str) -> str:
    return name[:-3] + "y" if name.endswith("ies") else name.removesuffix("s")
