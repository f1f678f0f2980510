"""Faults of a server process: what fails on its machine, and the code that makes it fail."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from tests.support.waiting import PATIENCE


@dataclass(frozen=True)
class Faults:
    """The settings of a server process. A call is a function of `os`: link, fsync, pwrite, pread or preadv."""

    directory: str = ""
    database: str = ""
    socket: int = -1
    deadline: float = PATIENCE
    require_marker: bool = False
    fail: dict[str, str] = field(default_factory=dict)
    """Call → the name of the error with which it always fails."""
    bad_file: int = -1
    """The inode of a file that cannot be read (EIO) from the position `bad_from` on."""
    bad_from: int = 0
    slow: dict[str, float] = field(default_factory=dict)
    """Call → seconds that it takes longer."""
    hold: dict[str, str] = field(default_factory=dict)
    """Call → the path of a gate file. While that exists the call waits, and creates a file with `.met` appended."""
    kill_at: str = ""
    """The process kills itself (SIGKILL) at this call, or before its N-th commit if this is `commit:N`."""
    syncs: str = ""
    """A file to which the inode of every fsync is appended."""
    has_unnamed_files: bool = True
    """Whether the file system has O_TMPFILE."""
    file_size: int = 0
    """The most bytes of a file (EFBIG after them); 0: no limit."""
    descriptors: int = 0
    """The most descriptors of the process; 0: no limit."""
    is_privileged: bool = True
    """Whether root may still open files whose mode forbids it."""
    pool: int = 0
    """Connections of an engine that the app makes and gives to the store; 0: the store makes its own."""
    records_statements: bool = True
    """Whether `/state` lists every statement; some tests cannot afford the time and memory."""
    cancels: bool = False
    """Whether a client that disconnects cancels the request, as under Hypercorn or Starlette's BaseHTTPMiddleware."""
    workers: int = 0
    """Workers that are forked after the store was used; 0: none."""

    def to_env(self) -> str:
        """Return the value of the variable FAULTS for the server process."""
        return json.dumps(asdict(self))


def break_disk(faults: Faults) -> None:
    """Apply every fault of the disk to this process."""
    for call in ("link", "fsync", "pwrite", "pread", "preadv"):
        _wrap(call, faults)
    if not faults.has_unnamed_files:
        del os.O_TMPFILE  # type: ignore[misc]
    if faults.file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (faults.file_size, resource.RLIM_INFINITY))
    if faults.descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (faults.descriptors, faults.descriptors))
    if not faults.is_privileged and os.geteuid() == 0:
        _drop_privileges()


def _wrap(call: str, faults: Faults) -> None:
    real = getattr(os, call)

    def faulty(*arguments: Any, **named: Any) -> Any:
        if faults.kill_at == call:
            os.kill(os.getpid(), signal.SIGKILL)
        if call == "fsync" and faults.syncs:
            with Path(faults.syncs).open("a") as file:
                file.write(f"{os.fstat(arguments[0]).st_ino}\n")
        time.sleep(faults.slow.get(call, 0))
        _wait_at_gate(faults.hold.get(call))
        if call in faults.fail:
            _fail(faults.fail[call])
        if call in ("pread", "preadv") and os.fstat(arguments[0]).st_ino == faults.bad_file:
            size = arguments[1] if call == "pread" else sum(len(buffer) for buffer in arguments[1])
            if arguments[2] + size > faults.bad_from:
                _fail("EIO")
        return real(*arguments, **named)

    setattr(os, call, faulty)


def _fail(name: str) -> None:
    number = getattr(errno, name)
    raise OSError(number, os.strerror(number))


def _wait_at_gate(gate: str | None) -> None:
    if gate is None:
        return
    if Path(gate).exists():
        Path(f"{gate}.met").touch()
    end = time.monotonic() + 30
    while Path(gate).exists() and time.monotonic() < end:
        time.sleep(0.01)


def _drop_privileges() -> None:
    """Stay root, but obey the mode of files (capset: no CAP_DAC_OVERRIDE, no CAP_DAC_READ_SEARCH).

    Threads inherit this from the thread that calls.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": (125, 126), "aarch64": (90, 91)}[platform.machine()]
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.syscall(number[0], header, data) == 0
    data[0] &= ~0b110
    assert libc.syscall(number[1], header, data) == 0


def kill_at_commit(faults: Faults) -> None:
    """Kill this process just before the N-th commit reaches the database, if the faults say so."""
    kind, _, number = faults.kill_at.partition(":")
    if kind != "commit":
        return
    left = int(number)

    def die(_: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "commit", die)
