"""What the attacks of `make soak` share: a tiny job for each phase, and how its result is compared.

A phase that was attacked and run again must write what an undisturbed run writes. If it refuses to go on, its advice is
followed. The processes are forked from one that has imported everything already, so that an attack falls into the
phase's own work and not into its imports.
"""

import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from helpers import SCRIPTS, load_script
from safetensors.torch import load_file
from test_bad_input import whole as inputs  # noqa: F401, the fixture that all attacks use

from modernbert_small.run.script import run_script

os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
PHASES = [load_script(script) for script in SCRIPTS]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
TRAINING = [
    *("--max_seq_length", "64", "--tokens_per_batch", "128", "--num_train_epochs", "2", "--save_steps", "3"),
    *("--eval_steps", "3", "--logging_steps", "3", "--report_to", "none", "--learning_rate", "3e-3"),
]
JOBS = {
    "corpus": (
        SCRIPTS[0],
        {"modernbert_small.corpus.build._ROWS_PER_SHARD": 9, "modernbert_small.corpus.spill._SPILL_BYTES": 2000},
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


def run_job(folder, log, prepare, script, constants, flags):
    """Run a script's `main` in the forked process, with constants changed so that shards are small."""
    os.chdir(folder)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    module = load_script(script)
    for name, value in constants.items():
        where, _, constant = name.rpartition(".")
        setattr(sys.modules[where] if where else module, constant, value)
    if prepare is not None:
        prepare()
    sys.argv = [script, *flags]
    run_script(module.main)


def started(folder, job, *more, log="log.txt", prepare: Callable[[], Any] | None = None):
    """A process that runs a phase, with more flags, its log in a file, and after a preparation of the attack's."""
    script, constants, flags = job
    flags = [*flags, "--output_dir", "cut/out", *more]
    process = CONTEXT.Process(target=run_job, args=(folder, log, prepare, script, constants, flags))
    process.start()
    return process


def attempt(folder, job, seconds=None, prepare=None):
    """Run a phase to its end, or kill it after some seconds; returns whether it was killed."""
    process = started(folder, job, prepare=prepare)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return True
    assert process.exitcode == 0, f"status {process.exitcode}: {(folder / 'log.txt').read_text()[-3000:]}"
    return False


def undisturbed(folder, job, whole):
    """Run a phase twice, the second time with warm caches; keep its result as `whole`; returns the seconds it took."""
    for _ in range(2):
        forget(folder)
        began = time.monotonic()
        attempt(folder, job)
    seconds = time.monotonic() - began
    shutil.copytree(folder / "cut", whole)
    return seconds


class Tally:
    """What an attack tried, and what was lost."""

    def __init__(self) -> None:
        self.tried = 0
        self.lost: list[str] = []

    @contextmanager
    def attack(self, what: str, times: int = 1) -> Iterator[None]:
        """Count some attempts, which are lost if the result is not as it has to be."""
        self.tried += times
        try:
            yield
        except AssertionError as error:
            self.lost.append(f"{what}: {str(error)[:6000]}")

    def report(self, attack: str, capsys: Any, notes: str = "") -> None:
        """Print the attack's line, and fail if anything was lost."""
        with capsys.disabled():
            survived = self.tried - len(self.lost)
            print(f"\n{attack}: tried {self.tried}, survived {survived}, lost {len(self.lost)}{notes}", flush=True)
        assert not self.lost, "\n\n".join(self.lost)


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
    assert names == others, f"not in both: {sorted(names ^ others)}"
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
        first, second = (record.get(name) for record in records)
        assert first == second, f"{name}: {first}, {second}"


def assert_equal_to_rounding(*tables):
    """Both tables hold the same texts, with labels that point the same way."""
    first, second = (np.array(table["label"].to_pylist(), np.float32) for table in tables)
    assert (first * second).sum(1).min() > 0.999
    assert tables[0].drop_columns("label").equals(tables[1].drop_columns("label"))


def remove(path):
    """Remove a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


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
        assert process.exitcode == 2, f"status {process.exitcode}: {log.read_text()[-3000:]}"
        said = [line for line in log.read_text().splitlines() if line.startswith("error: ")][-1]
        if "--overwrite" not in said:
            names = [path.name for path in (folder / "cut").iterdir() if f"cut/{path.name} " in f"{said} "]
            assert len(names) == 1, said
            advised = rf"(move|remove) cut/{re.escape(names[0])}\b|no run made; move them away"
            assert re.search(advised, said), said
            remove(folder / "cut" / names[0])
    raise AssertionError(log.read_text()[-3000:])
