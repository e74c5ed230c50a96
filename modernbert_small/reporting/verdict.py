"""The report's verdict, by rules: how good the model is, how sure that is, where the rest was lost, what to do next."""

from collections.abc import Iterator, Mapping
from typing import Any

from modernbert_small.evaluation.systems import MIXED, PROJECTED, STUDENT, TEACHER
from modernbert_small.reporting.formats import count, percent, queries
from modernbert_small.reporting.page import Paragraph, Section, Steps, section
from modernbert_small.reporting.paths import without_paths

Record = Mapping[str, Any]
Rows = Mapping[str, Mapping[str, Any]]  # of an account's `retrieval`, by system

# The least share of the teacher's nDCG@10 for a word. On BEIR, LEAF reports 97 % of its teacher (arXiv:2509.12539). The
# other bounds are a choice.
_WORDS = ((0.97, "Very good"), (0.9, "Good"), (0.8, "Fair"), (0.0, "Weak"))
WIDE = 0.1  # an interval of the share kept that is wider tells little
_NARROW = 0.05  # the width that is proposed instead
FEW_QUERIES = 30  # of fewer, the bootstrap's interval is too narrow itself; this is a choice
CEILING = 0.98  # of the projected teacher; with less, wider vectors come first
SMALL_LOSS = 0.02  # of the distillation; with less, nothing needs to be done
MANY_TEXTS = 100_000
SHORT_TEXTS = 128  # tokens; texts cut there gave the nearest student (docs/own-data.md)
# The share of the distance to the labels (1 - cosine) that is gained in the last quarter of the training, from which on
# more steps are proposed. This is a choice.
RISING = 0.05


def verdict(records: Mapping[str, Record]) -> Section:
    """The verdict on a finished model in a few sentences, and the steps that would make it better.

    Args:
        records: by phase, as `run.records.find_records` gives them.
    """
    if "distil_train" not in records:
        return []
    account = records["distil_train"].get("account", {})
    rows: Rows = {row["system"]: row for row in account.get("retrieval", ())}
    if reason := account.get("failed"):
        return [Paragraph(f"The comparison with the teacher failed: {without_paths(reason)}.", is_notice=True)]
    if STUDENT not in rows:
        why = "How good the model is was not measured: name sets in eval_datasets, best of all your own searches."
        return [Paragraph(why)]
    steps = list(_steps(records, rows))
    return section(
        Paragraph(f"{_how_good(account, rows)} {_how_sure(account, rows[STUDENT])}"),
        Paragraph(_where_lost(rows)),
        Steps("What to do next", steps) if steps else None,
    )


def mixed_is_better(account: Record) -> bool:
    """Whether the student's queries find more among the teacher's documents than among the student's own."""
    kept = {row["system"]: row["retention"] for row in account.get("retrieval", ())}
    return MIXED in kept and kept[MIXED] > kept[STUDENT]


def cosines_note(account: Record) -> str:
    """That a threshold for the teacher's cosines is none for the student's, with both models' means if they are known.

    Args:
        account: with `cosines`, see `evaluation.account.account`.
    """
    advice = "A threshold that was chosen for the teacher does not carry over to the student: choose it anew."
    cosines = account.get("cosines") or {}
    if not {TEACHER, STUDENT} <= set(cosines):
        return f"The student’s cosines are not the teacher’s, and are often higher. {advice}"
    (teacher, of_all), (student, of_all_) = ((c["relevant"], c["all"]) for c in (cosines[TEACHER], cosines[STUDENT]))
    compared = "higher than" if student > teacher else "not"
    return (
        f"The student’s cosines are {compared} the teacher’s: a query and a relevant document have {student:.2f} on "
        f"average by the student and {teacher:.2f} by the teacher, a query and any document {of_all_:.2f} and "
        f"{of_all:.2f}. {advice}"
    )


def _how_good(account: Record, rows: Rows) -> str:
    """The share that is kept, in words, and in how many searches one would notice."""
    student, teacher = rows[STUDENT], rows[TEACHER]
    word = next(word for least, word in _WORDS if student["retention"] >= least)
    names = list(student["scores"])
    where = f"on average over {len(names)} sets" if len(names) > 1 else f"on the set {names[0]}"
    text = (
        f"{word}: the student keeps {percent(student['retention'])} of its teacher’s nDCG@10 "
        f"{where} ({student['mean']:.3f} of {teacher['mean']:.3f}). nDCG@10 is 1 if all relevant "
        "documents come first, and 0 if none is among the first ten."
    )
    if outcomes := account.get("outcomes"):
        text += (
            f" For {count(outcomes['equal'])} of {queries(sum(outcomes.values()))} both do equally well, for "
            f"{count(outcomes['better'])} the student does better, for {count(outcomes['worse'])} worse."
        )
    return text


def _how_sure(account: Record, student: Record) -> str:
    """The interval, what it rests on, and what it is too wide for."""
    low, high = student["interval"]
    number = sum(account.get("queries", {}).values())
    text = f"The 95 % interval of what is kept is {percent(low)} to {percent(high)}; it rests on {queries(number)}."
    if number < FEW_QUERIES:
        return f"{text} That is too few for any judgement: use fifty at least."
    if high - low <= WIDE:
        return text
    needed = round(number * ((high - low) / _NARROW) ** 2, -2)
    return (
        f"{text} That is too few to tell {100 * low:.0f} from {100 * high:.0f} %; some {count(needed)} would narrow "
        f"the interval to {100 * _NARROW:.0f} % of the teacher’s."
    )


