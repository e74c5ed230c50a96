"""Two processes under torchrun do what one does with the same total batch."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import free_port, run_forked
from helpers import ROOT, SENTENCES, tiny_modernbert, tiny_sentence_transformer, tiny_tokenizer
from safetensors.torch import load_file
from test_retrieval import write_set

# On the CPU: a machine may have one GPU, and only on a CPU are sums the same to the byte.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
CPU = {**os.environ, **NO_GPU}
PHASE_1, PHASE_3, PHASE_4, PHASE_5 = (
    "mlm/create_dataset.py",
    "mlm/pre_train.py",
    "create_distil_dataset.py",
    "distil_train.py",
)


def write_corpus(folder):
    """A corpus of 120 random texts in `folder / "corpus"`."""
    rng = np.random.default_rng(0)
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    texts = [" ".join(rng.choice(words, rng.integers(3, 25))) for _ in range(120)]
    (folder / "corpus").mkdir()
    for split, rows in (("train", texts[:100]), ("validation", texts[100:])):
        table = pa.table({"text": rows, "source": ["own"] * len(rows), "kind": ["document"] * len(rows)})
        pq.write_table(table, folder / "corpus" / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny corpus, student and teacher."""
    folder = tmp_path_factory.mktemp("processes")
    teacher = tiny_sentence_transformer(folder / "small", "bert", width=24)
    tiny_modernbert(folder / "init", teacher.tokenizer)
    teacher.tokenizer.save_pretrained(folder / "init")
    write_set(folder / "evaluation")
    write_corpus(folder)
    return folder


def jobs(out, tokens_per_batch, labels=None):
    """Phases 4, 3 and 5; phase 5 on `labels`, its own by default."""
    training = ["--max_seq_length", "64", "--num_train_epochs", "2", "--tokens_per_batch", str(tokens_per_batch)]
    training += ["--save_steps", "4", "--eval_steps", "4", "--logging_steps", "1", "--report_to", "none"]
    training += ["--learning_rate", "5e-3", "--bf16", "false"]
    phase_4 = ["--teacher_name_or_path", "small/teacher", "--train_file", "corpus", "--embedding_dim", "16"]
    phase_4 += ["--pca_sample_size", "50", "--output_dir", f"{out}/distil", "--teacher_output_dir", f"{out}/teacher"]
    labels = labels or out
    data = ["--train_file", f"{labels}/distil", "--teacher_name_or_path", f"{labels}/teacher"]
    phase_5 = [*data, "--model_name_or_path", "init", "--eval_datasets", "evaluation", "--output_dir", f"{out}/model"]
    phase_3 = ["--train_file", "corpus", "--model_name_or_path", "init", "--output_dir", f"{out}/mlm"]
    return [
        [
            PHASE_4,
            {"modernbert_small.label.shards.ROWS_PER_SHARD": 16, "modernbert_small.label.teacher._TEXTS_PER_BLOCK": 16},
            phase_4,
        ],
        [PHASE_3, {}, phase_3 + training],
        [PHASE_5, {}, phase_5 + training],
    ]


@pytest.fixture(scope="module")
def one_and_two(folder):
    """The phases' output by one process and by two, and that of training by one with two batches in a step."""
    twice = [
        [script, constants, [*flags, "--gradient_accumulation_steps", "2"]]
        for script, constants, flags in jobs("twice", 128, "one")[1:]
    ]
    for processes, run in ((1, jobs("one", 256)), (2, jobs("two", 256, "copy")), (1, twice)):
        if processes == 2:  # the same labels, which these processes tokenise together
            for name in ("distil", "teacher"):
                shutil.copytree(folder / "one" / name, folder / "copy" / name)
        for script, constants, flags in run:
            changes = {"constants": constants, "environment": NO_GPU, "processes": processes}
            done = run_forked(script, folder, folder, *flags, **changes)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder / "one", folder / "two"


def test_labels_are_the_same_bytes(one_and_two):
    one, two = one_and_two
    files = sorted(path.relative_to(one) for path in one.glob("distil/*.parquet"))
    assert len(files) == 9
    for file in [*files, *(path.relative_to(one) for path in one.glob("teacher/**/*.safetensors"))]:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    records = [json.loads((out / "distil" / "run.json").read_text()) for out in one_and_two]
    assert records[0]["files"] == records[1]["files"]
    assert records[0]["counts"] == records[1]["counts"]


