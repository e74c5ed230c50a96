"""`python -m benchmarks.gpu` from end to end, on whatever device there is, at small sizes; then resumed.

This is not part of the test suite, since it starts some twenty processes; `make soak` runs it.
"""

import json
import os
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, SENTENCES

from benchmarks.speed import demo_tokenizer


def run(command, folder, *flags):
    words = [sys.executable, "-m", "benchmarks.gpu", command, "--output_dir", folder / "out", *flags]
    words += ["--tokenizer", demo_tokenizer(), "--max_seq_length", "64"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    texts = [f"{number} times: {SENTENCES[number % 4][: 5 + number % 50]}" for number in range(400)]
    table = pa.table({"text": texts, "source": ["made"] * 400, "kind": ["document"] * 400})
    (folder / "corpus").mkdir()
    pq.write_table(table, folder / "corpus/train-00000-of-00001.parquet")
    return folder


def test_correctness(folder):
    result = run("correctness", folder, "--tests", "tests/test_tables.py")
    assert result.returncode == 0, result.stderr
    parts = json.loads((folder / "out/correctness.json").read_text())["parts"]
    assert len(parts) == 6
    assert not [values for values in parts.values() if "failed" in values]
    assert re.fullmatch(r"\d+ passed in .*", parts["test suite"]["pytest"])

    again = run("correctness", folder, "--tests", "tests/test_tables.py")
    assert again.returncode == 0, again.stderr
    assert " ..." not in again.stderr  # no part is run again
    assert again.stdout.splitlines()[:20] == result.stdout.splitlines()[:20]


@pytest.mark.parametrize("command", ["speed", "comparison"])
def test_measurements(folder, command):
    small = ["--corpus", folder / "corpus", "--rows", "16", "--teacher_layers", "1"]
    result = run(command, folder, *small)
    assert result.returncode == 0, result.stderr
    record = json.loads((folder / f"out/{command}-64.json").read_text())
    measured = [m for m in record["parts"].values() if "tokens" in m]
    assert len(measured) >= {"speed": 3, "comparison": 9}[command]
    assert all(m["tokens"] > 0 and m["seconds"] > 0 for m in measured)
    assert (folder / f"out/{command}-64.md").read_text() in result.stdout
    assert ("not run: it needs CUDA" in result.stdout) == (command == "speed" and "gpu" not in record["machine"])
