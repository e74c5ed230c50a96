"""The labels' projection against scikit-learn's TruncatedSVD and brute force."""

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD

from modernbert_small.algebra import unit_vectors
from modernbert_small.label.projection import fit_projection, projection_quality


def vectors(n: int = 400, width: int = 20, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) * np.linspace(2, 0.2, width) + rng.normal(size=width)


def test_basis_is_the_uncentred_svd() -> None:
    X = vectors()
    basis, energy = fit_projection(X, 7)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    reference = TruncatedSVD(7, algorithm="arpack").fit(unit)
    np.testing.assert_allclose(np.abs(np.diag(basis.T @ reference.components_.T)), 1, atol=1e-8)
    np.testing.assert_allclose(energy, reference.singular_values_**2 / (unit**2).sum(), rtol=1e-8)
    np.testing.assert_allclose(basis.T @ basis, np.eye(7), atol=1e-12)


def test_no_other_projection_of_that_rank_loses_less() -> None:
    X = unit_vectors(vectors())
    basis, _ = fit_projection(X, 5)
    loss = ((X - X @ basis @ basis.T) ** 2).sum()
    rng = np.random.default_rng(1)
    for _ in range(50):
        other = np.linalg.qr(basis + 0.1 * rng.normal(size=basis.shape))[0]
        assert loss <= ((X - X @ other @ other.T) ** 2).sum()


def test_the_first_columns_are_the_best_smaller_basis() -> None:
    X = vectors()
    np.testing.assert_allclose(fit_projection(X, 8)[0][:, :3], fit_projection(X, 3)[0], atol=1e-9)


def test_full_width_keeps_every_cosine_and_neighbour() -> None:
    X = vectors(100)
    basis, energy = fit_projection(X, 20)
    assert energy.sum() == pytest.approx(1)
    assert projection_quality(X, X @ basis) == {"cosine_correlation": 1.0, "neighbour_recall": 1.0}


def test_quality_by_brute_force() -> None:
    X = vectors(30)
    Y = X[:, :4]
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    pairs = [(i, j) for i in range(30) for j in range(i)]
    before, after = ([cosine(Z[i], Z[j]) for i, j in pairs] for Z in (X, Y))
    kept = []
    for i in range(30):
        nearest = [
            set(sorted((j for j in range(30) if j != i), key=lambda j: -cosine(Z[i], Z[j]))[:10]) for Z in (X, Y)
        ]
        kept.append(len(nearest[0] & nearest[1]) / 10)
    quality = projection_quality(X, Y)
    assert quality["cosine_correlation"] == pytest.approx(np.corrcoef(before, after)[0, 1], abs=1e-4)
    assert quality["neighbour_recall"] == pytest.approx(np.mean(kept), abs=1e-4)


def test_bad_vectors_are_named() -> None:
    X = vectors(10)
    X[3] = 0
    with pytest.raises(ValueError, match="embedding 3 is zero"):
        fit_projection(X, 2)
    with pytest.raises(ValueError, match="cannot take 30"):
        fit_projection(vectors(), 30)
