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


JOBS_THAT_FAIL = """
import json, sys, time, traceback
import datasets
from helpers import load_script
from modernbert_small.run.script import run_script

time.sleep = lambda seconds: None  # the hub's client and datasets wait before they try again
datasets.config.STREAMING_READ_MAX_RETRIES = 2
for script, flags in json.loads(sys.argv[1]):
    sys.argv[:] = [script, *flags]
    try:
        run_script(load_script(script).main)
    except SystemExit as stop:
        print("exit", stop.code, file=sys.stderr)
    except Exception:
        traceback.print_exc()
        print("exit 1", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def failures(repositories, tmp_path_factory):
    """What commands print that ask the hub for what it does not give, by what they ask for."""
    folder = tmp_path_factory.mktemp("failures")
    tokenizer = ["--tokenizer_name_or_path", "answerdotai/ModernBERT-base", "--validation_rows", "10"]
    own = [*tokenizer, "--eval_datasets"]
    jobs = {
        "gated dataset": (SCRIPTS[0], [*own, "--sources", "msmarco"]),
        "missing dataset": (SCRIPTS[0], [*own, "--sources", "npr=sentence-transformers/gone"]),
        "gated sets": (SCRIPTS[0], [*tokenizer, "--sources", "npr"]),
        "missing model": (SCRIPTS[1], ["--teacher_name_or_path", "answerdotai/gone"]),
        "gated model": (SCRIPTS[1], ["--teacher_name_or_path", "ibm-granite/granite-embedding-small-english-r2"]),
        "pickled model": (SCRIPTS[1], ["--teacher_name_or_path", "jhu-clsp/ettin-encoder-32m", "--init", "embeddings"]),
        "busy": (SCRIPTS[0], [*own, "--sources", "npr", "--output_dir", "busy"]),
        "broken once": (SCRIPTS[0], [*own, "--sources", "finewiki", "--output_dir", "once"]),
        "broken": (SCRIPTS[0], [*own, "--sources", "finewiki", "--output_dir", "broken"]),
    }
    with StandInHub(repositories) as hub:
        hub.gated |= {
            "sentence-transformers/msmarco-msmarco-MiniLM-L6-v3",
            "sentence-transformers/NanoBEIR-en",
            "ibm-granite/granite-embedding-small-english-r2",
        }
        hub.busy["*/npr/resolve/*/pair/train-00001-of-00003.parquet"] = 2
        hub.breaks["data/enwiki/000_00001.parquet"] = [2000]
        hub.breaks["data/enwiki/000_00002.parquet"] = [10**9] * 2 + [2000] * 999
        environment = hub.environment(folder / "cache") | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", JOBS_THAT_FAIL, json.dumps(list(jobs.values()))]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    said = re.split(r"^exit (\d+)$", result.stderr, flags=re.MULTILINE)
    assert len(said) == 2 * len(jobs) + 1, result.stderr
    return folder, dict(zip(jobs, zip(said[::2], map(int, said[1::2]), strict=False), strict=True))


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("gated dataset", "msmarco-msmarco-MiniLM-L6-v3|gated|hf auth login|--sources msmarco=<local path>"),
        ("missing dataset", "sentence-transformers/gone|no such repository|--sources npr=<local path>"),
        ("gated sets", "--eval_datasets msmarco|sentence-transformers/NanoBEIR-en|gated|hf auth login"),
        ("missing model", "answerdotai/gone|no such repository|--teacher_name_or_path <local folder>"),
        ("gated model", "granite-embedding-small-english-r2|gated|hf auth login|--teacher_name_or_path"),
        ("pickled model", "ettin-encoder-32m|pickled weights|safetensors"),
        ("broken", "finewiki|cannot be read|connection"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(failures, job, words):
    said, status = failures[1][job]
    assert status == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said
    for word in words.split("|"):
        assert word in line


def test_a_connection_that_breaks_off_once_and_a_busy_hub_lose_nothing(failures):
    folder, said = failures
    assert said["busy"][1] == said["broken once"][1] == 0
    assert json.loads((folder / "once/run.json").read_text())["read"]["finewiki"]["rows"] == 300
    assert json.loads((folder / "busy/run.json").read_text())["read"]["npr"]["rows"] == 300
    assert not (folder / "broken").exists()
