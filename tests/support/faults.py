"""Faults inside this process: a disk whose calls fail or wait, and a database whose tables are locked."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from selfheal import UploadStore
from selfheal.sql.backends import backend_of

if TYPE_CHECKING:
    import pytest


class BrokenDisk:
    """Makes calls of the module `os` fail or wait until `mend`: on a real disk, a test cannot choose the moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def fill_after(self, size: int) -> None:
        """Accept `size` more bytes, then fail with ENOSPC; the write that reaches the end is a short one."""
        real = os.pwrite
        left = size

        def pwrite(fd: int, data: Any, offset: int) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = real(fd, memoryview(data)[:left], offset)
            left -= written
            return written

        self._monkeypatch.setattr(os, "pwrite", pwrite)

    def fail(self, call: str, number: int, *, once: bool = False) -> None:
        """Make every such call fail with an error number, or the next one."""
        real, failed = getattr(os, call), count()

        def failing(*arguments: Any, **named: Any) -> Any:
            if once and next(failed):
                return real(*arguments, **named)
            raise OSError(number, os.strerror(number))

        self._monkeypatch.setattr(os, call, failing)

    def hold(self, call: str, *, after: int = 0, done_first: bool = False) -> HeldCalls:
        """Make every such call except the first `after` wait until released; with `done_first`, after its own work."""
        held = HeldCalls()
        real = getattr(os, call)
        left = after

        def holding(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            result = real(*arguments, **named) if done_first else None
            if left < 0:
                held.wait()
            return result if done_first else real(*arguments, **named)

        self._monkeypatch.setattr(os, call, holding)
        return held

    def mend(self) -> None:
        """Let everything work again, and make the store forget the failures that it remembers."""
        self._monkeypatch.undo()
        self._monkeypatch.setattr("selfheal.disk.refusals.REFUSED_FOR", 0.0)


class HeldCalls:
    """Calls that wait in their threads until `release`, 30 s at most."""

    def __init__(self) -> None:
        self._met = threading.Event()
        self._released = threading.Event()

    def wait(self) -> None:
        """Wait for `release`, in the thread of the call."""
        self._met.set()
        self._released.wait(30)

    async def met(self) -> None:
        """Return as soon as one call waits."""
        while not self._met.is_set():
            await asyncio.sleep(0.005)

    def release(self) -> None:
        """Let all calls go on."""
        self._released.set()


@asynccontextmanager
async def locked_database(store: UploadStore) -> AsyncIterator[None]:
    """Lock the tables on another connection: inside the block, the database accepts queries and does not answer."""
    file = backend_of(store.database.url).file(store.database.url)
    if file is not None:
        connection = sqlite3.connect(file, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            connection.close()
        return
    engine = create_async_engine(store.database.url)
    async with engine.begin() as holder:
        await holder.execute(text("LOCK TABLE image_storage, image_chunk IN ACCESS EXCLUSIVE MODE"))
        yield
    await engine.dispose()
