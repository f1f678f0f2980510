"""Scenarios of several processes at work, each run by an interpreter of its own: `python pieces.py SCENARIO PLACE`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from selfheal import DatabaseUnavailable
from selfheal.bulk.process_pool import Processes


class Tool:
    """Writes down which process had it, and that it was closed."""

    def __init__(self) -> None:
        self.place = Path(sys.argv[2])
        (self.place / f"begun-{os.getpid()}").touch()

    async def close(self) -> None:
        """Say so."""
        (self.place / f"closed-{os.getpid()}").touch()


async def square(_tool: Tool, number: int, *, wait: float = 0.0) -> tuple[int, int]:
    """Who did it, and what came of it."""
    await asyncio.sleep(wait)
    return os.getpid(), number * number


async def fail(_tool: Tool) -> None:
    """As a piece does that the database gives no answer to."""
    raise DatabaseUnavailable("it is down")


async def die(_tool: Tool) -> None:
    """As the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


async def linger(tool: Tool) -> None:
    """Says that it has begun, and that it has come to its end."""
    (tool.place / "working").touch()
    time.sleep(1)  # busy, as with a disk
    (tool.place / "worked").touch()


async def share(workers: Processes) -> None:
    """Print, for each piece, its result; and how many processes had a part."""
    done = await asyncio.gather(*(workers.run(square, number, wait=0.05) for number in range(10)))
    print([result for _, result in done], len({pid for pid, _ in done}))


async def go_on(workers: Processes) -> None:
    """An error, and then work for every process."""
    try:
        await workers.run(fail)
    except DatabaseUnavailable as error:
        print(error)
    await share(workers)


async def lose_one(workers: Processes) -> None:
    """A process is killed at its work."""
    await workers.run(die)


async def wait_long(workers: Processes) -> None:
    """Work that takes its time."""
    await workers.run(linger)


if __name__ == "__main__":
    with Processes(Tool, 2) as workers:
        asyncio.run(globals()[sys.argv[1]](workers))
