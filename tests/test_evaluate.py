"""The account of the gap: scores against sentence-transformers' and by hand, steps that must be equal."""

import importlib.util
import json
import math
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_sentence_transformer
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from modernbert_small import evaluate
from modernbert_small.algebra import unit_vectors
from modernbert_small.evaluate import main, mteb_scores, parse_arguments
from modernbert_small.evaluation.account import account, account_after_training
from modernbert_small.evaluation.comparison import compare
from modernbert_small.evaluation.embedder import Embedder, load_vectors, save_vectors
from modernbert_small.evaluation.metrics import mean_difference_interval, ndcg_at_10, similarities, truncated
from modernbert_small.evaluation.searches import sample_searches
from modernbert_small.evaluation.sets import PairSet, RetrievalSet
from modernbert_small.evaluation.systems import project, split_projection, student_scores, teacher_scores
from modernbert_small.evaluation.tables import format_account
from modernbert_small.run import devices
from modernbert_small.run.errors import UserError
from modernbert_small.run.tables import markdown_table


def retention(record, system="student"):
    """Of a system in an account, None if it has no row."""
    return next((row["retention"] for row in record["retrieval"] if row["system"] == system), None)


def test_ndcg_by_hand():
    scores = np.array([[0.9, 0.8, 0.7, 0.6]])
    gain = 1 / math.log2(3) + 1 / math.log2(4)
    ideal = 1 / math.log2(2) + 1 / math.log2(3)
    assert ndcg_at_10(scores, [{1: 1, 2: 1}]) == pytest.approx([gain / ideal])
    assert ndcg_at_10(scores, [{0: 1}]) == pytest.approx([1])


def test_ndcg_is_sentence_transformers(tmp_path):
    rng = np.random.default_rng(0)
    words = ["cat", "mat", "dog", "map", "land", "water", "train", "paper", "mountain", "model"]
    corpus = {f"d{i}": " ".join(rng.choice(words, 6)) for i in range(60)}
    queries = {f"q{i}": " ".join(rng.choice(words, 3)) for i in range(12)}
    relevant = {query: {f"d{i}" for i in rng.integers(0, 60, rng.integers(1, 15))} for query in queries}
    model = tiny_sentence_transformer(tmp_path, "bert")
    expected = InformationRetrievalEvaluator(queries, corpus, relevant, ndcg_at_k=[10], write_csv=False)(model)
    queries_, documents = (unit_vectors(model.encode(list(texts.values()))) for texts in (queries, corpus))
    got = ndcg_at_10(similarities(queries_, documents), [{int(d[1:]): 1 for d in relevant[q]} for q in queries])
    assert got.mean() == pytest.approx(expected["cosine_ndcg@10"], abs=1e-6)


def test_smaller_vectors_by_hand():
    x = np.array([[3.0, 4.0, 12.0]]) / 13
    np.testing.assert_allclose(truncated(x, 2), [[0.6, 0.8]])
    signs = similarities(np.array([[0.5, -0.1, 2]]), np.array([[1, 1, 1], [-1, 1, -3]]), "binary")
    np.testing.assert_array_equal(signs, [[1, -3]])


@pytest.fixture
def models(tmp_path):
    """A teacher of width 24, the same reduced to 16, and two retrieval and pair sets."""
    torch.manual_seed(0)
    whole = tiny_sentence_transformer(tmp_path / "t", "bert", width=24)
    dense = Dense(24, 16, bias=False, activation_function=torch.nn.Identity())
    dense.linear.weight.data = torch.linalg.qr(torch.randn(24, 16))[0].T.contiguous()
    reduced = SentenceTransformer(modules=[*whole, dense, Normalize()], device="cpu")
    words = ["cat", "mat", "dog", "map", "land", "water"]
    texts = [f"{a} {b} {c}" for a in words for b in words[:2] for c in words[2:4]]
    corpus = {f"d{i}": text for i, text in enumerate(texts)}
    retrieval = RetrievalSet("Toy", {"q0": "cat dog", "q1": "water"}, corpus, {"q0": {"d1"}, "q1": {"d20", "d21"}})
    return whole, reduced, retrieval, PairSet("pairs", texts[:10], texts[10:20], list(range(10)))


