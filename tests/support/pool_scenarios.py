"""Scenarios of a process pool, each run by an interpreter of its own: `python -m … SCENARIO DIRECTORY`.

The processes report to the test with files in the directory.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from selfheal import DatabaseUnavailable
from selfheal.bulk.process_pool import ProcessPool


class Resource:
    """The resource of each process: it writes a file when it is made, and one when it is closed."""

    def __init__(self) -> None:
        self.directory = Path(sys.argv[2])
        (self.directory / f"begun-{os.getpid()}").touch()

    async def close(self) -> None:
        """Write the second file."""
        (self.directory / f"closed-{os.getpid()}").touch()


# -- the work ---------------------------------------------------------------------------------------------------------


async def square(_resource: Resource, number: int, *, wait: float = 0.0) -> tuple[int, int]:
    """Return the process id and the square of a number."""
    await asyncio.sleep(wait)
    return os.getpid(), number * number


async def fail(_resource: Resource) -> None:
    """Raise the error of a database that gives no answer."""
    raise DatabaseUnavailable("it is down")


async def die(_resource: Resource) -> None:
    """Kill this process, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


async def die_reporting(_resource: Resource) -> bytes:
    """Kill this process when the first half of its result is written."""

    def write_half(pipe: Connection, message: bytes) -> None:
        os.write(pipe.fileno(), message[: len(message) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = write_half  # type: ignore[attr-defined]
    return bytes(100_000)


async def block(resource: Resource) -> None:
    """Block the process for a second, as a slow disk does; write a file before and after."""
    (resource.directory / "working").touch()
    time.sleep(1)
    (resource.directory / "worked").touch()


async def wait(resource: Resource) -> None:
    """Wait for a minute, in a way that can be cancelled; write a file before and after."""
    (resource.directory / "working").touch()
    try:
        await asyncio.sleep(60)
    finally:
        (resource.directory / "ended").touch()


# -- the scenarios ----------------------------------------------------------------------------------------------------


async def share(pool: ProcessPool) -> None:
    """Print the results of ten calls, and how many processes took part."""
    done = await asyncio.gather(*(pool.run(square, number, wait=0.05) for number in range(10)))
    print([result for _, result in done], len({pid for pid, _ in done}))


async def go_on(pool: ProcessPool) -> None:
    """Print an error, then do as `share`."""
    try:
        await pool.run(fail)
    except DatabaseUnavailable as error:
        print(error)
    await share(pool)


async def lose_one(pool: ProcessPool) -> None:
    """Let a process be killed during its work."""
    await pool.run(die)


async def lose_one_reporting(pool: ProcessPool) -> None:
    """Let a process be killed in the middle of a message."""
    await pool.run(die_reporting)


async def wait_long(pool: ProcessPool) -> None:
    """Wait for work that takes a second."""
    await pool.run(block)


async def wait_longer(pool: ProcessPool) -> None:
    """Wait for work that takes a minute."""
    await pool.run(wait)


async def stop_one(pool: ProcessPool) -> None:
    """Print the error of work that is cancelled, then do as `share`."""
    waiting = asyncio.create_task(pool.run(wait))
    while not Path(sys.argv[2], "working").exists():
        await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    print("cancelled" if waiting.cancelled() else waiting.exception())
    await share(pool)


if __name__ == "__main__":
    with ProcessPool(Resource, 2) as pool:
        asyncio.run(globals()[sys.argv[1]](pool))
