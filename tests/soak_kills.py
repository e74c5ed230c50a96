"""Each phase is killed at random moments, or its files are damaged, and it is run again.

It must write what an undisturbed run writes. Files are damaged one at a time, those of an unfinished run and those of a
finished one: cut off, filled with zeros, removed. If the phase refuses to go on, its advice is followed.

This is not part of the test suite; `make soak` runs it. The processes are forked from one that has imported everything
already, so that the kills fall into the phase's own work and not into its imports.
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import SCRIPTS, load_script
from safetensors.torch import load_file
from test_bad_input import whole as inputs  # noqa: F401
from test_durable import WAYS, spoil

from modernbert_small.run.script import run_script

KILLS = 40
# Files that a phase doesn't look at again: people edit the card, and the others are not read by any phase.
NOT_CHECKED = ("README.md", "report.html", "eval", "runs", "checkpoint-")
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
PHASES = [load_script(script) for script in SCRIPTS]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
TRAINING = [
    *("--max_seq_length", "64", "--tokens_per_batch", "128", "--num_train_epochs", "4", "--save_steps", "3"),
    *("--eval_steps", "3", "--logging_steps", "3", "--report_to", "none", "--learning_rate", "3e-3"),
]
JOBS = {
    "corpus": (
        SCRIPTS[0],
        {"modernbert_small.corpus.build._ROWS_PER_SHARD": 9, "modernbert_small.corpus.build._SPILL_BYTES": 2000},
        ["--sources", "own=own.parquet", "again=corpus", "--tokenizer_name_or_path", "init", "--validation_rows", "5"],
    ),
    "init": (
        SCRIPTS[1],
        {},
        [
            *("--teacher_name_or_path", "init", "--hidden_size", "16", "--num_attention_heads", "2"),
            *("--num_hidden_layers", "2", "--intermediate_size", "24", "--max_position_embeddings", "64"),
            *("--train_file", "corpus"),
        ],
    ),
    "mlm": (SCRIPTS[2], {}, ["--model_name_or_path", "init", "--train_file", "corpus", *TRAINING]),
    "labels": (
        SCRIPTS[3],
        {"modernbert_small.label.shards.ROWS_PER_SHARD": 3},
        [
            *("--teacher_name_or_path", "small/teacher", "--train_file", "corpus", "--embedding_dim", "16"),
            *("--pca_sample_size", "30", "--teacher_output_dir", "cut/teacher"),
        ],
    ),
    "model": (
        SCRIPTS[4],
        {},
        [
            *("--model_name_or_path", "init", "--teacher_name_or_path", "wide16/teacher", "--train_file", "distil"),
            *("--eval_datasets", "evaluation", *TRAINING),
        ],
    ),
}


def run_job(folder, script, constants, flags):
    """Run a script's `main` in the forked process, with constants changed so that shards are small."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    module = load_script(script)
    for name, value in constants.items():
        where, _, constant = name.rpartition(".")
        setattr(sys.modules[where] if where else module, constant, value)
    sys.argv = [script, *flags]
    run_script(module.main)


def started(folder, job, *more):
    """A process that runs a phase."""
    script, constants, flags = job
    flags = [*flags, "--output_dir", "cut/out", *more]
    process = CONTEXT.Process(target=run_job, args=(folder, script, constants, flags))
    process.start()
    return process


def attempt(folder, job, seconds=None):
    """Run a phase to its end, or kill it after some seconds; returns whether it was killed."""
    process = started(folder, job)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return True
    assert process.exitcode == 0, (folder / "log.txt").read_text()[-3000:]
    return False


def forget(folder):
    """Remove what the phase wrote, and the caches of tokens beside its inputs."""
    for path in (folder / "cut", *folder.glob("*.tokens")):
        shutil.rmtree(path, ignore_errors=True)


def assert_same(whole, cut, to_the_byte=True):
    """Both folders hold the same files and counts. Data are equal to the byte, weights to within 1e-4.

    Labels that were made without the sample's vectors are equal to rounding: they were embedded in other batches.
    """
    names, others = (
        {
            str(path.relative_to(out))
            for path in out.rglob("*")
            if path.is_file() and not {"eval"} & set(path.parts) and "checkpoint-" not in str(path)
        }
        for out in (whole, cut)
    )
    assert names == others
    for name in names:
        if name.endswith(".parquet") and to_the_byte:
            assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
        elif name.endswith(".parquet"):
            assert_equal_to_rounding(*(pq.read_table(out / name) for out in (whole, cut)))
        if name.endswith(".safetensors"):
            weights, again = (load_file(out / name) for out in (whole, cut))
            for key, weight in weights.items():
                np.testing.assert_allclose(weight.float(), again[key].float(), atol=1e-4, err_msg=f"{name} {key}")
    records = [json.loads((out / "out" / "run.json").read_text()) for out in (whole, cut)]
    for record in records:
        record["settings"].pop("overwrite", None)  # what a refusal may have asked for
    for name in (
        "settings",
        "inputs",
        *(["files"] if to_the_byte else []),
        "rows",
        "counts",
        "dropped",
        "steps",
        "skipped_steps",
        "tokens",
    ):
        assert records[0].get(name) == records[1].get(name), name


