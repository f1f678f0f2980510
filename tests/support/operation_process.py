"""A process that performs operations, each in a fork that can be killed at any of its system calls.

It reads lines from standard input: an `Operation` as JSON, and later any line as the signal to start. It writes JSON
lines to standard output: the process and its threads, the answer or the error, and the exit code. Everything is
imported before the fork, so that the system calls of the child are those of the operation.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import traceback
from pathlib import Path
from typing import Any

from selfheal import SelfHealError, UploadStore
from selfheal import store as store_module
from selfheal.aio.threads import Threads
from selfheal.healing import restore_file as restoration
from tests.support.operations import Operation, perform

CONNECTIONS = 3
"""Connections that are opened before the start; a bulk run, which reads ahead, takes two."""


def _write_line(**values: Any) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")


def _read_line() -> bytes:
    """Read one line, or nothing at the end; what follows belongs to another process and stays in the pipe."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def _use_one_disk_thread() -> None:
    """Give the store one thread for the disk: then every call comes from a thread that exists before the start."""
    store_module.Threads = lambda: Threads(1)  # type: ignore[attr-defined]


def _apply(variant: str) -> None:
    if variant == "named":
        del os.O_TMPFILE  # type: ignore[misc]
    elif variant == "streamed":
        restoration.WHOLE_FIRST = 0


async def _run(operation: Operation) -> None:
    async with UploadStore(operation.directory, operation.database, settled_after=0.0) as store:
        # `open` has created the thread for the disk; the connections are created here
        await asyncio.gather(*(store.database.count() for _ in range(CONNECTIONS)))
        _write_line(process=os.getpid(), threads=sorted(int(tid) for tid in os.listdir("/proc/self/task")))
        _read_line()
        try:
            answer = await perform(store, operation)
        except (SelfHealError, OSError) as error:
            _write_line(raised=type(error).__name__, message=str(error))
        except Exception as error:
            _write_line(raised=type(error).__name__, message=traceback.format_exc(), unexpected=True)
        else:
            _write_line(answer=answer)


def _run_in_child(operation: Operation) -> None:
    _use_one_disk_thread()
    _apply(operation.variant)
    try:
        asyncio.run(_run(operation))
    except (SelfHealError, OSError) as error:  # while closing
        _write_line(closing=str(error))


def main() -> None:
    """Perform operations until standard input ends."""
    while line := _read_line():
        operation = Operation(**json.loads(line))
        child = os.fork()
        if not child:
            code = errno.EPERM
            with contextlib.suppress(BrokenPipeError):
                _run_in_child(operation)
                code = 0
            os._exit(code)
        _, status = os.waitpid(child, 0)
        _write_line(exit_code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    assert Path("/proc/self/task").exists()
    main()
