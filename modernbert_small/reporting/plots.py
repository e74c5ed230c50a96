"""Plots as SVG for the report's page.

They use the page's fonts, and its colours as CSS variables, so that they follow the light and the dark scheme. Each
series has a colour, a marker and a line style of its own, so that nobody needs to see colours to tell them apart.
Figures are drawn as narrow as a phone's screen and grow with the page.
"""

import html
import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modernbert_small.reporting.formats import percent, short

WIDTH = 4.3  # inches of 72 units
_LABEL = 22  # characters in a line beside a plot
# Matplotlib cannot draw with CSS variables: it draws with these colours, which are replaced by variables afterwards.
INK, MUTED, LINE = "#010203", "#010204", "#010205"
STYLES = {
    "teacher": ("#010206", "s", "--"),
    "student": ("#010207", "o", "-"),
    "third": ("#010208", "^", "-."),
    "fourth": ("#010209", "D", ":"),
}
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line"} | {color: name for name, (color, *_) in STYLES.items()}
_RC: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "hatch.linewidth": 0.8,
}


class Series(NamedTuple):
    """A line or a set of points: `x` and `y` have the same length, `style` names an entry of STYLES."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str


def _figure(height: float) -> tuple[Figure, Axes]:
    """An empty figure of a height in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str, description: str) -> str:
    """A figure as a part of a page: without a prologue, with the page's fonts and colours, and with ids of its own.

    Matplotlib escapes the texts in it.

    Args:
        figure: with everything drawn.
        name: a name that no other figure of the page has; all ids begin with it.
        description: what a screen reader says.
    """
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", out.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]+;", "", re.sub(r"\bfont: ([\d.]+px) [^;\"]+", r"font-size: \1", svg))
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    start = re.sub(r' (width|height)="[\d.]+pt"', "", svg[svg.index("<svg ") + 5 :], count=2)
    return f'<svg role="img" aria-label="{html.escape(description)}" {start}'


def _legend(axes: Axes) -> None:
    """Put the legend above the plot."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2, handlelength=2.6)


def _number(value: float, _: float) -> str:
    """A tick's label, as matplotlib's formatters are called: with value and position."""
    return short(value)


def _percent(share: float, _: float) -> str:
    """The label of a tick that is a share."""
    return f"{round(100 * share, 6):g} %"


def described(series: Sequence[Series], shares: bool = False) -> str:
    """Where lines begin and end, in words, such as `Student: 0.31 to 0.49`.

    Args:
        series: lines of at least one point each.
        shares: whether y is a share, given in per cent.
    """
    form = percent if shares else "{:.3g}".format
    words = "; ".join(f"{one.label}: {form(one.y[0])} to {form(one.y[-1])}" for one in series)
    return words[0].upper() + words[1:]


def lines(
    name: str, series: Sequence[Series], x_label: str, y_label: str, shares: bool = False, ticks: bool = False
) -> str:
    """Lines over a common axis, with markers where there are few points.

    Args:
        name: a name that no other figure of the page has.
        series: what to draw.
        x_label, y_label: labels of the axes, with units.
        shares: whether y is a share, shown in per cent.
        ticks: whether to put a tick at every x of the first series.
    """
    with matplotlib.rc_context(_RC):
        figure, axes = _figure(2.6)
        for label, x, y, style in series:
            color, marker, dash = STYLES[style]
            axes.plot(x, y, color=color, linestyle=dash, marker=marker if len(x) <= 40 else None, label=label)
        axes.set(xlabel=x_label, ylabel=y_label)
        if ticks:
            axes.set_xticks(series[0].x)
        else:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.xaxis.set_major_formatter(_number)
        if shares:
            axes.yaxis.set_major_formatter(_percent)
        if len(series) > 1:
            _legend(axes)
        return _svg(figure, name, f"{y_label} by {x_label}. {described(series, shares)}")


def _values_at_right(axes: Axes, values: Sequence[str]) -> None:
    """Write a text at the right of each row of a plot whose rows are at y = 0, 1, 2, ..."""
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    right.set_yticks(range(len(values)), values)
    right.tick_params(axis="y", length=0, labelcolor=INK)
    right.grid(visible=False)
    right.spines["left"].set_visible(False)


def stacked_bars(name: str, labels: Sequence[str], parts: Sequence[Series], x_label: str) -> str:
    """Horizontal bars that consist of at most two parts, each between its name and its length.

    Args:
        name: a name that no other figure of the page has.
        labels: (N,) names of the bars.
        parts: one or two series; `y` (N,) holds the length of the part in each bar, `x` is not used.
        x_label: label of the lengths.
    """
    with matplotlib.rc_context(_RC):
        figure, axes = _figure(0.9 + 0.34 * len(labels))
        left = [0.0] * len(labels)
        for part, hatch in zip(parts, ("", "////"), strict=False):
            color, *_ = STYLES[part.style]
            look: dict[str, Any] = {"facecolor": "none" if hatch else color, "edgecolor": color, "hatch": hatch}
            shown = [length or math.nan for length in part.y]  # else an edge is drawn
            axes.barh(range(len(labels)), shown, left=left, height=0.62, label=part.label, **look)
            left = [start + length for start, length in zip(left, part.y, strict=True)]
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(_number)
        axes.set_xlabel(x_label)
        _legend(axes)
        _values_at_right(axes, [short(length) for length in left])
        return _svg(figure, name, f"{x_label}. {_listed(labels, map(short, left))}")


def intervals(name: str, rows: Sequence[tuple[str, float, float, float, str]], x_label: str) -> str:
    """Rows of a point with its interval, each between its name and its value, beside a line at 1.

    Args:
        name: a name that no other figure of the page has.
        rows: for each row its label, value, lower and upper end of the interval, and style.
        x_label: label of the values, which are shares.
    """
    with matplotlib.rc_context(_RC):
        figure, axes = _figure(0.7 + 0.42 * len(rows))
        axes.axvline(1, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)))
        for index, (_, value, low, high, style) in enumerate(rows):
            color, marker, _ = STYLES[style]
            axes.plot([low, high], [index, index], color=color, linewidth=2, solid_capstyle="butt")
            axes.plot([value], [index], color=color, marker=marker, markersize=6)
        labels, values = [row[0] for row in rows], [percent(row[1]) for row in rows]
        axes.set_yticks(range(len(rows)), [textwrap.fill(label, _LABEL) for label in labels])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(x_label)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(_percent)
        _values_at_right(axes, values)
        return _svg(figure, name, f"{x_label}. {_listed(labels, values)}")


def _listed(labels: Iterable[str], values: Iterable[str]) -> str:
    """Names and values of rows in words."""
    return "; ".join(f"{label}: {value}" for label, value in zip(labels, values, strict=True))
