"""The report's sections on what the phases did, each from one phase's record. What a record lacks is left out."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modernbert_small.evaluation.metrics import perplexity
from modernbert_small.reporting.page import (
    Html,
    code,
    count,
    duration,
    element,
    figure,
    figures,
    join,
    name_values,
    percent,
    short,
    table,
    tiles,
)
from modernbert_small.reporting.plots import Series, lines, stacked_bars
from modernbert_small.run.artefacts import PHASES

Record = Mapping[str, Any]


def corpus(record: Record) -> Html:
    """Phase 1: rows, tokens, what was dropped."""
    by_source, rows = record.get("by_source", []), record.get("rows", {})
    dropped = record.get("dropped", {})
    sources, kinds = (list(dict.fromkeys(entry[what] for entry in by_source)) for what in ("source", "kind"))
    tokens = {(entry["source"], entry["kind"]): entry["tokens"] for entry in by_source}
    bars = [
        Series(kind, (), [tokens.get((source, kind), 0) for source in sources], style)
        for kind, style in zip(sorted(kinds), ("student", "teacher"), strict=False)
    ]
    lengths = [
        [entry["source"], entry["kind"], *map(count, (entry["rows"], entry["tokens"], entry["tokens"] / entry["rows"]))]
        for entry in by_source
    ]
    parts = [record.get(part, {}) for part in ("read", "dropped", "split")]
    became = (
        [[name, *(count(n) for part in parts for n in part[name].values())] for name in dropped] if all(parts) else []
    )
    reasons = [reason.replace("_", " ").capitalize() for reason in next(iter(dropped.values()), {})]
    return join(
        tiles(
            ("Texts to train on", rows.get("train"), count, ""),
            ("Texts held out", rows.get("validation"), count, ""),
            ("Tokens", record.get("tokens"), short, "estimated from a sample"),
            ("Dropped", sum(n for why in dropped.values() for n in why.values()) if dropped else None, count, "texts"),
        ),
        figures(
            figure(stacked_bars("tokens", sources, bars, "Tokens"), "Tokens by source and kind.") if bars else "",
            table("Texts kept, by source and kind", ["Source", "Kind", "Texts", "Tokens", "Tokens a text"], lengths),
        ),
        table(
            "What was read, what of it was dropped and why, and what was too long and split",
            ["Source", "Rows read", "Texts", *reasons, "Split", "Into chunks"],
            became,
        ),
        *(element("p", f"{name}: {n} files do not parse.") for name, n in record.get("skipped_files", {}).items()),
    )


def inheritance(record: Record) -> Html:
    """Phase 2: what the first weights hold of the teacher."""
    spectrum, transferred = (record.get(name) or [] for name in ("spectrum", "transferred"))
    layers = record.get("layers")
    drawn = []
    if layers:
        index = range(len(layers["cka"]))
        curves = [
            Series(label, index, layers[name], style)
            for name, label, style in (
                ("cka", "CKA", "student"),
                ("explained_variance", "explained variance", "teacher"),
            )
            if layers[name]
        ]
        note = f"The student’s layers against the teacher’s {', '.join(map(str, layers['teacher_layers']))}."
        drawn.append(figure(lines("layers", curves, "Layer of the student", "Share", True, True), "By layer.", note))
    if spectrum:
        drawn.append(_spectrum("embeddings", spectrum, "Token embeddings.", "Variance"))
    losses = [
        [name.capitalize(), f"{loss:.3f}", short(perplexity(loss))]
        for name, loss in record.get("heldout_mlm_loss", {}).items()
    ]
    caption = "Masked-LM loss on held-out text before any training, in nats a hidden token"
    return join(
        tiles(
            ("Initialisation", record["settings"].get("init"), str, ""),
            ("Parameters", record.get("parameters"), short, "masked-LM head included"),
            ("Tensors inherited", len(transferred) or None, count, "whole or projected"),
            ("Variance inherited", sum(spectrum) or None, percent, "of the token embeddings"),
        ),
        figures(*drawn, table(caption, ["Model", "Loss", "Perplexity"], losses)),
    )


def language(record: Record) -> Html:
    """Phase 3: the masked-LM curve."""
    loss = record.get("heldout_mlm_loss")
    return join(
        tiles(
            ("Held-out loss", loss, "{:.3f}".format, "nats a hidden token"),
            ("Held-out perplexity", loss and perplexity(loss), short, ""),
            *_training_tiles(record),
        ),
        figures(
            _curves(record, "mlm", _LOSSES, "Nats a hidden token", "Masked-LM loss."),
            _curves(record, "mlm-rate", _RATE, "Learning rate", "Schedule."),
        ),
    )


def projection(record: Record) -> Html:
    """Phase 4: what the teacher lost by becoming as narrow as the student."""
    fitted = record.get("projection")
    if not fitted:
        return element("p", "The teacher is as wide as the student: nothing was projected.")
    quality = sorted((int(width), kept) for width, kept in fitted.get("quality", {}).items())
    widths = [width for width, _ in quality]
    curves = [
        Series(label, widths, [kept[name] for _, kept in quality], style)
        for name, label, style in (
            ("cosine_correlation", "correlation of cosines", "student"),
            ("neighbour_recall", "10 nearest", "teacher"),
        )
    ]
    widest = quality[-1][1] if quality else {}
    drawn = lines("quality", curves, "Values kept", "Share", True, True) if quality else ""
    return join(
        tiles(
            ("Energy kept", fitted.get("explained_energy"), percent, "of the teacher’s unit vectors"),
            ("Neighbours kept", widest.get("neighbour_recall"), percent, "of the 10 nearest"),
            ("Fitted on", fitted.get("sample_texts"), count, "texts"),
            ("Measured on", fitted.get("heldout_texts"), count, "held-out texts"),
        ),
        figures(
            _spectrum("energy", fitted.get("spectrum", []), "Spectrum.", "Energy"),
            figure(drawn, "Quality by width.", "What the first values keep.") if drawn else "",
        ),
    )


def labels(record: Record) -> Html:
    """Phase 4: the labelled texts, and how far any student can come."""
    made = record.get("counts", {}).get("train", {})
    return join(
        tiles(
            ("Labelled texts", made.get("rows"), count, "to train on"),
            ("Tokens", made.get("tokens"), short, ""),
            ("Tokens a second", record.get("tokens_per_second"), count, ""),
            ("Padding", record.get("padding_share"), percent, "of what was computed"),
        ),
        retrieval_table("The ceiling of any student, measured before training: nDCG@10", record.get("ceiling", {})),
    )


def distillation(record: Record) -> Html:
    """Phase 5: loss, similarity and retrieval over steps."""
    start = record.get("alignment_similarity", {})
    before = f"{start['before']:.3f} before it was turned to the labels’ axes" if start else ""
    similarity = {"eval_similarity": ("held out", "student")}
    retrieval = _retrieval_curves(record)
    return join(
        tiles(
            ("Held-out cosine", record.get("heldout_similarity"), "{:.4f}".format, "to the teacher’s vectors"),
            ("Cosine at the start", start.get("after"), "{:.3f}".format, before),
            *_training_tiles(record),
        ),
        figures(
            _curves(record, "mse", _LOSSES, "Squared distance", "Loss.", "Squared distance to the labels."),
            _curves(record, "similarity", similarity, "Mean cosine", "Similarity to the labels."),
            figure(lines("retrieval", retrieval, "Step", "nDCG@10"), "Retrieval.") if retrieval else "",
            _curves(record, "rate", _RATE, "Learning rate", "Schedule."),
        ),
    )


def spent(record: Record) -> str:
    """Wall-clock time, and energy where it is known; of a run that was resumed, its last process's."""
    watt_hours = record.get("gpu_joules", 0) / 3600
    energy = f", {watt_hours:,.{0 if watt_hours >= 10 else 2}f} Wh by GPUs" if watt_hours else ""
    return duration(record.get("wall_seconds")) + energy + (" since it was resumed" if record.get("resumed") else "")


