"""The account: where a student stands against its teacher, and which step lost the rest.

All systems are measured on the same sets: the teacher, the teacher after phase 4's projection (the ceiling of any
student), the student, the student's queries against the teacher's documents, and the student with truncated and with
quantised vectors. Measured are nDCG@10, also as a share of the teacher's, Spearman's correlation on sentence pairs,
size, and speed on this machine.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from modernbert_small.evaluation.embedder import (
    LATENCY_QUERIES,
    SPEED_TEXTS,
    Embedder,
    KnownVectors,
    Vectors,
    machine,
)
from modernbert_small.evaluation.metrics import FloatArray, Gains, mean_ratio_interval, ndcg_at_10, store_scores
from modernbert_small.evaluation.searches import Search, sample_searches
from modernbert_small.evaluation.sets import PairSet, RetrievalSet
from modernbert_small.evaluation.systems import (
    PROJECTED,
    STUDENT,
    TEACHER,
    VectorPair,
    project,
    split_projection,
    student_scores,
    teacher_scores,
    truncated_widths,
)
from modernbert_small.run.errors import UserError
from modernbert_small.run.tables import counted

logger = logging.getLogger(__name__)

_EQUAL = 1e-9  # scores of a query that are nearer are equal
SEARCHES = 5  # queries, of all sets together, whose first results are kept

# An account without a measurement.
_EMPTY: dict[str, Any] = {
    "retrieval": [],
    "grid": {},
    "searches": [],
    "outcomes": {},
    "cosines": {},
    "left_out": [],
    "queries": {},
    "pairs": [],
    "cost": {},
    "machine": "",
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
    teacher_vectors: KnownVectors | None = None,
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
        teacher_vectors: the teacher's vectors before the projection, as far as they are known; new ones are added.

    Returns:
        retrieval: a row per system with `scores` by set, their `mean`, and `retention` with its 95 % `interval`, the
            means over sets of the share of the teacher's score.
        grid: the student's retention by width and by precision of its vectors.
        searches: see `sample_searches`.
        outcomes: of how many queries the student's nDCG@10 is `better` than the teacher's, `worse`, or `equal`.
        cosines: by model the mean cosine of a query to its `relevant` documents and to `all` documents.
        left_out: names of the retrieval sets on which the teacher finds nothing.
        queries: the number of queries by set.
        pairs: a row per system with `scores` by set.
        cost: by model, see `Embedder.cost`.
        machine: what `cost` was measured on.

    Raises:
        UserError: the teacher finds nothing on a set, and `flag` is given.
    """
    whole, projection = split_projection(teacher, is_reduced)
    embedders = {TEACHER: Embedder(whole, teacher_vectors)}
    if student is not None:
        embedders[STUDENT] = Embedder(student)
    retrieval = _retrieval(embedders, projection, retrieval_sets, flag)
    measured = [dataset for dataset in retrieval_sets if dataset.name not in retrieval["left_out"]]
    return {
        **retrieval,
        "queries": {dataset.name: len(dataset.queries) for dataset in measured},
        "pairs": pair_rows(embedders, projection, pair_sets),
        **costs(embedders, measured),
    }


def costs(embedders: Mapping[str, Embedder], retrieval_sets: Sequence[RetrievalSet]) -> dict[str, Any]:
    """The parts `cost` and `machine` of an account, measured on the first texts of the first set; empty without any."""
    if not retrieval_sets:
        return {"cost": {}, "machine": ""}
    queries = list(retrieval_sets[0].queries.values())[:LATENCY_QUERIES]
    documents = list(retrieval_sets[0].corpus.values())[:SPEED_TEXTS]
    return {
        "cost": {name: embed.cost(queries, documents) for name, embed in embedders.items()},
        "machine": machine(embedders[TEACHER].model.device),
    }


