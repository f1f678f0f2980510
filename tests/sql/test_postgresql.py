"""Connections that are kept for reading, over a real PostgreSQL: few, used again, and closed when they are lost."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from selfheal.sql import postgresql as module
from selfheal.sql.pool_limit import PoolLimit
from selfheal.sql.postgresql import KEPT_AT_MOST, PostgreSQLReader
from selfheal.sql.statements import DeadConnection
from tests.support.postgres import PostgresServer
from tests.support.raw_sql import sql

POOL = 3


@pytest.fixture
async def engine(postgres_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine with one open connection in its pool."""
    engine = create_async_engine(postgres_url, pool_size=POOL, max_overflow=POOL, connect_args={"command_timeout": 0.5})
    async with engine.connect():
        pass
    yield engine
    await engine.dispose()


@pytest.fixture
async def readers(engine: AsyncEngine) -> AsyncIterator[PostgreSQLReader]:
    """The connections that are kept for reading, over this engine."""
    readers = PostgreSQLReader(engine, PoolLimit(2 * POOL))
    yield readers
    readers.close()


async def process(driver: Any) -> int:
    """Return the id of the server process of a connection."""
    return int(await driver.fetchval("SELECT pg_backend_pid()"))


async def slow_process(driver: Any) -> int:
    """Return the same after 100 ms, so that other reads overlap with this one."""
    return int(await driver.fetchval("SELECT pg_backend_pid() FROM pg_sleep(0.1)"))


async def processes(url: str) -> set[int]:
    """Return the other server processes of this database, once those that end have ended."""
    await asyncio.sleep(0.2)
    query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    return {row[0] for row in await sql(url, query)}


def checked_out(engine: AsyncEngine) -> int:
    """Return how many connections the pool has handed out."""
    pool: Any = engine.pool
    return int(pool.checkedout())


async def test_one_read_after_the_other(engine: AsyncEngine, readers: PostgreSQLReader) -> None:
    """One read after the other uses the same connection, which is kept."""
    assert len({await readers.ask(process) for _ in range(5)}) == 1
    assert checked_out(engine) == 1


async def test_idle_connections(engine: AsyncEngine, readers: PostgreSQLReader) -> None:
    """A kept connection, or one in the pool, is idle; one that must be opened first is not."""
    assert readers.has_idle
    async with engine.connect():
        assert not readers.has_idle
    await readers.ask(process)
    assert readers.has_idle


async def test_many_reads_at_once(postgres_url: str, engine: AsyncEngine, readers: PostgreSQLReader) -> None:
    """Many reads at once are all answered; then two connections are kept, the pool is full, and the
    others are closed.
    """
    answers = await asyncio.gather(*(readers.ask(slow_process) for _ in range(2 * POOL)))
    assert len(set(answers)) == 2 * POOL
    assert checked_out(engine) == KEPT_AT_MOST
    left = await processes(postgres_url)
    assert len(left) == KEPT_AT_MOST + POOL
    assert left <= set(answers)
    assert set(await asyncio.gather(*(readers.ask(slow_process) for _ in range(POOL)))) <= left


async def test_a_connection_that_the_server_closes(
    postgres_url: str, engine: AsyncEngine, readers: PostgreSQLReader
) -> None:
    """A read on a connection that the server has closed raises an error, and the connection is not kept."""
    ended = await readers.ask(process)
    await sql(postgres_url, f"SELECT pg_terminate_backend({ended})")
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)):
        await readers.ask(process)
    assert checked_out(engine) == 0
    async with engine.connect():
        pass
    assert await readers.ask(process) != ended