def test_a_reduced_teacher_comes_apart(models):
    whole, reduced, _, _ = models
    texts = ["a cat", "the map"]
    before, projection = split_projection(reduced, is_reduced=True)
    np.testing.assert_allclose(unit_vectors(before.encode(texts)), unit_vectors(whole.encode(texts)), atol=1e-6)
    np.testing.assert_allclose(unit_vectors(before.encode(texts) @ projection), reduced.encode(texts), atol=1e-6)
    assert split_projection(reduced, is_reduced=False) == (reduced, None)


def test_vectors_are_float32_where_the_hardware_has_bf16(models, monkeypatch):
    """They are those that users get, who load the folder and encode."""
    monkeypatch.setattr(devices, "has_bf16", lambda device: True)
    whole, _, retrieval, _ = models
    texts = list(retrieval.corpus.values())
    np.testing.assert_allclose(Embedder(whole)(texts, "document", ""), unit_vectors(whole.encode(texts)), atol=1e-6)


def test_vectors_that_are_kept_are_not_computed_again(models, tmp_path):
    """Phase 4's of a teacher serve phase 5, but not those of another teacher or of other texts."""
    whole, reduced, retrieval, pairs = models
    vectors = {}
    first = account(None, reduced, True, [retrieval], [pairs], teacher_vectors=vectors)
    save_vectors(tmp_path, vectors)
    (tmp_path / "run.json").write_text('{"reduced_teacher": "abc"}')
    assert load_vectors(str(tmp_path), "another") == load_vectors(str(tmp_path / "nowhere"), None) == {}
    known = load_vectors(str(tmp_path), "abc")

    asked = []
    whole.encode_document = lambda texts, **kwargs: asked.append(len(texts)) or whole.encode(texts, **kwargs)
    again = account(reduced, whole, False, [retrieval], [pairs], teacher_vectors=known)
    assert again["retrieval"][0] == first["retrieval"][0]
    assert asked == [len(retrieval.corpus)]  # for the speed
    other = RetrievalSet("Other", retrieval.queries, retrieval.corpus | {"d9": "other"}, retrieval.relevant)
    account(None, whole, False, [other], teacher_vectors=known)
    assert asked == [len(retrieval.corpus)] * 3


def test_a_student_that_is_the_teacher_keeps_everything(models):
    _, reduced, retrieval, pairs = models
    record = account(reduced, reduced, True, [retrieval], [pairs])
    rows = {row["system"]: row for row in record["retrieval"]}
    assert rows["teacher"]["retention"] == 1
    for name in ("student", "student's queries, teacher's documents"):
        assert rows[name]["scores"] == rows["teacher, projected"]["scores"]
    assert retention(record) == rows["student"]["retention"]
    scores = {row["system"]: row["scores"]["pairs"] for row in record["pairs"]}
    assert scores["student"] == scores["teacher, projected"]
    assert record["cost"]["student"]["parameters"] > record["cost"]["teacher"]["parameters"]
    assert list(record["grid"]) == ["16", "8"]
    assert record["grid"]["16"]["float32"] == retention(record)
    assert record["grid"]["8"]["float32"] == rows["student, 8 values"]["retention"]
    assert record["grid"]["16"]["binary"] == rows["student, binary"]["retention"]
    text = format_account(record)
    assert "\nstudent, binary " in text
    assert "\nSpearman " in text
    assert "  kept (95 %, 2 queries)  ratio of means\n" in text
    of_means = 100 * rows["student, binary"]["mean"] / rows["teacher"]["mean"]
    (binary,) = [line for line in text.splitlines() if line.startswith("student, binary ")]
    assert binary.endswith(f"  {of_means:.1f} %")
    assert f"\n{record['machine']}  parameters  " in text
    table = text.split("\n\n")[0].splitlines()
    places = [line.rindex(f"{row['mean']:.3f}") for line, row in zip(table[1:], record["retrieval"], strict=True)]
    assert set(places) == {table[0].index(" mean ")}
    assert "| student, binary |" in format_account(record, markdown_table)


