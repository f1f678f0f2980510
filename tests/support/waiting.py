"""Wait until a condition holds: polling in short steps, with a limit."""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable

import anyio

PATIENCE = 30.0
"""Seconds to wait for what takes none on a quiet machine: one that runs many tests stands still at times."""


async def eventually(holds: Callable[[], bool | Awaitable[bool]], seconds: float = PATIENCE) -> None:
    """Return once `holds()` is true; fail the test if it is not within `seconds`."""
    end = time.monotonic() + seconds
    while True:
        result = holds()
        if await result if inspect.isawaitable(result) else result:
            return
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        await anyio.sleep(0.02)


def wait_until(holds: Callable[[], bool], seconds: float = PATIENCE, step: float = 0.01) -> None:
    """Return once `holds()` is true, in synchronous code; fail the test if it is not within `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(step)
