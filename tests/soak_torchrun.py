"""A process that is killed under the real torchrun, which takes too long for the suite."""

import os
import signal
import subprocess
import sys
import time

import test_processes
from helpers import ROOT
from test_processes import NO_GPU, PHASE_3, jobs

from modernbert_small.packed.checkpoints import last_whole_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

folder = test_processes.folder  # the fixture


def test_a_lost_process_ends_the_run_in_a_state_to_go_on_from(folder):
    _, flags = next((constants, flags) for script, constants, flags in jobs("lost", 128) if script == PHASE_3)
    flags = [*flags, "--num_train_epochs", "500", "--logging_steps", "1000", "--eval_steps", "10000"]
    output = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, **NO_GPU}
    run = subprocess.Popen([*TORCHRUN, ROOT / PHASE_3, *flags], cwd=folder, env=environment, **output)
    partial = folder / "lost" / "mlm.partial"
    while not list(partial.glob("checkpoint-*")) and run.poll() is None:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: another process of this run has ended")
    assert "; what was saved is kept; go on with: torchrun --nproc" in line
    assert last_whole_checkpoint(partial) is not None