async def test_a_lost_connection_that_cannot_be_replaced(
    postgres: PostgresServer, engine: AsyncEngine, readers: PostgreSQLReader
) -> None:
    """A read that cannot open a connection reports a dead connection; once the database is back, it opens a new one."""
    async with engine.connect() as connection:
        await connection.invalidate()
    database = engine.url.database
    postgres.sql(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
    with pytest.raises(DeadConnection):
        await readers.ask(process)
    postgres.sql(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
    assert await readers.ask(process)


async def test_a_connection_on_which_the_server_is_silent(engine: AsyncEngine, readers: PostgreSQLReader) -> None:
    """A connection on which the server was silent is closed: a late answer must not reach another read."""
    silent = await readers.ask(process)
    with pytest.raises(TimeoutError):
        await readers.ask(lambda driver: driver.fetchval("SELECT pg_sleep(9)"))
    assert checked_out(engine) == 0
    async with engine.connect():
        pass
    assert await readers.ask(process) != silent


async def test_a_wrong_statement(engine: AsyncEngine, readers: PostgreSQLReader) -> None:
    """A read with a wrong statement raises an error, and the connection is kept."""
    before = await readers.ask(process)
    with pytest.raises(asyncpg.PostgresError):
        await readers.ask(lambda driver: driver.fetchval("SELECT nonsense"))
    assert await readers.ask(process) == before


async def test_an_internal_error_of_the_driver(engine: AsyncEngine, readers: PostgreSQLReader) -> None:
    """A connection with an internal error of asyncpg, as happens when the server goes away, is not used again."""
    before = await readers.ask(process)

    async def confuse(_: Any) -> None:
        raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")

    with pytest.raises(asyncpg.InternalClientError):
        await readers.ask(confuse)
    assert checked_out(engine) == 0
    async with engine.connect():
        pass
    assert await readers.ask(process) != before


async def test_a_read_that_is_cancelled(engine: AsyncEngine, readers: PostgreSQLReader) -> None:
    """After a read is cancelled, the next read gets its own answer."""
    for _ in range(5):
        asking = asyncio.create_task(readers.ask(slow_process))
        await asyncio.sleep(0.02)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await readers.ask(lambda driver: driver.fetchval("SELECT 17")) == 17
    assert checked_out(engine) <= KEPT_AT_MOST


async def test_a_connection_that_was_kept_too_long(
    monkeypatch: pytest.MonkeyPatch, engine: AsyncEngine, readers: PostgreSQLReader
) -> None:
    """A connection that was kept too long goes back to the pool, which replaces it if it is too old."""
    before = await readers.ask(process)
    pool: Any = engine.pool
    pool._recycle = 0.01
    assert await readers.ask(process) == before
    monkeypatch.setattr(module, "KEPT_FOR", 0.0)
    await asyncio.sleep(0.02)
    assert await readers.ask(process) != before
    assert checked_out(engine) == 1


async def test_kept_connections_are_released_for_waiting_callers(
    engine: AsyncEngine, readers: PostgreSQLReader
) -> None:
    """Kept connections are released if the pool has no other connection left for callers that wait."""
    await asyncio.gather(*(readers.ask(slow_process) for _ in range(KEPT_AT_MOST)))
    assert checked_out(engine) == KEPT_AT_MOST
    others = [await engine.connect() for _ in range(2 * POOL - KEPT_AT_MOST)]
    readers.make_room()
    assert checked_out(engine) == len(others)
    others.append(await engine.connect())
    asking = asyncio.create_task(readers.ask(slow_process))
    await asyncio.sleep(0.02)
    async with asyncio.timeout(3):
        others.append(await engine.connect())
    await asking
    assert checked_out(engine) == len(others)
    for connection in others:
        await connection.close()


async def test_a_pool_that_has_enough_left_keeps_its_readers(engine: AsyncEngine, readers: PostgreSQLReader) -> None:
    """Kept connections are not released while the pool has others."""
    await readers.ask(process)
    readers.make_room()
    assert checked_out(engine) == 1


async def test_readers_that_are_not_closed(
    engine: AsyncEngine, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Kept connections go back to the pool with the garbage collection, without a warning."""
    readers = PostgreSQLReader(engine, PoolLimit(2 * POOL))
    await readers.ask(process)
    assert checked_out(engine) == 1
    del readers
    gc.collect()
    assert checked_out(engine) == 0
    assert caplog.records == []


async def test_closing(postgres_url: str, engine: AsyncEngine, readers: PostgreSQLReader) -> None:
    """After `close` no connection stays open, neither a kept one nor one that is in use."""
    await readers.ask(process)
    asking = asyncio.create_task(readers.ask(slow_process))
    await asyncio.sleep(0.02)
    readers.close()
    assert await asking
    await engine.dispose()
    assert checked_out(engine) == 0
    assert await processes(postgres_url) == set()
