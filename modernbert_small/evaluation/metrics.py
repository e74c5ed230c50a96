"""Metrics: nDCG@10 and its interval, similarities of truncated and quantised vectors, and perplexity.

Q: queries. N: documents. D: width.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modernbert_small.algebra import unit_vectors

FloatArray = NDArray[np.floating]
BOOTSTRAP_SAMPLES = 2000
PRECISIONS = ("float32", "int8", "binary")


def perplexity(loss: float) -> float:
    """The perplexity of a mean cross-entropy in nats, capped so that it is finite for an untrained model too."""
    return math.exp(min(loss, 50))


def ndcg_at_10(scores: FloatArray, relevant: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """NDCG@10 of each query, with binary relevance and logarithmic discount.

    Args:
        scores: (Q, N); a higher score means a nearer document.
        relevant: for each query the columns of its relevant documents, at least one.

    Returns:
        (Q,) between 0 and 1.
    """
    k = min(10, scores.shape[1])
    discount = 1 / np.log2(np.arange(2, k + 2))
    nearest = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, nearest, 1), axis=1, kind="stable")
    nearest = np.take_along_axis(nearest, order, 1)
    gains = [np.isin(found, wanted) @ discount for found, wanted in zip(nearest, relevant, strict=True)]
    return np.array(gains) / [discount[: len(wanted)].sum() for wanted in relevant]


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


def truncated(vectors: FloatArray, size: int) -> FloatArray:
    """The first `size` values of vectors (N, D), scaled to length one: (N, size)."""
    return unit_vectors(vectors[:, :size])


def similarities(queries: FloatArray, documents: FloatArray, precision: str = "float32") -> FloatArray:
    """Scores of queries and documents as a vector store of that precision gives them.

    Args:
        queries: (Q, D), unit length.
        documents: (N, D), unit length.
        precision: float32; int8, scaled so that the documents' largest value is 127; binary, which keeps the signs.

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


def store_scores(
    queries: FloatArray, documents: FloatArray, relevant: Sequence[Sequence[int]], widths: Sequence[int]
) -> dict[tuple[int, str], float]:
    """Mean nDCG@10 with vectors of each width and precision.

    Args:
        queries: (Q, D), unit length.
        documents: (N, D), unit length.
        relevant: for each query the columns of its relevant documents.
        widths: to which the vectors are truncated.

    Returns:
        The mean over queries by (width, precision).
    """
    means = {}
    for size in widths:
        cut = truncated(queries, size), truncated(documents, size)
        for precision in PRECISIONS:
            means[size, precision] = float(ndcg_at_10(similarities(*cut, precision), relevant).mean())
    return means
