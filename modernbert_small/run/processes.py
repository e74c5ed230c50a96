"""Several processes under torchrun: their numbers, waiting for each other, and what happens when one of them dies.

torchrun tells each process its RANK, LOCAL_RANK and WORLD_SIZE. Without torchrun there is one process, which waits for
nobody.

A process that dies closes its connections, so one that waits for it over the CPU (gloo) gets an error at once. One that
waits on the GPU (NCCL) may get none: its kernel waits on until the group's timeout, `ddp_timeout`, and its main thread
waits for the kernel in C, where no signal handler of Python runs. torchrun sends SIGTERM to the others, and SIGKILL
30 seconds later. `end_soon_after_sigterm` is for this case. torch's own means do not help there. Of the modes of
TORCH_NCCL_ASYNC_ERROR_HANDLING the default, 3, ends the process from a thread in C++, without Python, and only once
NCCL reports an error or the timeout is over. TORCH_NCCL_BLOCKING_WAIT waits at every collective.
`dist.monitored_barrier` is for gloo alone. A machine without power or network closes nothing: see `run.peers`.

References:
    https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html
    https://docs.pytorch.org/docs/stable/distributed.html
"""

import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from modernbert_small.run import peers
from modernbert_small.run.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
# The others wait while one process tokenises a corpus or fits a projection. A dead process is noticed at once.
_PATIENCE = timedelta(days=7)
_NEXT = "modernbert_small/next"  # key of the store of all processes: the number that `dealt` gives next
# Enough to end a step and save a checkpoint; 30 seconds after its SIGTERM torchrun kills what is left.
_SECONDS_TO_END = 20


PARENT_PIPE = "MODERNBERT_SMALL_PARENT_PIPE"  # in the environment: a pipe that closes when the parent has ended


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        import torch.distributed as dist  # takes seconds, for which --help need not wait; so in the others below

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
    import torch
    import torch.distributed as dist

    raised = torch.tensor(int(flag))
    dist.all_reduce(raised, dist.ReduceOp.MAX, _group())
    return bool(raised)


def from_first(compute: Callable[[], T]) -> T:
    """What the first process computes, in all of them; what it finds wrong is raised in all of them.

    Raises:
        UserError: the first process raised it.
    """
    if world_size() == 1:
        return compute()
    import torch.distributed as dist

    said: list[Any] = [None, None]
    if rank() == 0:
        try:
            said = [compute(), None]
        except UserError as error:
            said = [None, error]
    dist.broadcast_object_list(said, 0, _group())
    if said[1] is not None:
        raise said[1]
    return said[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank, in all of them."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, _group())
    return values


def dealt(count: int) -> Iterator[int]:
    """The numbers below `count`, each in one process alone: whichever process is free gets the next one.

    Every process must call this, and take its numbers to the end.
    """
    if world_size() == 1:
        yield from range(count)
        return
    from torch.distributed.distributed_c10d import _get_default_store

    wait_for_all()  # nobody still takes numbers of the last time
    store = _get_default_store()
    if rank() == 0:
        store.set(_NEXT, "0")
    wait_for_all()
    while (number := store.add(_NEXT, 1) - 1) < count:
        yield number


def is_lost_process(error: Exception) -> bool:
    """Whether an error says that another process has ended and so has closed its connections."""
    if world_size() == 1:
        return False
    import torch.distributed as dist

    said = str(error)
    return isinstance(error, dist.DistError) or "gloo" in said or "Connection closed" in said


def end_soon_after_sigterm(last_words: str) -> None:
    """From now on, if this process has not ended 20 seconds after a SIGTERM, print a line and end it.

    Must be called in the main thread.

    Args:
        last_words: the line.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    # The interpreter writes a signal's number there when the signal comes, whatever the main thread does.
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_after_sigterm, args=(reading, writing, last_words), daemon=True).start()


def end_with_parent() -> None:
    """From now on, send this process a SIGTERM when its parent has ended, if that has left a pipe to notice it by.

    Linux' parent-death signal is not used: it comes once for each thread of the parent, and a second SIGTERM stops a
    training before it is saved.
    """
    if pipe := os.environ.pop(PARENT_PIPE, None):
        threading.Thread(target=_sigterm_at_end_of, args=(int(pipe),), daemon=True).start()


def _sigterm_at_end_of(pipe: int) -> None:
    os.read(pipe, 1)  # nothing is ever written to it
    os.kill(os.getpid(), signal.SIGTERM)


def _end_after_sigterm(reading: socket.socket, _writing: socket.socket, last_words: str) -> None:
    """Wait for SIGTERM, then give the main thread time to end the process. Both sockets stay open until then."""
    while reading.recv(1)[0] != signal.SIGTERM:
        pass
    time.sleep(_SECONDS_TO_END)
    print(last_words, file=sys.stderr, flush=True)
    os._exit(1)


@functools.cache
def _group() -> "ProcessGroup":
    """All processes, connected over the CPU: waiting needs no device, and may take longer than a training step."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    peers.watch(rank(), world_size(), lambda told: dist.broadcast_object_list(told, 0, group))
    return group
