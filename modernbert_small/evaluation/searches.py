"""A few searches with their first results, for people to read."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TypedDict

import numpy as np

from modernbert_small.evaluation.metrics import FloatArray
from modernbert_small.evaluation.sets import RetrievalSet

RESULTS = 3  # documents shown of a search
EXCERPT = 160  # characters shown of a text


class Result(TypedDict):
    """A document that a system found, and its rank, counted from 1."""

    rank: int
    text: str
    score: float
    relevant: bool


class Search(TypedDict):
    """A query and, by system, what was found, the nearest first; the last one is relevant if none before it is."""

    set: str
    query: str
    results: dict[str, list[Result]]


def sample_searches(
    dataset: RetrievalSet, scores: Mapping[str, FloatArray], relevant: Sequence[Collection[int]], count: int
) -> list[Search]:
    """The first results of a few queries by each of several systems.

    Args:
        dataset: a set of Q queries and N documents.
        scores: (Q, N) by system.
        relevant: for each query the columns of its relevant documents, at least one.
        count: how many queries at most; they are evenly spaced in the set.

    Returns:
        A search for each of these queries.
    """
    if count < 1:
        return []
    queries, documents = list(dataset.queries.values()), list(dataset.corpus.values())
    searches: list[Search] = []
    for row in range(0, len(queries), math.ceil(len(queries) / count)):
        results = {system: _nearest(documents, matrix[row], relevant[row]) for system, matrix in scores.items()}
        searches.append({"set": dataset.name, "query": excerpt(queries[row]), "results": results})
    return searches


def _nearest(documents: Sequence[str], scores: FloatArray, relevant: Collection[int]) -> list[Result]:
    """The documents with the highest of the scores (N,), and the first relevant one if it comes after them."""
    order = np.argsort(-scores, kind="stable").tolist()
    first = next(place for place, column in enumerate(order) if column in relevant)
    places = [*range(min(RESULTS, len(order))), *([first] if first >= RESULTS else [])]
    return [
        {
            "rank": place + 1,
            "text": excerpt(documents[order[place]]),
            "score": round(float(scores[order[place]]), 3),
            "relevant": order[place] in relevant,
        }
        for place in places
    ]


def excerpt(text: str, characters: int = EXCERPT) -> str:
    """The beginning of a text in one line."""
    words = " ".join(text.split())
    return words if len(words) <= characters else words[:characters].rstrip() + "…"
