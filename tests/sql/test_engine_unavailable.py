"""A database that does not answer is *unknown*, never *absent*, in bounded time."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import MetaData

from selfheal import DatabaseUnavailable, SchemaError, define_tables
from selfheal.aio.tasks import Tasks
from selfheal.sql.engine import Engine
from selfheal.sql.schema import SCHEMA_VERSION
from selfheal.sql.sqlite import wal_is_safe
from tests.support.raw_sql import sql
from tests.support.records import bytes_of
from tests.support.sockets import free_port
from tests.support.storage import (
    CALLS,
    CREATE,
    READS,
    TIMEOUT,
    WRITES,
    assert_all_raise,
    opened_storage,
    prepared_storage,
)

SLACK = 8.0
"""Seconds beyond a timeout that a busy machine may need."""


# -- no answer ---------------------------------------------------------------------------------------------------------


async def test_no_server_listens() -> None:
    """If no server listens, every call is unknown."""
    async with opened_storage(f"postgresql+asyncpg://nobody@127.0.0.1:{free_port()}/nothing") as images:
        await assert_all_raise(images, CALLS | CREATE, DatabaseUnavailable)


@pytest.mark.parametrize("call", ["find", "store_image", "create_tables"])
async def test_a_black_hole(black_hole: int, call: str) -> None:
    """If the server never answers, a call is unknown within the timeout."""
    async with opened_storage(f"postgresql+asyncpg://nobody@127.0.0.1:{black_hole}/nothing") as images:
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            await (CALLS | CREATE)[call](images)
        # the tables are created in three attempts
        assert time.monotonic() - began < 3 * TIMEOUT + SLACK


async def test_many_calls_to_a_black_hole(black_hole: int) -> None:
    """If the server never answers, many calls at once are all unknown within the same time."""
    async with opened_storage(f"postgresql+asyncpg://nobody@127.0.0.1:{black_hole}/nothing") as images:
        began = time.monotonic()
        answers = await asyncio.gather(*(images.find(f"{n}.png") for n in range(40)), return_exceptions=True)
        assert {type(answer) for answer in answers} == {DatabaseUnavailable}
        assert time.monotonic() - began < 3 * TIMEOUT + SLACK


async def test_an_internal_error_of_the_driver(postgres_url: str) -> None:
    """An internal error of asyncpg, which is no PostgreSQL error, is unknown as well."""

    async def confuse(_: AsyncConnection) -> None:
        raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")

    async with prepared_storage(postgres_url) as images:
        with pytest.raises(DatabaseUnavailable, match="cannot switch"):
            await images._engine.read(confuse)
        assert await bytes_of(images, "a.png") == b"one"


async def test_a_read_only_database(postgres_url: str) -> None:
    """In a read-only database, a save is unknown, and reads are answered."""
    async with prepared_storage(postgres_url):
        pass
    name = postgres_url.rpartition("/")[2]
    await sql(postgres_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with opened_storage(postgres_url) as images:
        with pytest.raises(DatabaseUnavailable):
            await images.store_image("a.png", b"two")
        assert await bytes_of(images, "a.png") == b"one"


# -- damaged and missing files -----------------------------------------------------------------------------------------


async def test_a_damaged_file(tmp_path: Path) -> None:
    """A file that is no SQLite database is unknown, and is not changed."""
    garbage = b"this is no database, whatever its name says " * 1000
    (tmp_path / "a.db").write_bytes(garbage)
    async with opened_storage(f"sqlite+aiosqlite:///{tmp_path}/a.db") as images:
        await assert_all_raise(images, CALLS | CREATE, DatabaseUnavailable)
    assert (tmp_path / "a.db").read_bytes() == garbage


async def test_damaged_pages(tmp_path: Path) -> None:
    """A database of which only the first page is left is unknown, never empty."""
    url = f"sqlite+aiosqlite:///{tmp_path}/a.db"
    async with prepared_storage(url):
        pass
    await sql(url, "PRAGMA journal_mode=DELETE")
    whole = (tmp_path / "a.db").read_bytes()
    (tmp_path / "a.db").write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    async with opened_storage(url) as images:
        for call in (READS["find"], READS["count"], READS["pages"], READS["fetch"]):
            with pytest.raises(DatabaseUnavailable):
                await call(images)


async def test_a_directory_as_file(tmp_path: Path) -> None:
    """A directory in place of the database file is unknown."""
    async with opened_storage(f"sqlite+aiosqlite:///{tmp_path}") as images:
        await assert_all_raise(images, CALLS | CREATE, DatabaseUnavailable)


async def test_a_missing_directory(tmp_path: Path) -> None:
    """A database file in a directory that does not exist is unknown, and nothing is created."""
    async with opened_storage(f"sqlite+aiosqlite:///{tmp_path}/none/a.db") as images:
        await assert_all_raise(images, CALLS | CREATE, DatabaseUnavailable)
    assert list(tmp_path.iterdir()) == []


# -- locks -------------------------------------------------------------------------------------------------------------


async def test_a_locked_file(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another connection holds SQLite's lock, calls are unknown; afterwards they are answered."""
    monkeypatch.setattr("selfheal.sql.sqlite.LOCK_WAIT", 0.0)
    async with prepared_storage(sqlite_url, timeout=0.2) as images:
        holder = sqlite3.connect(sqlite_url.partition("///")[2], isolation_level=None)
        try:
            holder.execute("BEGIN EXCLUSIVE")
            await assert_all_raise(images, WRITES, DatabaseUnavailable)
            if not wal_is_safe(sqlite3.sqlite_version_info):  # with a WAL, reads go on
                await assert_all_raise(images, READS, DatabaseUnavailable)
        finally:
            holder.close()
        assert await bytes_of(images, "a.png") == b"one"
        await images.store_image("b.png", b"two")


