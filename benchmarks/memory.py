"""Peak memory of all five phases on a corpus and on one ten times as large; it should be about the same.

    python -m benchmarks.memory --tokenizer <folder>                          # 0.2 million rows, then 2 million
    python -m benchmarks.memory --tokenizer <folder> --millions 0.5 5 --phases create_dataset

The corpus consists of short, made-up texts that are written to Parquet a row group at a time. The scripts run on it
with a tiny teacher and student of random weights; phases 3 and 5 train for a few steps. So the measurement shows the
memory that grows with the rows, not that of models and batches. A million rows take about three minutes on one core.
"""

import argparse
import logging
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
from modernbert_small.run.script import run_script
from modernbert_small.run.tables import markdown_table
from modernbert_small.settings.sections import SECTIONS

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
ROWS_PER_GROUP = 50_000
WORDS_OF_TEXT = (4, 60)  # fewest, and one more than the most
DUPLICATES = 0.1  # share of rows that repeat another row, as in MS MARCO
STEPS = 50
ALLOWED_GROWTH = 1.25  # buffers fill up, and memory-mapped files count as resident while there is free memory


def prepare(folder: Path, rows: int, tokenizer: str) -> None:
    """Write made.parquet and teacher into a folder."""
    write_source(folder / "made.parquet", rows)
    make_teacher(folder / "teacher", tokenizer)


def made_up_words(rng: np.random.Generator, count: int) -> list[str]:
    """Random words of one to four syllables; some are equal."""
    onsets, vowels, codas = [*"bcdfghjklmnprstvwz", "st", "tr", "pl", ""], [*"aeiou"], [*"nrsl", ""]
    return [
        "".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(rng.integers(1, 5)))
        for _ in range(count)
    ]


def made_up_texts(rng: np.random.Generator, words: Sequence[str], rows: int) -> list[str]:
    """Random texts, some of which repeat another.

    Args:
        rng: source of randomness.
        words: the most frequent first; frequencies follow Zipf's law, as in real text.
        rows: number of texts.
    """
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
    """Write a Parquet file with one column, `text`."""
    rng = np.random.default_rng(0)
    words = made_up_words(rng, 20_000)
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="zstd") as writer:
        for first in range(0, rows, ROWS_PER_GROUP):
            texts = made_up_texts(rng, words, min(ROWS_PER_GROUP, rows - first))
            writer.write_table(pa.table({"text": texts}))


def make_teacher(folder: Path, tokenizer: str) -> None:
    """Write a tiny embedding model with random weights."""
    torch.manual_seed(0)
    backend = load_tokenizer("--tokenizer", tokenizer)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(backend), initializer_range=0.3, **sizes)).save_pretrained(folder / "encoder")
    backend.save_pretrained(folder / "encoder")
    transformer = Transformer(str(folder / "encoder"), max_seq_length=128)
    SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu").save_pretrained(str(folder))


def commands(folder: Path, tokenizer: str) -> dict[str, list[str]]:
    """The commands of the five scripts, by phase, for a folder that holds made.parquet and teacher."""
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
    """Run a script and measure it.

    Returns:
        Seconds, and peak resident memory in GiB.

    Raises:
        UserError: the script failed.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    errors = process.stderr.read() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed with exit status {process.returncode}: {errors[-500:]}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def measure(rows: int, tokenizer: str, phases: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Seconds and peak GiB of phases on a corpus of made-up rows; each is logged when it is known."""
    measured = {}
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        # A child's peak counts what its parent held when the child was started, so the corpus is made in a process of
        # its own.
        maker = f"from benchmarks.memory import *; prepare(Path({name!r}), {rows}, {tokenizer!r})"
        subprocess.run([sys.executable, "-c", maker], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        for phase, command in commands(Path(name), tokenizer).items():
            if phase in phases:
                seconds, peak = measured[phase] = run_phase(command)
                logger.info("%s, %s rows: %.0f s, %.2f GiB", phase, f"{rows:,}", seconds, peak)
    return measured


def main() -> None:
    """Measure the phases on two corpora; the command fails if the peak memory of one grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--millions", type=float, nargs=2, default=[0.2, 2], help="rows of the two corpora in millions; default: 0.2 2"
    )
    parser.add_argument("--tokenizer", default="answerdotai/ModernBERT-base", help="folder or hub id")
    parser.add_argument(
        "--phases",
        nargs="+",
        default=list(SECTIONS),
        choices=SECTIONS,
        help="phases to run, from the first on without gaps",
    )
    args = parser.parse_args()
    sizes = [round(millions * 1e6) for millions in args.millions]
    small, large = (measure(rows, args.tokenizer, args.phases) for rows in sizes)
    table = [["phase", "rows", "seconds", "peak GiB"]]
    for rows, measured in zip(sizes, (small, large), strict=True):
        for phase, (seconds, peak) in measured.items():
            table.append([phase, f"{rows:,}", f"{seconds:.0f}", f"{peak:.2f}"])
    print(markdown_table(table))
    grown = [phase for phase in small if large[phase][1] > small[phase][1] * ALLOWED_GROWTH]
    if grown:
        raise UserError(
            f"{', '.join(grown)}: more than {ALLOWED_GROWTH} times the memory for more rows; expected memory that does "
            "not depend on the number of rows"
        )


if __name__ == "__main__":
    run_script(main)
