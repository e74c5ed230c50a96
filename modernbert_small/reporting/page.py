"""The parts of the report's page, as data. `templates/parts.html` says how each of them looks.

The page stands alone: it loads nothing and runs no script. Every text is escaped; only plots are markup already.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from markupsafe import Markup

from modernbert_small.reporting.render import render

_NUMBER = re.compile(r"-?\d[\d,.]*(\s[%a-zA-Z]+)?")


@dataclass(frozen=True)
class Part:
    """A part of a section; `macro` names the macro that draws it."""

    macro: ClassVar[str]


@dataclass(frozen=True)
class Paragraph(Part):
    """A paragraph; a notice stands out."""

    macro = "paragraph"
    text: str
    is_notice: bool = False


@dataclass(frozen=True)
class Steps(Part):
    """What to do, the first thing first, under a title."""

    macro = "steps"
    title: str
    steps: Sequence[str]


@dataclass(frozen=True)
class Tiles(Part):
    """Numbers to see first: name, number as text, note."""

    macro = "tiles"
    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Table(Part):
    """A table under its caption; the first cell of a row names it.

    Attributes:
        caption: what the table shows.
        head: names of the columns.
        rows: cells, as many in each row as there are columns.
        code: columns whose cells are names that a machine gave, such as hashes.
        numeric: columns of numbers, set to the right.
    """

    macro = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    code: Sequence[int]
    numeric: Sequence[int]


@dataclass(frozen=True)
class HeatMap(Part):
    """A table whose cells are texts over a shade: by row, the text, a note and the shade, from 0 to 1, of each cell."""

    macro = "heat_map"
    caption: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[tuple[str, str, float]]]


@dataclass(frozen=True)
class Figure(Part):
    """A plot under its title."""

    macro = "figure"
    svg: Markup
    title: str
    note: str


@dataclass(frozen=True)
class Figures(Part):
    """Plots and small tables side by side where there is room."""

    macro = "figures"
    figures: Sequence[Figure | Table]


@dataclass(frozen=True)
class Searches(Part):
    """Searches, as `evaluation.searches.sample_searches` returns them, each result with its `rank`."""

    macro = "searches"
    searches: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Settings(Part):
    """Settings and their values, of each phase by its title."""

    macro = "settings"
    phases: Mapping[str, Mapping[str, str]]


Section = list[Part]


def section(*parts: Part | None) -> Section:
    """A section of the parts that are there."""
    return [part for part in parts if part is not None]


def tiles(*entries: tuple[str, Any, Callable[[Any], str], str]) -> Tiles | None:
    """Tiles from name, value, how to write the value, and note; those whose value is None are left out."""
    known = [(name, form(value), note) for name, value, form, note in entries if value is not None]
    return Tiles(known) if known else None


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], code: Sequence[int] = ()) -> Table | None:
    """A table in which columns that hold nothing but numbers are found; None without rows."""
    numeric = [
        index
        for index, cells in enumerate(zip(*rows, strict=True))
        if index not in code and all(_NUMBER.fullmatch(cell) or cell == "" for cell in cells)
    ]
    return Table(caption, head, rows, code, numeric) if rows else None


def figure(svg: str | None, title: str, note: str = "") -> Figure | None:
    """A plot of `reporting.plots`, whose texts are escaped there; None without one."""
    return None if svg is None else Figure(Markup(svg), title, note)


def figures(*drawn: Figure | Table | None) -> Figures | None:
    """The figures and tables that are there, side by side; None without any."""
    known = [one for one in drawn if one is not None]
    return Figures(known) if known else None


def page(title: str, header: Section, sections: Mapping[str, Section]) -> str:
    """The whole page; sections without parts are left out."""
    return render("report.html", title=title, header=header, sections={name: s for name, s in sections.items() if s})