def test_both_sides_of_the_searches_are_the_teacher_as_it_is_and_the_student(models):
    whole, _, retrieval, _ = models
    record = account(whole, whole, False, [retrieval])
    for search in record["searches"]:
        assert search["results"]["teacher"] == search["results"]["student"]
    assert record["outcomes"] == {"better": 0, "worse": 0, "equal": 2}
    assert record["cosines"]["teacher"] == record["cosines"]["student"]
    queries, documents = (unit_vectors(whole.encode(list(t.values()))) for t in (retrieval.queries, retrieval.corpus))
    of_relevant = [queries[0] @ documents[1], (queries[1] @ documents[20] + queries[1] @ documents[21]) / 2]
    assert record["cosines"]["teacher"]["relevant"] == pytest.approx(np.mean(of_relevant), abs=6e-4)
    assert record["cosines"]["teacher"]["all"] == pytest.approx((queries @ documents.T).mean(), abs=6e-4)


def test_wins_and_losses_of_a_student(models):
    """A student that embeds each query as its relevant document wins where the teacher does not find it first."""
    whole, _, retrieval, _ = models
    answers = {"cat dog": retrieval.corpus["d1"], "water": retrieval.corpus["d20"]}
    teacher = account(None, whole, False, [retrieval])["retrieval"][0]
    assert 0 < teacher["mean"] < 1

    class Knowing(SentenceTransformer):
        def encode_query(self, sentences, **kwargs):
            return super().encode([answers[text] for text in sentences], **kwargs)

    outcomes = account(Knowing(modules=list(whole), device="cpu"), whole, False, [retrieval])["outcomes"]
    assert outcomes["better"] >= 1
    assert outcomes["worse"] == 0
    assert sum(outcomes.values()) == 2


def test_several_students_under_their_names(models):
    whole, reduced, retrieval, pairs = models
    record = compare({"a/first": whole, "b/second": reduced}, whole, False, [retrieval], [pairs], "--datasets")
    alone = account(reduced, whole, False, [retrieval], [pairs])
    rows = {row["system"]: row for row in record["retrieval"]}
    assert list(rows) == ["teacher", "a/first", "b/second"]
    of_student = next(row for row in alone["retrieval"] if row["system"] == "student")
    assert rows["b/second"] == of_student | {"system": "b/second"}
    (difference,) = record["differences"]
    assert (difference["first"], difference["second"]) == ("a/first", "b/second")
    assert difference["difference"] == pytest.approx(rows["a/first"]["mean"] - rows["b/second"]["mean"], abs=1e-3)
    assert [row["system"] for row in record["pairs"]] == ["teacher", "a/first", "b/second"]
    assert list(record["cost"]) == ["teacher", "a/first", "b/second"]
    text = format_account(record)
    assert "\na/first minus b/second  " in text
    with pytest.raises(UserError, match="nDCG@10 is 0"):
        compare({"a": whole, "b": whole}, whole, False, [without_answers(retrieval, whole)], [], "--datasets")


def test_the_interval_of_a_difference_is_the_bootstraps():
    """Against resampling written as loops, with the same draws; and of equal systems it is nothing at all."""
    rng = np.random.default_rng(5)
    sets = [(rng.random(7), rng.random(7)), (rng.random(4), rng.random(4))]
    draws, means = np.random.default_rng(0), np.zeros(2000)
    for a, b in sets:
        for sample, drawn in enumerate(draws.integers(0, len(a), (2000, len(a)))):
            means[sample] += sum(a[i] - b[i] for i in drawn) / len(a) / 2
    assert mean_difference_interval(sets) == pytest.approx(np.quantile(means, [0.025, 0.975]))
    assert mean_difference_interval([(a, a) for a, _ in sets]) == (0, 0)


@pytest.mark.parametrize("students", [["a", "a"], ["a", "teacher"]])
def test_students_without_names_of_their_own_are_refused(students, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate", *students, "some/teacher"])
    with pytest.raises(UserError, match=r"expected different names, none of them teacher; .* such as \./ before it"):
        parse_arguments()


def test_the_last_model_is_the_teacher(models, monkeypatch, tmp_path, capsys):
    from test_retrieval import write_set

    whole, reduced, _, _ = models
    write_set(tmp_path / "set")
    monkeypatch.setattr(evaluate, "load_sentence_transformer", lambda _, name, **__: {"w": whole}.get(name, reduced))
    flags = ["a", "b", "w", "--datasets", str(tmp_path / "set")]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
    evaluate.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "minus", "b", "+0.000", "+0.000", "to", "+0.000"] in rows


