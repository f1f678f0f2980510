"""How late a task comes to its turn in a loop, compared with one in a process that does nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self

EVERY = 0.005
LATE = 0.05
"""Seconds between two beats, and by how much one may come too late."""
TRIES = 3
AT_MOST = 6


class Heart:
    """Beats in the loop in which it was started."""

    def __init__(self) -> None:
        self.worst = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on; what was is forgotten."""
        self.worst = 0.0
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._beat())

    async def stop(self) -> float:
        """The worst, in seconds."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return self.worst

    async def _beat(self) -> None:
        while True:
            due = time.monotonic() + EVERY
            try:
                await asyncio.sleep(EVERY)
            finally:  # who is stopped is late as well
                self.worst = max(self.worst, time.monotonic() - due)


class Control:
    """A heart in another process: what makes it late is the machine, not the work."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self) -> float:
        """The worst since the last question, in seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline()))


@dataclass(frozen=True)
class Stall:
    """How late the best of several tries was, in seconds; `tries` counts those in which the machine kept time.

    No tries: it was too busy, and nothing can be said.
    """

    worst: float
    tries: int

    @property
    def is_noticed(self) -> bool:
        """Whether the loop was held up by what was done in it."""
        return self.tries > 0 and self.worst > LATE

    def __str__(self) -> str:
        return f"{self.worst * 1000:.0f} ms" if self.tries else "unknown"


async def stall_of(work: Callable[[], Awaitable[float]], control: Control) -> Stall:
    """How late a loop is during `work`, which says so itself; done again while it is too late, at most three times.

    A try in which the control came too late as well says nothing, and is not counted.
    """
    best, tries = float("inf"), 0
    for _ in range(AT_MOST):
        control.ask()
        late = await work()
        is_quiet = await asyncio.to_thread(control.ask) <= LATE
        if is_quiet or late <= LATE:
            best, tries = min(best, late), tries + 1
        if best <= LATE or tries == TRIES:
            break
    return Stall(best, tries)


async def with_heart(work: Callable[[], Awaitable[object]]) -> float:
    """How late this loop is during `work`."""
    heart = Heart()
    heart.start()
    await asyncio.sleep(0)
    await work()
    await asyncio.sleep(0)
    return await heart.stop()


async def _main() -> None:
    heart = Heart()
    heart.start()
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, os.read, 0, 1):
        os.write(1, json.dumps(heart.worst).encode() + b"\n")
        heart.start()
    await heart.stop()


if __name__ == "__main__":
    asyncio.run(_main())
