"""The model card as the hub reads it back, and what it says of where a model came from."""

import json
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from modernbert_small.reporting.card import write_model_card

ACCOUNT = {
    "retrieval": [
        {"system": name, "scores": {"NanoA": score, "B": 0.5}, "mean": 0.5, "retention": 0.9, "interval": [0.8, 1.0]}
        for name, score in (("teacher", 0.6), ("student", 0.5432))
    ],
    "queries": {"NanoA": 50, "B": 9},
    "pairs": [{"system": "student", "scores": {"stsb": 0.81}}],
    "cost": {},
}
RECORD = {"account": ACCOUNT, "heldout_similarity": 0.9, "rows": {"train": 1000}, "steps": 7}
RECORD["reported_texts_in_training"] = {}


@pytest.fixture
def args(tmp_path):
    """Phase 5's settings, with the records of the four phases before."""
    runs = {
        "corpus": (
            "create_dataset",
            {"sources": ["msmarco", "own=/texts"], "max_rows_per_source": None},
            {"msmarco": {"hub_id": "some/msmarco"}, "own": {"path": "/texts", "hash": "0"}},
        ),
        "init": (
            "init_model_mlm",
            {"teacher_name_or_path": "big/encoder", "hidden_size": 16},
            {"teacher": {"hub_id": "big/encoder"}},
        ),
        "mlm": ("pre_train", {"mlm_probability": 0.3, "max_steps": -1}, {"model": {"path": "init"}}),
        "labels": (
            "create_distil_dataset",
            {"teacher_name_or_path": "big/embedder", "embedding_dim": 16},
            {"teacher": {"hub_id": "big/embedder"}, "corpus": {"path": "corpus"}},
        ),
    }
    for folder, (phase, settings, inputs) in runs.items():
        for value in inputs.values():
            if value.get("path") in runs:
                value["path"] = str(tmp_path / value["path"])
        rows = [{"source": "msmarco", "rows": 30}, {"source": "msmarco", "rows": 5}, {"source": "own", "rows": 1}]
        record = {"phase": phase, "settings": settings, "inputs": inputs, "by_source": rows}
        if phase == "create_dataset":
            record |= {"evaluation_sets_kept_out": ["NanoA"], "dropped": {"msmarco": {"contaminated": 4}, "own": {}}}
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.json").write_text(json.dumps(record))
    return SimpleNamespace(
        model_name_or_path=str(tmp_path / "mlm"),
        train_file=str(tmp_path / "labels"),
        teacher_name_or_path=str(tmp_path / "teacher"),
        max_seq_length=64,
        tokens_per_batch=512,
        num_train_epochs=2.0,
        max_steps=-1,
        learning_rate=1e-3,
    )


def test_the_hub_reads_it_back(args, tmp_path):
    folder = tmp_path / "small.partial"
    folder.mkdir()
    write_model_card(folder, args, RECORD, width=16)
    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == "small"
    assert card.data.base_model == ["big/embedder", "big/encoder"]
    assert card.data.datasets == ["some/msmarco"]
    assert card.data.library_name == "sentence-transformers"
    results = {(one.task_type, one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert results == {
        ("information-retrieval", "NanoA", "cosine_ndcg@10"): 0.5432,
        ("information-retrieval", "B", "cosine_ndcg@10"): 0.5,
        ("semantic-similarity", "stsb", "spearman_cosine"): 0.81,
    }
    assert "| msmarco | some/msmarco | 35 | MS MARCO, for non-commercial research only" in card.text
    assert "equal a query of NanoA, or share 13 words in a row with one, were kept out" in card.text
    assert "the corpus: 4 texts." in card.text
    assert "| own | local files | 1 | its owner's |" in card.text
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe["init_model_mlm"] == {"teacher_name_or_path": "big/encoder", "hidden_size": 16}
    assert recipe["pre_train"] == {"mlm_probability": 0.3}
    assert recipe["distil_train"]["learning_rate"] == 1e-3


def test_a_card_without_sets_and_records(args, tmp_path):
    for folder in ("mlm", "labels"):
        (tmp_path / folder / "run.json").unlink()
    nothing = {"retrieval": [], "queries": {}, "pairs": [], "cost": {}}
    write_model_card(tmp_path, args, RECORD | {"account": nothing}, width=16)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None
    assert card.data.base_model is None
    assert "No evaluation set was given." in card.text


def test_a_card_claims_no_decontamination_that_did_not_take_place(args, tmp_path):
    corpus = tmp_path / "corpus" / "run.json"
    corpus.write_text(json.dumps(json.loads(corpus.read_text()) | {"evaluation_sets_kept_out": []}))
    write_model_card(tmp_path, args, RECORD | {"reported_texts_in_training": {"NanoA": 3}}, width=16)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "decontaminate" not in text
    assert "No evaluation set was kept out of the corpus. 3 training texts equal a query of NanoA" in text
