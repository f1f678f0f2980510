"""How late an event loop is: a task that sleeps 5 ms again and again, compared with one in an idle process."""

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

INTERVAL = 0.005
"""Seconds that the task sleeps."""
LIMIT = 0.05
"""Seconds by which it may wake up too late."""
TRIES = 3
"""How often the work is done while the loop is too late."""
MAX_TRIES = 6
"""The same, with the tries in which the machine was too busy to measure."""


class LatencyMonitor:
    """Measures the latency of the event loop in which it is started."""

    def __init__(self) -> None:
        self.worst = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to measure; forget what was measured before."""
        self.worst = 0.0
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._measure())

    async def stop(self) -> float:
        """Stop, and return the worst latency in seconds."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return self.worst

    async def _measure(self) -> None:
        while True:
            due = time.monotonic() + INTERVAL
            try:
                await asyncio.sleep(INTERVAL)
            finally:  # a task that is cancelled too late counts as well
                self.worst = max(self.worst, time.monotonic() - due)


class ControlProcess:
    """A monitor in an idle process: if it is late, the machine is the cause, not the work."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def worst(self) -> float:
        """Return the worst latency since the last call, in seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline()))


@dataclass(frozen=True)
class Latency:
    """The latency of the best of several tries, in seconds; `tries` counts those that could be measured.

    Zero tries mean that the machine was too busy to measure anything.
    """

    worst: float
    tries: int

    @property
    def is_too_high(self) -> bool:
        """Whether the work blocked the loop."""
        return self.tries > 0 and self.worst > LIMIT

    def __str__(self) -> str:
        return f"{self.worst * 1000:.0f} ms" if self.tries else "unknown"


async def measure_latency(work: Callable[[], Awaitable[float]], control: ControlProcess) -> Latency:
    """Do `work`, which returns a latency, up to three times until that is low enough; return the best.

    A try in which the control process was too late as well is not counted.
    """
    best, tries = float("inf"), 0
    for _ in range(MAX_TRIES):
        control.worst()
        late = await work()
        is_quiet = await asyncio.to_thread(control.worst) <= LIMIT
        if is_quiet or late <= LIMIT:
            best, tries = min(best, late), tries + 1
        if best <= LIMIT or tries == TRIES:
            break
    return Latency(best, tries)


async def latency_during(work: Callable[[], Awaitable[object]]) -> float:
    """Return the worst latency of this loop during `work`, in seconds."""
    monitor = LatencyMonitor()
    monitor.start()
    await asyncio.sleep(0)
    await work()
    await asyncio.sleep(0)
    return await monitor.stop()


async def _main() -> None:
    monitor = LatencyMonitor()
    monitor.start()
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, os.read, 0, 1):
        os.write(1, json.dumps(monitor.worst).encode() + b"\n")
        monitor.start()
    await monitor.stop()


if __name__ == "__main__":
    asyncio.run(_main())
