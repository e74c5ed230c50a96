"""Tables of text: aligned for a terminal, or in Markdown."""

from collections.abc import Sequence

Cells = Sequence[Sequence[str]]


def markdown_table(rows: Cells, text_columns: Sequence[int] = (0,)) -> str:
    """A Markdown table.

    Args:
        rows: of cells, the header first.
        text_columns: columns to set to the left; all others hold numbers and are set to the right.
    """
    rules = ["---" if column in text_columns else "---:" for column in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rules, *rows[1:]])


def aligned(rows: Cells, text_columns: Sequence[int] = (0,)) -> str:
    """The same table in lines whose columns are aligned by blanks.

    Args:
        rows: of cells, the header first.
        text_columns: columns to set to the left; all others hold numbers and are set to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
