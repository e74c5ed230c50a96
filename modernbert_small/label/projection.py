"""The teacher's embeddings in fewer dimensions: one linear map that keeps cosines.

Uncentred SVD of unit vectors: the best rank-k fit to the vectors themselves, hence to their inner products.
Centring first would drop the mean direction, in which all texts agree, and with it most of what a cosine is
made of (384 -> 192, all-MiniLM-L6-v2: correlation of cosines .869 centred, .996 uncentred).

N: texts. D_T: teacher's width. D: the reduced width.
"""

import numpy as np
from numpy.typing import NDArray

from modernbert_small.algebra import unit_vectors

FloatArray = NDArray[np.floating]


def fit_projection(embeddings: FloatArray, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Leading right singular vectors of unit vectors.

    Args:
        embeddings: (N, D_T), any length; each is scaled to length one.
        size: D, at most D_T and N.

    Returns:
        basis (D_T, D) float64, orthonormal columns by falling energy, so that the first k columns are the
        best k; and each column's share of the energy (D,) float64.

    Raises:
        ValueError: too few vectors, or some not finite or of length zero.
    """
    if len(embeddings) < size or embeddings.shape[1] < size:
        raise ValueError(f"{embeddings.shape[0]} vectors of width {embeddings.shape[1]} do not give {size} directions")
    unit = unit_vectors(embeddings.astype(np.float64))
    energy, directions = np.linalg.eigh(unit.T @ unit)
    basis = directions[:, ::-1][:, :size]
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(size)])
    return basis, energy[::-1][:size].clip(min=0) / energy.clip(min=0).sum()


def projection_quality(before: FloatArray, after: FloatArray, neighbours: int = 10) -> dict[str, float]:
    """How well reduced vectors keep cosines and neighbours, on texts that the projection was not fitted on.

    Args:
        before: (N, D_T); after: (N, D), the same texts.
        neighbours: k of the recall.

    Returns:
        cosine_correlation: Pearson's between all pairs' cosines before and after; neighbour_recall: share
        of each text's k nearest before that are among its k nearest after.
    """
    first, second = (unit_vectors(vectors.astype(np.float64)) for vectors in (before, after))
    cosines = first @ first.T, second @ second.T
    pairs = np.triu_indices(len(before), 1)
    correlation = float(np.corrcoef(cosines[0][pairs], cosines[1][pairs])[0, 1])
    k = min(neighbours, len(before) - 1)
    nearest = []
    for matrix in cosines:
        np.fill_diagonal(matrix, -np.inf)
        nearest.append(np.argpartition(-matrix, k - 1, axis=1)[:, :k])
    kept = [len(np.intersect1d(a, b)) / k for a, b in zip(*nearest, strict=True)]
    return {"cosine_correlation": round(correlation, 4), "neighbour_recall": round(float(np.mean(kept)), 4)}
