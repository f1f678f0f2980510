"""Upload sources (bytes, a path, a file, an async iterator, an UploadFile), read as chunks of one size."""

import asyncio
import contextlib
import inspect
import os
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import AsyncExitStack, aclosing
from typing import Any, Protocol, TypeGuard

from ..aio.home import HomeLoop, relayed
from ..aio.threads import Threads

CHUNK = 256 * 1024
"""Bytes in every chunk but the last: as fast as any size on SQLite and PostgreSQL, and small in memory."""


class Readable(Protocol):
    """A file object (`read` returns bytes) or an UploadFile (`read` returns an awaitable of bytes)."""

    def read(self, size: int, /) -> Any:
        """Read up to `size` bytes; return none at the end."""


Source = bytes | bytearray | memoryview | str | os.PathLike[str] | Readable | AsyncIterable[bytes]


async def read_chunks(source: Source, threads: Threads) -> AsyncGenerator[bytes, None]:
    """Yield `source` in chunks of exactly `CHUNK` bytes, the last one shorter. Raises `TypeError` if it is none."""
    buffer = bytearray()
    async with aclosing(_pieces(source, threads)) as pieces:
        async for piece in pieces:
            if not buffer and len(piece) == CHUNK:
                yield piece  # not copied: that costs as much as reading it
                continue
            buffer += piece
            while len(buffer) >= CHUNK:
                yield bytes(buffer[:CHUNK])
                del buffer[:CHUNK]
    if buffer:
        yield bytes(buffer)


def portable(source: Source, threads: Threads, home: HomeLoop) -> Source:
    """Return a source that can be read at home: what the running loop has to read is read there, piece by piece."""
    if home.is_here or not (isinstance(source, AsyncIterable) or _is_awaitable(source)):
        return source
    return relayed(read_chunks(source, threads), asyncio.get_running_loop())


async def _pieces(source: Source, threads: Threads) -> AsyncGenerator[bytes, None]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        view = memoryview(source)
        view = memoryview(view.tobytes()) if not view.c_contiguous else view.cast("B")
        for start in range(0, len(view), CHUNK):
            yield bytes(view[start : start + CHUNK])
    elif isinstance(source, (str, os.PathLike)):
        file = await threads.run(open, source, "rb")
        try:
            async with aclosing(_read(file, threads)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            await threads.run(file.close)
    elif _is_readable(source):
        async with aclosing(_read(source, threads)) as pieces:
            async for piece in pieces:
                yield piece
    elif isinstance(source, AsyncIterable):
        async with AsyncExitStack() as closing:
            if isinstance(source, AsyncGenerator):
                await closing.enter_async_context(aclosing(source))
            async for piece in source:
                yield piece
    else:
        raise TypeError(
            f"cannot save a {type(source).__name__}: give bytes, a path, a file, an async iterator or an UploadFile"
        )


async def _read(file: Readable, threads: Threads) -> AsyncGenerator[bytes, None]:
    awaitable = _is_awaitable(file)
    if awaitable:
        await rewind(file, threads)
    while piece := await (file.read(CHUNK) if awaitable else threads.run(file.read, CHUNK)):
        if not isinstance(piece, bytes):
            raise TypeError("the file object reads text; open it in binary mode")
        yield piece


async def rewind(upload: Readable, threads: Threads) -> None:
    """Go back to the start of an upload, if it can: the app may have read it before it saves it."""
    seek = getattr(upload, "seek", None)
    if seek is None:
        return
    if inspect.iscoroutinefunction(seek):
        await seek(0)
        return
    with contextlib.suppress(OSError):  # a stream
        await threads.run(seek, 0)


def _is_awaitable(source: object) -> bool:
    return inspect.iscoroutinefunction(getattr(source, "read", None))


def _is_readable(source: object) -> TypeGuard[Readable]:
    """Whether there is a `read`. From Python 3.12 on, `isinstance` does not see what wrappers (Flask's) delegate."""
    return hasattr(source, "read")
