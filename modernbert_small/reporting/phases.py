"""The report's sections on the phases, each from the record (`run.json`) of one phase.

Records of older versions lack some measurements, and an interrupted recipe lacks whole phases: what a record lacks is
left out. Every section is a list of parts as `page.py` defines them.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modernbert_small.evaluation.metrics import perplexity
from modernbert_small.evaluation.systems import STUDENT, TEACHER
from modernbert_small.initialise.report import comment_on_losses
from modernbert_small.reporting.formats import count, percent, queries, short
from modernbert_small.reporting.page import (
    Figure,
    Paragraph,
    Section,
    Table,
    figure,
    figures,
    section,
    table,
    tiles,
)
from modernbert_small.reporting.plots import Series, described, lines, stacked_bars

Record = Mapping[str, Any]

_LOSSES = {"loss": ("training", "student"), "eval_loss": ("held out", "teacher")}
_RATE = {"learning_rate": ("learning rate", "student")}
_STRAIGHT = ("linear", "constant", "constant_with_warmup")  # schedules of the learning rate that need no plot

KEPT = "“Kept” is the mean over the sets of a system’s nDCG@10 divided by the teacher’s on that set."


def corpus(record: Record) -> Section:
    """Phase 1: how many texts and tokens each source gave, and how many texts were dropped.

    Args:
        record: with `rows` by split; `tokens`, an estimate; `by_source`, entries with `source`, `kind`, `rows` and
            `tokens`; and, by source, `read`, `dropped` (texts by reason), `split` and `skipped` (`rows`).
    """
    rows, dropped = record.get("rows", {}), record.get("dropped", {})
    by_source = record.get("by_source", [])
    number_dropped = sum(number for reasons in dropped.values() for number in reasons.values())
    kept = [
        [entry["source"], entry["kind"], *map(count, (entry["rows"], entry["tokens"], entry["tokens"] / entry["rows"]))]
        for entry in by_source
    ]
    skipped = {name: found["rows"] for name, found in record.get("skipped", {}).items()}
    return section(
        tiles(
            ("Training texts", rows.get("train"), count, ""),
            ("Held-out texts", rows.get("validation"), count, ""),
            ("Tokens", record.get("tokens"), short, "estimated from a sample"),
            ("Dropped", number_dropped if dropped else None, count, "texts"),
        ),
        figures(
            _tokens_by_source(by_source),
            table("Texts kept, by source and kind", ["Source", "Kind", "Texts", "Tokens", "Tokens per text"], kept),
        ),
        _losses_by_source(record),
        *(
            Paragraph(
                f"Rows of {name} that could not be used and were skipped: {count(rows)}. run.json shows the first."
            )
            for name, rows in skipped.items()
        ),
    )


def _tokens_by_source(by_source: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Bars of the tokens of each source, queries and documents apart."""
    if not by_source:
        return None
    sources = list(dict.fromkeys(entry["source"] for entry in by_source))
    kinds = sorted({entry["kind"] for entry in by_source})
    tokens = {(entry["source"], entry["kind"]): entry["tokens"] for entry in by_source}
    bars = [
        Series(kind, (), [tokens.get((source, kind), 0) for source in sources], style)
        for kind, style in zip(kinds, ("student", "teacher"), strict=False)
    ]
    return figure(stacked_bars("tokens", sources, bars, "Tokens"), "Tokens by source and kind.")


def _losses_by_source(record: Record) -> Table | None:
    """What was read from each source, what was dropped by reason, and what was split."""
    read, dropped, split = (record.get(part, {}) for part in ("read", "dropped", "split"))
    if not (read and dropped and split):
        return None
    rows = [
        [source, *map(count, [*read[source].values(), *reasons.values(), *split[source].values()])]
        for source, reasons in dropped.items()
    ]
    reasons = [reason.replace("_", " ").capitalize() for reason in next(iter(dropped.values()))]
    return table(
        "Rows and texts read from each source, texts dropped by reason, and texts too long that were split into chunks",
        ["Source", "Rows read", "Texts", *reasons, "Split", "Into chunks"],
        rows,
    )


