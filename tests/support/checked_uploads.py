"""Uploads that pass through an `UploadPolicy`."""

from __future__ import annotations

from collections.abc import AsyncIterator

from selfheal import UploadPolicy
from selfheal.aio.threads import Threads
from selfheal.content.sources import Source, read_chunks


async def checked(policy: UploadPolicy, end: str, source: Source, passed: list[bytes] | None = None) -> bytes:
    """Return what the policy lets through; `passed` has it too, for the case that the upload is refused half-way."""
    passed = [] if passed is None else passed
    threads = Threads(2)
    try:
        async for chunk in policy.checked(end, read_chunks(source, threads)):
            passed.append(chunk)
    finally:
        threads.close()
    return b"".join(passed)


async def in_pieces(data: bytes, *sizes: int) -> AsyncIterator[bytes]:
    """Yield `data` in pieces of these sizes, which are repeated."""
    start = number = 0
    while start < len(data):
        size = sizes[number % len(sizes)]
        yield data[start : start + size]
        start, number = start + size, number + 1
