"""An engine that belongs to the app, with its own settings, transactions and isolation level."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import sqlite3
import sys
from collections.abc import Callable
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.schema import MetaData

from selfheal import DatabaseUnavailable, SelfHealError, define_tables
from selfheal.aio.tasks import Tasks
from selfheal.sql.engine import Engine
from tests.support.raw_sql import sql
from tests.support.records import bytes_of
from tests.support.storage import (
    TIMEOUT,
    WRITES,
    opened_storage,
    prepared_storage,
)


async def test_the_apps_own_engine_over_postgres(postgres_url: str) -> None:
    """An engine of the app is used with its settings, and stays open after `close`."""
    await sql(postgres_url, "CREATE SCHEMA apart")
    arguments = {"server_settings": {"search_path": "apart"}}
    engine = create_async_engine(postgres_url, pool_size=1, max_overflow=0, connect_args=arguments)

    async def server_process() -> int:
        async with engine.connect() as connection:
            return int((await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one())

    before = await server_process()
    async with prepared_storage(engine) as images:  # type: ignore[arg-type]
        assert await bytes_of(images, "a.png") == b"one"
    assert await server_process() == before
    await engine.dispose()
    assert await sql(postgres_url, "SELECT name FROM apart.image_storage") == [("a.png",)]


async def test_the_apps_own_engine_over_sqlite() -> None:
    """An in-memory database of the app's engine is used through that engine, and outlives `close`."""
    engine = create_async_engine("sqlite+aiosqlite://")
    async with prepared_storage(engine) as images:  # type: ignore[arg-type]
        assert await bytes_of(images, "a.png") == b"one"
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT name FROM image_storage"))).all() == [("a.png",)]
    await engine.dispose()


# -- engines that begin transactions themselves ------------------------------------------------------------------------


def beginning_by_hooks(url: str) -> AsyncEngine:
    """Return an engine that begins transactions with event hooks, as SQLAlchemy documents for savepoints."""
    engine = create_async_engine(url)

    @event.listens_for(engine.sync_engine, "connect")
    def begin_nothing(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def beginning_by_driver(url: str) -> AsyncEngine:
    """Return an engine with `autocommit=False`, as SQLAlchemy documents for Python 3.12 and later."""
    if sys.version_info < (3, 12):
        pytest.skip("sqlite3 has no `autocommit` before Python 3.12")
    return create_async_engine(url, connect_args={"autocommit": False})


def beginning_by_asking(url: str) -> AsyncEngine:
    """Return an engine that runs a query on every connection, as SQLAlchemy documents for a liveness test."""
    engine = create_async_engine(url)

    @event.listens_for(engine.sync_engine, "engine_connect")
    def ask(connection: Connection) -> None:
        connection.scalar(text("SELECT 1"))

    return engine


@pytest.mark.parametrize("make", [beginning_by_hooks, beginning_by_driver, beginning_by_asking])
async def test_the_apps_own_engine_that_begins_its_transactions_itself(
    sqlite_url: str, make: Callable[[str], AsyncEngine]
) -> None:
    """With an engine that begins transactions itself everything works, and a write waits for the lock."""
    engine = make(sqlite_url)
    async with prepared_storage(engine, 8) as images, opened_storage(sqlite_url, 8) as others:  # type: ignore[arg-type]
        for call in WRITES.values():
            with contextlib.suppress(SelfHealError):
                await call(images)
        both = [store.store_image(f"{index}.png", b"x") for index in range(20) for store in (images, others)]
        assert {record.sha256 for record in await asyncio.gather(*both)} == {hashlib.sha256(b"x").hexdigest()}
        assert await images.count() == 21
        assert [version.generation for version in await images.history("a.png")] == [3, 2, 1]
    await engine.dispose()


@pytest.mark.parametrize("make", [create_async_engine, beginning_by_hooks, beginning_by_driver, beginning_by_asking])
@pytest.mark.parametrize("size", [10, 7_000_000])
async def test_a_transaction_of_the_callers_is_whole(
    sqlite_url: str, make: Callable[[str], AsyncEngine], size: int
) -> None:
    """A file stored in the caller's transaction exists after a commit and not after a rollback, however it begins."""
    engine, data = make(sqlite_url), b"x" * size
    async with prepared_storage(engine) as images:  # type: ignore[arg-type]
        async with engine.connect() as connection:
            await images.store_image("b.png", data, connection=connection)
            await connection.rollback()
            assert await bytes_of(images, "b.png") is None
            await images.store_image("b.png", data, connection=connection)
            await connection.commit()
        assert await bytes_of(images, "b.png") == data
    await engine.dispose()


async def test_a_sqlite_connection_that_commits_each_statement_is_no_transaction(sqlite_url: str) -> None:
    """A connection that commits each statement is refused, because a record could be stored without its bytes."""
    engine = create_async_engine(sqlite_url, isolation_level="AUTOCOMMIT")
    async with prepared_storage(sqlite_url) as images, engine.connect() as connection:
        with pytest.raises(DatabaseUnavailable, match="commits each statement"):
            await images.store_image("b.png", b"two", connection=connection)
        assert await images.find("b.png") is None
    await engine.dispose()


@pytest.mark.parametrize("make", [create_async_engine, beginning_by_hooks, beginning_by_driver, beginning_by_asking])
async def test_a_lock_that_the_apps_own_engine_does_not_get(
    sqlite_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[str], AsyncEngine],
) -> None:
    """A write that does not get the lock reports that, and the connection can be used again."""
    monkeypatch.setattr("selfheal.sql.sqlite.LOCK_WAIT", 0.0)
    engine = make(f"{sqlite_url}?timeout=0.1")
    async with prepared_storage(engine) as images:  # type: ignore[arg-type]
        holder = sqlite3.connect(sqlite_url.partition("///")[2], isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseUnavailable, match="locked"):
            await images.store_image("b.png", b"two")
        holder.close()
        await images.store_image("b.png", b"two")
        assert await bytes_of(images, "b.png") == b"two"
    await engine.dispose()
    assert "Traceback" not in caplog.text


