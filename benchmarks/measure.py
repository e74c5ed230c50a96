"""One measurement of speed.py, in a process of its own so that its peak memory is its own.

speed.py runs this. To run it alone, from the root of the repository, with a folder that prepare.py wrote:

    python -m benchmarks.measure usual mlm --folder <prepared> --scratch <new> --first 16 --rows 64 \
        --warm_up_rows 16 --max_seq_length 1024 --result r.json
"""

import argparse
import dataclasses
import importlib
import json
import logging
import resource
import sys
from pathlib import Path

from benchmarks.workload import Workload

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def peak_bytes(cuda: bool) -> int:
    """Peak memory so far, in bytes.

    Args:
        cuda: whether to return the GPU's memory, if torch used any.

    Returns:
        The peak of the GPU's allocated memory, or else of the resident memory of this process or its largest child.
    """
    if cuda and "torch" in sys.modules:
        import torch  # no cost, it was imported before

        if torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated()
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(one).ru_maxrss for one in who) * 1024


def main() -> None:
    """Run one measurement and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("usual", "strongest", "ours"), help="which way of doing it")
    parser.add_argument("what", help="what to measure, see speed.py: mlm, labels, distillation, corpus, ...")
    parser.add_argument("--folder", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--scratch", type=Path, required=True, help="empty folder to write into")
    parser.add_argument("--first", type=int, required=True, help="first row of the corpus to run on")
    parser.add_argument("--rows", type=int, required=True, help="number of rows to run on")
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--warm_up_rows", type=int, required=True, help="the corpus's first rows, which are not timed")
    parser.add_argument("--max_seq_length", type=int, required=True, help="tokens at which texts are cut")
    parser.add_argument("--torch_compile", type=json.loads, help="true or false; default: as the phases do")
    parser.add_argument("--profile", action="store_true", help="count the device's work in ours")
    parser.add_argument("--cuda", action="store_true", help="use a GPU's batch sizes, and measure its memory")
    args = parser.parse_args()
    names = (field.name for field in dataclasses.fields(Workload))
    workload = Workload(**{name: getattr(args, name) for name in names})
    if args.what.startswith("corpus"):
        module, function = "corpus", args.side + args.what.removeprefix("corpus")
    else:
        module, function = args.side, args.what
    measurement = getattr(importlib.import_module(f"benchmarks.{module}"), function)(workload)
    measurement = dataclasses.replace(measurement, peak_bytes=peak_bytes(args.cuda))
    args.result.write_text(measurement.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
