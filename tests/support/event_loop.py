"""Helpers for tests of asyncio code: let the loop run, and collect what became of many callers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

PATIENCE = 5.0
"""Seconds within which every caller must have its result."""


async def run_loop(iterations: int = 10) -> None:
    """Let the event loop run for some iterations."""
    for _ in range(iterations):
        await asyncio.sleep(0)


async def results_of(callers: Iterable[asyncio.Future[Any]]) -> list[Any]:
    """Return the result, error or cancellation of every caller; fail if one of them never ends."""
    waiting = list(callers)
    _, hanging = await asyncio.wait(waiting, timeout=PATIENCE)
    for caller in hanging:
        caller.cancel()
    assert not hanging, f"{len(hanging)} of {len(waiting)} callers never got a result"
    return await asyncio.gather(*waiting, return_exceptions=True)
