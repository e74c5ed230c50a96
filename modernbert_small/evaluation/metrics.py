"""Metrics: nDCG@10 and its interval, similarities of truncated and quantised vectors, and perplexity.

Q: queries. N: documents. D: width.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from modernbert_small.algebra import unit_vectors

FloatArray = NDArray[np.floating]
Gains = Mapping[int, float]  # of a query: above 0, by the column of the relevant document
BOOTSTRAP_SAMPLES = 2000
PRECISIONS = ("float32", "int8", "binary")
RESCORED = 40  # documents of a search that are ordered again by their float32 vectors


def perplexity(loss: float) -> float:
    """The perplexity of a mean cross-entropy in nats, capped so that it is finite for an untrained model too."""
    return math.exp(min(loss, 50))


def ndcg_at_10(scores: FloatArray, gains: Sequence[Gains]) -> NDArray[np.float64]:
    """NDCG@10 of each query, as it is expected when documents with equal scores are ordered at random.

    The gain of a document is its relevance itself (linear gains), and the discount of a rank is log2(rank + 1), as in
    trec_eval and sentence-transformers. Binary and int8 scores have many ties. Any one order of them would be luck, so
    every document of a tie counts with the mean gain of the tie.

    Args:
        scores: (Q, N), finite; a higher score means a nearer document.
        gains: for each query the gains of its relevant documents, at least one.

    Returns:
        (Q,) between 0 and 1.

    References:
        Jarvelin and Kekalainen 2002, Cumulated gain-based evaluation of IR techniques.
        McSherry and Najork 2008, Computing information retrieval performance measures efficiently in the presence of
        tied scores.
    """
    k = min(10, scores.shape[1])
    discount = 1 / np.log2(np.arange(2, k + 2))
    ndcg = np.zeros(len(scores))
    for query, (row, of_query) in enumerate(zip(scores, gains, strict=True)):
        ideal = np.sort(list(of_query.values()))[::-1][:k]
        ndcg[query] = (_expected_gains(row, of_query, k) @ discount) / (ideal @ discount[: len(ideal)])
    return ndcg


def _expected_gains(scores: FloatArray, gains: Gains, k: int) -> NDArray[np.float64]:
    """The gains (k,) that are expected at the first k ranks of documents with the scores (N,)."""
    kth = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= kth)  # all documents of the last tie are among them
    of_candidates = np.array([gains.get(column, 0.0) for column in candidates.tolist()])
    _, tie, sizes = np.unique(-scores[candidates], return_inverse=True, return_counts=True)
    mean_gains = np.bincount(tie, weights=of_candidates) / sizes
    return np.repeat(mean_gains, sizes)[:k]


def mean_ratio_interval(pairs: Sequence[tuple[FloatArray, FloatArray]], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean over sets of mean(a) / mean(b), by a paired bootstrap over each set's queries.

    A sample of queries for which b is 0 throughout has no ratio and does not count.

    Args:
        pairs: for each set the scores a and b (Q,) of two systems on the same queries; b has a score above 0.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    ratios = np.zeros(BOOTSTRAP_SAMPLES)
    for a, b in pairs:
        drawn = rng.integers(0, len(a), (BOOTSTRAP_SAMPLES, len(a)))
        means_of_b = b[drawn].mean(1)
        ratios += a[drawn].mean(1) / np.where(means_of_b > 0, means_of_b, np.nan) / len(pairs)
    low, high = np.nanquantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def mean_difference_interval(pairs: Sequence[tuple[FloatArray, FloatArray]], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean over sets of mean(a - b), by a paired bootstrap over each set's queries.

    Args:
        pairs: for each set the scores a and b (Q,) of two systems on the same queries.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(BOOTSTRAP_SAMPLES)
    for a, b in pairs:
        drawn = rng.integers(0, len(a), (BOOTSTRAP_SAMPLES, len(a)))
        means += (a - b)[drawn].mean(1) / len(pairs)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def truncated(vectors: FloatArray, size: int) -> FloatArray:
    """The first `size` values of vectors (N, D), scaled to length one: (N, size)."""
    return unit_vectors(vectors[:, :size])


def similarities(queries: FloatArray, documents: FloatArray, precision: str = "float32") -> FloatArray:
    """Scores of queries and documents as a vector store of that precision gives them.

    Args:
        queries: (Q, D), unit length.
        documents: (N, D), unit length.
        precision: float32; int8, with one scale for all dimensions, by which the documents' largest value becomes 127;
            binary, which keeps the signs. A scale for each dimension would weigh weak dimensions like strong ones.

    Returns:
        (Q, N); a higher score means a nearer document.
    """
    if precision == "float32":
        return queries @ documents.T
    if precision == "binary":
        return np.sign(queries) @ np.sign(documents).T  # D - 2 * Hamming distance
    scale = 127 / np.abs(documents).max()
    # Each score is a sum of D products of at most 127 * 127, which float32 holds exactly up to D = 1,040.
    q, d = (np.round(x * scale).clip(-127, 127).astype(np.float32) for x in (queries, documents))
    return q @ d.T


def rescored(rough: FloatArray, exact: FloatArray, count: int = RESCORED) -> FloatArray:
    """Scores of a search that takes the first documents by rough scores, and orders them by exact scores.

    Args:
        rough: (Q, N), by which documents are taken; of equal ones some are taken at random, always the same.
        exact: (Q, N), by which they are ordered.
        count: documents that are taken, at least 10 for nDCG@10.

    Returns:
        (Q, N): the exact scores of the documents that were taken, and -inf for all others.
    """
    shuffled = np.random.default_rng(0).permutation(rough.shape[1])
    taken = shuffled[np.argsort(-rough[:, shuffled], axis=1, kind="stable")[:, :count]]
    scores = np.full_like(exact, -np.inf)
    np.put_along_axis(scores, taken, np.take_along_axis(exact, taken, 1), 1)
    return scores


def store_scores(
    queries: FloatArray, documents: FloatArray, gains: Sequence[Gains], widths: Sequence[int]
) -> dict[tuple[int, str], float]:
    """Mean nDCG@10 with vectors of each width and precision.

    Args:
        queries: (Q, D), unit length.
        documents: (N, D), unit length.
        gains: for each query the gains of its relevant documents.
        widths: to which the vectors are truncated.

    Returns:
        The mean over queries by (width, precision).
    """
    means = {}
    for size in widths:
        cut = truncated(queries, size), truncated(documents, size)
        for precision in PRECISIONS:
            means[size, precision] = float(ndcg_at_10(similarities(*cut, precision), gains).mean())
    return means
