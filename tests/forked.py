"""Runs scripts as processes of their own, forked from one that has imported everything, since imports take seconds."""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from helpers import SCRIPTS, load_script

from modernbert_small.run.script import run_script

os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
Changes = tuple[dict[str, Any], dict[str, str]]  # of constants and of the environment
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
for script in SCRIPTS:
    load_script(script)


def _work(script: str, folder: Path, flags: tuple[str, ...], files: tuple[Path, Path], changes: Changes) -> None:
    """What the forked process does: the script, in its folder, with its output in files."""
    constants, environment = changes
    os.chdir(folder)
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    os.environ.update(environment)
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    sys.argv = [script, *flags]
    run_script(load_script(script).main)


def run_forked(
    script: str,
    folder: Path,
    files: Path,
    *flags: str,
    constants: Mapping[str, Any] = MappingProxyType({}),
    environment: Mapping[str, str] = MappingProxyType({}),
    processes: int = 1,
) -> subprocess.CompletedProcess:
    """Run a script to its end.

    Args:
        script: its path in the repository.
        folder: where it runs.
        files: a folder for its output.
        flags: of its command line.
        constants: what to change before it runs, such as {"modernbert_small.label.shards.ROWS_PER_SHARD": 3}.
        environment: what to change there.
        processes: how many run it together, as torchrun would start them.

    Returns:
        The first exit status that is not 0, and the output of the process of rank 0.
    """
    together = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    together["MASTER_PORT"] = str(free_port())
    started, streams = [], []
    for rank in range(processes):
        of_rank = together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        streams.append(tuple(files / f"{Path(script).stem}-{rank}.{stream}" for stream in ("stdout", "stderr")))
        changes = (dict(constants), dict(environment) | of_rank)
        started.append(CONTEXT.Process(target=_work, args=(script, folder, flags, streams[-1], changes)))
        started[-1].start()
    for process in started:
        process.join()
    status = next((process.exitcode for process in started if process.exitcode), 0)
    return subprocess.CompletedProcess([script, *flags], status, *(file.read_text() for file in streams[0]))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