def provenance(records: Mapping[str, Record]) -> Html:
    """Time, inputs with their hashes, versions, settings."""
    # The teacher is fitted while the labels are made.
    counted = [record for phase, record in records.items() if phase != "teacher" or "labels" not in records]
    total = {
        name: sum(record.get(name, 0) for record in counted)
        for name in ("wall_seconds", "gpu_joules")
        if any(name in record for record in counted)
    }
    times = [
        [
            *(PHASES[phase], code(record["folder"]), record.get("started", "")[:16].replace("T", " ")),
            *(code((record.get("git_commit") or "")[:10]), spent(record)),
        ]
        for phase, record in records.items()
    ]
    inputs = [
        [
            PHASES[phase],
            name.split()[0],
            code(found.get("path") or found.get("hub_id", "")),
            code(found.get("hash", "")),
        ]
        for phase, record in records.items()
        for name, found in record["inputs"].items()
    ]
    versions: dict[str, dict[str, None]] = {}
    for name, version in (pair for record in records.values() for pair in record.get("versions", {}).items()):
        versions.setdefault(name, {})[version] = None
    times.append(["All", "", "", "", spent(total)])
    return join(
        table("Phases", ["Phase", "Folder", "Started", "Commit", "Took"], times),
        table("Inputs, with the xxh3-128 of what they held", ["Phase", "Input", "Path or hub id", "Hash"], inputs),
        table("Versions", ["Library", "Version"], [[name, ", ".join(found)] for name, found in versions.items()]),
        element("h3", "Settings"),
        *(
            element("details", element("summary", PHASES[phase]), name_values(record["settings"]))
            for phase, record in records.items()
        ),
    )


