"""An open file: measured once, read piece by piece, and never waited for in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Self

from ..aio.single_flight import ahead
from ..aio.threads import Threads
from ..content.digests import Digests, add_all, chunk_digests
from ..content.sources import CHUNK
from ..errors import Unsettled

PIECE = 256 * 1024
"""Bytes read and sent at a time: more costs memory and gains nothing."""
LEAST_PIECE = 16 * 1024
PIECES_TOGETHER = 8 * 1024 * 1024
"""Bytes that the pieces of all who are being sent something have together: each slow client holds one in a buffer."""

CHUNKS_TOGETHER = 8
"""Chunks that are read, or hashed, in one go of a thread (2 MiB)."""

_NOWAIT = getattr(os, "RWF_NOWAIT", None)
_CANNOT_TELL = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EINVAL)
"""What a file system, an old kernel, or a sandbox says to `RWF_NOWAIT`."""

Identity = tuple[int, int, int, int]


def identity_of(measured: os.stat_result) -> Identity:
    """(mtime in ns, size in bytes, inode, ctime in ns): who lays an old file back can keep all but the last."""
    return measured.st_mtime_ns, measured.st_size, measured.st_ino, measured.st_ctime_ns


class ReadFailed(OSError):
    """The disk could not give a piece of a file: no error of whoever is sent it."""


class Crowd:
    """Those who are being sent something piece by piece; entered and left by each. The more, the smaller the pieces."""

    def __init__(self) -> None:
        self._size = 0

    def __enter__(self) -> Self:
        self._size += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._size -= 1

    @property
    def piece(self) -> int:
        """How many bytes each is sent at a time."""
        return max(LEAST_PIECE, min(PIECE, PIECES_TOGETHER // (self._size or 1)))


CROWD = Crowd()
"""That of this process, whose memory it is."""


class _Scratch(threading.local):
    """Where bytes are read to, before they are copied; each thread has its own. A new one for every piece would be
    filled with zeros first, and large ones would be fetched from the system and given back each time.
    """

    def __init__(self) -> None:
        self.view = memoryview(bytearray(PIECE))


_SCRATCH = _Scratch()


def close(fd: int) -> None:
    """Close what was only read: an error of it (FUSE has some) says nothing of what was read."""
    with contextlib.suppress(OSError):
        os.close(fd)


def read_cached(fd: int, start: int, size: int) -> bytes:
    """Up to `size` bytes (a piece at most) from `start`, if they are in memory; else raises `BlockingIOError`."""
    if _NOWAIT is None:
        raise BlockingIOError
    view = _SCRATCH.view[:size]
    try:
        got = os.preadv(fd, (view,), start, _NOWAIT)
    except OSError as error:
        if error.errno in _CANNOT_TELL:
            raise BlockingIOError from None
        raise
    if got == 0:
        raise BlockingIOError
    return (view if got == size else view[:got]).tobytes()


class OpenFile:
    """A regular file, opened and measured once: what is sent is what was measured, whatever happens to its name.

    `size` is in bytes, `modified_ns` in ns since the epoch; `identity` changes whenever the file does.
    """

    __slots__ = ("fd", "identity", "modified_ns", "path", "size", "threads")

    def __init__(self, fd: int, path: str, measured: os.stat_result, threads: Threads) -> None:
        self.fd = fd
        self.path = path
        self.threads = threads
        self.identity = identity_of(measured)
        self.modified_ns, self.size = self.identity[:2]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_waiting(self, start: int, size: int) -> bytes:
        """Up to `size` bytes from `start`; raises `OSError` (EIO) if the disk cannot give them."""
        return os.pread(self.fd, size, start)

    def sha256(self) -> str:
        """The digest, in hex, of the whole file; may wait for the disk."""
        whole, at = hashlib.sha256(), 0
        while piece := self.read_waiting(at, 4 * PIECE):
            whole.update(piece)
            at += len(piece)
        return whole.hexdigest()

    async def digests(self) -> Digests:
        """The digests of all `chunks` together and of each, from one reading; both are made in threads of their own."""
        whole, each = hashlib.sha256(), list[bytes]()
        async with aclosing(ahead(self._handfuls())) as handfuls:
            async for chunks in handfuls:
                of_chunks = self.threads.run(chunk_digests, len(each), chunks)
                each += (await asyncio.gather(of_chunks, self.threads.run(add_all, whole, chunks)))[0]
        return Digests(whole.hexdigest(), each)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """All chunks of what was measured, read in a thread some ahead: for who takes them as fast as they come, and
        serves nobody. Raises `Unsettled` if the file was cut short meanwhile.
        """
        async with aclosing(ahead(self._handfuls())) as handfuls:
            async for chunks in handfuls:
                for chunk in chunks:
                    yield chunk

    async def _handfuls(self) -> AsyncGenerator[list[bytes], None]:
        step = CHUNKS_TOGETHER * CHUNK
        for start in range(0, self.size, step):
            yield await self.threads.run(self._chunks_waiting, start, min(self.size, start + step))

    def _chunks_waiting(self, start: int, stop: int) -> list[bytes]:
        return [self._all_waiting(at, min(CHUNK, stop - at)) for at in range(start, stop, CHUNK)]

    def _all_waiting(self, start: int, size: int) -> bytes:
        data = self.read_waiting(start, size)
        while len(data) < size:  # the file ends here now, or its file system gives less at a time
            more = self.read_waiting(start + len(data), size - len(data))
            if not more:
                raise self._cut_short()
            data += more
        return data

    async def read(self, start: int, size: int) -> bytes:
        """Up to `size` bytes from `start`, from memory if they are there, else in a thread."""
        try:
            return read_cached(self.fd, start, size)
        except BlockingIOError:
            return await self.threads.run(self.read_waiting, start, size)

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """The bytes from `start` up to, without, `stop`; raises `Unsettled` if the file was cut short, `ReadFailed`."""
        while start < stop:
            try:
                piece = await self.read(start, min(CROWD.piece, stop - start))
            except OSError as error:
                raise ReadFailed(error.errno, error.strerror, self.path) from error
            if not piece:
                raise self._cut_short()
            start += len(piece)
            yield piece

    def _cut_short(self) -> Unsettled:
        return Unsettled(f"{self.path} was cut short while it was read")

    def close(self) -> None:
        """Close the descriptor; closing twice is harmless."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)
