"""Peak memory of all five phases as the corpus grows tenfold: it should stay flat.

    python -m benchmarks.memory --tokenizer <folder>                          # 0.2 million rows, then two
    python -m benchmarks.memory --tokenizer <folder> --millions 0.5 5 --phases create_dataset

Makes Parquet of that many short, different rows of made-up English on disk, a row group at a time, and runs the
scripts on it with a tiny teacher and student of random weights, phases 3 and 5 for some steps. What grows with the
rows shows; what models and batches take is not the point. Some three minutes a million rows on one core.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig, BertModel

from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_tokenizer
from modernbert_small.run.recipe import SECTIONS
from modernbert_small.run.script import run_script

ROOT = Path(__file__).resolve().parent.parent
ROWS_PER_GROUP = 50_000
WORDS_OF_TEXT = (4, 60)
DUPLICATES = 0.1  # share of rows that repeat another, as queries and passages of MS MARCO do
STEPS = 50
ALLOWED_GROWTH = 1.25  # buffers fill, and memory-mapped files count as resident while there is room


def prepare(folder: Path, rows: int, tokenizer: str) -> None:
    """made.parquet and teacher in a folder."""
    write_source(folder / "made.parquet", rows)
    make_teacher(folder / "teacher", tokenizer)


def made_up_words(rng: np.random.Generator, count: int) -> list[str]:
    """Words of one to four syllables."""
    onsets, vowels, codas = [*"bcdfghjklmnprstvwz", "st", "tr", "pl", ""], [*"aeiou"], [*"nrsl", ""]
    return [
        "".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(rng.integers(1, 5)))
        for _ in range(count)
    ]


def made_up_texts(rng: np.random.Generator, words: Sequence[str], rows: int) -> list[str]:
    """Texts of words as frequent as words are (Zipf), one in ten a repeat."""
    lengths = rng.integers(*WORDS_OF_TEXT, rows)
    drawn = rng.zipf(1.2, int(lengths.sum())) % len(words)
    ends = np.cumsum(lengths)
    texts = [
        " ".join(words[i] for i in drawn[end - length : end]).capitalize() + "."
        for end, length in zip(ends, lengths, strict=True)
    ]
    for row in np.flatnonzero(rng.random(rows) < DUPLICATES):
        texts[row] = texts[rng.integers(rows)]
    return texts


def write_source(path: Path, rows: int) -> None:
    """A Parquet file of one column `text`."""
    rng = np.random.default_rng(0)
    words = made_up_words(rng, 20_000)
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="zstd") as writer:
        for first in range(0, rows, ROWS_PER_GROUP):
            texts = made_up_texts(rng, words, min(ROWS_PER_GROUP, rows - first))
            writer.write_table(pa.table({"text": texts}))


def make_teacher(folder: Path, tokenizer: str) -> None:
    """A tiny embedding model of random weights."""
    torch.manual_seed(0)
    backend = load_tokenizer("--tokenizer", tokenizer)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(backend), initializer_range=0.3, **sizes)).save_pretrained(folder / "encoder")
    backend.save_pretrained(folder / "encoder")
    transformer = Transformer(str(folder / "encoder"), max_seq_length=128)
    SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu").save_pretrained(str(folder))


def commands(folder: Path, tokenizer: str) -> dict[str, list[str]]:
    """The five scripts on a folder that holds made.parquet and teacher."""
    sizes = "--hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 16"
    training = f"--max_seq_length 128 --tokens_per_batch 4096 --max_steps {STEPS} --report_to none"
    lines = {
        "create_dataset": f"mlm/create_dataset.py --sources made={folder}/made.parquet --output_dir {folder}/corpus "
        f"--tokenizer_name_or_path {tokenizer} --max_seq_length 128",
        "init_model_mlm": f"mlm/init_model_mlm.py --teacher_name_or_path {folder}/teacher/encoder {sizes} "
        f"--init embeddings --train_file {folder}/corpus --output_dir {folder}/init",
        "pre_train": f"mlm/pre_train.py --model_name_or_path {folder}/init --train_file {folder}/corpus "
        f"--output_dir {folder}/mlm {training}",
        "create_distil_dataset": f"create_distil_dataset.py --teacher_name_or_path {folder}/teacher "
        f"--train_file {folder}/corpus --output_dir {folder}/distil --teacher_output_dir {folder}/reduced "
        "--embedding_dim 16",
        "distil_train": f"distil_train.py --model_name_or_path {folder}/mlm --train_file {folder}/distil "
        f"--teacher_name_or_path {folder}/reduced --output_dir {folder}/model --eval_datasets {training}",
    }
    return {phase: line.split() for phase, line in lines.items()}


def run_phase(command: list[str]) -> tuple[float, float]:
    """Seconds, and peak resident memory in GiB."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    errors = process.stderr.read() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed with {process.returncode}: {errors[-500:]}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def main() -> None:
    """Make, run, report; an error if a phase's peak grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs=2, default=[0.2, 2], help="rows of the two corpora")
    parser.add_argument("--tokenizer", default="answerdotai/ModernBERT-base", help="folder or hub id")
    parser.add_argument("--phases", nargs="+", default=SECTIONS, choices=SECTIONS, help="the first ones, in order")
    args = parser.parse_args()
    peaks: dict[str, list[float]] = {phase: [] for phase in args.phases}
    print("| phase | rows | seconds | peak GiB |\n| --- | ---: | ---: | ---: |")
    for millions in args.millions:
        with tempfile.TemporaryDirectory(prefix="memory-") as name:
            folder, rows = Path(name), round(millions * 1e6)
            # In a process of its own: a child's peak counts what its parent held when it was started.
            maker = f"from benchmarks.memory import *; prepare(Path({name!r}), {rows}, {args.tokenizer!r})"
            subprocess.run([sys.executable, "-c", maker], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
            for phase, command in commands(folder, args.tokenizer).items():
                if phase in args.phases:
                    seconds, peak = run_phase(command)
                    peaks[phase].append(peak)
                    print(f"| {phase} | {rows:,} | {seconds:.0f} | {peak:.2f} |", flush=True)
    grown = [phase for phase, (before, after) in peaks.items() if after > before * ALLOWED_GROWTH]
    if grown:
        raise UserError(f"more than {ALLOWED_GROWTH} times the memory for more rows: {', '.join(grown)}")


if __name__ == "__main__":
    run_script(main)
