"""Runs scripts as processes of their own, forked from one that has imported everything, since imports take seconds."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from helpers import SCRIPTS, load_script

from modernbert_small.run.script import run_script

os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
for script in SCRIPTS:
    load_script(script)


def _work(script: str, folder: Path, flags: tuple[str, ...], files: tuple[Path, Path]) -> None:
    """What the forked process does: the script, in its folder, with its output in files."""
    os.chdir(folder)
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), stream)
    sys.argv = [script, *flags]
    run_script(load_script(script).main)


def run_forked(script: str, folder: Path, files: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run a script to its end.

    Args:
        script: its path in the repository.
        folder: where it runs.
        files: a folder for its output.
        flags: of its command line.
    """
    streams = tuple(files / f"{Path(script).stem}.{stream}" for stream in ("stdout", "stderr"))
    process = CONTEXT.Process(target=_work, args=(script, folder, flags, streams))
    process.start()
    process.join()
    return subprocess.CompletedProcess([script, *flags], process.exitcode, *(file.read_text() for file in streams))