def test_only_vectors_of_one_width_are_mixed():
    rng = np.random.default_rng(0)
    T, S = ([unit_vectors(rng.normal(size=(5, width))) for _ in range(2)] for width in (24, 16))
    projected = project(T, np.eye(24)[:, :16])
    mixed = "student's queries, teacher's documents"
    np.testing.assert_allclose(student_scores(S, projected)[mixed], S[0] @ projected[1].T)
    assert mixed not in student_scores(S, T)
    assert "student, 8 values" in student_scores(S, T)
    assert list(teacher_scores(T, projected)) == ["teacher", "teacher, projected"]
    assert list(teacher_scores(T, None)) == ["teacher"]


def test_searches_by_hand():
    corpus = {"d0": "a  cat\n sat", "d1": "x" * 200, "d2": "map", "d3": "land"}
    queries = {f"q{i}": f"query {i}" for i in range(6)}
    dataset = RetrievalSet("Toy", queries, corpus, {query: {"d2"} for query in queries})
    scores = np.tile([[0.1, 0.9, 0.5, 0.2]], (6, 1))
    first, second = sample_searches(dataset, {"student": scores}, [[2]] * 6, 2)
    assert (first["set"], first["query"], second["query"]) == ("Toy", "query 0", "query 3")
    found = [
        {"rank": 1, "text": "x" * 160 + "…", "score": 0.9, "relevant": False},
        {"rank": 2, "text": "map", "score": 0.5, "relevant": True},
        {"rank": 3, "text": "land", "score": 0.2, "relevant": False},
    ]
    assert first["results"]["student"] == found
    missed = sample_searches(dataset, {"student": scores}, [[0]] * 6, 1)[0]["results"]["student"]
    last = {"rank": 4, "text": "a cat sat", "score": 0.1, "relevant": True}
    assert missed == [*({**one, "relevant": False} for one in found), last]
    assert sample_searches(dataset, {"student": scores}, [[2]] * 6, 0) == []
    assert len(sample_searches(dataset, {"student": scores}, [[2]] * 6, 99)) == 6


def test_five_searches_of_several_sets(models):
    _, reduced, retrieval, _ = models
    sets = [RetrievalSet(name, retrieval.queries, retrieval.corpus, retrieval.relevant) for name in "ABCD"]
    record = account(reduced, reduced, True, sets)
    assert [search["set"] for search in record["searches"]] == ["A", "A", "B", "B", "C"]


def without_answers(dataset, teacher):
    """The same queries, to each of which only the document that the teacher ranks last is relevant."""
    queries, documents = (list(texts.values()) for texts in (dataset.queries, dataset.corpus))
    scores = teacher.encode(queries) @ teacher.encode(documents).T
    last = [list(dataset.corpus)[i] for i in scores.argmin(1)]
    relevant = {query: {document} for query, document in zip(dataset.queries, last, strict=True)}
    return RetrievalSet("Nothing", dataset.queries, dataset.corpus, relevant)


@pytest.mark.parametrize("has_student", [False, True])
def test_a_set_on_which_the_teacher_finds_nothing_is_refused(models, has_student):
    whole, _, retrieval, _ = models

    class NeverAsked(SentenceTransformer):
        def encode(self, *args, **kwargs):
            raise AssertionError("the student must not be measured on a set that is refused")

    student = NeverAsked(modules=list(whole), device="cpu") if has_student else None
    with pytest.raises(UserError, match=r"--datasets Nothing: the teacher's nDCG@10 is 0: .*2 queries.*; leave this s"):
        account(student, whole, False, [without_answers(retrieval, whole)], flag="--datasets")


def test_without_a_flag_such_a_set_is_left_out_with_a_warning(models, caplog):
    """After a training, the account must neither fail nor divide by nothing."""
    whole, reduced, retrieval, pairs = models
    nothing = without_answers(retrieval, whole)
    record = account(reduced, reduced, True, [nothing, retrieval], [pairs])
    expected = account(reduced, reduced, True, [retrieval], [pairs])
    assert record["left_out"] == ["Nothing"]
    for part in ("retrieval", "grid", "queries", "pairs"):
        assert record[part] == expected[part]
    assert {search["set"] for search in record["searches"]} == {"Toy"}
    assert "Nothing: the teacher's nDCG@10 is 0" in caplog.text
    assert "LEFT OUT" in caplog.text
    text = format_account(record)
    assert "Left out, since the teacher's nDCG@10 is 0 there: Nothing." in text

    alone = account(reduced, reduced, True, [nothing])
    assert (alone["retrieval"], alone["grid"], alone["cost"], alone["left_out"]) == ([], {}, {}, ["Nothing"])
    assert format_account(alone) == "Left out, since the teacher's nDCG@10 is 0 there: Nothing."


