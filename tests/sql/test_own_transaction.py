"""A save that waits for the transaction of its own caller fails at once, and says how to be part of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool

from selfheal import DatabaseUnavailable, UploadStore

WRITE = text("INSERT INTO app_cat VALUES (1)")
SHORT = 0.5
"""Seconds that a transaction of somebody else takes."""


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """The app's own engine, with a table."""
    engine = create_async_engine(database_url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE app_cat (id INTEGER)"))
    yield engine
    await engine.dispose()


@pytest.fixture(params=["engine", "url"])
async def uploads(
    request: pytest.FixtureRequest, engine: AsyncEngine, database_url: str, directory: Path
) -> AsyncIterator[UploadStore]:
    """A store over the app's own engine, and over a URL that leads to the same database."""
    async with UploadStore(directory, engine if request.param == "engine" else database_url) as store:
        await store.database.create_tables()
        await store.save("old.png", b"old")
        yield store


only_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""Only SQLite's writers lock each other out of the whole database."""

CALLS: dict[str, Callable[[UploadStore], object]] = {
    "save": lambda store: store.save("new.png", b"new"),
    "overwrite": lambda store: store.save("old.png", b"new"),
    "save a large file": lambda store: store.save("new.png", bytes(9_000_000)),
    "delete": lambda store: store.delete("old.png"),
    "store_image": lambda store: store.database.store_image("new.png", b"new"),
}


@only_sqlite
@pytest.mark.parametrize("call", CALLS)
async def test_a_write_that_waits_for_its_own_caller(uploads: UploadStore, engine: AsyncEngine, call: str) -> None:
    """Inside the caller's open transaction a call fails at once and names `connection=`; after the commit it works."""
    async with AsyncSession(engine) as session:
        await session.execute(WRITE)
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="pass connection="):
            await CALLS[call](uploads)  # type: ignore[misc]
        assert time.monotonic() - began < 10
        await session.commit()
        await CALLS[call](uploads)  # type: ignore[misc]
        await session.execute(WRITE)
        await session.rollback()
        await uploads.save("last.png", b"last")


@only_sqlite
async def test_an_engine_that_is_not_async(uploads: UploadStore, engine: AsyncEngine) -> None:
    """A session that is not async is noticed as well."""
    other = create_engine(engine.url.set(drivername="sqlite"))
    try:
        with Session(other) as session:
            session.execute(WRITE)
            with pytest.raises(DatabaseUnavailable, match="pass connection="):
                await uploads.save("new.png", b"new")
        await uploads.save("new.png", b"new")
    finally:
        other.dispose()


async def test_a_transaction_that_locks_nothing(uploads: UploadStore, engine: AsyncEngine) -> None:
    """A caller who only read, or wrote a temporary table, can save."""
    async with AsyncSession(engine) as session:
        await session.execute(text("SELECT * FROM app_cat"))
        await uploads.save("one.png", b"one")
        await session.execute(text("CREATE TEMPORARY TABLE t (x INTEGER)"))
        await session.execute(text("INSERT INTO t VALUES (1)"))
        await uploads.save("two.png", b"two")


async def test_a_write_of_another_task(uploads: UploadStore, engine: AsyncEngine) -> None:
    """A short transaction of another task is waited for, also by a caller with a transaction that only read."""
    has_lock = asyncio.Event()

    async def write() -> None:
        async with AsyncSession(engine) as session:
            await session.execute(WRITE)
            has_lock.set()
            await asyncio.sleep(SHORT)
            await session.commit()

    writing = asyncio.create_task(write())
    await has_lock.wait()
    async with AsyncSession(engine) as session:
        await session.execute(text("SELECT * FROM app_cat"))
        await uploads.save("new.png", b"new")
    await writing


async def test_a_save_in_a_task_of_the_apps_own(uploads: UploadStore, engine: AsyncEngine) -> None:
    """A task that the caller started, and does not wait for before it commits, waits and succeeds."""
    async with AsyncSession(engine) as session:
        await session.execute(WRITE)
        saving = asyncio.create_task(uploads.save("new.png", b"new"))
        await asyncio.sleep(SHORT)
        await session.commit()
    await saving


@only_sqlite
async def test_a_write_of_another_thread(uploads: UploadStore, engine: AsyncEngine) -> None:
    """A short transaction of another thread is waited for."""
    other, has_lock = create_engine(engine.url.set(drivername="sqlite")), threading.Event()

    def write() -> None:
        with Session(other) as session:
            session.execute(WRITE)
            has_lock.set()
            time.sleep(SHORT)
            session.commit()

    thread = threading.Thread(target=write)
    thread.start()
    await asyncio.to_thread(has_lock.wait)
    await uploads.save("new.png", b"new")
    await asyncio.to_thread(thread.join)
    other.dispose()


async def test_a_row_that_the_caller_has_locked(engine: AsyncEngine, database_url: str, directory: Path) -> None:
    """Over every database a save that times out says that the caller's own transaction is open."""
    async with UploadStore(directory, database_url, deadline=1.5) as store:
        await store.database.create_tables()
        async with AsyncSession(engine) as session:
            await store.save("a.png", b"one", connection=session)
            with pytest.raises(DatabaseUnavailable, match="pass connection="):
                await store.save("a.png", b"two")
            await store.save("a.png", b"two", connection=session)
            await session.commit()
        assert (await store.save("a.png", b"three")).generation == 3


async def test_a_pool_that_the_caller_has_emptied(database_url: str, directory: Path, engine: AsyncEngine) -> None:
    """A caller who holds the only connection of the app's engine gets the same advice."""
    one = {"poolclass": AsyncAdaptedQueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": 0.5}
    small = create_async_engine(database_url, **one)
    async with UploadStore(directory, engine) as store:
        await store.database.create_tables()
    async with UploadStore(directory, small, deadline=2.0) as store, AsyncSession(small) as session:
        await session.execute(text("SELECT * FROM app_cat"))
        with pytest.raises(DatabaseUnavailable, match="pass connection="):
            await store.save("a.png", b"one")
    await small.dispose()
