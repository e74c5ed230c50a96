"""Retrieval sets and scores against values worked out by hand."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import tiny_sentence_transformer

from modernbert_small import retrieval
from modernbert_small.retrieval import RetrievalSet, compare, format_comparison, load_retrieval_sets, ndcg_at_10
from modernbert_small.settings import UserError


class Stub:
    """Looks vectors up, where the evaluator wants a model."""

    device = torch.device("cpu")
    similarity_fn_name = "cosine"

    def __init__(self, vectors):
        self.vectors = vectors
        self.model_card_data = self

    def set_evaluation_metrics(self, *args, **kwargs):
        pass

    def encode_query(self, texts, **kwargs):
        return torch.tensor([self.vectors[text] for text in texts])

    encode_document = encode_query

    def similarity(self, a, b):
        return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T


def plane(angle):
    return [math.cos(angle), math.sin(angle)]


@pytest.fixture
def example():
    """One query; documents at growing angles, so that their ranks are known; the 2nd and 3rd are relevant."""
    vectors = {"q": plane(0.0), **{f"doc {i}": plane(0.1 * (i + 1)) for i in range(5)}}
    corpus = {f"d{i}": f"doc {i}" for i in range(5)}
    return Stub(vectors), RetrievalSet("Toy", {"q0": "q"}, corpus, {"q0": {"d1", "d2"}})


def test_ndcg_by_hand(example, monkeypatch):
    monkeypatch.setattr(retrieval, "has_bf16", lambda device: False)
    model, dataset = example
    gain = 1 / math.log2(3) + 1 / math.log2(4)
    ideal = 1 / math.log2(2) + 1 / math.log2(3)
    assert ndcg_at_10(model, dataset) == pytest.approx(gain / ideal, abs=1e-6)


def test_retention_is_student_over_teacher_and_its_mean(monkeypatch):
    scores = {("teacher", "A"): 0.8, ("student", "A"): 0.6, ("teacher", "B"): 0.5, ("student", "B"): 0.5}
    monkeypatch.setattr(retrieval, "ndcg_at_10", lambda model, dataset: scores[model, dataset.name])
    rows = compare("student", "teacher", [RetrievalSet(name, {}, {}, {}) for name in "AB"])
    assert [row["retention"] for row in rows] == [0.75, 1.0, 0.875]
    assert rows[-1] == {"dataset": "mean", "teacher": 0.65, "student": 0.55, "retention": 0.875}
    assert format_comparison(rows).splitlines()[2] == "| A | 0.800 | 0.600 | 75.0 % |"
    assert compare("student", "teacher", []) == []


def write_set(folder, name="Toy", qrels=(("q1", "d1"),)):
    for part, columns in {
        "corpus": {"_id": ["d1", "d2"], "text": ["one", "two"]},
        "queries": {"_id": ["q1", "q2"], "text": ["eins", "zwei"]},
        "qrels": {"query-id": [q for q, _ in qrels], "corpus-id": [d for _, d in qrels]},
    }.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / part / f"{name}-00000-of-00001.parquet")


def test_a_folder_of_sets(tmp_path):
    write_set(tmp_path, "A")
    write_set(tmp_path, "B", [("q1", "d1"), ("q2", "d1"), ("q2", "d2"), ("q3", "d1")])
    a, b = load_retrieval_sets([str(tmp_path)])
    assert a == RetrievalSet("A", {"q1": "eins"}, {"d1": "one", "d2": "two"}, {"q1": {"d1"}})
    assert b.relevant == {"q1": {"d1"}, "q2": {"d1", "d2"}}


def test_bad_sets_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nothere: no such folder, and not one of NanoBEIR's sets: .*msmarco"):
        load_retrieval_sets(["nothere"])
    with pytest.raises(UserError, match="no qrels"):
        load_retrieval_sets([str(tmp_path)])
    write_set(tmp_path, qrels=[("q9", "d1")])
    with pytest.raises(UserError, match="no query of Toy has a relevant document"):
        load_retrieval_sets([str(tmp_path)])
    pq.write_table(pa.table({"id": ["d1"]}), tmp_path / "corpus" / "Toy-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"corpus: .*_id, text"):
        load_retrieval_sets([str(tmp_path)])
    (tmp_path / "corpus" / "Toy-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"no corpus/Toy-\*\.parquet"):
        load_retrieval_sets([str(tmp_path)])


def test_a_real_model_is_scored(tmp_path):
    write_set(tmp_path / "set")
    model = tiny_sentence_transformer(tmp_path / "model", "bert")
    assert 0 < ndcg_at_10(model, load_retrieval_sets([str(tmp_path / "set")])[0]) <= 1


def test_nanobeir_without_a_hub_is_one_line():
    with pytest.raises(UserError, match=r"--eval_datasets msmarco: .*NanoBEIR-en did not come .*local folder"):
        load_retrieval_sets(["msmarco"])
