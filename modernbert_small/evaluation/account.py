"""The account: where a student stands against its teacher, and which step lost the rest.

All systems are measured on the same sets: the teacher, the teacher after phase 4's projection (the ceiling of any
student), the student, the student's queries against the teacher's documents, and the student with truncated and with
quantised vectors. Measured are nDCG@10, also as a share of the teacher's, Spearman's correlation on sentence pairs,
size, and speed on this machine.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from modernbert_small.evaluation.embedder import Embedder, Vectors
from modernbert_small.evaluation.metrics import FloatArray, Gains, mean_ratio_interval, ndcg_at_10, store_scores
from modernbert_small.evaluation.searches import Search, sample_searches
from modernbert_small.evaluation.sets import PairSet, RetrievalSet
from modernbert_small.evaluation.systems import (
    PROJECTED,
    STUDENT,
    TEACHER,
    WIDTHS,
    VectorPair,
    is_reduced_teacher,
    pair_scores,
    project,
    split_projection,
    student_scores,
    teacher_scores,
    truncated_widths,
)
from modernbert_small.run.errors import UserError
from modernbert_small.run.tables import markdown_table, printable

__all__ = ["WIDTHS", "account", "account_after_training", "format_account", "is_reduced_teacher"]

logger = logging.getLogger(__name__)

SEARCHES = 5  # queries, of all sets together, whose first results are kept

# An account without a measurement.
_EMPTY: dict[str, Any] = {
    "retrieval": [],
    "grid": {},
    "searches": [],
    "left_out": [],
    "queries": {},
    "pairs": [],
    "cost": {},
}

# nDCG@10 of each query (Q,), by system, then by set.
QueryScores = dict[str, dict[str, NDArray[np.float64]]]


def account(
    student: SentenceTransformer | None,
    teacher: SentenceTransformer,
    is_reduced: bool,
    retrieval_sets: Sequence[RetrievalSet],
    pair_sets: Sequence[PairSet] = (),
    flag: str | None = None,
) -> dict[str, Any]:
    """Measure every step from the teacher to the student on the same sets.

    Args:
        student: None measures the ceiling alone.
        teacher: phase 4's reduced teacher, or any model.
        is_reduced: whether its last Dense module is phase 4's projection.
        retrieval_sets: sets for nDCG@10.
        pair_sets: sets for Spearman's correlation.
        flag: the flag that names the sets. With it, a set on which the teacher finds nothing is refused; without it,
            such a set is left out with a warning, so that a finished training is not lost.

    Returns:
        retrieval: a row per system with `scores` by set, their `mean`, and `retention` with its 95 % `interval`, the
            means over sets of the share of the teacher's score.
        grid: the student's retention by width and by precision of its vectors.
        searches: see `sample_searches`; the teacher with its projection if it has one.
        left_out: names of the retrieval sets on which the teacher finds nothing.
        queries: the number of queries by set.
        pairs: a row per system with `scores` by set.
        cost: by model, see `Embedder.cost`.

    Raises:
        UserError: the teacher finds nothing on a set, and `flag` is given.
    """
    whole, projection = split_projection(teacher, is_reduced)
    embedders = {TEACHER: Embedder(whole)}
    if student is not None:
        embedders[STUDENT] = Embedder(student)
    retrieval = _retrieval(embedders, projection, retrieval_sets, flag)
    measured = [dataset for dataset in retrieval_sets if dataset.name not in retrieval["left_out"]]
    queries = [text for dataset in measured for text in dataset.queries.values()]
    return {
        **retrieval,
        "queries": {dataset.name: len(dataset.queries) for dataset in measured},
        "pairs": _pairs(embedders, projection, pair_sets),
        "cost": {name: embed.cost(queries) for name, embed in embedders.items()} if queries else {},
    }


def _retrieval(
    embedders: Mapping[str, Embedder],
    projection: Vectors | None,
    retrieval_sets: Sequence[RetrievalSet],
    flag: str | None,
) -> dict[str, Any]:
    """The parts `retrieval`, `grid`, `searches` and `left_out` of an account."""
    per_query: QueryScores = {}
    shares: dict[tuple[int, str], list[float]] = {}  # of the teacher's score, one a set, by width and precision
    searches: list[Search] = []
    left_out: list[str] = []
    for dataset in retrieval_sets:
        gains = _gains(dataset)
        T = _embed_set(embedders, TEACHER, dataset)
        projected = None if projection is None else project(T, projection)
        scores = teacher_scores(T, projected)
        teachers_mean = float(ndcg_at_10(scores[TEACHER], gains).mean())
        if teachers_mean == 0:
            _refuse_or_warn(dataset, flag)
            left_out.append(dataset.name)
            continue
        if STUDENT in embedders:
            S = _embed_set(embedders, STUDENT, dataset)
            scores |= student_scores(S, projected or T)
            for store, score in store_scores(*S, gains, truncated_widths(S[0].shape[1])).items():
                shares.setdefault(store, []).append(score / teachers_mean)
            count = min(math.ceil(SEARCHES / len(retrieval_sets)), SEARCHES - len(searches))
            shown = {TEACHER: scores.get(PROJECTED, scores[TEACHER]), STUDENT: scores[STUDENT]}
            searches += sample_searches(dataset, shown, gains, count)
        for system, matrix in scores.items():
            per_query.setdefault(system, {})[dataset.name] = ndcg_at_10(matrix, gains)
        logger.info("%s: %d queries, %d documents", dataset.name, len(dataset.queries), len(dataset.corpus))
    return {
        "retrieval": [_row(system, by_set, per_query[TEACHER]) for system, by_set in per_query.items()],
        "grid": _grid(shares),
        "searches": searches,
        "left_out": left_out,
    }


def _gains(dataset: RetrievalSet) -> list[Gains]:
    """For each query the gains of its relevant documents, by their positions in the corpus."""
    column = {document: index for index, document in enumerate(dataset.corpus)}
    return [
        {column[document]: dataset.gains.get((query, document), 1.0) for document in dataset.relevant[query]}
        for query in dataset.queries
    ]


def _embed_set(embedders: Mapping[str, Embedder], name: str, dataset: RetrievalSet) -> VectorPair:
    """A model's vectors of a set's queries (Q, D) and documents (N, D)."""
    embed = embedders[name]
    queries = embed(list(dataset.queries.values()), "query", f"{dataset.name}, {name}, queries")
    return queries, embed(list(dataset.corpus.values()), "document", f"{dataset.name}, {name}, documents")


def _refuse_or_warn(dataset: RetrievalSet, flag: str | None) -> None:
    """Say that the teacher finds nothing on a set.

    Raises:
        UserError: there is a flag that the user can change.
    """
    found = (
        f"{dataset.name}: the teacher's nDCG@10 is 0: it ranks no relevant document among the first ten for any of "
        f"{len(dataset.queries):,} queries, so no share of it can be given"
    )
    if flag is not None:
        raise UserError(f"{flag} {found}; leave this set out, check its qrels, or use a teacher that finds something")
    logger.warning("%s; THIS SET IS LEFT OUT of the account; check its qrels", found)


def _row(system: str, by_set: Mapping[str, FloatArray], teacher: Mapping[str, FloatArray]) -> dict[str, Any]:
    """A system's line of an account.

    Args:
        system: its name.
        by_set: nDCG@10 of each query (Q,), by set.
        teacher: the same of the teacher, whose mean is above 0 on every set.
    """
    means = {name: float(values.mean()) for name, values in by_set.items()}
    shares = [means[name] / float(teacher[name].mean()) for name in by_set]
    low, high = mean_ratio_interval([(by_set[name], teacher[name]) for name in by_set])
    return {
        "system": system,
        "scores": {name: round(mean, 4) for name, mean in means.items()},
        "mean": round(float(np.mean(list(means.values()))), 4),
        "retention": round(float(np.mean(shares)), 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def _grid(shares: Mapping[tuple[int, str], Sequence[float]]) -> dict[str, dict[str, float]]:
    """Means over sets, by width and then by precision."""
    grid: dict[str, dict[str, float]] = {}
    for (size, precision), of_sets in shares.items():
        grid.setdefault(str(size), {})[precision] = round(float(np.mean(of_sets)), 4)
    return grid


def _pairs(
    embedders: Mapping[str, Embedder], projection: Vectors | None, pair_sets: Sequence[PairSet]
) -> list[dict[str, Any]]:
    """Spearman's correlation of each system's cosines with the sets' scores: the part `pairs` of an account."""
    by_system: dict[str, dict[str, float]] = {}
    for pair_set in pair_sets:
        vectors = {
            name: (
                embed(pair_set.first, "document", f"{pair_set.name}, {name}, first sentences"),
                embed(pair_set.second, "document", f"{pair_set.name}, {name}, second sentences"),
            )
            for name, embed in embedders.items()
        }
        T = vectors[TEACHER]
        projected = None if projection is None else project(T, projection)
        for system, cosines in pair_scores(T, projected, vectors.get(STUDENT)).items():
            correlation = _spearman(f"{pair_set.name}, {system}", cosines, pair_set.scores)
            by_system.setdefault(system, {})[pair_set.name] = round(correlation, 4)
    return [{"system": system, "scores": scores} for system, scores in by_system.items()]