def _where_lost(rows: Rows) -> str:
    """How much the projection and the distillation lost."""
    kept = rows[STUDENT]["retention"]
    ceiling = rows[PROJECTED]["retention"] if PROJECTED in rows else 1.0
    if kept >= 1:
        return "On these sets nothing was lost."
    lost = f"{percent(1 - kept)} of the teacher’s nDCG@10 are lost"
    if PROJECTED not in rows:
        return f"{lost}, all of it in the distillation: the student does not reproduce the teacher’s vectors exactly."
    if ceiling >= 1:
        return f"{lost}: none by the projection to shorter vectors, all of it in the distillation."
    if kept >= ceiling:
        return f"{lost}, by the projection to shorter vectors; the distillation loses none."
    return (
        f"{lost}: {percent(1 - ceiling)} by the projection to shorter vectors, above which no student is expected, and "
        f"{percent(ceiling - kept)} by the distillation, since the student does not reproduce these vectors exactly."
    )


def _steps(records: Mapping[str, Record], rows: Rows) -> Iterator[str]:
    """What to do next, in the order of docs/own-data.md; what helps without a training comes first."""
    final = records["distil_train"]
    student = rows[STUDENT]
    kept, (low, high) = student["retention"], student["interval"]
    ceiling = rows[PROJECTED]["retention"] if PROJECTED in rows else 1.0
    if high - low > WIDE or sum(final["account"].get("queries", {}).values()) < FEW_QUERIES:
        yield "Measure with more queries of your own before you change anything on the strength of these figures."
    if mixed_is_better(final["account"]):
        yield (
            "Today, without any training: embed the documents with the reduced teacher, and only the queries with the "
            f"student. This keeps {percent(rows[MIXED]['retention'])} instead of {percent(kept)} (docs/shipping.md)."
        )
    if ceiling < CEILING:
        yield (
            f"Raise the ceiling, which is {percent(ceiling)}: give the vectors more values, with a larger "
            "embedding_dim of phase 4 and the same hidden_size of phase 2."
        )
    if ceiling - kept > SMALL_LOSS:
        yield from _more_training(records)
    elif ceiling >= CEILING:
        yield "Nothing more is needed on these sets. See below how small the vectors can be."


def _more_training(records: Mapping[str, Record]) -> Iterator[str]:
    """What makes a student nearer to its teacher: queries, steps, text, shorter texts, size.

    Steps come before text: a student that still learns, or has not read all of its texts, needs no others yet.
    """
    final, corpus = records["distil_train"], records.get("create_dataset", {})
    texts, kinds = final.get("rows", {}).get("train"), {entry["kind"] for entry in corpus.get("by_source", ())}
    if kinds and "query" not in kinds:
        yield "Add queries to the corpus: it holds none, so the student has to guess where the teacher puts a query."
    share = max((entry["epoch"] for entry in final.get("history", ()) if "epoch" in entry), default=1.0)
    reasons = [f"it has read only {percent(share)} of its texts"] if share < 1 else []
    if still := rising(final):
        reasons.append(f"in its last quarter {still}")
    if reasons:
        more = "Raise max_steps of phase 5, or leave it out." if share < 1 else "Raise num_train_epochs of phase 5."
        yield f"Train for more steps: the training was short, since {' and '.join(reasons)}. {more}"
    if texts is not None and texts < MANY_TEXTS and share >= 1:
        yield f"Add text and queries like those that will be searched: the student has seen {count(texts)} texts."
    if (longest := corpus.get("settings", {}).get("max_seq_length", 0)) > SHORT_TEXTS:
        yield (
            f"Cut the texts shorter than {count(longest)} tokens (max_seq_length of phase 1; we measured "
            f"{SHORT_TEXTS}): every text gives one label, so shorter texts give more labels for the same work."
        )
    yield "If that is not enough, choose a larger student: more layers, or a wider one (docs/another-size.md)."


def rising(final: Record) -> str | None:
    """What still became better in the last quarter of the training, in words; None if little did or it is not known.

    It is the held-out cosine or, in a training that was evaluated once at most, the training loss. The loss is the
    squared distance to the labels, so both are compared with the same bound.

    Args:
        final: phase 5's record, with `history`, the Trainer's log.
    """
    if found := _last_quarter(final, "eval_similarity"):
        before, after = found
        is_rising = after - before > RISING * (1 - before)
        return f"the held-out cosine still rose by {after - before:.3f}" if is_rising else None
    if found := _last_quarter(final, "loss"):
        before, after = found
        return f"the loss still fell by {percent(1 - after / before)}" if before - after > RISING * before else None
    return None


def _last_quarter(final: Record, name: str) -> tuple[float, float] | None:
    """A logged value at the end, and where it was last logged before the last quarter began; None if never."""
    logged = {entry["step"]: entry[name] for entry in final.get("history", ()) if name in entry}
    early = [step for step in logged if step <= 0.75 * max(logged)]
    return (logged[max(early)], logged[max(logged)]) if early else None
