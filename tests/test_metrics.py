"""The metrics: nDCG@10 against trec_eval, ties against the mean over their orders, intervals against SciPy's."""

import itertools
import math

import numpy as np
import pytest
import pytrec_eval
from scipy.stats import bootstrap

from modernbert_small.algebra import unit_vectors
from modernbert_small.evaluation.metrics import mean_ratio_interval, ndcg_at_10, rescored, similarities


def trec_eval(scores, gains):
    """trec_eval's ndcg_cut_10 of each query."""
    qrels = {f"q{i}": {f"d{j}": gain for j, gain in of_query.items()} for i, of_query in enumerate(gains)}
    run = {f"q{i}": {f"d{j}": float(score) for j, score in enumerate(row)} for i, row in enumerate(scores)}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    return [found[f"q{i}"]["ndcg_cut_10"] for i in range(len(scores))]


@pytest.mark.parametrize("largest", [1, 4])
@pytest.mark.parametrize("documents", [5, 10, 200])
def test_ndcg_is_trec_evals(largest, documents):
    """Binary and graded relevance, with fewer and with more relevant documents than are looked at."""
    rng = np.random.default_rng(largest * documents)
    scores = rng.permuted(np.tile(np.arange(documents, dtype=np.float32), (20, 1)), axis=1)
    gains = [
        {int(j): int(rng.integers(1, largest + 1)) for j in rng.choice(documents, min(documents, 1 + i), replace=False)}
        for i in range(20)
    ]
    np.testing.assert_allclose(ndcg_at_10(scores, gains), trec_eval(scores, gains), atol=1e-6)


def test_gains_are_linear():
    """The less relevant document first: (1 + 3 / log2(3)) / (3 + 1 / log2(3)); with 2**gain - 1 it would be less."""
    expected = (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))
    assert ndcg_at_10(np.array([[0.9, 0.8]]), [{0: 1, 1: 3}]) == pytest.approx([expected])


def test_ties_count_as_the_mean_over_their_orders():
    """Four documents tie for two of the ten ranks; the mean is taken over all 24 orders, each by trec_eval."""
    scores = np.array([[9, 8, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1, 0.0]])
    scores[0, 8] = 1.5
    gains = [{2: 1, 10: 3, 12: 2, 13: 1}]
    orders = []
    for order in itertools.permutations(range(4)):
        for swap in (0, 0.1):
            broken = scores.copy()
            broken[0, 9:13] += np.array(order) * 0.01
            broken[0, 1] += swap - 0.05
            orders += trec_eval(broken, gains)
    assert ndcg_at_10(scores, gains) == pytest.approx([np.mean(orders)], abs=1e-6)


def test_scores_that_say_nothing_are_worth_a_random_order():
    rng = np.random.default_rng(0)
    gains = [{3: 1, 40: 2}]
    random = np.mean([ndcg_at_10(rng.permuted(np.arange(50.0))[None], gains)[0] for _ in range(20_000)])
    assert ndcg_at_10(np.zeros((1, 50)), gains) == pytest.approx([random], abs=0.003)


def test_the_place_of_a_document_in_the_corpus_does_not_matter():
    rng = np.random.default_rng(0)
    queries, documents = (np.sign(rng.normal(size=(n, 16))) for n in (8, 300))  # many equal Hamming distances
    gains = [{int(j): 1 for j in rng.choice(300, 4, replace=False)} for _ in range(8)]
    order = rng.permutation(300)
    moved = [{int(np.flatnonzero(order == j)[0]): gain for j, gain in of_query.items()} for of_query in gains]
    scores = similarities(queries, documents, "binary")
    assert len(np.unique(scores[0])) < 20
    np.testing.assert_allclose(ndcg_at_10(scores, gains), ndcg_at_10(scores[:, order], moved), atol=1e-12)


def test_the_interval_is_scipys():
    """One set, and two sets of different sizes whose queries are drawn independently."""
    rng = np.random.default_rng(0)
    sets = [(rng.uniform(0.3, 0.9, size), rng.uniform(0.5, 1, size)) for size in (80, 50)]

    def mean_ratio(*rows):
        return np.mean([a[drawn].mean() / b[drawn].mean() for drawn, (a, b) in zip(rows, sets, strict=False)])

    for count in (1, 2):
        rows = [np.arange(len(a)) for a, _ in sets[:count]]
        reference = bootstrap(
            rows, mean_ratio, vectorized=False, method="percentile", n_resamples=5000, rng=rng
        ).confidence_interval
        expected = pytest.approx((reference.low, reference.high), abs=0.006)
        assert mean_ratio_interval(sets[:count]) == expected
    assert mean_ratio_interval([(sets[0][1], sets[0][1])]) == (1, 1)


def test_samples_in_which_the_teacher_finds_nothing_have_no_ratio():
    """Of two queries the teacher finds one: every sample that has it gives the same ratio."""
    assert mean_ratio_interval([(np.array([0.4, 0.0]), np.array([0.8, 0.0]))]) == (0.5, 0.5)


def test_int8_is_near_to_float():
    rng = np.random.default_rng(0)
    q, d = (unit_vectors(rng.normal(size=(n, 64)).astype(np.float32)) for n in (20, 200))
    exact, rounded = similarities(q, d), similarities(q, d, "int8")
    for a, b in zip(exact, rounded, strict=True):
        assert np.corrcoef(a, b)[0, 1] > 0.99


def test_rescoring_orders_what_a_rough_search_found():
    rough, exact = np.array([[3.0, 2.0, 1.0, 0.0]]), np.array([[0.1, 0.4, 0.9, 0.2]])
    np.testing.assert_array_equal(rescored(rough, exact, 2), [[0.1, 0.4, -np.inf, -np.inf]])
    np.testing.assert_array_equal(rescored(rough, exact), exact)


def test_rescoring_does_not_favour_the_first_of_equal_documents():
    """All rough scores are equal, and the right documents come first: half of them are found, not all."""
    exact = np.tile(np.r_[np.ones(50), np.zeros(50)], (1, 1))
    found = np.isfinite(rescored(np.zeros((1, 100)), exact, 50))
    assert found.sum() == 50
    assert 10 < found[0, :50].sum() < 40


def test_int8_is_what_the_guide_says():
    """The lines of docs/shipping.md: one scale for all dimensions, also where their energies differ widely."""
    rng = np.random.default_rng(0)
    q, d = (unit_vectors((rng.normal(size=(n, 64)) / np.arange(1, 65)).astype(np.float32)) for n in (20, 200))
    scale = 127 / np.abs(d).max()
    as_bytes = [(vectors * scale).round().clip(-127, 127).astype(np.int8).astype(np.int32) for vectors in (q, d)]
    np.testing.assert_array_equal(similarities(q, d, "int8"), as_bytes[0] @ as_bytes[1].T)