async def test_the_apps_own_engine_that_commits_nothing(sqlite_url: str) -> None:
    """With `autocommit=True`, where the driver commits nothing, a write is refused and leaves
    neither rows nor a lock.
    """
    if sys.version_info < (3, 12):
        pytest.skip("sqlite3 has no `autocommit` before Python 3.12")
    engine = create_async_engine(sqlite_url, connect_args={"autocommit": True})
    async with prepared_storage(sqlite_url) as others, opened_storage(engine) as images:  # type: ignore[arg-type]
        with pytest.raises(DatabaseUnavailable, match="autocommit=True"):
            await images.store_image("a.png", b"two")
        assert await bytes_of(images, "a.png") == b"one"
        await others.store_image("a.png", b"three")
        with pytest.raises(DatabaseUnavailable, match="autocommit=True"):
            await images.purge(timedelta(0), dry_run=True)
        assert [version.generation for version in await others.history("a.png")] == [1]
    await engine.dispose()


# -- one connection ----------------------------------------------------------------------------------------------------


async def test_many_writes_on_one_connection() -> None:
    """Writes to an in-memory database, which has one connection, are transactions that follow each other."""
    async with prepared_storage("sqlite+aiosqlite:///:memory:") as images:
        names = [f"{index}.png" for index in range(60)]
        await asyncio.gather(*(images.store_image(name, name.encode()) for name in names))
        assert [await bytes_of(images, name) for name in names] == [name.encode() for name in names]


@pytest.mark.parametrize("is_given", [False, True], ids=["ours", "the app's own"])
async def test_reads_beside_writes_on_one_connection(is_given: bool) -> None:
    """Reads on the one connection of a database, cancelled or not, never end the transaction of a write."""
    url = "sqlite+aiosqlite://"
    engine: Any = create_async_engine(url) if is_given else url
    async with prepared_storage(engine) as images:
        is_over = asyncio.Event()

        async def ask() -> None:
            while not is_over.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(images.find("a.png"), Random().uniform(0, 0.002))
                await asyncio.sleep(0)

        asking = [asyncio.create_task(ask()) for _ in range(3)]
        names = [f"{index}.png" for index in range(60)]
        for name in names:
            await images.store_image(name, name.encode())
        is_over.set()
        await asyncio.gather(*asking)
        assert [await bytes_of(images, name) for name in names] == [name.encode() for name in names]
    if is_given:
        await engine.dispose()


async def test_a_transaction_of_the_apps_own_on_one_connection() -> None:
    """A write is refused while the app's transaction is on the only connection: it would become a part of that."""
    engine = create_async_engine("sqlite+aiosqlite://")
    async with prepared_storage(engine) as images:  # type: ignore[arg-type]
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE image_storage SET modified_ns = 77"))
            with pytest.raises(DatabaseUnavailable, match="only connection"):
                await images.store_image("b.png", b"two")
        assert await images.find("b.png") is None
        await images.store_image("b.png", b"two")
        assert await bytes_of(images, "b.png") == b"two"
    await engine.dispose()


# -- isolation levels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "READ COMMITTED", "SERIALIZABLE"])
@pytest.mark.parametrize("options", [{}, {"skip_autocommit_rollback": True}], ids=["", "rolling nothing back at it"])
@pytest.mark.parametrize("how", ["from the beginning", "by an option"])
async def test_the_apps_own_engine_of_another_isolation_level(
    database_url: str, level: Any, how: str, options: dict[str, bool]
) -> None:
    """With any isolation level of the app's engine, a write happens whole or not at all, and waits for others."""
    if database_url.startswith("sqlite") and level == "READ COMMITTED":
        pytest.skip("SQLite has no such level")
    if not options.keys() <= inspect.signature(DefaultDialect.__init__).parameters.keys():
        pytest.skip("SQLAlchemy has no such option before 2.0.43")
    if how == "by an option":
        engine = create_async_engine(database_url, **options)
        engine = engine.execution_options(isolation_level=level)
    else:
        engine = create_async_engine(database_url, isolation_level=level, **options)
    tasks = Tasks()
    tasks.home.settle()
    ours = Engine(engine, define_tables(MetaData()), timeout=TIMEOUT, tasks=tasks)

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(text("DELETE FROM image_storage"))
        raise EOFError("the caller has failed")

    async with prepared_storage(engine) as images:  # type: ignore[arg-type]
        with pytest.raises(EOFError):
            await ours.write(work)
        assert await bytes_of(images, "a.png") == b"one"
        saves = [images.store_image("a.png", b"%d" % index) for index in range(20)]
        generations = sorted(record.generation for record in await asyncio.gather(*saves))
        assert generations == list(range(2, 22))
        async with engine.connect() as connection:  # the app's own statements are as before
            await connection.execute(text("UPDATE image_storage SET modified_ns = 77"))
        record = await images.find("a.png")
        assert record is not None
        assert (record.modified_ns == 77) is (level == "AUTOCOMMIT")
    await tasks.drain(20)
    await engine.dispose()