def _spearman(what: str, cosines: FloatArray, scores: Sequence[float]) -> float:
    """Spearman's correlation, which is 0 with a warning if the cosines (N,) are all equal: they then rank no pair."""
    if np.ptp(cosines) == 0:
        logger.warning("%s: all %d cosines are equal, so the correlation is counted as 0", what, len(cosines))
        return 0.0
    return float(spearmanr(cosines, scores)[0])


def account_after_training(
    student: SentenceTransformer,
    teacher: SentenceTransformer,
    is_reduced: bool,
    retrieval_sets: Sequence[RetrievalSet],
    pair_sets: Sequence[PairSet],
    again: str,
) -> dict[str, Any]:
    """The same as `account`, but an error is logged and not raised, so that a finished training is not lost.

    Args:
        student: the trained model.
        teacher: see `account`.
        is_reduced: see `account`.
        retrieval_sets: see `account`.
        pair_sets: see `account`.
        again: the command that makes the comparison again, for the log.

    Returns:
        The account. If it cannot be made, its parts are empty, and `failed` says why.
    """
    try:
        record = account(student, teacher, is_reduced, retrieval_sets, pair_sets)
        json.dumps(record, allow_nan=False)  # run.json could not hold a number that is not finite
    except Exception as error:  # whatever it is, the model is finished without it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.error(
            "THE COMPARISON WITH THE TEACHER FAILED (%s); the trained model is kept and finished without it; "
            "compare again with: %s",
            reason,
            again,
            exc_info=not isinstance(error, UserError),
        )
        return _EMPTY | {"failed": reason}
    return record