def _retrieval(
    embedders: Mapping[str, Embedder],
    projection: Vectors | None,
    retrieval_sets: Sequence[RetrievalSet],
    flag: str | None,
) -> dict[str, Any]:
    """The parts `retrieval`, `grid`, `searches`, `outcomes`, `cosines` and `left_out` of an account."""
    per_query: QueryScores = {}
    cosines: dict[str, list[tuple[float, float]]] = {}  # of relevant and of all documents, one a set, by model
    shares: dict[tuple[int, str], list[float]] = {}  # of the teacher's score, one a set, by width and precision
    searches: list[Search] = []
    left_out: list[str] = []
    for dataset in retrieval_sets:
        gains = gains_of(dataset)
        T = embed_set(embedders, TEACHER, dataset)
        projected = None if projection is None else project(T, projection)
        scores = teacher_scores(T, projected)
        teachers_mean = float(ndcg_at_10(scores[TEACHER], gains).mean())
        if teachers_mean == 0:
            refuse_or_warn(dataset, flag)
            left_out.append(dataset.name)
            continue
        if STUDENT in embedders:
            S = embed_set(embedders, STUDENT, dataset)
            scores |= student_scores(S, projected or T)
            for store, score in store_scores(*S, gains, truncated_widths(S[0].shape[1])).items():
                shares.setdefault(store, []).append(score / teachers_mean)
            count = min(math.ceil(SEARCHES / len(retrieval_sets)), SEARCHES - len(searches))
            both = {name: scores[name] for name in (TEACHER, STUDENT)}
            searches += sample_searches(dataset, both, gains, count)
            for name, matrix in both.items():
                cosines.setdefault(name, []).append(_mean_cosines(matrix, gains))
        for system, matrix in scores.items():
            per_query.setdefault(system, {})[dataset.name] = ndcg_at_10(matrix, gains)
        queries, documents = counted(len(dataset.queries), "query", "queries"), counted(len(dataset.corpus), "document")
        logger.info("%s: %s, %s", dataset.name, queries, documents)
    return {
        "retrieval": [retrieval_row(system, by_set, per_query[TEACHER]) for system, by_set in per_query.items()],
        "grid": _grid(shares),
        "searches": searches,
        "outcomes": _outcomes(per_query[STUDENT], per_query[TEACHER]) if STUDENT in per_query else {},
        "cosines": {
            name: dict(zip(("relevant", "all"), np.mean(means, 0).round(3).tolist(), strict=True))
            for name, means in cosines.items()
        },
        "left_out": left_out,
    }


def _mean_cosines(scores: FloatArray, gains: Sequence[Gains]) -> tuple[float, float]:
    """The mean of cosines (Q, N) of queries to their relevant documents, and to all."""
    relevant = [scores[query, list(of_query)].mean() for query, of_query in enumerate(gains)]
    return float(np.mean(relevant)), float(scores.mean())


def _outcomes(student: Mapping[str, FloatArray], teacher: Mapping[str, FloatArray]) -> dict[str, int]:
    """Of how many queries a student's nDCG@10 is better, worse and equal; (Q,) by set of both."""
    gains = np.concatenate([student[name] - teacher[name] for name in student])
    better, worse = int((gains > _EQUAL).sum()), int((gains < -_EQUAL).sum())
    return {"better": better, "worse": worse, "equal": len(gains) - better - worse}


def gains_of(dataset: RetrievalSet) -> list[Gains]:
    """For each query the gains of its relevant documents, by their positions in the corpus."""
    column = {document: index for index, document in enumerate(dataset.corpus)}
    return [
        {column[document]: dataset.gains.get((query, document), 1.0) for document in dataset.relevant[query]}
        for query in dataset.queries
    ]


def embed_set(embedders: Mapping[str, Embedder], name: str, dataset: RetrievalSet) -> VectorPair:
    """A model's vectors of a set's queries (Q, D) and documents (N, D)."""
    embed = embedders[name]
    queries = embed(list(dataset.queries.values()), "query", f"{dataset.name}, {name}, queries")
    return queries, embed(list(dataset.corpus.values()), "document", f"{dataset.name}, {name}, documents")


def refuse_or_warn(dataset: RetrievalSet, flag: str | None) -> None:
    """Say that the teacher finds nothing on a set.

    Raises:
        UserError: there is a flag that the user can change.
    """
    found = (
        f"{dataset.name}: the teacher's nDCG@10 is 0: it ranks no relevant document among the first ten for any of "
        f"{counted(len(dataset.queries), 'query', 'queries')}, so no share of it can be given"
    )
    if flag is not None:
        raise UserError(f"{flag} {found}; leave this set out, check its qrels, or use a teacher that finds something")
    logger.warning("%s; THIS SET IS LEFT OUT of the account; check its qrels", found)


def retrieval_row(system: str, by_set: Mapping[str, FloatArray], teacher: Mapping[str, FloatArray]) -> dict[str, Any]:
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


def pair_rows(
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
        if projection is not None:
            vectors = {TEACHER: T, PROJECTED: project(T, projection)} | vectors
        for system, pair in vectors.items():
            cosines = (pair[0] * pair[1]).sum(1)
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
    teacher_vectors: KnownVectors | None = None,
) -> dict[str, Any]:
    """The same as `account`, but an error is logged and not raised, so that a finished training is not lost.

    Args:
        student: the trained model.
        teacher: see `account`.
        is_reduced: see `account`.
        retrieval_sets: see `account`.
        pair_sets: see `account`.
        again: the command that makes the comparison again, for the log.
        teacher_vectors: see `account`.

    Returns:
        The account. If it cannot be made, its parts are empty, and `failed` says why.
    """
    try:
        record = account(student, teacher, is_reduced, retrieval_sets, pair_sets, teacher_vectors=teacher_vectors)
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