def test_tokens_are_the_same_bytes(one_and_two):
    """Each process tokenises some of the eight files; nothing of their parts is left."""
    stores = [one_and_two[0].with_name(name) / "distil.tokens" for name in ("one", "copy")]
    files = [{str(path.relative_to(store)) for path in store.rglob("*.npy")} for store in stores]
    assert files[0] == files[1]
    assert len(files[0]) == 6  # tokens and offsets of both splits, and their labels
    for file in files[0]:
        assert (stores[0] / file).read_bytes() == (stores[1] / file).read_bytes(), file


@pytest.mark.parametrize("other", ["two", "twice"])
@pytest.mark.parametrize(("phase", "heldout"), [("mlm", "heldout_mlm_loss"), ("model", "heldout_similarity")])
def test_training_is_the_same_to_rounding(one_and_two, phase, heldout, other):
    outs = one_and_two[0], one_and_two[0].with_name(other)
    records = [json.loads((out / phase / "run.json").read_text()) for out in outs]
    curves = [[entry["loss"] for entry in record["history"] if "loss" in entry] for record in records]
    assert len(curves[0]) > 10
    assert len(set(curves[0])) > 10
    np.testing.assert_allclose(*curves, rtol=1e-5)
    assert records[0]["rows"] == records[1]["rows"]
    assert records[0][heldout] == pytest.approx(records[1][heldout], rel=1e-2)  # means over other batches
    one, two = (load_file(out / phase / "model.safetensors") for out in outs)
    for name, weight in one.items():
        np.testing.assert_allclose(two[name], weight, atol=1e-5, err_msg=name)


def write_sources(folder):
    """Queries and documents in files of several forms, with texts that occur in several of them, and a bad row."""
    (folder / "own").mkdir()
    texts = [f"what is number {i % 90}" for i in range(200)]
    triplets = {"query": texts, "positive": [f"number {i} is the one after {i - 1}" for i in range(200)]}
    pq.write_table(pa.table(triplets), folder / "own" / "a.parquet", row_group_size=30)
    articles = [f"what is number {i}" if i % 3 else "The cat sat on the mat. " * i for i in range(120)]
    (folder / "own" / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*articles, None]))
    pq.write_table(pa.table({"text": articles + texts}), folder / "again.parquet", row_group_size=50)
    queries = {"_id": ["q1", "q2"], "text": ["What is number 3?", "unheard of"]}
    write_set(folder / "evaluation")
    pq.write_table(pa.table(queries), folder / "evaluation" / "queries" / "Toy-00000-of-00001.parquet")
    tiny_tokenizer(folder / "tokenizer")


def test_the_corpus_is_the_same_bytes(tmp_path):
    write_sources(tmp_path)
    constants = {"sources._UNIT_BYTES": (2000, 2000), "build._ROWS_PER_SHARD": 60, "spill.BUCKET_BITS": 3}
    constants = {f"modernbert_small.corpus.{name}": value for name, value in constants.items()}
    constants["os.fsync"] = id  # syncs take milliseconds, as in conftest.py
    flags = ["--sources", "own=own", "again=again.parquet", "--tokenizer_name_or_path", "tokenizer"]
    flags += ["--max_seq_length", "64", "--validation_rows", "20", "--eval_datasets", "evaluation", "heldout"]
    corpora = [tmp_path / f"corpus-{processes}" for processes in (1, 2, 3)]
    # Two processes that break off after the first pass, with a TypeError; three go on.
    broken = constants | {"modernbert_small.corpus.build._first_of_equals": None}
    done = run_forked(PHASE_1, tmp_path, tmp_path, *flags, "--output_dir", "corpus-3", constants=broken, processes=2)
    assert done.returncode == 1
    for processes, out in enumerate(corpora, 1):
        changes = {"constants": constants, "processes": processes}
        done = run_forked(PHASE_1, tmp_path, tmp_path, *flags, "--output_dir", out.name, **changes)
        # By any process: units go to whichever is free, so that one of the three may get none.
        said = [file.read_text() for file in tmp_path.glob("create_dataset-*.stderr")]
        assert any("read by the interrupted run" in text for text in said) == (processes == 3)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "rows skipped: 1; the first: own/b.jsonl: row 121" in done.stdout
    files = sorted(path.relative_to(corpora[0]) for path in corpora[0].rglob("*.parquet"))
    assert len(files) > 10
    records = [json.loads((out / "run.json").read_text()) for out in corpora]
    assert records[0]["dropped"]["own"]["duplicate"] > 100
    assert records[0]["dropped"]["own"]["contaminated"] > 2
    for out, record in zip(corpora[1:], records[1:], strict=True):
        assert sorted(path.relative_to(out) for path in out.rglob("*.parquet")) == files
        for file in files:
            assert (out / file).read_bytes() == (corpora[0] / file).read_bytes(), file
        for what in ("rows", "tokens", "files", "by_source", "read", "dropped", "split", "skipped"):
            assert record[what] == records[0][what], what
        assert sorted(path.name for path in out.iterdir()) == sorted([*record["files"], "heldout", "run.json"])


