"""An open file: measured once, read in pieces, and never read in the event loop if that could wait for a disk."""

import asyncio
import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Self

from ..aio.streams import prefetch
from ..aio.threads import Threads
from ..content.byte_counter import BYTES_READ
from ..content.digests import Digests, chunk_digests, update_all
from ..content.sources import CHUNK
from ..errors import FileChanged
from .syscalls import Closing

PIECE = 256 * 1024  # bytes read and sent at a time: more costs memory and gains nothing
LEAST_PIECE = 16 * 1024
PIECES_TOGETHER = 8 * 1024 * 1024
"""Bytes of the pieces of all answers that are being sent: each slow client holds one piece in a buffer."""

CHUNKS_TOGETHER = 8  # chunks that one call of a thread reads or hashes (2 MiB)

_NOWAIT = getattr(os, "RWF_NOWAIT", None)
_NO_NOWAIT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EINVAL)
"""Errors of file systems, old kernels and sandboxes that do not know `RWF_NOWAIT`."""

Identity = tuple[int, int, int, int]


def identity_of(measured: os.stat_result) -> Identity:
    """Return (mtime in ns, size in bytes, inode, ctime in ns). An old file put back can have all but the same ctime."""
    return measured.st_mtime_ns, measured.st_size, measured.st_ino, measured.st_ctime_ns


class ReadFailed(OSError):
    """The disk failed to read a piece of a file; not an error of the client."""


class PieceSize:
    """The size of the pieces of bodies, smaller with more answers at once; entered for each answer."""

    def __init__(self) -> None:
        self._answers = 0
        self._lock = threading.Lock()  # event loops in several threads

    def __enter__(self) -> Self:
        with self._lock:
            self._answers += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._answers -= 1

    @property
    def now(self) -> int:
        """In bytes."""
        return max(LEAST_PIECE, min(PIECE, PIECES_TOGETHER // (self._answers or 1)))


PIECE_SIZE = PieceSize()  # one for the process: it bounds the memory of the process


class _Scratch(threading.local):
    """A buffer for each thread: new ones would be fetched from the system and filled with zeros every time."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(PIECE))


_SCRATCH = _Scratch()


def close(fd: int) -> None:
    """Close a descriptor that was only read. Errors are ignored: FUSE has some that do not concern the bytes read."""
    with contextlib.suppress(OSError):
        os.close(fd)


def read_cached(fd: int, start: int, size: int) -> bytes:
    """Read up to `size` bytes (at most a piece) from `start` if they are in memory; else raise `BlockingIOError`."""
    if _NOWAIT is None:
        raise BlockingIOError
    view = _SCRATCH.view[:size]
    try:
        got = os.preadv(fd, (view,), start, _NOWAIT)
    except OSError as error:
        if error.errno in _NO_NOWAIT:
            raise BlockingIOError from None
        raise
    if got == 0:
        raise BlockingIOError
    return (view if got == size else view[:got]).tobytes()


class OpenFile(Closing):
    """A regular file, opened and measured once: that is sent. `identity` changes whenever the file does."""

    __slots__ = ("fd", "identity", "modified_ns", "path", "size", "threads")

    def __init__(self, fd: int, path: str, measured: os.stat_result, threads: Threads) -> None:
        self.fd = fd
        self.path = path
        self.threads = threads
        self.identity = identity_of(measured)
        self.modified_ns, self.size = self.identity[:2]

    def read_waiting(self, start: int, size: int) -> bytes:
        """Read up to `size` bytes from `start`; may wait for the disk. Raises `OSError` (EIO)."""
        return os.pread(self.fd, size, start)

    def sha256(self) -> str:
        """Return the digest of the whole file in hex; may wait for the disk."""
        whole, at = hashlib.sha256(), 0
        while piece := self.read_waiting(at, 4 * PIECE):
            whole.update(piece)
            at += len(piece)
        return whole.hexdigest()

    async def digest(self) -> str:
        """Return the digest of the whole file in hex; one of a large file can be cancelled."""
        if self.size <= CHUNKS_TOGETHER * CHUNK:
            return await self.threads.run(self.sha256)
        whole = hashlib.sha256()
        async with aclosing(prefetch(self._chunk_lists())) as lists:
            async for chunks in lists:
                await self.threads.run(update_all, whole, chunks)
        return whole.hexdigest()

    async def digests(self) -> Digests:
        """Read the file once; return the digests of the whole and of each chunk, computed in two threads."""
        whole, each = hashlib.sha256(), list[bytes]()
        async with aclosing(prefetch(self._chunk_lists())) as lists:
            async for chunks in lists:
                of_chunks = self.threads.run(chunk_digests, len(each), chunks)
                each += (await asyncio.gather(of_chunks, self.threads.run(update_all, whole, chunks)))[0]
        return Digests(whole.hexdigest(), each)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield all chunks of what was measured, read ahead. Raises `FileChanged` if the file got shorter."""
        async with aclosing(prefetch(self._chunk_lists())) as lists:
            async for chunks in lists:
                for chunk in chunks:
                    yield chunk

    async def _chunk_lists(self) -> AsyncGenerator[list[bytes], None]:
        step = CHUNKS_TOGETHER * CHUNK
        for start in range(0, self.size, step):
            stop = min(self.size, start + step)
            yield await self.threads.run(self._chunks_waiting, start, stop)
            BYTES_READ.add(stop - start)

    def _chunks_waiting(self, start: int, stop: int) -> list[bytes]:
        return [self._all_waiting(at, min(CHUNK, stop - at)) for at in range(start, stop, CHUNK)]

    def _all_waiting(self, start: int, size: int) -> bytes:
        data = self.read_waiting(start, size)
        while len(data) < size:  # the file got shorter, or its file system reads less at a time
            more = self.read_waiting(start + len(data), size - len(data))
            if not more:
                raise self._got_shorter()
            data += more
        return data

    async def read(self, start: int, size: int) -> bytes:
        """Read up to `size` bytes from `start`: at once if they are in memory, else in a thread."""
        try:
            return read_cached(self.fd, start, size)
        except BlockingIOError:
            return await self.threads.run(self.read_waiting, start, size)

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `start` to before `stop`; raises `FileChanged` if the file got shorter, `ReadFailed`."""
        held: list[bytes] = []
        while start < stop:
            try:
                held.append(await self.read(start, min(PIECE_SIZE.now, stop - start)))
            except OSError as error:
                raise ReadFailed(error.errno, error.strerror, self.path) from error
            if not held[0]:
                raise self._got_shorter()
            start += len(held[0])
            yield held.pop()  # kept here it would stay in memory: new memory for each piece costs a fifth of the time

    def pieces_waiting(self, start: int, stop: int) -> Iterator[bytes]:
        """As `pieces`, for a thread of its own: every read may wait for the disk."""
        while start < stop:
            try:
                held = [self.read_waiting(start, min(PIECE_SIZE.now, stop - start))]
            except OSError as error:
                raise ReadFailed(error.errno, error.strerror, self.path) from error
            if not held[0]:
                raise self._got_shorter()
            start += len(held[0])
            yield held.pop()

    def _got_shorter(self) -> FileChanged:
        return FileChanged(f"{self.path} got shorter while it was read")

    def detach(self) -> int:
        """Return the descriptor, which the caller closes."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        fd = self.detach()
        if fd >= 0:
            close(fd)
