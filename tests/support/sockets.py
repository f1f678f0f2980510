"""Sockets that tests put on disk, and ports that they give to servers."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from pathlib import Path

PORTS_EACH = 1_000
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 12
_first = 20_000 + PORTS_EACH * _worker
_ports = (_first + number % PORTS_EACH for number in itertools.count(os.getpid()))


def make_socket(path: Path) -> None:
    """Make a Unix socket at `path`, as `os.mkfifo` makes a FIFO.

    The address of a Unix socket has at most 107 bytes, so it is bound by its last part, from its own directory.
    """
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(path.parent):
        listener.bind(path.name)


def free_port() -> int:
    """Return a port of the loopback interface that is free now.

    It is below those that the system chooses by itself: one of them may be another's before a server has started.
    """
    for _ in range(PORTS_EACH):
        port = next(_ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
