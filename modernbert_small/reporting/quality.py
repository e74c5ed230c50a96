"""The report's sections on how good the model is, from phase 5's account (see `evaluation.account.account`)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modernbert_small.evaluation.metrics import PRECISIONS
from modernbert_small.reporting.formats import count, percent, short
from modernbert_small.reporting.page import (
    HeatMap,
    Paragraph,
    Searches,
    Section,
    Table,
    figure,
    figures,
    section,
    table,
    tiles,
)
from modernbert_small.reporting.phases import Record, interval, retrieval_table
from modernbert_small.reporting.plots import Series, intervals, points
from modernbert_small.run.records import PHASES

_BYTES = {"float32": 4.0, "int8": 1.0, "binary": 0.125}  # of a value


def headline(records: Mapping[str, Record]) -> Section:
    """What the model is and how good it is: a sentence, some numbers, and which phases left no record.

    Args:
        records: by phase, as `run.records.find_records` gives them.
    """
    final = records.get("distil_train", {})
    account = final.get("account", {})
    students = [row for row in account.get("retrieval", ()) if row["system"] == "student"]
    cost = account.get("cost", {}).get("student", {})
    ratios = {name: f"{value / account['cost']['teacher'][name]:.2g} × the teacher’s" for name, value in cost.items()}
    missing = "; ".join(title for phase, title in PHASES.items() if phase not in records)
    return section(
        Paragraph(_description(records)),
        tiles(
            *(("nDCG@10 kept", row["retention"], percent, f"of the teacher’s ({interval(row)})") for row in students),
            ("Cosine to the teacher", final.get("heldout_similarity"), "{:.3f}".format, "mean over held-out texts"),
            ("Parameters", cost.get("parameters"), short, ratios.get("parameters", "")),
            ("Texts per second", cost.get("texts_per_second"), count, ratios.get("texts_per_second", "")),
        ),
        *(
            Paragraph(_worse(phase, record["ended_worse"]), is_notice=True)
            for phase, record in records.items()
            if "ended_worse" in record
        ),
        Paragraph(f"No record was found of these phases: {missing}. Their measurements are left out.", is_notice=True)
        if missing
        else None,
    )


def _worse(phase: str, worse: Mapping[str, Any]) -> str:
    """That a phase's training made the model worse, in a sentence."""
    return (
        f"{PHASES[phase]} made the model worse: its {worse['measure']} was {worse['began']:.4f} at the beginning and "
        f"{worse['ended']:.4f} at the end. Do not use it."
    )


def _description(records: Mapping[str, Record]) -> str:
    """A sentence with the model's size and its teacher, as far as they are known."""
    size, teacher = (records.get(phase, {}).get("settings", {}) for phase in ("init_model_mlm", "reduced_teacher"))
    sentence = "An embedding model"
    if size:
        sentence += f" with {size['num_hidden_layers']} layers and a hidden size of {size['hidden_size']}"
    if teacher:
        sentence += f", distilled from {Path(teacher['teacher_name_or_path']).name}"
    return f"{sentence}."


def student_and_teacher(account: Record) -> Section:
    """How much of the teacher's quality is left after each step.

    Args:
        account: with `retrieval`, see `phases.retrieval_table`; `queries` by set; `pairs`, entries with `system` and
            `scores`, Spearman's correlation by set; and `left_out`, sets on which the teacher finds nothing.
    """
    left_out = account.get("left_out")
    notice = f"The teacher finds nothing in these sets, so they are left out: {', '.join(left_out or ())}."
    rows = account.get("retrieval", [])
    if not rows:
        return [Paragraph(notice, is_notice=True)] if left_out else []
    kept = {row["system"]: row["retention"] for row in rows}
    sentences = f"The student keeps {percent(kept['student'])} of the teacher’s nDCG@10."
    if ceiling := kept.get("teacher, projected"):
        projected, distilled = (f"{100 * share:+.1f}" for share in (ceiling - 1, kept["student"] - ceiling))
        sentences += f" The projection changes it by {projected} percentage points, the distillation by {distilled}."
    shown = [
        (row["system"], row["retention"], *row["interval"], _style(row["system"]))
        for row in rows
        if row["system"] != "teacher"
    ]
    queries = count(sum(account.get("queries", {}).values()))
    note = f"Means over sets, {queries} queries; 95 % intervals by a paired bootstrap over queries."
    return section(
        Paragraph(sentences),
        Paragraph(notice, is_notice=True) if left_out else None,
        figures(figure(intervals("gap", shown, "Share of the teacher’s nDCG@10"), "What each step keeps.", note)),
        retrieval_table("nDCG@10 by step and set", account),
        _pairs(account),
    )


