"""What to run where a GPU is at hand: is it right, how near its limit is it, how does it compare with other ways.

    python -m benchmarks.gpu correctness
    python -m benchmarks.gpu speed --max_seq_length 128
    python -m benchmarks.gpu comparison --corpus data/corpus --tokenizer checkpoints/init --rounds 3

Each command consists of parts. It writes NAME.json after each part, and NAME.md at the end, into --output_dir. A part
that is in NAME.json is not run again, so a command that was cut off goes on where it was. On one GPU each is meant to
take less than eight minutes with one round, which nobody has measured yet. No network is needed if --tokenizer is a
folder. A part that cannot run here is `not run` in the table, which says why: on a CPU what needs CUDA, and without the
package datasets what needs sentence-transformers' trainer.

correctness: attention kernels and a whole batch against float32, the test suite, phases 1 to 5 with kills, torchrun.
speed: phases 3 to 5 with and without torch.compile. Utilisation is the counted FLOP/s over the rate of a large matrix
    product on the same device. Idle is the share of the time in which no kernel runs.
comparison: the three ways of speed.py.
"""

import argparse
import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import correctness, speed
from benchmarks.training import bf16, matrix_product_rate
from modernbert_small.run.errors import UserError
from modernbert_small.run.records import write_json
from modernbert_small.run.script import run_script
from modernbert_small.run.tables import markdown_table

logger = logging.getLogger(__name__)

PHASES = ("mlm", "labels", "distillation")
SAME = ("gpu", "cpu", "torch", "transformers", "sentence-transformers", "commit")  # of all parts of a table
NOT_RUN = "not run"


@dataclass(frozen=True)
class Part:
    """A part of a command.

    Attributes:
        name: its key in the JSON.
        run: measures, and returns values by name.
        needs: `cuda`, or names of packages, without which it cannot run.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    needs: tuple[str, ...] = ()

    @property
    def lacks(self) -> str | None:
        """What is missing here, or None."""
        for need in self.needs:
            if not (torch.cuda.is_available() if need == "cuda" else importlib.util.find_spec(need)):
                return "CUDA" if need == "cuda" else f"the package {need}"
        return None


def run_parts(parts: Sequence[Part], file: Path, where: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run the parts that are not in a JSON file yet; it is written after each.

    Args:
        parts: in their order.
        file: `machine`, and `parts` by name.
        where: the machine, which must be the same for all parts.

    Returns:
        What each part measured; one that cannot run here has the key NOT_RUN, and one that failed `failed`. The latter
        is not in the file, and is run again the next time.

    Raises:
        UserError: the file is of another machine, of other versions or of another commit.
    """
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"machine": where, "parts": {}}
    differing = [f"{key} {record['machine'].get(key)}" for key in SAME if record["machine"].get(key) != where.get(key)]
    if differing:
        raise UserError(f"{file}: measured with {', '.join(differing)}; remove it, or pass another --output_dir")
    done = record["parts"]
    results = {}
    for part in parts:
        if part.name not in done and part.lacks:
            results[part.name] = {NOT_RUN: f"it needs {part.lacks}"}
            continue
        if part.name not in done:
            logger.info("%s ...", part.name)
            try:
                done[part.name] = part.run()
            except UserError as error:
                logger.error("%s: %s", part.name, error)
                results[part.name] = {"failed": str(error)}
                continue
            write_json(file, record)
        results[part.name] = done[part.name]
    return results


def correctness_parts(args: argparse.Namespace, work: Path) -> list[Part]:
    """Checks of the device."""
    phases = correctness.Phases(work / "phases", speed.local_path(args.tokenizer))
    return [
        Part("attention, error against float32", correctness.attention),
        Part("a whole batch", partial(correctness.whole_batch, 65_536 if args.cuda else 2048)),
        Part("phases 1 to 4, 3 and 4 killed and resumed", phases.until_labels),
        Part("phase 5, killed and resumed", phases.distillation, ("datasets",)),
        Part("torchrun --nproc_per_node 1", phases.torchrun),
        Part("test suite", partial(correctness.suite, args.tests), ("pytest", "hypothesis")),
    ]


