r"""Text for a terminal, and tables of it: aligned, or in Markdown.

Names of files and columns come from strangers. Control characters in them could recolour a terminal, move its cursor or
show a line in another order, so they are shown as Python writes them, such as \x1b.
"""

import re
from collections.abc import Sequence

Cells = Sequence[Sequence[str]]
# Control characters other than tab and newline, marks that change the direction of text, and lone surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, one_line: bool = False) -> str:
    """A text whose control characters are written as escapes; tabs and newlines stay, unless it must be one line."""
    shown = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return shown.replace("\n", "\\n") if one_line else shown


def markdown_table(rows: Cells, text_columns: Sequence[int] = (0,)) -> str:
    """A Markdown table.

    Args:
        rows: of cells, the header first.
        text_columns: columns to set to the left; all others hold numbers and are set to the right.
    """
    rows = _printable_cells(rows)
    rules = ["---" if column in text_columns else "---:" for column in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rules, *rows[1:]])


def aligned(rows: Cells, text_columns: Sequence[int] = (0,)) -> str:
    """The same table in lines whose columns are aligned by blanks.

    Args:
        rows: of cells, the header first.
        text_columns: columns to set to the left; all others hold numbers and are set to the right.
    """
    rows = _printable_cells(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things, such as `1 query` or `1,400 queries`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _printable_cells(rows: Cells) -> list[list[str]]:
    return [[printable(cell, one_line=True) for cell in row] for row in rows]
