"""How good a ranking is, how sure that is, what is left of vectors when they are made smaller; and perplexity.

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
    """exp of a mean cross-entropy in nats, finite for a model that knows nothing too."""
    return math.exp(min(loss, 50))


def ndcg_at_10(scores: FloatArray, relevant: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """NDCG@10 of each query, with binary relevance and logarithmic discount.

    Args:
        scores: (Q, N), higher is nearer.
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
    """95 % interval of the mean over sets of mean(a) / mean(b): paired bootstrap over each set's queries.

    Args:
        pairs: for each set the scores (Q,) of two systems on the same queries.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    ratios = np.zeros(BOOTSTRAP_SAMPLES)
    for a, b in pairs:
        drawn = rng.integers(0, len(a), (BOOTSTRAP_SAMPLES, len(a)))
        ratios += a[drawn].mean(1) / np.maximum(b[drawn].mean(1), 1e-9) / len(pairs)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def truncated(vectors: FloatArray, size: int) -> FloatArray:
    """The first `size` of each vector's values, scaled to length one."""
    return unit_vectors(vectors[:, :size])


def similarities(queries: FloatArray, documents: FloatArray, precision: str = "float32") -> FloatArray:
    """Scores (Q, N) of queries (Q, D) and documents (N, D) as a vector store of that precision gives them.

    Args:
        queries, documents: unit vectors.
        precision: float32; int8, the documents' largest value being 127; binary, the signs alone.
    """
    if precision == "float32":
        return queries @ documents.T
    if precision == "binary":
        return np.sign(queries) @ np.sign(documents).T  # D - 2 * Hamming distance
    scale = 127 / np.abs(documents).max()
    # Products of up to 127 * 127 summed over D: exact in float32 up to D = 1,040.
    q, d = (np.round(x * scale).clip(-127, 127).astype(np.float32) for x in (queries, documents))
    return q @ d.T


def store_scores(
    queries: FloatArray, documents: FloatArray, relevant: Sequence[Sequence[int]], widths: Sequence[int]
) -> dict[tuple[int, str], float]:
    """Mean nDCG@10 of unit vectors (Q, D) and (N, D) at every pair of width and precision."""
    found = {}
    for size in widths:
        cut = truncated(queries, size), truncated(documents, size)
        for precision in PRECISIONS:
            found[size, precision] = float(ndcg_at_10(similarities(*cut, precision), relevant).mean())
    return found