def speed_parts(args: argparse.Namespace, work: Path) -> list[Part]:
    """Phases 3 to 5 as they are run, compiled and not."""
    parts = [Part("matrix product", lambda: {"flops_per_second": matrix_product_rate()})]
    for what in args.sizes:
        for compiled in (False, True):
            needs = ("cuda",) * compiled + (("datasets",) if what == "distillation" else ())
            flags = ("--profile", "--torch_compile", json.dumps(compiled))
            run = partial(measure, args, work, 0, what, "ours", *flags)
            parts.append(Part(f"{what}{', compiled' if compiled else ''}", run, needs))
    return parts


def comparison_parts(args: argparse.Namespace, work: Path) -> list[Part]:
    """The usual way, the strongest of stock libraries, and ours."""
    parts = []
    for number, what, side in speed.order(args):
        needs = ("datasets",) if side != "ours" or what == "distillation" else ()
        parts.append(Part(f"{what} {side} {number}", partial(measure, args, work, number, what, side), needs))
    return parts


def measure(args: argparse.Namespace, work: Path, number: int, what: str, side: str, *more: str) -> dict[str, Any]:
    """A measurement of speed.py, on what is prepared when it is first needed."""
    return speed.measure(args, speed.prepare(args, work), work, number, what, side, *more)


def correctness_table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each value."""
    rows = [["", "", "found"]]
    for name, values in results.items():
        for what, value in values.items():
            rows.append([name, what, f"{value:.6g}" if isinstance(value, float) else value])
    return markdown_table(rows, (0, 1))


def speed_table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each phase, compiled and not."""
    rate = results["matrix product"]["flops_per_second"]
    rows = [["", "tokens/s", "utilisation", "idle", "peak GB", "tokens measured"]]
    for name, m in results.items():
        if "tokens" in m:
            tokens_per_second = m["tokens"] / m["seconds"]
            busy = m["busy_seconds_per_token"]
            cells = [f"{tokens_per_second:,.0f}", f"{m['flops_per_token'] * tokens_per_second / rate:.1%}"]
            cells += [NOT_RUN if busy is None else f"{1 - busy * tokens_per_second:.0%}"]
            rows.append([name, *cells, f"{m['peak_bytes'] / 1e9:.2f}", f"{m['tokens']:,}"])
        elif name != "matrix product":
            ((state, why),) = m.items()
            rows.append([name, f"{state}: {why}", "", "", "", ""])
    product = f"matrix product: {rate / 1e12:.2f} TFLOP/s in {'bf16' if bf16() else 'float32'}"
    return f"{markdown_table(rows)}\n\n{product}"


def comparison_table(results: dict[str, dict[str, Any]]) -> str:
    """The table of speed.py, and below it what was not run."""
    measured = [m for m in results.values() if "tokens" in m]
    lines = [speed.summarise(what, measured) for what in dict.fromkeys(m["what"] for m in measured)]
    missing = [f"{name} {state}: {why}" for name, m in results.items() if "tokens" not in m for state, why in m.items()]
    return "\n\n".join([speed.table(lines), *missing])


COMMANDS = {
    "correctness": (correctness_parts, correctness_table),
    "speed": (speed_parts, speed_table),
    "comparison": (comparison_parts, comparison_table),
}


def main() -> None:
    """Run what is not there yet, and write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=list(COMMANDS))
    speed.add_arguments(parser)
    parser.add_argument("--tests", nargs="+", default=["tests"], help="what the test suite is; default: tests")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results/gpu"), help="folder to write")
    parser.set_defaults(only=list(PHASES), rounds=1)
    args = speed.complete(parser.parse_args())
    name = args.command if args.command == "correctness" else f"{args.command}-{args.max_seq_length}"
    work, file = args.output_dir.resolve() / "work", args.output_dir / f"{name}.json"
    work.mkdir(parents=True, exist_ok=True)
    parts_of, table_of = COMMANDS[args.command]
    where = speed.machine()
    results = run_parts(parts_of(args, work), file, where)
    text = f"{table_of(results)}\n\n{speed.conditions(where)}\n"
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {args.output_dir}")
    if failed := [part for part, values in results.items() if "failed" in values]:
        raise UserError(f"{', '.join(failed)}: failed; mend what the table says, and run the command again")


if __name__ == "__main__":
    run_script(main)
