"""The README's five commands against a stand-in for the hub that holds repositories in their real form."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import ROOT, SCRIPTS
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from standin_hub import StandInHub
from standin_repositories import LEAKED_QUERIES, write_repositories

# What bounds the time. All else is as the commands are without a flag, or as recipes/v2.yaml says.
BOUNDS = (
    ["--max_rows_per_source", "45", "--validation_rows", "10"],
    [],
    ["--max_steps", "2", "--tokens_per_batch", "1024"],
    ["--tokens_per_batch", "4096"],
    ["--max_steps", "2", "--tokens_per_batch", "1024"],
)
# Samples are smaller than those of a user, and datasets doesn't wait after each file that it streams.
CONSTANTS = {
    "datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN": 0,
    "modernbert_small.distil.alignment._SAMPLE_ROWS_PER_DIMENSION": 0.05,
}
HUB_IDS = {
    "base_model": ["Alibaba-NLP/gte-modernbert-base", "answerdotai/ModernBERT-base"],
    "datasets": [
        "sentence-transformers/msmarco-msmarco-MiniLM-L6-v3",
        "johnnyboycurtis/Philosophical-Triplets-Retrieval",
        "sentence-transformers/npr",
        "HuggingFaceFW/finewiki",
    ],
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_repositories(root)
    return root


def launch(folder: Path, environment: dict[str, str], *jobs: list) -> subprocess.CompletedProcess:
    """Scripts one after the other as users run them, in one interpreter: importing takes longer than they do."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, ROOT / "tests" / "launch.py", "jobs.json"]
    environment = environment | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    (folder / "jobs.json").unlink()
    return result


@pytest.fixture(scope="module")
def recipe(repositories, tmp_path_factory):
    """The five commands without a flag, from an empty folder and an empty cache; phases 3 and 5 upload."""
    folder, cache = tmp_path_factory.mktemp("recipe"), tmp_path_factory.mktemp("cache")
    push = {2: ["--push_to_hub"], 4: ["--push_to_hub"]}
    jobs = [[script, CONSTANTS, [*BOUNDS[i], *push.get(i, [])]] for i, script in enumerate(SCRIPTS)]
    with StandInHub(repositories) as hub:
        result = launch(folder, hub.environment(cache, HF_TOKEN="hf_secret"), *jobs)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, cache, hub, result


def test_the_model_loads_and_says_what_it_is(recipe):
    folder, _, _, result = recipe
    model = SentenceTransformer(str(folder / "checkpoints/ModernBERT-small-v2"), device="cpu")
    vectors = model.encode(["The philosophical implications of AI.", "How to train a ModernBERT model."])
    assert vectors.shape == (2, 384)
    assert model.max_seq_length == 1024
    card = ModelCard.load(folder / "checkpoints/ModernBERT-small-v2/README.md")
    for key, expected in HUB_IDS.items():
        assert getattr(card.data, key) == expected
    assert {one.dataset_name for one in card.data.eval_results} == {"NanoMSMARCO", "NanoHotpotQA"}
    assert "| teacher, projected |" in card.text
    assert "NanoMSMARCO NanoHotpotQA mean" in " ".join(result.stdout.split())
    report = (folder / "checkpoints/ModernBERT-small-v2/report.html").read_text()
    assert "No record was found" not in report
    assert len(re.findall("<h2>", report)) == 11


def test_reported_queries_are_kept_out_without_a_flag(recipe):
    folder, _, _, result = recipe
    record = json.loads((folder / "data/corpus/run.json").read_text())
    assert record["evaluation_sets_kept_out"] == ["NanoMSMARCO", "NanoHotpotQA"]
    assert record["dropped"]["msmarco"]["contaminated"] >= 1
    texts = {
        text for file in (folder / "data/corpus").glob("*.parquet") for text in pq.read_table(file)["text"].to_pylist()
    }
    assert not texts & set(LEAKED_QUERIES)
    card = (folder / "checkpoints/ModernBERT-small-v2/README.md").read_text()
    assert "equal a query of NanoHotpotQA, NanoMSMARCO" in card
    assert "training texts equal a query" not in result.stderr + card


def test_the_teacher_was_computed_in_float32(recipe):
    folder, _, _, _ = recipe
    teacher = SentenceTransformer(str(folder / "checkpoints/teacher"), device="cpu")
    assert {str(weight.dtype) for weight in teacher.state_dict().values()} == {"torch.float32"}
    labels = pq.read_table(folder / "data/distil/validation-00000-of-00001.parquet")
    vectors = teacher.encode(labels["sentence"].to_pylist())
    cosines = [float(vector @ label) for vector, label in zip(vectors, labels["label"].to_pylist(), strict=True)]
    assert sum(cosines) / len(cosines) > 0.9999
    assert min(cosines) > 0.999


def test_what_is_uploaded_is_what_a_user_loads(recipe):
    folder, cache, hub, _ = recipe
    assert [repository for repository, _, _ in hub.commits] == ["somebody/mlm", "somebody/ModernBERT-small-v2"]
    mlm, model = (set(hub.uploads[repository]) for repository, _, _ in hub.commits)
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert mlm - {".gitattributes"} == {"config.json", "model.safetensors", *tokenizer}
    modules = {
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "2_Normalize/config.json",
    }
    weights = {"config.json", "model.safetensors", *tokenizer}
    assert model - {".gitattributes"} == {"README.md", "report.html", *weights, *modules}
    for content in (
        content for files in hub.uploads.values() for name, content in files.items() if "safetensors" not in name
    ):
        for private in (str(folder), str(cache), str(Path.home()), "hf_secret", hub.endpoint):
            assert private.encode() not in content
