"""The model card as the hub reads it back, and what it says of where a model came from."""

import ast
import json
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from records import edit, fixture, write_records

from modernbert_small.reporting.card import metadata, model_licence, write_model_card, write_teacher_card


def come_from_the_hub(corpus):
    """Phase 1's record with a source of the hub and a set that was kept out, which a run offline cannot have."""
    corpus["inputs"]["msmarco"] = {"hub_id": "some/msmarco"}
    for entry in corpus["by_source"]:
        entry["source"] = entry["source"].replace("pairs", "msmarco")
    corpus["evaluation_sets_kept_out"] = ["NanoA"]
    corpus["dropped"]["own"]["contaminated"] = 4


@pytest.fixture
def args(tmp_path, monkeypatch):
    """Phase 5's settings, with the records of all phases; teachers and a source are of the hub."""
    monkeypatch.chdir(tmp_path)
    model = write_records(tmp_path)
    edit("data/corpus", come_from_the_hub)
    for folder, teacher in (("checkpoints/init", "big/encoder"), ("data/distil", "big/embedder")):
        edit(folder, lambda record, teacher=teacher: record["settings"].update(teacher_name_or_path=teacher))
        edit(folder, lambda record, teacher=teacher: record["inputs"].update(teacher={"hub_id": teacher}))
    edit("checkpoints/mlm", lambda mlm: mlm["inputs"]["corpus"].update(path=str(tmp_path / "data/corpus")))  # the same
    return SimpleNamespace(**json.loads((tmp_path / model / "run.json").read_text())["settings"])


@pytest.fixture
def record():
    """Phase 5's measurements, with a set of pairs."""
    measured = json.loads(fixture("checkpoints/model").read_text())
    measured["account"]["pairs"] = [{"system": "student", "scores": {"stsb": 0.81}}]
    return measured


