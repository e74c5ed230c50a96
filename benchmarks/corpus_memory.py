"""Peak memory of phase 1 as its source grows: it should stay flat.

    python benchmarks/corpus_memory.py --tokenizer <folder>                        # half a million rows, then five
    python benchmarks/corpus_memory.py --tokenizer <folder> --millions 0.5 2

Makes Parquet of that many short, different rows of made-up English on disk, a row group at a time, and runs
mlm/create_dataset.py on it. About a minute a million rows on one core, and 0.3 GB of disk.
"""

import argparse
import json
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

ROOT = Path(__file__).resolve().parent.parent
ROWS_PER_GROUP = 50_000
WORDS_OF_TEXT = (4, 60)
DUPLICATES = 0.1  # share of rows that repeat another, as queries and passages of MS MARCO do
LIMIT_GIB = 1.5


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


def run_phase(source: Path, output: Path, tokenizer: str) -> tuple[float, float, int]:
    """Phase 1 on a source.

    Returns:
        Seconds; peak resident memory in GiB; texts kept.
    """
    command = [sys.executable, str(ROOT / "mlm" / "create_dataset.py"), "--sources", f"made={source}"]
    command += ["--output_dir", str(output), "--tokenizer_name_or_path", tokenizer]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} failed with {process.returncode}")
    kept = json.loads((output / "run.json").read_text(encoding="utf-8"))["rows"]
    return time.monotonic() - began, usage.ru_maxrss / 2**20, sum(kept.values())


def main() -> None:
    """Make, run, report; status 1 if the limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[0.5, 5], help="rows of each source")
    parser.add_argument("--tokenizer", default="answerdotai/ModernBERT-base", help="folder or hub id")
    args = parser.parse_args()
    peaks = []
    print("| rows | kept | seconds | peak GiB |\n| ---: | ---: | ---: | ---: |")
    for millions in args.millions:
        with tempfile.TemporaryDirectory(prefix="corpus-memory-") as name:
            source, rows = Path(name) / "made.parquet", round(millions * 1e6)
            # In a process of its own: a child's peak counts what its parent held when it was started.
            maker = f"from corpus_memory import *; write_source(Path({str(source)!r}), {rows})"
            subprocess.run([sys.executable, "-c", maker], check=True, cwd=Path(__file__).parent)
            seconds, peak, kept = run_phase(source, Path(name) / "corpus", args.tokenizer)
        peaks.append(peak)
        print(f"| {rows:,} | {kept:,} | {seconds:.0f} | {peak:.2f} |", flush=True)
    sys.exit(0 if max(peaks) < LIMIT_GIB else f"error: more than {LIMIT_GIB} GiB")


if __name__ == "__main__":
    main()
