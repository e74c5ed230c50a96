"""The static model of a student's start, against dense least squares and ridge regression."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array, random_array
from sklearn.linear_model import Ridge

from modernbert_small.algebra import sparse_ridge
from modernbert_small.distil.static import fit_static


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 30), st.floats(0.01, 10))
def test_sparse_ridge_is_ridge_regression(seed, rows, columns, alpha):
    rng = np.random.default_rng(seed)
    X = random_array((rows, columns), density=0.3, rng=rng, format="csr")
    targets = rng.normal(size=(rows, 3))
    best = Ridge(alpha, fit_intercept=False, solver="cholesky").fit(X.toarray(), targets).coef_.T
    found, none = sparse_ridge(X, targets, alpha), np.zeros_like(best)

    def loss(W):
        return np.square(X @ W - targets).sum(0) + alpha * np.square(W).sum(0)

    def gradient_length(W):
        gradient = X.T @ (X @ W - targets) + alpha * W
        return np.sqrt((gradient**2 / (X.power(2).sum(0) + alpha)[:, None]).sum(0))

    assert (gradient_length(found) <= 0.011 * gradient_length(none) + 1e-6).all()
    assert (loss(found) - loss(best) <= 0.01 * (loss(none) - loss(best)) + 1e-6).all()


def test_tokens_that_no_text_holds_follow_from_their_features():
    """Labels that are linear in the features are found exactly, for unseen tokens too."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(40, 6)).astype(np.float32)
    truth = features @ rng.normal(size=(6, 4)).astype(np.float32) + 2
    counts = rng.integers(0, 3, (300, 40)) * (np.arange(40) < 30)  # the last ten are in no text
    texts = csr_array((counts / counts.sum(1, keepdims=True)).astype(np.float32))
    np.testing.assert_allclose(fit_static(texts, texts @ truth, features), truth, atol=1e-3)


def test_tokens_of_many_texts_follow_the_labels():
    """Without features that tell tokens apart, the fit is ridge regression in closed form."""
    rng = np.random.default_rng(2)
    counts = rng.integers(0, 3, (200, 10))
    texts = counts / counts.sum(1, keepdims=True)
    labels = rng.normal(size=(200, 4))
    mean = labels.mean(0)
    closed_form = mean + np.linalg.solve(texts.T @ texts + 0.03 * np.eye(10), texts.T @ (labels - mean))
    fitted = fit_static(csr_array(texts), labels, np.ones((10, 1)))
    np.testing.assert_allclose(fitted, closed_form, atol=1e-2 * np.abs(closed_form).max())
