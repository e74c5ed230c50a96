"""What the five commands say of what the hub does not give, and what a bad connection costs: nothing."""

import json
import re
import subprocess
import sys

import pytest
from helpers import ROOT, SCRIPTS
from standin_hub import StandInHub
from standin_repositories import write_repositories

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
def failures(tmp_path_factory):
    """What commands print that ask the hub for what it does not give, by what they ask for."""
    folder, repositories = tmp_path_factory.mktemp("failures"), tmp_path_factory.mktemp("hub")
    write_repositories(repositories)
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