def _pairs(account: Record) -> Table | None:
    """Spearman's correlation of each system on each set of sentence pairs."""
    rows = account.get("pairs", [])
    names = list(rows[0]["scores"]) if rows else []
    cells = [[row["system"].capitalize(), *(f"{row['scores'][name]:.3f}" for name in names)] for row in rows]
    caption = "Spearman’s correlation of the cosine of two sentences with their similarity as people rated it"
    return table(caption, ["System", *names], cells)


def _style(system: str) -> str:
    """The style of a system: the teacher, the student, both models together, or the student with smaller vectors."""
    if system.startswith("teacher"):
        return "teacher"
    if system == "student":
        return "student"
    return "fourth" if "teacher" in system else "third"


def smaller_vectors(account: Record) -> Section:
    """What the student keeps when its vectors are truncated and quantised.

    Args:
        account: with `grid`: by width and precision, the share of the teacher's nDCG@10.
    """
    grid = account.get("grid")
    if not grid:
        return []
    shares = [share for row in grid.values() for share in row.values()]
    low, span = min(shares), (max(shares) - min(shares)) or 1
    rows = {}
    for width, row in grid.items():
        sizes = {precision: f"{math.ceil(int(width) * _BYTES[precision]):,} bytes" for precision in PRECISIONS}
        rows[f"{width} values"] = [(percent(row[p]), sizes[p], (row[p] - low) / span) for p in PRECISIONS]
    caption = "Share of the teacher’s nDCG@10 that truncated and quantised vectors keep, and the bytes of one vector"
    return [HeatMap(caption, PRECISIONS, rows)]


def size_and_speed(account: Record) -> Section:
    """Quality against size and speed, for both models.

    Args:
        account: with `retrieval`, and `cost` by model: `parameters`, `megabytes`, `texts_per_second` and
            `query_milliseconds`.
    """
    cost = account.get("cost", {})
    quality = {row["system"]: row["mean"] for row in account.get("retrieval", ())}
    drawn = []
    for name, label, title in (
        ("parameters", "Parameters", "Quality and size."),
        ("texts_per_second", "Texts per second", "Quality and speed."),
    ):
        series = [Series(model, [values[name]], [quality[model]], model) for model, values in cost.items()]
        drawn.append(figure(points(name, series, label, "Mean nDCG@10"), title) if series else None)
    rows = []
    for model, values in cost.items():
        size = [short(values["parameters"]), f"{values['megabytes']:,.1f}"]
        speed = [count(values["texts_per_second"]), f"{values['query_milliseconds']:.1f}"]
        rows.append([model.capitalize(), *size, *speed])
    caption = (
        "Cost on the machine that trained the student; the time per query is the median of queries embedded singly"
    )
    head = ["Model", "Parameters", "MB", "Texts per second", "Milliseconds per query"]
    return section(figures(*drawn), table(caption, head, rows))


def searches(account: Record) -> Section:
    """What both models find for the same queries.

    Args:
        account: with `searches`, see `evaluation.searches.sample_searches`.
    """
    found = account.get("searches")
    if not found:
        return []
    intro = (
        "For a few queries of each set, the documents that the projected teacher and the student find first, with "
        "their cosines. Documents that the set names as relevant are marked."
    )
    return [Paragraph(intro), Searches(found)]
