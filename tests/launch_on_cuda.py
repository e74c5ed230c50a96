"""Runs several scripts one after another in a single interpreter on an emulated GPU (see emulated_cuda).

    python tests/launch_on_cuda.py emulated_cuda.so jobs.json report.json

The first file is emulated_cuda.cpp, compiled. The second holds a list of jobs [script, flags]. The report says of each
job: its `error`, if it ended with one; the number of `operations` on the GPU, copies aside; how often the attention
kernel was called, by dtype (`attended`); and for each training step how often the program waited for the GPU (`waits`),
and where it did in the last of them (`where`).
"""

import ctypes
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch, which looks once for CUDA

import emulated_cuda

if __name__ == "__main__":
    emulated_cuda.activate()

from helpers import load_script

from modernbert_small.packed.progress import Progress
from modernbert_small.run.errors import UserError
from modernbert_small.run.script import run_script


def count_waits_of_steps(steps):
    """Add to `steps`, at the end of each training step, where the program has waited since the step before."""
    end_step = Progress.on_step_end

    def on_step_end(self, *args, **kwargs):
        steps.append(dict(emulated_cuda.waits))
        emulated_cuda.waits.clear()
        end_step(self, *args, **kwargs)

    Progress.on_step_end = on_step_end


def main():
    steps, report = [], []
    count_waits_of_steps(steps)
    for script, flags in json.loads(Path(sys.argv[2]).read_text()):
        steps.clear()
        emulated_cuda.attended.clear()
        emulated_cuda.operations[0], error = 0, None
        arguments = sys.argv
        sys.argv = [script, *flags]
        module = load_script(script)
        module.write_report = print  # drawing it takes seconds and no GPU
        try:
            module.main()
        except UserError as problem:
            error = str(problem)
        finally:
            sys.argv = arguments
        report.append(
            {
                "error": error,
                "operations": emulated_cuda.operations[0],
                "attended": dict(emulated_cuda.attended),
                "waits": [sum(step.values()) for step in steps],
                "where": steps[-1] if steps else {},
            }
        )
    Path(sys.argv[3]).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_script(main)
