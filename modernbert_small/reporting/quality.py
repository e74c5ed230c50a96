"""The report's sections on how good the model is, from phase 5's account (see `evaluation.account.account`)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modernbert_small.evaluation.metrics import PRECISIONS, RESCORED
from modernbert_small.evaluation.systems import PROJECTED, STUDENT, TEACHER
from modernbert_small.reporting.formats import count, percent, queries, short
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
from modernbert_small.reporting.phases import (
    Record,
    interval,
    is_smaller,
    kept_table,
    retrieval_tables,
)
from modernbert_small.reporting.plots import intervals
from modernbert_small.reporting.verdict import cosines_note, verdict
from modernbert_small.run.records import PHASES

_BYTES = {"float32": 4.0, "int8": 1.0, "binary": 0.125}  # of a value


def headline(records: Mapping[str, Record]) -> Section:
    """What the model is, the verdict on it, some numbers, and which phases left no record.

    Args:
        records: by phase, as `run.records.find_records` gives them.
    """
    final = records.get("distil_train", {})
    account = final.get("account", {})
    students = [row for row in account.get("retrieval", ()) if row["system"] == STUDENT]
    cost = account.get("cost", {}).get(STUDENT, {})
    ratios = {name: f"{value / account['cost'][TEACHER][name]:.2g} × the teacher’s" for name, value in cost.items()}
    number = sum(account.get("queries", {}).values())
    missing = "; ".join(title for phase, title in PHASES.items() if phase not in records)
    return section(
        Paragraph(_description(records)),
        *(
            Paragraph(_worse(phase, record["ended_worse"]), is_notice=True)
            for phase, record in records.items()
            if "ended_worse" in record
        ),
        *verdict(records),
        tiles(
            *(
                ("nDCG@10 kept", row["retention"], percent, f"of the teacher’s ({interval(row)}, {queries(number)})")
                for row in students
            ),
            ("Cosine to the teacher", final.get("heldout_similarity"), "{:.3f}".format, "mean over held-out texts"),
            ("Parameters", cost.get("parameters"), short, ratios.get("parameters", "")),
            ("Texts per second", cost.get("texts_per_second"), count, ratios.get("texts_per_second", "")),
            ("ms per query", cost.get("query_milliseconds"), "{:.1f}".format, ratios.get("query_milliseconds", "")),
        ),
        Paragraph(f"Speed in float32{_on_machine(account)}.") if cost else None,
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
        account: with `retrieval`, see `phases.retrieval_tables`; `queries` by set; `cosines`, see `verdict`; `pairs`,
            entries with `system` and `scores`, Spearman's correlation by set; and `left_out`, sets on which the teacher
            finds nothing.
    """
    left_out = account.get("left_out")
    notice = f"The teacher finds nothing in these sets, so they are left out: {', '.join(left_out or ())}."
    rows = account.get("retrieval", [])
    if not rows:
        return [Paragraph(notice, is_notice=True)] if left_out else []
    shown = [
        (row["system"], row["retention"], *row["interval"], _style(row["system"]))
        for row in rows
        if row["system"] != TEACHER and not is_smaller(row["system"])
    ]
    note = "“Projected” is the teacher with its vectors reduced to the student’s width. Lines are 95 % intervals."
    gap = figure(intervals("gap", shown, "Share of the teacher’s nDCG@10"), "What each step keeps.", note)
    return section(
        Paragraph(notice, is_notice=True) if left_out else None,
        figures(gap),
        *retrieval_tables("nDCG@10 by step, computed in float32", account),
        Paragraph(cosines_note(account)),
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
    """The style of a system: the teacher, the student, or both models together."""
    if system in (TEACHER, PROJECTED):
        return "teacher"
    return "student" if system == STUDENT else "fourth"


def searches(account: Record) -> Section:
    """What both models find for the same queries.

    Args:
        account: with `searches`, see `evaluation.searches.sample_searches`, and `outcomes`.
    """
    found = account.get("searches")
    if not found:
        return []
    ranked = [
        {**search, "results": {model: list(map(_with_rank, r, range(1, 99))) for model, r in search["results"].items()}}
        for search in found
    ]
    intro = (
        "A few queries, evenly spaced in each set, and what teacher and student find first, with the cosines. "
        "Documents that the set names as relevant are marked. If none is among the first, the nearest relevant one "
        "stands below them with its rank."
    )
    if outcomes := account.get("outcomes"):
        intro += (
            f" Over all queries, the student’s nDCG@10 is better than the teacher’s in {count(outcomes['better'])}, "
            f"worse in {count(outcomes['worse'])}, and equal in {count(outcomes['equal'])}."
        )
    return [Paragraph(intro), Searches(ranked)]


def _with_rank(result: Record, place: int) -> Record:
    """A result with its rank, which older records lack since they hold the first results only."""
    return {"rank": place, **result}


def smaller_vectors(account: Record) -> Section:
    """What the student keeps when its vectors are truncated and quantised.

    Args:
        account: with `grid`: by width and precision, the share of the teacher's nDCG@10; and `retrieval`.
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
    caption = (
        "Share of the teacher’s nDCG@10 that is kept with the first values of each vector only, stored in four bytes "
        "(float32), one byte (int8) or one bit (binary) each; and the bytes of one vector"
    )
    with_intervals = (
        "The same with intervals. “Rescored”: the first "
        f"{RESCORED} documents of a search are ordered again by their float32 vectors"
    )
    smaller = [row for row in account.get("retrieval", ()) if is_smaller(row["system"])]
    return section(HeatMap(caption, PRECISIONS, rows), kept_table(with_intervals, account, smaller))


def size_and_speed(account: Record) -> Section:
    """Size and speed of both models.

    Args:
        account: with `cost` by model: `parameters`, `megabytes`, `texts_per_second` and `query_milliseconds`; and
            `machine`.
    """
    rows = []
    for model, values in account.get("cost", {}).items():
        size = [short(values["parameters"]), f"{values['megabytes']:,.1f}"]
        speed = [count(values["texts_per_second"]), f"{values['query_milliseconds']:.1f}"]
        rows.append([model.capitalize(), *size, *speed])
    caption = (
        f"Cost in float32{_on_machine(account)}; texts per second of the first documents of the first set, in batches "
        "of 32, and the median time of queries that are embedded one by one"
    )
    return section(table(caption, ["Model", "Parameters", "MB", "Texts per second", "Milliseconds per query"], rows))


def _on_machine(account: Record) -> str:
    """Where the speed was measured."""
    return f", on {account['machine']}" if account.get("machine") else ", on the machine that trained the student"