def retrieval_table(caption: str, account: Record) -> Html:
    """nDCG@10 of each system on each set."""
    rows = account.get("retrieval", [])
    names = list(rows[0]["scores"]) if rows else []
    cells = [
        [
            *(row["system"].capitalize(), f"{row['mean']:.3f}", percent(row["retention"]), interval(row)),
            *(f"{row['scores'][name]:.3f}" for name in names),
        ]
        for row in rows
    ]
    return table(caption, ["System", "Mean", "Kept", "95 % interval", *names], cells)


def interval(row: Record) -> str:
    """A row's 95 % interval of what is kept; the teacher has none."""
    low, high = row["interval"]
    return "" if row["system"] == "teacher" else f"{100 * low:.1f} – {percent(high)}"


_LOSSES = {"loss": ("training", "student"), "eval_loss": ("held out", "teacher")}
_RATE = {"learning_rate": ("learning rate", "student")}


def _curves(
    record: Record, name: str, logged: Mapping[str, tuple[str, str]], y_label: str, title: str, note: str = ""
) -> Html:
    """A figure of what the Trainer logged over steps; `logged`: by the Trainer's name, a label and a style."""
    history, series = record.get("history", ()), []
    for key, (label, style) in logged.items():
        if entries := [entry for entry in history if key in entry]:
            series.append(Series(label, [e["step"] for e in entries], [e[key] for e in entries], style))
    return figure(lines(name, series, "Step", y_label), title, note) if series else Html("")


def _retrieval_curves(record: Record) -> list[Series]:
    """The student's nDCG@10 over steps, the mean of its sets, against the teacher's."""
    rows = {row["system"]: row for row in record.get("account", {}).get("retrieval", ())}
    names = [f"eval_{dataset}_cosine_ndcg@10" for dataset in rows.get("student", {}).get("scores", ())]
    logged = [entry for entry in record.get("history", ()) if names and set(names) <= set(entry)]
    if not logged:
        return []
    steps = [entry["step"] for entry in logged]
    means = [sum(entry[name] for name in names) / len(names) for entry in logged]
    ceiling = Series("teacher", steps, [rows["teacher"]["mean"]] * len(steps), "teacher")
    return [
        Series("student" if len(names) == 1 else f"student, mean of {len(names)} sets", steps, means, "student"),
        ceiling,
    ]


def _spectrum(name: str, shares: Sequence[float], title: str, what: str) -> Html:
    """What the leading directions hold together."""
    if not shares:
        return Html("")
    sums = Series(what, range(1, len(shares) + 1), list(itertools.accumulate(shares)), "student")
    svg = lines(name, [sums], "Directions kept", f"{what}, cumulative", True)
    return figure(svg, title, f"{what} in the leading directions.")


def _training_tiles(record: Record) -> list[tuple[str, Any, Callable[[Any], str], str]]:
    """What phases 3 and 5 have in common."""
    return [
        ("Steps", record.get("steps"), count, ""),
        ("Tokens a second", record.get("train_tokens_per_second"), count, "evaluations left out"),
        ("Of the device’s peak", record.get("mfu"), percent, "model FLOPs utilisation"),
        ("Peak memory", record.get("peak_memory_bytes"), lambda size: f"{size / 1e9:.1f} GB", ""),
        ("Texts cut", record.get("truncated_rows") or None, count, "longer than the model reads"),
    ]
