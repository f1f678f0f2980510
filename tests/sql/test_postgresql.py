"""Connections that are kept for reading, over a real PostgreSQL: used again, few, thrown away when they are lost."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from selfheal.sql import postgresql as module
from selfheal.sql.postgresql import KEPT_AT_MOST, Readers
from selfheal.sql.statements import DeadConnection
from tests.support.postgres import PostgresServer
from tests.support.sides import sql

POOL = 3


@pytest.fixture
async def engine(postgres_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine with a connection in its pool."""
    engine = create_async_engine(postgres_url, pool_size=POOL, max_overflow=POOL, connect_args={"command_timeout": 0.5})
    async with engine.connect():
        pass
    yield engine
    await engine.dispose()


@pytest.fixture
async def readers(engine: AsyncEngine) -> AsyncIterator[Readers]:
    """Its readers."""
    readers = Readers(engine, 2 * POOL)
    yield readers
    readers.close()


async def process(driver: Any) -> int:
    """The server's process behind a connection."""
    return int(await driver.fetchval("SELECT pg_backend_pid()"))


async def slowly(driver: Any) -> int:
    """The same, for long enough that others ask meanwhile."""
    return int(await driver.fetchval("SELECT pg_backend_pid() FROM pg_sleep(0.1)"))


async def processes(url: str) -> set[int]:
    """The server's processes for others in this database, once those that end have done so."""
    await asyncio.sleep(0.2)
    query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    return {row[0] for row in await sql(url, query)}


def taken(engine: AsyncEngine) -> int:
    """How many connections the pool has handed out."""
    pool: Any = engine.pool
    return int(pool.checkedout())


async def test_one_that_asks_over_and_over(engine: AsyncEngine, readers: Readers) -> None:
    """Always the same connection, which is kept."""
    assert len({await readers.ask(process) for _ in range(5)}) == 1
    assert taken(engine) == 1


async def test_none_is_idle(engine: AsyncEngine, readers: Readers) -> None:
    """One that would have to be opened is not had at once; one that is kept, or in the pool, is."""
    assert readers.has_idle
    async with engine.connect():
        assert not readers.has_idle
    await readers.ask(process)
    assert readers.has_idle


async def test_many_at_once(postgres_url: str, engine: AsyncEngine, readers: Readers) -> None:
    """All are answered; then a few are kept, the pool is as full as it may be, and the rest is closed."""
    answers = await asyncio.gather(*(readers.ask(slowly) for _ in range(2 * POOL)))
    assert len(set(answers)) == 2 * POOL
    assert taken(engine) == KEPT_AT_MOST
    left = await processes(postgres_url)
    assert len(left) == KEPT_AT_MOST + POOL
    assert left <= set(answers)
    assert set(await asyncio.gather(*(readers.ask(slowly) for _ in range(POOL)))) <= left


async def test_one_that_the_server_closes(postgres_url: str, engine: AsyncEngine, readers: Readers) -> None:
    """Who asks it is told, and it is not kept."""
    ended = await readers.ask(process)
    await sql(postgres_url, f"SELECT pg_terminate_backend({ended})")
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)):
        await readers.ask(process)
    assert taken(engine) == 0
    async with engine.connect():
        pass
    assert await readers.ask(process) != ended


