"""Scenarios of a process pool, each run by an interpreter of its own: `python -m … SCENARIO DIRECTORY`.

The processes report to the test with files in the directory.
"""

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
    """The tool of each process: it writes a file that names its process when it is made, and one when it is closed."""

    def __init__(self) -> None:
        self.directory = Path(sys.argv[2])
        (self.directory / f"begun-{os.getpid()}").touch()

    async def close(self) -> None:
        """Write the second file."""
        (self.directory / f"closed-{os.getpid()}").touch()


# -- the work ---------------------------------------------------------------------------------------------------------


async def square(_tool: Tool, number: int, *, wait: float = 0.0) -> tuple[int, int]:
    """Return the process id and the square of a number."""
    await asyncio.sleep(wait)
    return os.getpid(), number * number


async def fail(_tool: Tool) -> None:
    """Raise the error of a database that gives no answer."""
    raise DatabaseUnavailable("it is down")


async def die(_tool: Tool) -> None:
    """Kill this process, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


async def block(tool: Tool) -> None:
    """Block the process for a second, as a slow disk does; write a file before and after."""
    (tool.directory / "working").touch()
    time.sleep(1)
    (tool.directory / "worked").touch()


# -- the scenarios ----------------------------------------------------------------------------------------------------


async def share(workers: Processes) -> None:
    """Print the results of ten calls, and how many processes took part."""
    done = await asyncio.gather(*(workers.run(square, number, wait=0.05) for number in range(10)))
    print([result for _, result in done], len({pid for pid, _ in done}))


async def go_on(workers: Processes) -> None:
    """Print an error, then do as `share`."""
    try:
        await workers.run(fail)
    except DatabaseUnavailable as error:
        print(error)
    await share(workers)


async def lose_one(workers: Processes) -> None:
    """Let a process be killed during its work."""
    await workers.run(die)


async def wait_long(workers: Processes) -> None:
    """Wait for work that takes a second."""
    await workers.run(block)


if __name__ == "__main__":
    with Processes(Tool, 2) as workers:
        asyncio.run(globals()[sys.argv[1]](workers))
