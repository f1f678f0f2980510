"""Uploads that pass through an `UploadPolicy`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from selfheal import UploadPolicy
from selfheal.aio.threads import Threads
from selfheal.content.content_types import IMAGE_EXTENSIONS
from selfheal.content.sources import Source, read_chunks

WITH_SVG = UploadPolicy(extensions=IMAGE_EXTENSIONS | {"svg"})
STRICT = UploadPolicy(extensions=IMAGE_EXTENSIONS | {"svg"}, strict=True)


async def checked(policy: UploadPolicy, end: str, source: Source, passed: list[bytes] | None = None) -> bytes:
    """Return what the policy lets through; `passed` has it too, for the case that the upload is refused half-way."""
    return (await checked_as(policy, end, source, passed))[1]


async def checked_as(
    policy: UploadPolicy, end: str, source: Source, passed: list[bytes] | None = None
) -> tuple[str, bytes]:
    """Return the extension that the policy chooses for an upload called `x.END`, and what it lets through."""
    passed = [] if passed is None else passed
    threads = Threads(2)
    try:
        async with aclosing(read_chunks(source, threads)) as chunks:
            true_end, let_through = await policy.check(f"x.{end}", chunks)
            async for chunk in let_through:
                passed.append(chunk)
    finally:
        threads.close()
    return true_end, b"".join(passed)


async def in_pieces(data: bytes, *sizes: int) -> AsyncIterator[bytes]:
    """Yield `data` in pieces of these sizes, which are repeated."""
    start = number = 0
    while start < len(data):
        size = sizes[number % len(sizes)]
        yield data[start : start + size]
        start, number = start + size, number + 1