def test_only_the_ceiling(models):
    _, reduced, retrieval, _ = models
    record = account(None, reduced, True, [retrieval])
    assert (record["grid"], record["searches"]) == ({}, [])
    assert [row["system"] for row in record["retrieval"]] == ["teacher", "teacher, projected"]
    assert retention(record) is None
    assert format_account({"retrieval": [], "pairs": [], "cost": {}}) == ""
    strange = {"retrieval": [], "left_out": ["\x1b[31mred"], "pairs": [], "cost": {}}
    assert format_account(strange).endswith("is 0 there: \\x1b[31mred.")


def test_the_command(models, tmp_path, monkeypatch, capsys):
    from test_retrieval import write_set

    _, reduced, _, _ = models
    reduced.save_pretrained(str(tmp_path / "reduced"))
    (tmp_path / "reduced" / "run.json").write_text('{"projection": {"quality": {}}}')
    write_set(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    flags = ["reduced", "reduced", "--datasets", "set", "--output", "account.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
    main()
    said = capsys.readouterr()
    assert "\nteacher, projected  " in said.out
    assert "query of Toy" not in said.err
    assert json.loads((tmp_path / "account.json").read_text())["retrieval"][0]["system"] == "teacher"


def test_an_output_that_is_a_folder_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate", "no model", "no teacher", "--output", str(tmp_path)])
    with pytest.raises(UserError, match=r"--output .*: is a folder, expected a file; name one such as .*account.json"):
        parse_arguments()


def test_graded_relevance_counts(models):
    """The teacher's nDCG@10 on a set with gains, against the formula with the same gains."""
    whole, _, retrieval, _ = models
    gains = {("q1", "d20"): 3.0, ("q1", "d21"): 2.0}
    graded = RetrievalSet("Toy", retrieval.queries, retrieval.corpus, retrieval.relevant, gains)
    scores = similarities(*(unit_vectors(whole.encode(list(t.values()))) for t in (graded.queries, graded.corpus)))
    expected = ndcg_at_10(scores, [{1: 1}, {20: 3, 21: 2}]).mean()
    record = account(None, whole, False, [graded])
    assert record["retrieval"][0]["mean"] == pytest.approx(expected, abs=1e-3)


def test_cosines_that_are_all_equal_count_as_no_correlation(models, caplog):
    whole, _, _, _ = models
    pairs = PairSet("Same", ["a cat"] * 4, ["the map"] * 4, [1.0, 2.0, 3.0, 4.0])
    assert account(whole, whole, False, [], [pairs])["pairs"][1] == {"system": "student", "scores": {"Same": 0.0}}
    assert "Same, student: all 4 cosines are equal" in caplog.text


def test_after_training_a_failure_is_said_and_not_raised(models, caplog):
    whole, _, retrieval, pairs = models

    class Broken(SentenceTransformer):
        def encode(self, *args, **kwargs):
            raise RuntimeError("out of memory")

    broken = Broken(modules=list(whole), device="cpu")
    record = account_after_training(broken, whole, False, [retrieval], [pairs], "compare model teacher")
    assert record["failed"] == "RuntimeError: out of memory"
    assert record.keys() - {"failed"} == account(whole, whole, False, [retrieval], [pairs]).keys()
    assert "THE COMPARISON WITH THE TEACHER FAILED (RuntimeError: out of memory)" in caplog.text
    assert "compare again with: compare model teacher" in caplog.text
    assert format_account(record) == "The comparison with the teacher failed: RuntimeError: out of memory"
    assert account_after_training(whole, whole, False, [retrieval], [], "")["retrieval"]


def test_a_missing_mteb_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--mteb: the package mteb is missing; install it"):
        mteb_scores({}, ["STSBenchmark"])