async def test_one_that_was_lost_and_cannot_be_opened(
    postgres: PostgresServer, engine: AsyncEngine, readers: Readers
) -> None:
    """Whoever asks is told that it is dead; once the database is back it is opened anew."""
    async with engine.connect() as connection:
        await connection.invalidate()
    database = engine.url.database
    postgres.sql(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
    with pytest.raises(DeadConnection):
        await readers.ask(process)
    postgres.sql(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
    assert await readers.ask(process)


async def test_one_that_the_server_is_silent_on(engine: AsyncEngine, readers: Readers) -> None:
    """It is thrown away: what it would say later is nobody's answer."""
    silent = await readers.ask(process)
    with pytest.raises(TimeoutError):
        await readers.ask(lambda driver: driver.fetchval("SELECT pg_sleep(9)"))
    assert taken(engine) == 0
    async with engine.connect():
        pass
    assert await readers.ask(process) != silent


async def test_a_question_that_is_wrong(engine: AsyncEngine, readers: Readers) -> None:
    """It is told so, and the connection is as good as before."""
    before = await readers.ask(process)
    with pytest.raises(asyncpg.PostgresError):
        await readers.ask(lambda driver: driver.fetchval("SELECT nonsense"))
    assert await readers.ask(process) == before


async def test_a_driver_that_is_confused(engine: AsyncEngine, readers: Readers) -> None:
    """As asyncpg is now and then while the server goes away: it is not asked again."""
    before = await readers.ask(process)

    async def confuse(_: Any) -> None:
        raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")

    with pytest.raises(asyncpg.InternalClientError):
        await readers.ask(confuse)
    assert taken(engine) == 0
    async with engine.connect():
        pass
    assert await readers.ask(process) != before


async def test_a_question_that_is_cancelled(engine: AsyncEngine, readers: Readers) -> None:
    """Whoever asks next gets the answer to what he asked."""
    for _ in range(5):
        asking = asyncio.create_task(readers.ask(slowly))
        await asyncio.sleep(0.02)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await readers.ask(lambda driver: driver.fetchval("SELECT 17")) == 17
    assert taken(engine) <= KEPT_AT_MOST


async def test_one_that_was_kept_for_long(
    monkeypatch: pytest.MonkeyPatch, engine: AsyncEngine, readers: Readers
) -> None:
    """It goes back into the pool before it is asked: the pool opens anew what is too old."""
    before = await readers.ask(process)
    pool: Any = engine.pool
    pool._recycle = 0.01
    assert await readers.ask(process) == before
    monkeypatch.setattr(module, "KEPT_FOR", 0.0)
    await asyncio.sleep(0.02)
    assert await readers.ask(process) != before
    assert taken(engine) == 1


async def test_somebody_waits_for_one_that_is_kept(engine: AsyncEngine, readers: Readers) -> None:
    """Where the pool has no other left it is let go; none is kept that others wait for."""
    await asyncio.gather(*(readers.ask(slowly) for _ in range(KEPT_AT_MOST)))
    assert readers.kept == KEPT_AT_MOST
    others = [await engine.connect() for _ in range(2 * POOL - KEPT_AT_MOST)]
    readers.make_room()
    assert readers.kept == 0
    others.append(await engine.connect())
    asking = asyncio.create_task(readers.ask(slowly))
    await asyncio.sleep(0.02)
    async with asyncio.timeout(3):
        others.append(await engine.connect())
    await asking
    assert readers.kept == 0
    for connection in others:
        await connection.close()


async def test_a_pool_that_has_enough_left_keeps_its_readers(engine: AsyncEngine, readers: Readers) -> None:
    """They are not let go for as long as others can be had."""
    await readers.ask(process)
    readers.make_room()
    assert readers.kept == 1


async def test_readers_that_nobody_closed(
    engine: AsyncEngine, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The pool gets back what was kept, and has nothing to complain of."""
    readers = Readers(engine, 2 * POOL)
    await readers.ask(process)
    assert taken(engine) == 1
    del readers
    gc.collect()
    assert taken(engine) == 0
    assert caplog.records == []


async def test_closing(postgres_url: str, engine: AsyncEngine, readers: Readers) -> None:
    """Nothing stays open, neither what is kept nor what is being asked."""
    await readers.ask(process)
    asking = asyncio.create_task(readers.ask(slowly))
    await asyncio.sleep(0.02)
    readers.close()
    assert await asking
    await engine.dispose()
    assert taken(engine) == 0
    assert await processes(postgres_url) == set()
