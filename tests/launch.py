"""Runs several scripts one after another in a single interpreter.

    python tests/launch.py jobs.json

The file holds a list of jobs [script, constants, flags]. The constants are changed before the script runs, for
example to make shards smaller: {"modernbert_small.label.shards.ROWS_PER_SHARD": 3}. A name without a module is a
constant of the script itself.
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from helpers import load_script

from modernbert_small.run.script import run_script


def main():
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for script, constants, flags in jobs:
        module = load_script(script)
        for name, value in constants.items():
            where, _, constant = name.rpartition(".")
            setattr(importlib.import_module(where) if where else module, constant, value)
        sys.argv[1:] = flags
        module.main()


if __name__ == "__main__":
    run_script(main)
