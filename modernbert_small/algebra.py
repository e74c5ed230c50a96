"""Linear algebra that several phases need."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

FloatArray = NDArray[np.floating]

_TOLERANCE = 1e-2
_MOST_ITERATIONS = 100
_TINY = 1e-30  # against division by zero once a target is solved exactly


def unit_vectors(vectors: FloatArray) -> FloatArray:
    """Vectors (N, D), each scaled to length one.

    Raises:
        ValueError: a vector is zero or not finite; the first such position is named.
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if len(bad):
        raise ValueError(f"embedding {bad[0]} is zero or not finite, as are {len(bad) - 1} others")
    return vectors / norms


def mean_free_basis(size: int) -> Tensor:
    """An orthonormal basis of the vectors with mean zero: Helmert's contrasts.

    Args:
        size: D, at least 2.

    Returns:
        (D, D - 1) float64, orthonormal columns, each orthogonal to the vector of ones.
    """
    rows = torch.tril(torch.ones(size - 1, size, dtype=torch.float64))
    rows[torch.arange(size - 1), torch.arange(1, size)] = -torch.arange(1, size, dtype=torch.float64)
    return (rows / rows.norm(dim=1, keepdim=True)).T.contiguous()


def leading_directions(
    vectors: FloatArray, size: int, *, centred: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The orthonormal directions that hold most of a set of vectors: PCA, or uncentred SVD.

    Centred, the directions of largest variance are found by scikit-learn's PCA. Uncentred, the leading right singular
    vectors are found by `leading_eigenvectors` of the second moments. scikit-learn's TruncatedSVD has the same
    mathematics, but its exact solver took 72 s where this takes 3 s (100,000 x 768 vectors, 384 directions, two CPU
    cores), and it cannot give as many directions as there are dimensions.

    Args:
        vectors: (N, D), computed with in float64.
        size: directions to keep, 1 <= size <= min(N, D).
        centred: subtract the mean vector first.

    Returns:
        The directions as columns (D, size) float64, in the order of falling variance (or energy, uncentred), each
        with its largest entry positive, so that the signs don't depend on the LAPACK at hand; and each one's share
        of the total variance or energy (size,) float64.

    Raises:
        ValueError: size is out of range, or a value is not finite.
    """
    N, D = vectors.shape
    if not 1 <= size <= min(N, D):
        raise ValueError(f"cannot take {size} directions of {N} vectors of width {D}; take at most {min(N, D)}")
    vectors = vectors.astype(np.float64, copy=False)
    if not centred:
        return leading_eigenvectors(vectors.T @ vectors, size)
    from sklearn.decomposition import PCA  # imported here, since it takes two seconds

    pca = PCA(size, svd_solver="covariance_eigh").fit(vectors)
    return pca.components_.T, pca.explained_variance_ratio_


def leading_eigenvectors(moments: NDArray[np.float64], size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The eigenvectors with the largest eigenvalues of second moments X^T X, for vectors X that are not kept.

    Args:
        moments: (D, D), symmetric and without negative eigenvalues.
        size: eigenvectors to keep, at most D.

    Returns:
        As `leading_directions`: columns (D, size) float64 by falling eigenvalue, each with its largest entry
        positive; and each one's share of the sum of all eigenvalues (size,) float64.

    Raises:
        ValueError: a value is not finite.
    """
    if not np.isfinite(moments).all():
        raise ValueError("second moments hold NaN or infinity, expected finite values")
    eigenvalues, vectors = np.linalg.eigh(moments)
    vectors = vectors[:, ::-1][:, :size]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(size)])
    shares = eigenvalues[::-1][:size].clip(min=0) / eigenvalues.clip(min=0).sum()
    return vectors * signs, shares


def sparse_ridge(X: csr_array, targets: NDArray[np.floating], alpha: float) -> NDArray[np.float32]:
    """Ridge regression on a sparse matrix, of all targets at once.

    The normal equations are solved by conjugate gradients, with their own diagonal as preconditioner. scikit-learn's
    Ridge has no preconditioner and solves target by target, which takes many times as long.

    Args:
        X: (N, V).
        targets: (N, D).
        alpha: of the squared length of the solution.

    Returns:
        W (V, D), for which |X W - targets|^2 + alpha |W|^2 is least: at most a hundredth of the gradient at W = 0 is
            left, unless 100 steps were not enough.
    """
    X = X.astype(np.float32)
    transposed = X.T.tocsr()
    diagonal = np.asarray(X.power(2).sum(0), np.float32).reshape(-1, 1) + alpha
    residual = transposed @ targets.astype(np.float32)  # of the normal equations, (V, D)
    W, direction = np.zeros_like(residual), residual / diagonal
    size = first_size = (residual * direction).sum(0)  # (D,)
    for _ in range(_MOST_ITERATIONS):
        if (size <= _TOLERANCE**2 * first_size).all():
            break
        image = transposed @ (X @ direction) + alpha * direction
        step = size / np.maximum((direction * image).sum(0), _TINY)
        W += step * direction
        residual -= step * image
        previous, size = size, (residual**2 / diagonal).sum(0)
        direction = residual / diagonal + size / np.maximum(previous, _TINY) * direction
    return W
