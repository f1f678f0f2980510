"""Bytes for uploads, and the pieces in which they arrive."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from functools import lru_cache


@lru_cache(maxsize=8)
def noise(size: int, seed: int = 0) -> bytes:
    """Return `size` pseudo-random bytes, always the same for a size and a seed; no two parts of them look alike."""
    return random.Random(seed * 1_000_003 + size).randbytes(size)


async def pieces_of(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    """Yield the bytes in pieces of `size`, as the body of a request arrives: in order, and only once."""
    for start in range(0, len(data), size):
        await asyncio.sleep(0)
        yield data[start : start + size]


async def pieces_of_sizes(data: bytes, sizes: tuple[int, ...]) -> AsyncIterator[bytes]:
    """Yield the bytes in pieces of these sizes, again and again in turn."""
    start = turn = 0
    while start < len(data):
        step = sizes[turn % len(sizes)]
        yield data[start : start + step]
        start, turn = start + step, turn + 1
