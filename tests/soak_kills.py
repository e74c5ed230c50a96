"""Each phase is killed with SIGKILL at random moments and run again; it must write what an undisturbed run writes.

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
import pytest
from helpers import SCRIPTS, load_script
from safetensors.torch import load_file
from test_bad_input import whole as inputs  # noqa: F401

from modernbert_small.run.script import run_script

KILLS = 40
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


def attempt(folder, job, seconds=None):
    """Run a phase to its end, or kill it after some seconds; returns whether it was killed."""
    script, constants, flags = job
    process = CONTEXT.Process(target=run_job, args=(folder, script, constants, [*flags, "--output_dir", "cut/out"]))
    process.start()
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


def assert_same(whole, cut):
    """Both folders hold the same files and counts. Data are equal to the byte, weights to within 1e-4."""
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
        if name.endswith(".parquet"):
            assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
        if name.endswith(".safetensors"):
            weights, again = (load_file(out / name) for out in (whole, cut))
            for key, weight in weights.items():
                np.testing.assert_allclose(weight.float(), again[key].float(), atol=1e-4, err_msg=f"{name} {key}")
    records = [json.loads((out / "out" / "run.json").read_text()) for out in (whole, cut)]
    for name in ("settings", "inputs", "files", "rows", "counts", "dropped", "steps", "skipped_steps", "tokens"):
        assert records[0].get(name) == records[1].get(name), name


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