def initialisation(record: Record) -> Section:
    """Phase 2: what the student's first weights keep of the teacher.

    Args:
        record: with `settings`; `init_used`, the initialisation that was used; `transferred`, names of tensors;
            `spectrum`, (D_S,) shares of the variance of the teacher's token embeddings; `layers`, see
            `initialise.agreement`; `heldout_mlm_loss`, nats by model; and `parameters`.
    """
    asked = record["settings"].get("init")
    used = record.get("init_used") or asked
    spectrum, transferred = (record.get(name) or [] for name in ("spectrum", "transferred"))
    losses = [
        [name.capitalize(), f"{loss:.3f}", short(perplexity(loss))]
        for name, loss in record.get("heldout_mlm_loss", {}).items()
    ]
    caption = "Masked-LM loss on held-out text before any training, in nats per masked token"
    return section(
        tiles(
            ("Initialisation", used, str, "" if used == asked else f"used in place of {asked}"),
            ("Parameters", record.get("parameters"), short, "masked-LM head included"),
            ("Tensors from the teacher", len(transferred) or None, count, "copied or projected"),
            ("Variance kept", sum(spectrum) or None, percent, "of the teacher’s token embeddings"),
        ),
        figures(
            _agreement(record.get("layers")),
            _spectrum("embeddings", spectrum, "Token embeddings.", "Variance"),
            table(caption, ["Model", "Loss", "Perplexity"], losses),
        ),
        Paragraph(comment) if (comment := comment_on_losses(record.get("heldout_mlm_loss", {}))) else None,
    )


def _agreement(layers: Mapping[str, Any] | None) -> Figure | None:
    """How far each layer of the student agrees with the teacher's layer that it stands for."""
    if not layers:
        return None
    index = range(len(layers["cka"]))
    labels = {"cka": ("CKA", "student"), "explained_variance": ("explained variance", "teacher")}
    curves = [Series(label, index, layers[name], style) for name, (label, style) in labels.items() if layers[name]]
    teacher_layers = ", ".join(map(str, layers["teacher_layers"]))
    note = (
        f"The student’s layers are compared with the teacher’s layers {teacher_layers}. CKA is 1 if "
        "one layer’s outputs are a rotation of the other’s; explained variance is the share of the teacher’s variance "
        "in the directions that the student has. From the first layer to the last:"
    )
    return _drawn("layers", curves, "Layer of the student", "Share", "Agreement by layer.", note, True, True)


def pre_training(record: Record) -> Section:
    """Phase 3: the loss of masked language modelling over steps.

    Args:
        record: with `heldout_mlm_loss` in nats; `history`, the Trainer's log; and what `_training_tiles` shows.
    """
    loss = record.get("heldout_mlm_loss")
    return section(
        tiles(
            ("Held-out loss", loss, "{:.3f}".format, "nats per masked token, less is better"),
            ("Held-out perplexity", loss and perplexity(loss), short, "like a guess among so many tokens"),
            *_training_tiles(record),
        ),
        figures(
            _curves(record, "mlm", _LOSSES, "Nats per masked token", "Masked-LM loss."),
            _schedule(record, "mlm-rate"),
        ),
    )


def projection(record: Record) -> Section:
    """Phase 4: what the teacher's vectors lost when they were reduced to the student's width.

    Args:
        record: with `projection`: `explained_energy`, `sample_texts`, `heldout_texts`, `spectrum` (D_S,), and
            `quality`, by width `cosine_correlation` and `neighbour_recall`; None if nothing was projected.
    """
    fitted = record.get("projection")
    if not fitted:
        return [Paragraph("The teacher’s vectors are as wide as the student’s, so nothing was projected.")]
    quality = sorted((int(width), kept) for width, kept in fitted.get("quality", {}).items())
    widest = quality[-1][1] if quality else {}
    return section(
        tiles(
            ("Energy kept", fitted.get("explained_energy"), percent, "of the squared length of the teacher’s vectors"),
            ("Neighbours kept", widest.get("neighbour_recall"), percent, "of the 10 nearest"),
            ("Fitted on", fitted.get("sample_texts"), count, "texts"),
            ("Measured on", fitted.get("heldout_texts"), count, "held-out texts"),
        ),
        figures(
            _spectrum("energy", fitted.get("spectrum", []), "Spectrum.", "Energy"),
            _quality_by_width(quality),
        ),
    )


