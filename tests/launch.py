"""Scripts one after the other in one interpreter: `launch.py JOBS.json`, a list of [script, constants, flags].

Constants are of the script itself or, with a module's name before them, of a module: what is a matter of scale.
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
