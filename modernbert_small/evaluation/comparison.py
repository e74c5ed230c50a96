"""Several students of one teacher, measured on the same sets and compared with each other."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from modernbert_small.evaluation.account import (
    QueryScores,
    costs,
    embed_set,
    gains_of,
    pair_rows,
    refuse_or_warn,
    retrieval_row,
)
from modernbert_small.evaluation.embedder import Embedder
from modernbert_small.evaluation.metrics import mean_difference_interval, ndcg_at_10, similarities
from modernbert_small.evaluation.sets import PairSet, RetrievalSet
from modernbert_small.evaluation.systems import TEACHER, project, split_projection, teacher_scores


def compare(
    students: Mapping[str, SentenceTransformer],
    teacher: SentenceTransformer,
    is_reduced: bool,
    retrieval_sets: Sequence[RetrievalSet],
    pair_sets: Sequence[PairSet],
    flag: str,
) -> dict[str, Any]:
    """Measure several students and their teacher on the same sets.

    Args:
        students: by the names to show, none of which is `teacher`.
        teacher: see `account.account`.
        is_reduced: see `account.account`.
        retrieval_sets: sets for nDCG@10.
        pair_sets: sets for Spearman's correlation.
        flag: the flag that names the sets.

    Returns:
        `retrieval`, `queries`, `pairs`, `cost` and `machine`, as in an account; and `differences`: for each pair of
        students `first`, `second`, the `difference` of their mean nDCG@10, and its 95 % `interval`.

    Raises:
        UserError: the teacher finds nothing on a set.
    """
    whole, projection = split_projection(teacher, is_reduced)
    embedders = {TEACHER: Embedder(whole)} | {name: Embedder(model) for name, model in students.items()}
    per_query: QueryScores = {}
    for dataset in retrieval_sets:
        gains = gains_of(dataset)
        T = embed_set(embedders, TEACHER, dataset)
        scores = teacher_scores(T, None if projection is None else project(T, projection))
        scores |= {name: similarities(*embed_set(embedders, name, dataset)) for name in students}
        for system, matrix in scores.items():
            per_query.setdefault(system, {})[dataset.name] = ndcg_at_10(matrix, gains)
        if not per_query[TEACHER][dataset.name].any():
            refuse_or_warn(dataset, flag)
    return {
        "retrieval": [retrieval_row(system, by_set, per_query[TEACHER]) for system, by_set in per_query.items()],
        "differences": [_difference(pair, per_query) for pair in combinations(students, 2)] if per_query else [],
        "queries": {dataset.name: len(dataset.queries) for dataset in retrieval_sets},
        "pairs": pair_rows(embedders, projection, pair_sets),
        **costs(embedders, retrieval_sets),
    }


def _difference(pair: tuple[str, str], per_query: QueryScores) -> dict[str, Any]:
    """The difference of two students' mean nDCG@10, with its interval."""
    a, b = (per_query[name] for name in pair)
    low, high = mean_difference_interval([(a[name], b[name]) for name in a])
    difference = float(np.mean([(a[name] - b[name]).mean() for name in a]))
    return {
        "first": pair[0],
        "second": pair[1],
        "difference": round(difference, 4),
        "interval": [round(low, 4), round(high, 4)],
    }
