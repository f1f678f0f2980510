"""What a missing file can be answered with while it is not, or cannot be, on disk."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ..content.sources import CHUNK
from ..db import ImageStorage
from ..disk.open_file import CROWD, OpenFile
from ..errors import CorruptBlob, DatabaseUnavailable, DiskUnwritable, SelfHealError
from ..sql.models import Record


class FromDatabase:
    """A record's bytes, sent from the database because the disk takes no file."""

    def __init__(self, database: ImageStorage, record: Record) -> None:
        self._database = database
        self._record = record
        self.size = record.size
        self.modified_ns = record.modified_ns

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Every chunk is checked; the last piece of a whole answer is held back until the whole digest is."""
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
        """Read it all, and raise `CorruptBlob` if the whole is not what was recorded."""
        async with aclosing(self.pieces(0, self.size)) as pieces:
            async for _ in pieces:
                pass

    def close(self) -> None:
        """Nothing is held between pieces."""


class InMemory:
    """A small record's bytes, checked whole, when the disk takes no file."""

    def __init__(self, data: bytes, modified_ns: int) -> None:
        self._data = data
        self.size = len(data)
        self.modified_ns = modified_ns

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """All of it at once."""
        yield self._data[start:stop]

    def close(self) -> None:
        """Nothing is held."""


class Landed(InMemory):
    """The bytes of a file that was just given its name, and its time as the disk keeps it: to read it back is work."""


class Progress:
    """How far a restore has come: `checked` bytes of the staged file can be read; then it is over, or it failed."""

    def __init__(self) -> None:
        self.checked = 0
        self.is_over = False
        self.error: SelfHealError | None = None
        self._moved = asyncio.Event()

    def move(self, checked: int) -> None:
        """Tell those who wait that so many bytes are there."""
        self.checked = checked
        self._wake()

    def end(self, error: SelfHealError | None) -> None:
        """Tell those who wait that no more will come."""
        self.is_over, self.error = True, error
        self._wake()

    async def wait(self, timeout: float) -> None:
        """Wait for the next move; raises `DatabaseUnavailable` after `timeout` seconds without one."""
        try:
            await asyncio.wait_for(self._moved.wait(), timeout)
        except TimeoutError:
            raise DatabaseUnavailable("the restore stands still") from None

    def _wake(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()


class Incoming:
    """A large file on its way back: what is checked is read from the staged file, the rest is waited for.

    Shared by all who ask for it; it closes its descriptor when the last of them, and the restore itself, has let go.
    """

    def __init__(self, record: Record, staged: OpenFile, rest: FromDatabase, patience: float) -> None:
        self.size = record.size
        self.modified_ns = record.modified_ns
        self.progress = Progress()
        self._staged = staged
        self._rest = rest
        self._patience = patience
        self._holders = 1

    def hold(self) -> Incoming:
        """The same, for one more who will close it."""
        self._holders += 1
        return self

    def close(self) -> None:
        """Let go."""
        self._holders -= 1
        if not self._holders:
            self._staged.close()

    async def finished(self) -> None:
        """Wait until the restore is over; raises what it failed of."""
        while not self.progress.is_over:
            await self.progress.wait(self._patience)
        if self.progress.error is not None:
            raise self.progress.error

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """From the staged file as it grows, from the database what lies far ahead or no longer fits the disk."""
        is_ahead = start > self.progress.checked + CHUNK
        while start < stop and not is_ahead and not isinstance(self.progress.error, DiskUnwritable):
            if self.progress.error is not None:
                raise self.progress.error
            ready = min(stop, self._ready())
            if start >= ready:
                await self.progress.wait(self._patience)
                continue
            piece = await self._staged.read(start, min(CROWD.piece, ready - start))
            start += len(piece)
            yield piece
        if start < stop:
            if not is_ahead:
                await self._rest.check()
            async with aclosing(self._rest.pieces(start, stop)) as rest:
                async for piece in rest:
                    yield piece

    def _ready(self) -> int:
        """The last byte is held back until the whole is checked and published: no damaged file is ever sent whole."""
        return self.size if self.progress.is_over else min(self.progress.checked, self.size - 1)