def test_what_one_process_finds_wrong_ends_all_in_its_words(tmp_path):
    write_sources(tmp_path)
    flags = ["--sources", "own=own", "--tokenizer_name_or_path", "nowhere/tokenizer", "--output_dir", "corpus"]
    done = run_forked(PHASE_1, tmp_path, tmp_path, *flags, processes=2)
    assert done.returncode == 2
    assert "no such folder" in done.stderr
    assert not list(tmp_path.glob("corpus*"))


WAITS_IN_C = """
import ctypes
from modernbert_small.run import processes
from modernbert_small.run.script import run_script

def main():
    mutex = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    print("waiting", flush=True)
    libc.pthread_mutex_lock(mutex)

processes._SECONDS_TO_END = 1
run_script(main)
"""


def test_a_process_that_waits_in_c_for_a_dead_one_ends_soon_after_sigterm():
    """As one does in an NCCL kernel, where no signal handler of Python runs."""
    output = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = CPU | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    run = subprocess.Popen([sys.executable, "-c", WAITS_IN_C, "--flag"], cwd=ROOT, env=environment, **output)
    assert run.stdout.readline() == "waiting\n"
    time.sleep(1)  # from that line to the wait in C, where a signal would still be handled
    run.terminate()
    _, said = run.communicate(timeout=20)
    assert run.returncode == 1
    (line,) = said.splitlines()
    assert line.startswith("error: another process of this run has ended; what was saved is kept; go on with: torchrun")


WAITS_FOR_NOBODY = """
import time
from modernbert_small.run import peers
from modernbert_small.run.processes import rank, wait_for_all
from modernbert_small.run.script import run_script

def main():
    wait_for_all()
    print("together", flush=True)
    time.sleep(600 if rank() == 0 else {seconds})

peers.seconds_to_end = 0.1
run_script(main)
"""


@pytest.mark.parametrize(("seconds", "is_lost"), [(600, True), (0, False)])
def test_a_lost_process_is_noticed_by_one_that_does_not_wait_for_it(seconds, is_lost):
    """As one does that computes; a process that has ended well is not lost."""
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    output = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", WAITS_FOR_NOBODY.format(seconds=seconds)]
    first, second = (
        subprocess.Popen(command, cwd=ROOT, env=CPU | together | {"RANK": str(rank)}, **output) for rank in range(2)
    )
    assert [run.stdout.readline() for run in (first, second)] == ["together\n"] * 2
    if not is_lost:
        assert second.wait(timeout=60) == 0
        time.sleep(1)
        assert first.poll() is None
    second.kill()
    if is_lost:
        _, said = first.communicate(timeout=60)
        assert first.returncode == 1
        assert said.startswith(
            "error: another process of this run has ended; what was saved is kept; go on with: torch"
        )
    first.kill()


def test_processes_without_a_common_folder_are_refused(tmp_path):
    write_sources(tmp_path)
    flags = ["--sources", "own=own", "--tokenizer_name_or_path", "tokenizer", "--output_dir", "corpus"]
    constants = {"modernbert_small.run.artefacts._SECONDS_TO_SEE": 0}
    done = run_forked(PHASE_1, tmp_path, tmp_path, *flags, constants=constants, processes=2)
    assert done.returncode == 2
    assert "error: --output_dir corpus: not all 2 processes see what the first one writes there; name a" in done.stderr