def test_the_hub_reads_it_back(args, tmp_path, record):
    folder = tmp_path / "small.partial"
    folder.mkdir()
    write_model_card(folder, args, record, width=16)
    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == "small"
    assert card.data.base_model == ["big/embedder", "big/encoder"]
    assert card.data.datasets == ["some/msmarco"]
    assert card.data.library_name == "sentence-transformers"
    results = {(one.task_type, one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert results == {
        ("information-retrieval", "Toy", "cosine_ndcg@10"): 1.0,
        ("semantic-similarity", "stsb", "spearman_cosine"): 0.81,
    }
    assert "# small\n\nsmall is a small ModernBERT. It maps texts of up to 64 tokens" in card.text
    assert "| msmarco | some/msmarco | 50 | MS MARCO, for non-commercial research only" in card.text
    assert "equal a query of NanoA, or share 13 words in a row with one, were kept out" in card.text
    assert "the corpus: 4 texts." in card.text
    assert card.text.count("| own | local files | 150 | its owner's |") == 1
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe["init_model_mlm"]["teacher_name_or_path"] == "big/encoder"
    assert recipe["init_model_mlm"]["hidden_size"] == 16
    assert "output_dir" not in recipe["init_model_mlm"]
    assert recipe["create_dataset"] == {"sources": ["own=texts.jsonl", "pairs=pairs.csv"], "max_seq_length": 64}
    assert recipe["pre_train"]["max_steps"] == 6
    assert recipe["distil_train"]["learning_rate"] == 3e-3
    assert "max_steps" not in recipe["distil_train"]  # -1: the epochs count


def test_a_card_without_sets_and_records(args, tmp_path, record):
    for folder in ("checkpoints/mlm", "data/distil", "checkpoints/teacher"):
        (tmp_path / folder / "run.json").unlink()
    nothing = {"retrieval": [], "queries": {}, "pairs": [], "cost": {}}
    write_model_card(tmp_path, args, record | {"account": nothing}, width=16)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None
    assert card.data.base_model is None
    assert "No evaluation set was given." in card.text


def test_a_card_claims_no_decontamination_that_did_not_take_place(args, tmp_path, record):
    edit("data/corpus", lambda corpus: corpus.update(evaluation_sets_kept_out=[]))
    write_model_card(tmp_path, args, record | {"reported_texts_in_training": {"NanoA": 3}}, width=16)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "decontaminate" not in text
    assert "No evaluation set was kept out of the corpus. 3 training texts equal a query of NanoA" in text


def test_a_reduced_teacher_has_a_card_of_its_own(tmp_path):
    folder = tmp_path / "teacher.partial"
    folder.mkdir()
    projection = {"sample_texts": 1000, "heldout_texts": 20, "explained_energy": 0.9512}
    projection["quality"] = {16: {"cosine_correlation": 0.98765}, 8: {"cosine_correlation": 0.5}}
    write_teacher_card(folder, {"hub_id": "big/embedder"}, projection, width=16)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "big/embedder"
    assert card.data.model_name == "teacher"
    assert "This model is big/embedder, with vectors of 16 dimensions and unit length, to which" in card.text
    assert "which explain 95.1 %" in card.text
    assert "a correlation of 0.988" in card.text


def test_the_card_of_a_teacher_that_needed_no_projection_shows_no_private_path(tmp_path):
    write_teacher_card(tmp_path, {"path": "/home/somebody/models/own", "hash": "0"}, None, width=16)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert "This model is models/own, with vectors of 16 dimensions and unit length. It was" in card.text
    assert "somebody" not in card.text
    assert "rojection" not in card.text


def code(text):
    """The first program of a card."""
    return text.split("```python\n")[1].split("\n```\n")[0]


def test_the_example_is_a_search_of_the_models_own(args, tmp_path, record):
    query = 'what\'s ```this``` "quoted"\\?'
    found = [{"rank": 1, "text": "wrong", "score": 0.5, "relevant": False}]
    of_student = [*found, {"rank": 9, "text": "right", "score": 0.1, "relevant": True}]
    nothing_wrong = {"query": "skipped", "results": {"student": of_student[1:]}}
    searches = [nothing_wrong, {"query": query, "results": {"student": of_student}}]
    record["account"]["searches"] = searches
    write_model_card(tmp_path, args, record, width=16)
    program = ast.parse(code((tmp_path / "README.md").read_text()))
    assert {query, "right", "wrong"} < {node.value for node in ast.walk(program) if isinstance(node, ast.Constant)}
    record["account"]["searches"] = []
    write_model_card(tmp_path, args, record, width=16)
    assert "How does photosynthesis work?" in code((tmp_path / "README.md").read_text())


def test_the_teachers_documents_are_recommended_only_where_they_win(args, tmp_path, record):
    write_model_card(tmp_path, args, record, width=16)
    assert "teacher.encode_document" not in (tmp_path / "README.md").read_text()
    for row in record["account"]["retrieval"]:
        row["retention"] = {"student": 0.8, "student's queries, teacher's documents": 0.9}.get(row["system"], 1)
    write_model_card(tmp_path, args, record, width=16)
    text = (tmp_path / "README.md").read_text()
    assert "teacher.encode_document(texts)" in text
    assert "90.0 % of the teacher's nDCG@10 are kept instead of\n80.0 %" in text


def test_a_card_has_the_name_that_was_given_and_no_path_of_an_error(args, tmp_path, record):
    args.model_name = "My model"
    record["account"] = {**record["account"], "retrieval": [], "failed": "OSError: /home/somebody/a/b/set is gone"}
    write_model_card(tmp_path, args, record, width=16)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == "My model"
    assert "\n# My model\n" in card.text
    assert "failed: OSError: b/set is gone" in card.text


def test_licences_of_models_and_the_language_where_they_are_known(args, tmp_path, record):
    own = tmp_path / "own"
    own.mkdir()
    (own / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    edit("checkpoints/init", lambda init: init["inputs"].update(teacher={"hub_id": "answerdotai/ModernBERT-base"}))
    edit("data/distil", lambda labels: labels["inputs"].update(teacher={"path": str(own), "hash": "0"}))
    write_model_card(tmp_path, args, record, width=16)
    card = ModelCard.load(tmp_path / "README.md")
    assert "| answerdotai/ModernBERT-base | first weights | apache-2.0 |" in card.text
    assert "| own | teacher | mit |" in card.text
    assert card.data.language is None  # of a local source it is not known
    (own / "README.md").write_text("no card")
    assert model_licence({"path": str(own)}) is None
    assert model_licence({"hub_id": "some/other"}) is None
    corpus = {"by_source": [{"source": "npr", "rows": 1}], "inputs": {"npr": {"hub_id": "sentence-transformers/npr"}}}
    nothing = {"retrieval": [], "pairs": []}
    assert metadata("small", nothing, {}, [corpus]).language == "en"
    assert metadata("small", nothing, {}, []).language is None
