"""The report's sections on how good the model is, each from phase 5's account of the gap."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modernbert_small.evaluation.metrics import PRECISIONS
from modernbert_small.reporting.page import (
    Html,
    count,
    element,
    figure,
    figures,
    heat_map,
    join,
    percent,
    short,
    table,
    tiles,
)
from modernbert_small.reporting.phases import Record, interval, retrieval_table
from modernbert_small.reporting.plots import Series, intervals, points
from modernbert_small.run.artefacts import PHASES

_BYTES = {"float32": 4.0, "int8": 1.0, "binary": 0.125}  # of a value


def headline(records: Mapping[str, Record]) -> Html:
    """What the model is and what became of it: a sentence, some numbers, what is missing."""
    final = records.get("distil_train", {})
    shape, taught = (records.get(phase, {}).get("settings", {}) for phase in ("init_model_mlm", "teacher"))
    sentence = "An embedding model"
    if shape:
        sentence += f" of {shape['num_hidden_layers']} layers × {shape['hidden_size']}"
    if taught:
        sentence += f", taught by {Path(taught['teacher_name_or_path']).name}"
    account = final.get("account", {})
    students = [row for row in account.get("retrieval", ()) if row["system"] == "student"]
    cost = account.get("cost", {}).get("student", {})
    times = {name: f"{value / account['cost']['teacher'][name]:.2g} × the teacher’s" for name, value in cost.items()}
    missing = "; ".join(title for phase, title in PHASES.items() if phase not in records)
    return join(
        element("p", sentence, "."),
        tiles(
            *(("nDCG@10 kept", row["retention"], percent, f"of the teacher’s ({interval(row)})") for row in students),
            ("Cosine to the teacher", final.get("heldout_similarity"), "{:.3f}".format, "mean over held-out texts"),
            ("Parameters", cost.get("parameters"), short, times.get("parameters", "")),
            ("Texts a second", cost.get("texts_per_second"), count, times.get("texts_per_second", "")),
        ),
        element("p", f"No record was found of: {missing}. What they measured is left out.", class_="notice")
        if missing
        else "",
    )


def gap(account: Record) -> Html:
    """How much of the teacher each step keeps."""
    rows = account.get("retrieval", [])
    if not rows:
        return Html("")
    kept = {row["system"]: row["retention"] for row in rows}
    sentence = f"The student keeps {percent(kept['student'])} of the teacher’s nDCG@10"
    if ceiling := kept.get("teacher, projected"):
        parts = f"{100 * (1 - ceiling):.1f} points are lost by the projection, {100 * (ceiling - kept['student']):.1f}"
        sentence += f": {parts} between its labels and the student"
    shown = [
        (row["system"], row["retention"], *row["interval"], _style(row["system"]))
        for row in rows
        if row["system"] != "teacher"
    ]
    queries = count(sum(account.get("queries", {}).values()))
    note = f"Means over sets, {queries} queries; 95 % intervals by a paired bootstrap over queries."
    pairs = [
        [row["system"].capitalize(), *(f"{r:.3f}" for r in row["scores"].values())] for row in account.get("pairs", ())
    ]
    return join(
        element("p", sentence, "."),
        figures(figure(intervals("gap", shown, "Share of the teacher’s nDCG@10"), "What each step keeps.", note)),
        retrieval_table("nDCG@10 by step and set", account),
        table(
            "Spearman’s correlation with how alike people found pairs of sentences",
            ["System", *(account["pairs"][0]["scores"] if pairs else ())],
            pairs,
        ),
    )


def smaller_vectors(account: Record) -> Html:
    """Truncation by quantisation."""
    grid = account.get("grid")
    if not grid:
        return Html("")
    every = [share for row in grid.values() for share in row.values()]
    low, span = min(every), (max(every) - min(every)) or 1

    def cell(width: str, precision: str, share: float) -> tuple[Html, float]:
        size = f"{math.ceil(int(width) * _BYTES[precision]):,} bytes"
        return join(element("b", percent(share)), element("small", size)), (share - low) / span

    rows = {f"{width} values": [cell(width, p, row[p]) for p in PRECISIONS] for width, row in grid.items()}
    caption = "Kept of the teacher’s nDCG@10 with the student’s vectors cut and in fewer bits; bytes are of one vector"
    return heat_map(caption, PRECISIONS, rows)


def size_and_speed(account: Record) -> Html:
    """Quality against cost, both models."""
    cost, quality = account.get("cost", {}), {row["system"]: row["mean"] for row in account.get("retrieval", ())}
    drawn = [
        figure(
            points(name, [Series(m, [c[name]], [quality[m]], m) for m, c in cost.items()], label, "Mean nDCG@10"), title
        )
        for name, label, title in (
            ("parameters", "Parameters", "Quality and size."),
            ("texts_per_second", "Texts a second", "Quality and speed."),
        )
        if cost
    ]
    rows = [
        [
            *(model.capitalize(), short(c["parameters"]), f"{c['megabytes']:,.1f}"),
            *(count(c["texts_per_second"]), f"{c['query_milliseconds']:.1f}"),
        ]
        for model, c in cost.items()
    ]
    caption = "Cost on the machine that trained the student; a query’s time is the median of single ones"
    head = ["Model", "Parameters", "MB", "Texts a second", "Milliseconds a query"]
    return join(figures(*drawn), table(caption, head, rows))


def searches(account: Record) -> Html:
    """What both models find for the same queries."""
    blocks = []
    for search in account.get("searches", ()):
        sides = [
            element("div", element("h4", name.capitalize()), element("ol", *map(_result, results)))
            for name, results in search["results"].items()
        ]
        title = element("h3", search["query"], " ", element("span", search["set"], class_="note"))
        blocks.append(element("article", title, element("div", *sides, class_="sides"), class_="search"))
    intro = "First results of the projected teacher and the student, with cosines, for queries spread over the sets."
    return join(element("p", intro), *blocks) if blocks else Html("")


def _result(result: Mapping[str, Any]) -> Html:
    mark = element("b", " ✓ relevant") if result["relevant"] else ""
    note = element("small", f"{result['score']:.2f}", mark)
    return element("li", note, result["text"], class_="hit" if result["relevant"] else "miss")


def _style(system: str) -> str:
    """The teacher's, the student's, both models together, or the student's smaller vectors."""
    if system.startswith("teacher"):
        return "teacher"
    return "student" if system == "student" else "fourth" if "teacher" in system else "third"
