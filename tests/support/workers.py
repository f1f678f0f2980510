"""uvicorn with several worker processes, one of which can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support import environment
from tests.support.faulty_server import SECONDS, FaultyServer
from tests.support.process_faults import Faults
from tests.support.sockets import free_port

WORKERS = 4


@asynccontextmanager
async def running_workers(base: Path, faults: Faults) -> AsyncIterator[FaultyServer]:
    """Run uvicorn with four workers; it starts a new worker for each that dies."""
    log = base / "workers.log"
    port = free_port()
    flags = ["--factory", "--workers", str(WORKERS), "--port", str(port), "--no-access-log"]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", *flags, "--log-level", "warning", "tests.support.workers_app:app"],
            env=environment(FAULTS=faults.to_env()),
            stderr=errors,
        )
    server = FaultyServer(faults, port, process, log)
    try:
        await _wait_for(server)
        yield server
    except BaseException:
        print(f"the log of the server:\n{server.stderr()[-5000:]}")
        raise
    finally:
        server.terminate()
        await server.wait()


async def _wait_for(server: FaultyServer) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            async with asyncio.timeout(SECONDS):
                if (await server.ask("GET", "/state")).status == 200:
                    return
        except OSError:
            assert server.process.poll() is None, server.stderr()
            assert time.monotonic() < end, server.stderr()
            await asyncio.sleep(0.1)


def worker_processes(server: FaultyServer) -> list[int]:
    """Return the ids of the worker processes."""
    found = []
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    for child in children:
        with contextlib.suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def kill_a_worker(server: FaultyServer) -> bool:
    """Send SIGKILL to a random worker; return False if there is none at this moment."""
    alive = worker_processes(server)
    if alive:
        os.kill(random.choice(alive), signal.SIGKILL)
    return bool(alive)