def assert_equal_to_rounding(*tables):
    """Both tables hold the same texts, with labels that point the same way."""
    first, second = (np.array(table["label"].to_pylist(), np.float32) for table in tables)
    assert (first * second).sum(1).min() > 0.999
    assert tables[0].drop_columns("label").equals(tables[1].drop_columns("label"))


@pytest.mark.parametrize("phase", JOBS)
def test_killed_and_run_again(inputs, phase, capsys):  # noqa: F811
    folder, job, chance = inputs, JOBS[phase], random.Random(phase)
    forget(folder)
    attempt(folder, job)
    forget(folder)
    began = time.monotonic()
    attempt(folder, job)
    seconds = time.monotonic() - began
    whole = folder / f"whole-{phase}"
    (folder / "cut").rename(whole)
    kills = rounds = 0
    while kills < KILLS:
        forget(folder)
        for _ in range(chance.randint(1, 4)):
            if not attempt(folder, job, chance.uniform(0, seconds)):
                break
            kills += 1
        attempt(folder, job)
        assert_same(whole, folder / "cut")
        rounds += 1
    with capsys.disabled():
        print(f"\n{phase}: {kills} kills in {rounds} runs of {seconds:.1f} s, nothing lost")


def run_as_told(folder, job):
    """Run a phase, and if it refuses, do what its error says and run it again; returns what it logged."""
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    said = ""
    for _ in range(3):
        process = started(folder, job, *(["--overwrite"] if "--overwrite" in said else []))
        process.join()
        if process.exitcode == 0:
            return log.read_text()
        assert process.exitcode == 2, log.read_text()[-3000:]
        said = [line for line in log.read_text().splitlines() if line.startswith("error: ")][-1]
        if "--overwrite" not in said:
            (named,) = [path for path in sorted((folder / "cut").iterdir()) if f"{path.relative_to(folder)} " in said]
            assert "move" in said, said
            shutil.rmtree(named)
    raise AssertionError(log.read_text()[-3000:])


def interrupt(folder, job):
    """Kill a phase when it has saved something twice."""
    process = started(folder, job)
    saved = folder / "cut" / "out.partial"
    while len([*saved.glob("checkpoint-*[0-9]"), *saved.glob("train-*.parquet")]) < 2:
        assert process.is_alive(), "the phase ended before it was killed"
        time.sleep(0.001)
    process.kill()
    process.join()


def state_of(folder):
    """The folders that a phase writes: its output and the caches beside its inputs."""
    return [path for path in (folder / "cut", *sorted(folder.glob("*.tokens"))) if path.exists()]


def restore(folder, state):
    """Put back what was kept of a phase's folders."""
    forget(folder)
    for path in state.iterdir():
        shutil.copytree(path, folder / path.name)


@pytest.mark.parametrize("moment", ["unfinished", "finished"])
@pytest.mark.parametrize("phase", ["mlm", "labels", "model"])
def test_every_file_damaged_in_turn(inputs, phase, moment, capsys):  # noqa: F811
    folder, job = inputs, JOBS[phase]
    forget(folder)
    attempt(folder, job)
    whole, state = (folder / f"{name}-{phase}-{moment}" for name in ("whole", "state"))
    shutil.copytree(folder / "cut", whole)
    if moment == "unfinished":
        forget(folder)
        interrupt(folder, job)
    for path in state_of(folder):
        shutil.copytree(path, state / path.name)
    files = [path.relative_to(state) for path in sorted(state.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    if moment == "finished":
        files = [path for path in files if not any(part.startswith(NOT_CHECKED) for part in path.parts)]
    silent = []
    for path in files:
        for how in WAYS:
            restore(folder, state)
            spoil(folder / path, how)
            said = run_as_told(folder, job)
            lost_sample = phase == "labels" and (moment == "finished" or path.name in ("sample.npz", "run.json"))
            assert_same(whole, folder / "cut", to_the_byte=not lost_sample)
            if not any(word in said for word in (path.name, "random numbers", "made with", "no run made")):
                silent.append(f"{path} ({how})")
    with capsys.disabled():
        print(f"\n{phase}, {moment}: {len(files)} files damaged in {len(WAYS)} ways, nothing lost")
        print("  without a word:", ", ".join(silent) or "none")