async def test_waiting_for_a_lock(sqlite_url: str) -> None:
    """A write waits for a lock that is released in time."""
    async with prepared_storage(sqlite_url, timeout=5) as images:
        holder = sqlite3.connect(sqlite_url.partition("///")[2], isolation_level=None, check_same_thread=False)
        try:
            holder.execute("BEGIN IMMEDIATE")
            saving = asyncio.create_task(images.store_image("a.png", b"two"))
            await asyncio.sleep(0.3)
            assert not saving.done()
            holder.execute("COMMIT")
            assert (await saving).generation == 2
        finally:
            holder.close()


async def test_a_locked_table(postgres_url: str) -> None:
    """A call for a table that another connection has locked is unknown within the timeout;
    afterwards it is answered.
    """
    async with prepared_storage(postgres_url) as images:
        engine = create_async_engine(postgres_url, poolclass=NullPool)
        async with engine.connect() as holder:
            await holder.execute(text("LOCK TABLE image_storage"))
            began = time.monotonic()
            asked = [images.find("a.png"), images.store_image("a.png", b"two"), images.bury("a.png")]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(answer) for answer in answers} == {DatabaseUnavailable}
            assert time.monotonic() - began < TIMEOUT + SLACK
        await engine.dispose()
        assert await bytes_of(images, "a.png") == b"one"
        assert (await images.store_image("a.png", b"two")).generation == 2


# -- connections -------------------------------------------------------------------------------------------------------


async def test_kept_connections_are_given_to_other_callers(postgres_url: str) -> None:
    """The connections kept for reading do not reduce the number of callers that can have a connection at once."""
    async with prepared_storage(postgres_url, 20.0) as images:
        for _ in range(2):
            await asyncio.gather(*(images.find("a.png") for _ in range(4)))
        have_one = asyncio.Barrier(10)

        async def hold(_: AsyncConnection) -> None:
            await have_one.wait()

        began = time.monotonic()
        await asyncio.gather(*(images._engine.read(hold) for _ in range(10)))
        assert time.monotonic() - began < 10


