"""Ends a process within a minute of the loss of another one, or of its machine, whatever it waits for.

A process that waits over gloo for one that was killed gets an error at once, since the dead one's connections close.
But a machine that loses its power or its network closes nothing, and one that waits on a GPU (NCCL) gets no error. So
each process keeps a connection to the first one, on which nothing is said until the end. The kernels test it (TCP
keepalive), so a process that only computes for long is not taken for lost.
"""

import hmac
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# Of silence, between two tests, and how many fail: a lost machine is noticed after 10 + 5 * 5 seconds.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5}
_SECONDS_TO_CONNECT, _SECONDS_TO_SPEAK = 60, 5
_TOKEN_BYTES, _FAREWELL = 16, b"."

_connections: list[socket.socket] = []
last_words = "error: another process of this run has ended"
seconds_to_end = 20  # for the main thread, which may get an error of its own and save what it has


def watch(rank: int, world_size: int, tell_all: Callable[[list[Any]], None]) -> None:
    """Connect this process with the first one, or the first one with all others, and watch the connections.

    Args:
        rank: this process's number.
        world_size: how many processes there are; all must call this.
        tell_all: replaces the items of a list by those of the first process's list.
    """
    if rank == 0:
        token = secrets.token_bytes(_TOKEN_BYTES)
        with _server() as server:
            server.settimeout(_SECONDS_TO_CONNECT)
            tell_all([server.getsockname()[1], token])
            while len(_connections) < world_size - 1:
                connection = server.accept()[0]
                connection.settimeout(_SECONDS_TO_SPEAK)
                try:
                    said = connection.recv(_TOKEN_BYTES)
                except OSError:
                    said = b""
                if hmac.compare_digest(said, token):
                    _connections.append(connection)
                else:
                    connection.close()  # somebody else's who tries ports
    else:
        told: list[Any] = [None, None]
        tell_all(told)
        port, token = told
        connection = socket.create_connection((os.environ["MASTER_ADDR"], port), _SECONDS_TO_CONNECT)
        connection.sendall(token)
        _connections.append(connection)
    for connection in _connections:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()


def say_farewell() -> None:
    """Tell the others that this process ends because its work is done."""
    for connection in _connections:
        try:
            connection.sendall(_FAREWELL)
        except OSError:
            continue  # that one ended before


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _end_with(connection: socket.socket) -> None:
    """Wait for the process at the other end, and end this one if that one is lost."""
    try:
        said = connection.recv(1)
    except OSError:
        said = b""
    if said == _FAREWELL:
        return
    time.sleep(seconds_to_end)
    print(last_words, file=sys.stderr, flush=True)
    os._exit(1)
