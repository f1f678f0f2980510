"""Sockets that tests put on disk, and ports that they give to servers."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path


def make_socket(path: Path) -> None:
    """Make a Unix socket at `path`, as `os.mkfifo` makes a FIFO.

    The address of a Unix socket has at most 107 bytes, so it is bound by its last part, from its own directory.
    """
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(path.parent):
        listener.bind(path.name)


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
