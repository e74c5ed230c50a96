"""Several processes under torchrun: their numbers, and waiting for each other.

torchrun tells each process its RANK, LOCAL_RANK and WORLD_SIZE. Without torchrun there is one process, which waits for
nobody.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# The others wait while one process tokenises a corpus or fits a projection. A dead process is noticed at once.
_PATIENCE = timedelta(days=7)


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        dist.barrier(_group())


def local_world_size() -> int:
    """How many processes are on this machine, each with a GPU of its own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process run the body of the `with` alone; then the others run it and find its results cached."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def any_process(flag: bool) -> bool:
    """Whether the flag is true in any process; all processes get the same answer."""
    if world_size() == 1:
        return flag
    raised = torch.tensor(int(flag))
    dist.all_reduce(raised, dist.ReduceOp.MAX, _group())
    return bool(raised)


def is_lost_process(error: Exception) -> bool:
    """Whether an error says that another process has ended and so has closed its connections."""
    said = str(error)
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in said or "Connection closed" in said)


@functools.cache
def _group() -> dist.ProcessGroup:
    """All processes, connected over the CPU: waiting needs no device, and may take longer than a training step."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
