"""Numbers as a reader sees them."""

from modernbert_small.run.tables import counted

_SIZES = ((1e9, " B"), (1e6, " M"), (1e3, " k"))
_TIMES = ((86400, "days"), (3600, "h"), (60, "min"))


def percent(share: float) -> str:
    """A share in per cent, such as `93.1 %`."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def count(number: float) -> str:
    """A whole number, such as `26,142`."""
    return f"{number:,.0f}"


def queries(number: int) -> str:
    """A number of queries, such as `1,400 queries`."""
    return counted(number, "query", "queries")


def short(number: float) -> str:
    """The first three digits of a large number, such as `5.37 M`."""
    size, unit = next((step for step in _SIZES if number >= step[0]), (1, ""))
    return f"{float(f'{number / size:.3g}'):g}{unit}"


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them, such as `47.9 min`; nothing for None."""
    if seconds is None:
        return ""
    size, unit = next((step for step in _TIMES if seconds >= 2 * step[0]), (1, "s"))
    return f"{seconds / size:.{int(size > 1)}f} {unit}"
