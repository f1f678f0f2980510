"""Bodies: what answers a request for a file that was missing on disk."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Self

from ..content.sources import CHUNK
from ..db import ImageStorage
from ..disk.open_file import PIECE_SIZE, OpenFile
from ..errors import CorruptBlob, DatabaseUnavailable, DiskUnwritable, SelfHealError
from ..sql.models import Record


class _Unshared:
    """A body that holds nothing open between two pieces."""

    def hold(self) -> Self:
        """Return the body for one more caller, who closes it."""
        return self

    def close(self) -> None:
        """Do nothing."""


class FromDatabase(_Unshared):
    """A record's bytes, sent from the database because the disk takes no file."""

    def __init__(self, database: ImageStorage, record: Record) -> None:
        self._database = database
        self._record = record
        self.size = record.size
        self.modified_ns = record.modified_ns
        self.content_type = record.content_type
        self.sha256 = record.sha256

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Check every chunk; hold the last piece of a whole answer back until the whole digest is checked."""
        whole, at = hashlib.sha256(), start // CHUNK * CHUNK
        async with aclosing(self._database.read(self._record, start // CHUNK, at_once=1)) as chunks:
            async for chunk in chunks:
                whole.update(chunk)
                if at + len(chunk) >= self.size and not start and whole.hexdigest() != self._record.sha256:
                    raise CorruptBlob(self._record.name, "the whole does not match its digest")
                yield chunk[max(start - at, 0) : stop - at]
                at += len(chunk)
                if at >= stop:
                    return

    async def check(self) -> None:
        """Read all bytes; raises `CorruptBlob` if they are not the recorded ones."""
        async with aclosing(self.pieces(0, self.size)) as pieces:
            async for _ in pieces:
                pass

    async def on_disk(self) -> None:
        """Raise `DiskUnwritable`."""
        raise DiskUnwritable(f"{self._record.name!r} is in the database, but the disk takes no file")


class InMemory(_Unshared):
    """A small record's bytes, checked as a whole. Its file is on the disk unless there is an `error`."""

    def __init__(self, data: bytes, record: Record, modified_ns: int, error: DiskUnwritable | None = None) -> None:
        self._data = data
        self._error = error
        self.size = len(data)
        self.modified_ns = modified_ns
        self.content_type = record.content_type
        self.sha256 = record.sha256

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Yield all of it at once."""
        yield self._data[start:stop]

    async def on_disk(self) -> None:
        """Raise the error of the disk, if there is one."""
        if self._error is not None:
            raise self._error


class Restoring:
    """A file being restored: checked bytes are read from it, others waited for, up to `patience` seconds."""

    def __init__(self, record: Record, staged: OpenFile, rest: FromDatabase, patience: float) -> None:
        self.size = record.size
        self.modified_ns = record.modified_ns
        self.content_type = record.content_type
        self.sha256 = record.sha256
        self.error: SelfHealError | None = None
        self._checked = 0
        self._is_over = False
        self._changed = asyncio.Event()
        self._staged = staged
        self.rest = rest
        self._patience = patience
        self._holders = 1

    def advance(self, checked: int) -> None:
        """The first `checked` bytes of the staged file can be read now."""
        self._checked = checked
        self._wake()

    def finish(self, error: SelfHealError | None) -> None:
        """The restore is over: all bytes can be read, or no more will come."""
        self._is_over, self.error = True, error
        self._wake()

    def hold(self) -> Self:
        """Return the body for one more caller, who closes it."""
        self._holders += 1
        return self

    def close(self) -> None:
        """Give the body back."""
        self._holders -= 1
        if not self._holders:
            self._staged.close()

    async def on_disk(self) -> None:
        """Wait until the restore is over; raises what it failed of."""
        while not self._is_over:
            await self._wait()
        if self.error is not None:
            raise self.error

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Read the staged file as it grows; read the database for a far offset, or if the disk takes no more."""
        is_far = start > self._checked + CHUNK and not self._is_over
        while start < stop and not is_far and not isinstance(self.error, DiskUnwritable):
            if self.error is not None:
                raise self.error
            ready = min(stop, self._ready)
            if start >= ready:
                await self._wait()
                continue
            held = [await self._staged.read(start, min(PIECE_SIZE.now, ready - start))]
            start += len(held[0])
            yield held.pop()
        if start < stop:
            if not is_far:
                await self.rest.check()
            async with aclosing(self.rest.pieces(start, stop)) as rest:
                async for piece in rest:
                    yield piece

    @property
    def _ready(self) -> int:
        """The last byte is held back until the whole is checked and published: no damaged file is ever sent whole."""
        return self.size if self._is_over else min(self._checked, self.size - 1)

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), self._patience)
        except TimeoutError:
            raise DatabaseUnavailable("the restore makes no progress") from None

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


Body = FromDatabase | InMemory | Restoring
"""The bytes of a name, shared by all callers of one restore; each of them closes it."""