def format_account(record: Mapping[str, Any]) -> str:
    """An account in Markdown: nDCG@10 of each system, the sets that were left out, Spearman, MTEB, cost."""
    blocks = []
    if reason := record.get("failed"):
        blocks.append(f"The comparison with the teacher failed: {reason}")
    if record["retrieval"]:
        blocks.append(_retrieval_table(record["retrieval"]))
    if left_out := record.get("left_out"):
        blocks.append(f"Left out, since the teacher's nDCG@10 is 0 there: {', '.join(left_out)}.")
    for part, title in (("pairs", "Spearman"), ("mteb", "MTEB")):
        if rows := record.get(part):
            names = list(rows[0]["scores"])
            blocks.append(markdown_table([[title, *names], *([row["system"], *_scores(row, names)] for row in rows)]))
    if record["cost"]:
        blocks.append(_cost_table(record["cost"]))
    return printable("\n\n".join(blocks))


def _retrieval_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The nDCG@10 of each system on each set, and what is kept of the teacher's."""
    names = list(rows[0]["scores"])
    lines = [["nDCG@10", *names, "mean", "kept (95 %)"]]
    for row in rows:
        low, high = (100 * share for share in row["interval"])
        kept = f"{100 * row['retention']:.1f} % ({low:.1f} - {high:.1f})" if row["system"] != TEACHER else ""
        lines.append([row["system"], *_scores(row, names), f"{row['mean']:.3f}", kept])
    return markdown_table(lines)


def _scores(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """A row's scores on these sets, with three decimals."""
    return [f"{row['scores'][name]:.3f}" for name in names]


def _cost_table(costs: Mapping[str, Mapping[str, float]]) -> str:
    """Size and speed of each model."""
    lines = [["", "parameters", "MB", "texts/s", "ms a query"]]
    for name, cost in costs.items():
        size = [f"{cost['parameters'] / 1e6:.1f} M", f"{cost['megabytes']:,.0f}"]
        lines.append([name, *size, f"{cost['texts_per_second']:,.0f}", f"{cost['query_milliseconds']:.1f}"])
    return markdown_table(lines)