def _quality_by_width(quality: Sequence[tuple[int, Mapping[str, float]]]) -> Table | None:
    """Two measures of the projected vectors, truncated to several widths."""
    rows = [
        [str(width), f"{kept['cosine_correlation']:.3f}", percent(kept["neighbour_recall"])] for width, kept in quality
    ]
    caption = (
        "What is left when only the first values of each vector are kept: the correlation of the cosines with those "
        "before the projection, and the share of the 10 nearest neighbours"
    )
    return table(caption, ["Values", "Correlation", "Neighbours"], rows)


def labels(record: Record) -> Section:
    """Phase 4: the labelled texts, and the teacher's quality after the projection.

    Args:
        record: with `counts` by split; `tokens_per_second`; `padding_share`; and `ceiling`, see `retrieval_tables`.
    """
    made = record.get("counts", {}).get("train", {})
    return section(
        tiles(
            ("Labelled texts", made.get("rows"), count, "to train on"),
            ("Tokens", made.get("tokens"), short, ""),
            ("Tokens per second", record.get("tokens_per_second"), count, ""),
            ("Padding", record.get("padding_share"), percent, "of all tokens computed"),
        ),
        *retrieval_tables(
            "The teacher before and after the projection; the student learns from the projected teacher",
            record.get("ceiling", {}),
        ),
    )


def distillation(record: Record) -> Section:
    """Phase 5: loss, similarity and retrieval over steps.

    Args:
        record: with `alignment_similarity`, the mean cosine `before` and `after` the student was aligned with the
            labels; `heldout_similarity`; `history`, the Trainer's log; `account`; and what `_training_tiles` shows.
    """
    start = record.get("alignment_similarity", {})
    before = f"{start['before']:.3f} before the student was aligned with the labels" if start else ""
    similarity = {"eval_similarity": ("held out", "student")}
    return section(
        tiles(
            ("Held-out cosine", record.get("heldout_similarity"), "{:.4f}".format, "in the precision of the training"),
            ("Cosine before training", start.get("after"), "{:.3f}".format, before),
            *_training_tiles(record),
        ),
        figures(
            _curves(record, "mse", _LOSSES, "Squared distance", "Loss.", "Squared distance to the labels."),
            _curves(record, "similarity", similarity, "Mean cosine", "Similarity to the labels."),
            _retrieval_curves(record),
            _schedule(record, "rate"),
        ),
    )


def retrieval_tables(caption: str, account: Record) -> list[Table | None]:
    """nDCG@10 of each system: what it keeps of the teacher's, and its score on each set.

    Args:
        caption: of the first table.
        account: its `retrieval` holds, for each system, `system`, `scores` by set, their `mean`, `retention` (the share
            of the teacher's that is kept) and its 95 % `interval`; its `queries` are numbers by set.
    """
    rows, numbers = account.get("retrieval", []), account.get("queries", {})
    steps = [row for row in rows if not is_smaller(row["system"])]
    by_set = [
        [name, count(numbers[name]) if name in numbers else "", *(f"{row['scores'][name]:.3f}" for row in steps)]
        for name in (rows[0]["scores"] if rows else ())
    ]
    return [
        kept_table(f"{caption}. {KEPT} {interval_note(account)}", account, steps),
        table("nDCG@10 on each set", ["Set", "Queries", *(row["system"].capitalize() for row in steps)], by_set),
    ]


def kept_table(caption: str, account: Record, rows: Sequence[Record]) -> Table | None:
    """What systems keep of the teacher's nDCG@10; `rows` are some of the account's `retrieval`."""
    teacher = next((row["mean"] for row in account.get("retrieval", ()) if row["system"] == TEACHER), math.nan)
    cells = [
        [row["system"].capitalize(), f"{row['mean']:.3f}"]
        + (
            ["", "", ""]
            if row["system"] == TEACHER
            else [percent(row["retention"]), interval(row), percent(row["mean"] / teacher)]
        )
        for row in rows
    ]
    return table(caption, ["System", "Mean nDCG@10", "Kept", "95 % interval", "Ratio of the means"], cells)


