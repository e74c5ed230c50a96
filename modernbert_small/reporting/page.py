"""The parts of an HTML page that stands alone: nothing is loaded, no script runs, every text is escaped.

`Html` marks what is markup already; anything else that a part is given is text.
"""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from string import Template
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,.]*(\s[%a-zA-Z]+)?")

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1>$header</header>
<nav aria-label="Sections">$links</nav>
<main>$sections</main>
</body>
</html>
""")

_STYLE = """
:root {
  --paper: #fdfdfb; --raised: #f4f4ef; --ink: #1b1d22; --muted: #5d626d; --line: #dcdcd4;
  --student: #1f5bb5; --teacher: #ad4a06; --third: #1d7350; --fourth: #7a3d9c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --raised: #1d2025; --ink: #e8e9ec; --muted: #a3a8b3; --line: #363a42;
    --student: #86b4ff; --teacher: #f2a765; --third: #6fd3a5; --fourth: #cf9bee;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; }
body {
  margin: 0 auto; max-width: 66rem; padding: 0 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 Inter, "Segoe UI", system-ui, -apple-system, Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
header { padding: 3rem 0 1.25rem; }
h1, h2 { font-family: Charter, "Iowan Old Style", "Source Serif 4", Georgia, serif; text-wrap: balance; }
h1 { margin: 0 0 .5rem; font-size: clamp(1.8rem, 5vw, 2.7rem); line-height: 1.12; overflow-wrap: anywhere; }
h2 { margin: 0 0 .6rem; font-size: 1.55rem; line-height: 1.2; }
h3 { margin: 1.8rem 0 .5rem; font-size: 1rem; line-height: 1.35; }
p { max-width: 68ch; margin: 0 0 .9rem; text-wrap: pretty; overflow-wrap: anywhere; }
header p { font-size: 1.12rem; }
.note, .caption, figcaption { color: var(--muted); font-size: .9rem; }
.notice { border-left: 3px solid var(--teacher); padding: .1rem 0 .1rem .9rem; }
nav {
  position: sticky; top: 0; z-index: 1; display: flex; gap: 1.1rem; overflow-x: auto; padding: .65rem 0;
  background: var(--paper); border-bottom: 1px solid var(--line); font-size: .9rem; white-space: nowrap;
}
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: .25em; }
nav a { color: var(--muted); text-decoration: none; }
a:hover, nav a:hover { color: var(--student); }
:focus-visible { outline: 2px solid var(--student); outline-offset: 2px; }
section { padding: 2.6rem 0 1rem; border-bottom: 1px solid var(--line); }
section:last-child { border: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.2rem, 1fr)); gap: 1.1rem 1.6rem; }
.tiles { margin: 1.4rem 0; }
.tiles > div { border-top: 1px solid var(--muted); padding-top: .5rem; }
.tiles dt { color: var(--muted); font-size: .82rem; }
.tiles dd { margin: 0; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; color: var(--muted); font-size: .82rem; line-height: 1.4; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.6rem 2rem;
  margin: 1.2rem 0; align-items: start; }