async def test_every_connection_is_taken(database_url: str) -> None:
    """A call that gets no connection within the timeout is unknown; later calls get connections again."""
    tasks = Tasks()
    tasks.home.settle()
    engine = Engine(database_url, define_tables(MetaData()), timeout=TIMEOUT, tasks=tasks)
    async with opened_storage(database_url) as images:
        await images.create_tables()
    release = asyncio.Event()

    async def hold(connection: AsyncConnection) -> int:
        await release.wait()
        return int((await connection.execute(text("SELECT 1"))).scalar_one())

    async def one(connection: AsyncConnection) -> int:
        return int((await connection.execute(text("SELECT 1"))).scalar_one())

    holding = [asyncio.create_task(engine.read(hold)) for _ in range(10)]
    await asyncio.sleep(0.2)
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        await engine.read(one)
    assert time.monotonic() - began < TIMEOUT + SLACK
    release.set()
    assert await asyncio.gather(*holding) == [1] * 10
    assert await engine.read(one) == 1
    await tasks.drain(20)
    await engine.close()


# -- tables of another shape -------------------------------------------------------------------------------------------


async def test_no_tables(database_url: str) -> None:
    """In a database without tables, every call raises an error that says what to run."""
    async with opened_storage(database_url) as images:
        caught = await assert_all_raise(images, CALLS, SchemaError)
        assert all("selfheal migrate" in str(error) for error in caught)
        await images.create_tables()
        assert await images.find("a.png") is None


MISSING = {
    "DROP TABLE image_storage": ("find", "find_many", "fetch", "pages", "count", "store_image", "bury", "undo"),
    "DROP TABLE image_chunk": ("fetch", "read", "store_image", "store_many", "mend"),
    "DROP TABLE image_blob": ("store_image", "store_many", "mend"),
    "DROP TABLE image_history": ("history", "bury", "purge"),
    "ALTER TABLE image_storage RENAME COLUMN generation TO other": ("find", "fetch", "pages", "bury"),
    "ALTER TABLE image_chunk DROP COLUMN digest": ("read", "store_image", "mend"),
}


async def test_missing_tables_and_columns(database_url: str) -> None:
    """Every call that needs a missing table or column reports that, and never an absent name."""
    for statement, needing in MISSING.items():
        async with prepared_storage(database_url):
            pass
        await sql(database_url, statement)
        async with opened_storage(database_url) as images:
            await assert_all_raise(images, {what: CALLS[what] for what in needing}, SchemaError)
        for table in ("storage", "blob", "chunk", "history", "schema"):
            await sql(database_url, f"DROP TABLE IF EXISTS image_{table}")


async def test_no_schema_version(database_url: str) -> None:
    """Without the table that holds the schema's version, every call raises an error."""
    async with prepared_storage(database_url):
        pass
    await sql(database_url, "DROP TABLE image_schema")
    async with opened_storage(database_url) as images:
        await assert_all_raise(images, CALLS, SchemaError)


@pytest.mark.parametrize(
    ("change", "says"), [(1, "upgrade selfheal"), (-1, "selfheal migrate")], ids=["newer", "older"]
)
async def test_tables_of_another_version(database_url: str, change: int, says: str) -> None:
    """Tables of another version are not used, and the error says what to do."""
    async with prepared_storage(database_url):
        pass
    await sql(database_url, f"UPDATE image_schema SET version = {SCHEMA_VERSION + change}")
    async with opened_storage(database_url) as images:
        caught = await assert_all_raise(images, CALLS, SchemaError)
        assert all(says in str(error) for error in caught)
        await sql(database_url, f"UPDATE image_schema SET version = {SCHEMA_VERSION}")
        assert await bytes_of(images, "a.png") == b"one"


async def test_missing_tables_inside_the_callers_transaction(database_url: str) -> None:
    """In the caller's transaction, missing tables are reported as well."""
    engine = create_async_engine(database_url, poolclass=NullPool)
    async with opened_storage(database_url) as images, engine.connect() as connection:
        with pytest.raises(SchemaError):
            await images.store_image("a.png", b"x", connection=connection)
    await engine.dispose()