def is_smaller(system: str) -> bool:
    """Whether a system is the student with truncated or quantised vectors."""
    return system.startswith(f"{STUDENT}, ")


def interval(row: Record) -> str:
    """The 95 % interval of the share that a row's system keeps of the teacher's nDCG@10."""
    low, high = row["interval"]
    return f"{100 * low:.1f}\N{NO-BREAK SPACE}–\N{NO-BREAK SPACE}{percent(high)}"


def interval_note(account: Record) -> str:
    """What the intervals of an account rest on."""
    number = sum(account.get("queries", {}).values())
    return f"The intervals come from a paired bootstrap over {queries(number)}, which are drawn again and again."


def _curves(
    record: Record, name: str, logged: Mapping[str, tuple[str, str]], y_label: str, title: str, note: str = ""
) -> Figure | None:
    """A figure of what the Trainer logged over steps; `logged`: by the Trainer's name, a label and a style."""
    series = []
    for key, (label, style) in logged.items():
        entries = [entry for entry in record.get("history", ()) if key in entry]
        series.append(Series(label, [e["step"] for e in entries], [e[key] for e in entries], style))
    return _drawn(name, series, "Step", y_label, title, note)


def _drawn(
    name: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    title: str,
    note: str = "",
    shares: bool = False,
    ticks: bool = False,
) -> Figure | None:
    """A figure of lines, with what they begin and end with in words; two points make no line."""
    shown = [one for one in series if len(one.x) > 2]
    if not shown:
        return None
    words = f"{note} {described(shown, shares)}.".strip()
    return figure(lines(name, shown, x_label, y_label, shares, ticks), title, words)


def _retrieval_curves(record: Record) -> Figure | None:
    """The student's nDCG@10 over steps, the mean of its sets, against the teacher's."""
    rows = {row["system"]: row for row in record.get("account", {}).get("retrieval", ())}
    names = [f"eval_{dataset}_cosine_ndcg@10" for dataset in rows.get(STUDENT, {}).get("scores", ())]
    logged = [entry for entry in record.get("history", ()) if names and set(names) <= set(entry)]
    if not logged:
        return None
    steps = [entry["step"] for entry in logged]
    means = [sum(entry[name] for name in names) / len(names) for entry in logged]
    label = "student" if len(names) == 1 else f"student, mean of {len(names)} sets"
    series = [
        Series(label, steps, means, "student"),
        Series("teacher", steps, [rows[TEACHER]["mean"]] * len(steps), "teacher"),
    ]
    note = "During training, in the precision of the training."
    return _drawn("retrieval", series, "Step", "nDCG@10", "Retrieval.", note)


def _spectrum(name: str, shares: Sequence[float], title: str, what: str) -> Figure | None:
    """The share that the first 1, 2, 3, ... directions hold together."""
    if not shares:
        return None
    sums = Series(what, range(1, len(shares) + 1), list(itertools.accumulate(shares)), "student")
    note = f"Share of the {what.lower()} that the first principal directions hold."
    return _drawn(name, [sums], "Directions kept", f"{what}, cumulative", title, note, shares=True)


def _schedule(record: Record, name: str) -> Figure | None:
    """The learning rate over steps, unless it is straight but for its warm-up."""
    if record.get("settings", {}).get("lr_scheduler_type") in _STRAIGHT:
        return None
    return _curves(record, name, _RATE, "Learning rate", "Learning rate.")


def _training_tiles(record: Record) -> list[tuple[str, Any, Callable[[Any], str], str]]:
    """The tiles that phases 3 and 5 have in common."""
    return [
        ("Steps", record.get("steps"), count, ""),
        ("Tokens per second", record.get("train_tokens_per_second"), count, "without evaluations"),
        ("Model FLOPs utilisation", record.get("mfu"), percent, "of the device’s peak rate"),
        ("Evaluations", record.get("evaluation_share"), percent, "of the training’s time"),
        ("Peak memory", record.get("peak_memory_bytes"), lambda size: f"{size / 1e9:.1f} GB", ""),
        ("Texts truncated", record.get("truncated_rows") or None, count, "longer than max_seq_length"),
    ]