.figures > * { min-width: 0; }
.figures .caption { margin-top: 0; }
figure { margin: 0; max-width: 31rem; break-inside: avoid; }
figcaption { margin-bottom: .4rem; max-width: 60ch; }
figcaption b { color: var(--ink); }
svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; stroke-linecap: butt; }
.caption { margin: 1.4rem 0 .3rem; }
.scroll {
  overflow-x: auto; margin-bottom: 1.4rem;  /* a shade at the right edge, covered once scrolled to the end */
  background: linear-gradient(to left, var(--paper) 1.2rem, transparent) right / 2.4rem 100% no-repeat local,
    linear-gradient(to left, color-mix(in srgb, var(--ink) 18%, transparent), transparent) right / .9rem 100% no-repeat;
}
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem 1.1rem .34rem 0; text-align: left; vertical-align: baseline; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--muted); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 400; }
.n { text-align: right; }
.heat td, .heat th { padding: .5rem clamp(.35rem, 1.5vw, .9rem); border: 2px solid var(--paper); text-align: center; }
.heat tbody th { padding-left: 0; text-align: left; }
.heat tbody td {
  print-color-adjust: exact;
  background: color-mix(in srgb, var(--student) calc(var(--share) * 55%), var(--raised));
}
.heat small { display: block; }
code { font: .85em ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.search { margin: 1.3rem 0 2rem; break-inside: avoid; }
.search h3 { font-family: Charter, "Iowan Old Style", Georgia, serif; font-size: 1.15rem; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .8rem 2rem; }
.sides h4 { margin: 0 0 .3rem; font-size: .82rem; font-weight: 600; }
ol { margin: 0; padding: 0; list-style: none; font-size: .9rem; line-height: 1.45; }
li { padding: .45rem .6rem .45rem .8rem; margin-bottom: .3rem; border-left: 3px solid var(--line); }
li { overflow-wrap: anywhere; }
li.hit { border-left-color: var(--third); background: var(--raised); }
li small { display: block; color: var(--muted); }
li.hit b { color: var(--third); }
details { margin: .6rem 0; }
summary { cursor: pointer; padding: .3rem 0; }
dl.settings { columns: 20rem; column-gap: 2rem; margin: .4rem 0 1rem; font-size: .82rem; }
dl.settings div { break-inside: avoid; display: flex; gap: .7rem; justify-content: space-between;
  border-bottom: 1px solid var(--line); padding: .15rem 0; }
dl.settings dd { margin: 0; text-align: right; color: var(--muted); }
@media (max-width: 30rem) {
  header { padding-top: 1.6rem; }
  section { padding-top: 1.8rem; }
  table { width: max-content; }
  table:not(.heat) tbody th { white-space: normal; max-width: 10rem; }
}
@media print {
  :root { --paper: #fff; --raised: #f2f2f2; --ink: #000; --muted: #444; --line: #bbb;
    --student: #1f5bb5; --teacher: #ad4a06; --third: #1d7350; --fourth: #7a3d9c; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav { display: none; }
  section { padding: 1rem 0; }
  h2, h3, h2 + p, .caption, figcaption { break-after: avoid; }
  tr, table, .tiles { break-inside: avoid; }
  .scroll { overflow: visible; background: none; }
  .figures { grid-template-columns: 1fr 1fr; }
  details::details-content { content-visibility: visible; block-size: auto; }
  th, td { white-space: normal; }
}
"""


class Html(str):
    """Markup: goes into a page as it is."""

    __slots__ = ()


def escape(text: Any) -> Html:
    """Text for a page; markup stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def join(*parts: Any) -> Html:
    """Parts one after the other."""
    return Html("".join(map(escape, parts)))


def element(tag: str, *parts: Any, **attributes: Any) -> Html:
    """`<tag attribute="...">parts</tag>`; `class_` is class, `aria_label` aria-label."""
    words = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for name, value in attributes.items()
    )
    return Html(f"<{tag}{words}>{join(*parts)}</{tag}>")


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def count(number: float) -> str:
    """A whole number."""
    return f"{number:,.0f}"


def short(number: float) -> str:
    """The first three digits of a large number."""
    size, unit = next((step for step in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if number >= step[0]), (1, ""))
    return f"{float(f'{number / size:.3g}'):g}{unit}"


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them."""
    if seconds is None:
        return ""
    size, unit = next(
        (step for step in ((86400, "days"), (3600, "h"), (60, "min")) if seconds >= 2 * step[0]), (1, "s")
    )
    return f"{seconds / size:.{int(size > 1)}f} {unit}"


def code(text: str) -> Html:
    """A name that a machine gave."""
    return element("code", text) if text else Html("")


def tiles(*entries: tuple[str, Any, Callable[[Any], str], str]) -> Html:
    """Numbers to see first: name, value, how to write it, note. Those whose value is None are left out."""
    boxes = [
        element("div", element("dt", name), element("dd", form(value), element("small", note) if note else ""))
        for name, value, form, note in entries
        if value is not None
    ]
    return element("dl", *boxes, class_="tiles") if boxes else Html("")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A table that scrolls by itself where it is too wide; columns of numbers to the right, the first names a row."""
    if not rows:
        return Html("")
    numeric = [all(_NUMBER.fullmatch(str(cell)) or cell == "" for cell in column) for column in zip(*rows, strict=True)]
    classes: list[dict[str, str]] = [{"class_": "n"} if right else {} for right in numeric]
    header = [element("th", name, scope="col", **kind) for name, kind in zip(head, classes, strict=True)]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, **kind) for cell, kind in zip(row[1:], classes[1:], strict=True)),
        )
        for row in rows
    ]
    inner = element("thead", element("tr", *header)), element("tbody", *body)
    return _scrolling(caption, element("table", *inner))


def heat_map(caption: str, columns: Sequence[str], rows: Mapping[str, Sequence[tuple[str, float]]]) -> Html:
    """A table of texts, each over a shade from 0 to 1."""
    header = [element("td"), *(element("th", name, scope="col") for name in columns)]
    body = [
        element(
            "tr",
            element("th", name, scope="row"),
            *(element("td", text, style=f"--share:{shade:.3f}") for text, shade in cells),
        )
        for name, cells in rows.items()
    ]
    inner = element("thead", element("tr", *header)), element("tbody", *body)
    return _scrolling(caption, element("table", *inner, class_="heat"))


def _scrolling(caption: str, inner: Html) -> Html:
    region = element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)
    return element("div", element("p", caption, class_="caption"), region)


def figure(svg: str, title: str, note: str = "") -> Html:
    """A plot under its title."""
    return element("figure", element("figcaption", element("b", title), f" {note}" if note else ""), Html(svg))


def figures(*drawn: str) -> Html:
    """Plots and small tables side by side where there is room."""
    return element("div", *drawn, class_="figures") if any(drawn) else Html("")


def name_values(values: Mapping[str, Any]) -> Html:
    """Names and values in columns, without those that say nothing."""
    rows = [
        element("div", element("dt", name), element("dd", element("code", value)))
        for name, value in values.items()
        if value not in (None, "", [], {})
    ]
    return element("dl", *rows, class_="settings")


def page(title: str, header: Html, sections: Mapping[str, Html]) -> str:
    """The whole page; sections without content are left out."""
    kept = {name: body for name, body in sections.items() if body}
    anchors = {name: re.sub(r"\W+", "-", name.lower()) for name in kept}
    links = [element("a", name, href=f"#{anchors[name]}") for name in kept]
    blocks = [element("section", element("h2", name), body, id=anchors[name]) for name, body in kept.items()]
    return _PAGE.substitute(
        title=escape(title), style=_STYLE, header=header, links=join(*links), sections=join(*blocks)
    )
