"""What a name is on either side, seen from outside; and a disk and a database that can be broken and mended."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import random
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from sqlalchemy import event, text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, Pool

from selfheal import UploadStore
from selfheal.settings import sqlite_file
from selfheal.sql.postgresql import Readers
from selfheal.sql.sqlite import Direct

if TYPE_CHECKING:
    import pytest


def noise(size: int) -> bytes:
    """Bytes that no two positions of a file share by chance."""
    return random.Random(size).randbytes(size)


async def pieces_of(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    """Bytes as they come from a client: once, in pieces of any size."""
    for start in range(0, len(data), size):
        await asyncio.sleep(0)
        yield data[start : start + size]


def resize(monkeypatch: pytest.MonkeyPatch, **constants: float) -> None:
    """Give constants of selfheal other values, in every room that has imported them."""
    for name, room in list(sys.modules.items()):
        if name.startswith("selfheal."):
            for constant in constants.keys() & vars(room).keys():
                monkeypatch.setattr(room, constant, constants[constant])


# -- what is there --------------------------------------------------------------------------------------------------


def files_below(directory: Path) -> list[str]:
    """Every file below a directory, hidden ones and litter among them."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def on_disk(store: UploadStore, name: str) -> bytes | None:
    """The bytes of a name's file; None if there is none."""
    path = store.disk.path_of(name)
    return path.read_bytes() if path.exists() else None


def in_quarantine(store: UploadStore) -> list[bytes]:
    """The bytes of everything that was set aside."""
    return [path.read_bytes() for path in store.disk.quarantine_path.rglob("*") if path.is_file()]


async def in_database(store: UploadStore, name: str) -> bytes | None:
    """The bytes of a name's living record; None if it has none."""
    record = await store.database.find(name)
    if record is None or record.is_deleted:
        return None
    data = b"".join([chunk async for chunk in store.database.read(record)])
    assert sha256(data).hexdigest() == record.sha256
    return data


async def on_both_sides(store: UploadStore, name: str) -> bytes | None:
    """A name's bytes, which must be the same on disk and in the database."""
    data = await in_database(store, name)
    assert on_disk(store, name) == data
    return data


async def brought_back(store: UploadStore, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
    """What a visitor gets for a name that is missing on disk; None if there is no such name."""
    body = await store.bring_back(name)
    if body is None:
        return None
    try:
        return b"".join([piece async for piece in body.pieces(start, body.size if stop is None else stop)])
    finally:
        body.close()


async def looked_behind(store: UploadStore, name: str) -> None:
    """A hit, as a server answers it, and all that is done behind it."""
    hit(store, name)
    await store.tasks.settle(30)


def hit(store: UploadStore, name: str) -> None:
    """What a server does for a file that is on disk: open it, answer, and have it looked at behind."""
    file = store.disk.open(name)
    assert file is not None
    file.close()
    store.noticed(name, file.identity, adopt=True)


def held_open(path: Path) -> list[str]:
    """What this process holds open at or below a path, but for one descriptor of the path itself."""
    held = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target == str(path) or target.startswith(f"{path}/"):
            held.append(target)
    if path.is_dir() and str(path) in held:
        held.remove(str(path))
    return held


async def nothing_is_held_open(path: Path) -> None:
    """What only the garbage collector closes is given its chance, and no more."""
    gc.collect()
    await asyncio.sleep(0.05)
    left = held_open(path)
    assert left == [], left


@contextmanager
def statements() -> Iterator[list[str]]:
    """Every statement that the drivers below any engine of this process are given meanwhile."""
    seen: list[str] = []
    watched: set[int] = set()
    active = True

    def see(statement: Any) -> None:
        if active:
            seen.append(f"{statement.query} {statement.args}" if hasattr(statement, "query") else statement)

    def watch(connection: Any, *_: Any) -> None:
        driver = connection.driver_connection
        if hasattr(driver, "add_query_logger"):
            watch_server(driver)
        elif id(driver) not in watched:
            watched.add(id(driver))
            connection.run_async(lambda driver: driver.set_trace_callback(see))

    def watch_server(driver: Any) -> None:
        if id(driver) not in watched:
            watched.add(id(driver))
            driver.add_query_logger(see)

    connect, ask = Direct._connection, Readers.ask

    def ask_watched(readers: Readers, question: Callable[[Any], Awaitable[Any]]) -> Any:
        def watched_question(driver: Any) -> Awaitable[Any]:
            watch_server(driver)
            return question(driver)

        return ask(readers, watched_question)

    def connect_watched(direct: Direct) -> sqlite3.Connection:
        connection = connect(direct)
        connection.set_trace_callback(see)
        return connection

    event.listen(Pool, "checkout", watch)
    Direct._connection = connect_watched  # type: ignore[method-assign]
    Readers.ask = ask_watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        active = False
        event.remove(Pool, "checkout", watch)
        Direct._connection = connect  # type: ignore[method-assign]
        Readers.ask = ask  # type: ignore[method-assign]


# -- what can go wrong ----------------------------------------------------------------------------------------------


class BrokenDisk:
    """A disk whose calls fail or wait, until it is mended; on a real one nobody can choose the moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def fill_after(self, room: int) -> None:
        """No room for more than so many bytes; the write that meets the end is a short one."""
        real = os.pwrite
        left = room

        def pwrite(fd: int, data: Any, offset: int) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = real(fd, memoryview(data)[:left], offset)
            left -= written
            return written

        self._monkeypatch.setattr(os, "pwrite", pwrite)

    def fail(self, call: str, number: int) -> None:
        """Every such call fails."""

        def failing(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        self._monkeypatch.setattr(os, call, failing)

    def hold(self, call: str, *, after: int = 0, done_first: bool = False) -> Held:
        """All such calls but the first `after` wait until they are released; with `done_first` once they are done."""
        held = Held()
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
        """Everything works again, and what was remembered of its refusals is forgotten."""
        self._monkeypatch.undo()
        self._monkeypatch.setattr("selfheal.disk.directory.REFUSED_FOR", 0.0)


class Held:
    """Calls that wait in their threads; released at the latest after 30 s."""

    def __init__(self) -> None:
        self._met = threading.Event()
        self._released = threading.Event()

    def wait(self) -> None:
        """What a call does."""
        self._met.set()
        self._released.wait(30)

    async def met(self) -> None:
        """Wait until a call waits."""
        while not self._met.is_set():
            await asyncio.sleep(0.005)

    def release(self) -> None:
        """Let them all go on."""
        self._released.set()


@asynccontextmanager
async def locked(store: UploadStore) -> AsyncIterator[None]:
    """Somebody else holds the catalogue's tables locked: the database takes questions and gives no answer."""
    file = sqlite_file(store.database.url)
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


async def execute(store: UploadStore, statement: str, **parameters: Any) -> None:
    """Change the database behind the store's back."""
    await sql(store.database.url, statement, **parameters)


async def sql(url: str | URL, statement: str, **values: Any) -> list[tuple[Any, ...]]:
    """What somebody else does in the database of a URL, behind our back; the rows it gets."""
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            result = await connection.execute(text(statement), values)
            return [tuple(row) for row in result] if result.returns_rows else []
    finally:
        await engine.dispose()


async def somebody_waits(url: str, count: int = 1) -> None:
    """Wait until so many transactions wait for a lock in this PostgreSQL database."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    while len(await sql(url, waiting)) < count:
        await anyio.sleep(0.01)
