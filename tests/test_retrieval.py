"""Evaluation sets from folders, files and names."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer

from modernbert_small.evaluation.sets import PairSet, RetrievalSet, evaluator, load_evaluation_sets
from modernbert_small.run.errors import UserError

FLAG = "--eval_datasets"


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
    (a, b), _ = load_evaluation_sets(FLAG, [str(tmp_path)])
    assert a == RetrievalSet("A", {"q1": "eins"}, {"d1": "one", "d2": "two"}, {"q1": {"d1"}})
    assert b.relevant == {"q1": {"d1"}, "q2": {"d1", "d2"}}


def test_bad_sets_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nothere: no such folder or file, and not one of NanoBEIR's sets .*msmarco"):
        load_evaluation_sets(FLAG, ["nothere"])
    with pytest.raises(UserError, match="no qrels"):
        load_evaluation_sets(FLAG, [str(tmp_path)])
    write_set(tmp_path, qrels=[("q9", "d1")])
    with pytest.raises(UserError, match="no query of Toy has a relevant document"):
        load_evaluation_sets(FLAG, [str(tmp_path)])
    pq.write_table(pa.table({"id": ["d1"]}), tmp_path / "corpus" / "Toy-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"corpus: .*_id, text"):
        load_evaluation_sets(FLAG, [str(tmp_path)])
    (tmp_path / "corpus" / "Toy-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"no corpus/Toy-\*\.parquet"):
        load_evaluation_sets(FLAG, [str(tmp_path)])


def test_sentence_pairs(tmp_path):
    file = tmp_path / "pairs.parquet"
    rows = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "score": [0.5, 1.0], "more": [1, 2]}
    pq.write_table(pa.table(rows), file)
    assert load_evaluation_sets(FLAG, [str(file)]) == ([], [PairSet("pairs", ["a", "c"], ["b", "d"], [0.5, 1.0])])
    for scores, said in (([1, 1], "do not differ"), (["1", "2"], "expected two of strings and a number")):
        pq.write_table(pa.table(rows | {"score": scores}), file)
        with pytest.raises(UserError, match=said):
            load_evaluation_sets(FLAG, [str(file)])
    pq.write_table(pa.table({"sentence1": ["a"], "sentence2": ["b"], "score": pa.array([None], pa.float64())}), file)
    with pytest.raises(UserError, match="without nulls"):
        load_evaluation_sets(FLAG, [str(file)])
    file.write_text("sentence1,sentence2")
    with pytest.raises(UserError, match=r"pairs.parquet: expected Parquet with sentence1, sentence2, score"):
        load_evaluation_sets(FLAG, [str(file)])


@pytest.mark.parametrize(
    ("name", "hub_id"), [("msmarco", "NanoBEIR-en"), ("nanobeir", "NanoBEIR-en"), ("stsb", "stsb")]
)
def test_without_a_hub_is_one_line(name, hub_id):
    with pytest.raises(
        UserError, match=rf"--eval_datasets \w+: .*{hub_id}: the Hugging Face hub cannot be reached.*local folder"
    ):
        load_evaluation_sets(FLAG, [name])


@pytest.mark.parametrize("right", ["a", "b"])
def test_scores_are_float32_under_autocast(right):
    """Two documents closer than bf16 tells apart are still ranked, whichever would win a tie."""

    class Lookup(SentenceTransformer):
        def encode_query(self, sentences, **kwargs):
            return torch.tensor([[1.0, 0.02]])

        def encode_document(self, sentences, **kwargs):
            return torch.tensor([[1.0, 0.01] if text == right else [1.0, 0.0] for text in sentences])

    dataset = RetrievalSet("Close", {"q": "query"}, {"a": "a", "b": "b"}, {"q": {right}})
    model = Lookup(modules=[torch.nn.Identity()], device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluator(dataset)(model)["Close_cosine_ndcg@10"] == 1
