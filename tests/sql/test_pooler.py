"""PostgreSQL behind a pooler in transaction mode: no prepared statement is used after its transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.applications import Starlette

from selfheal import SelfHealMiddleware, UploadStore, bulk
from selfheal.content.sources import CHUNK
from selfheal.sql.backends import database_url
from tests.support.pooler import running_pooler
from tests.support.postgres import PostgresServer
from tests.support.records import bytes_of
from tests.support.sample_data import noise
from tests.support.uploads import get

NAMES = [f"{number}.png" for number in range(60)]


@pytest.fixture(scope="session")
def pooler(postgres: PostgresServer) -> Iterator[int]:
    """The port of a pooler that has three connections to the server."""
    with running_pooler(postgres, postgres.data.parent / "pooler") as port:
        yield port


@pytest.fixture(params=["pgbouncer=true", "prepared_statement_cache_size=0", "statement_cache_size=0"])
def pooled_url(request: pytest.FixtureRequest, postgres: PostgresServer, postgres_url: str, pooler: int) -> str:
    """An empty database behind the pooler; each way to say so in the URL."""
    return f"{postgres.url(postgres_url.rpartition('/')[2], pooler)}?{request.param}"


async def test_everything_behind_a_pooler(pooled_url: str, directory: Path) -> None:
    """Saves, deletions, undos, restores, listings and runs of many tasks work on whatever connection they get."""
    async with UploadStore(directory, pooled_url) as store:
        await store.database.create_tables()
        await asyncio.gather(*(store.save(name, name.encode() * 99) for name in NAMES))
        large = noise(20 * CHUNK)
        (await store.save("large.png", large)).path.unlink()
        for name in NAMES:
            store.disk.path_of(name).unlink()
        app = SelfHealMiddleware(Starlette(), store)
        answers = await asyncio.gather(*(get(app, name) for name in ("large.png", *NAMES[:30], "none.png")))
        assert [answer.status_code for answer in answers] == [200] * 31 + [404]
        assert answers[0].content == large
        assert all(await asyncio.gather(*(store.delete(name) for name in NAMES[:20])))
        await store.undo(NAMES[0])
        assert await bytes_of(store.database, NAMES[0]) == NAMES[0].encode() * 99
        results = [result async for result in bulk.restore(store, verify=True)]
        assert not any(result.is_problem for result in results)
        assert await store.database.count() == len(NAMES) - 19 + 1


async def test_no_statement_is_left(pooled_url: str, directory: Path) -> None:
    """After many questions no connection of the pooler has a prepared statement."""
    counting = "SELECT count(*), pg_backend_pid() FROM pg_prepared_statements WHERE name <> ''"

    async def count(connection: AsyncConnection) -> tuple[int, int]:
        left, process = (await connection.exec_driver_sql(counting)).one()
        return left, process

    async with UploadStore(directory, pooled_url) as store:
        await store.database.create_tables()
        await asyncio.gather(*(store.save(name, b"x") for name in NAMES[:20]))
        await asyncio.gather(*(store.database.find(name) for name in NAMES))
        counted = [await store.database._engine.read(count) for _ in range(6)]
    assert {left for left, _ in counted} == {0}
    assert len({process for _, process in counted}) > 1


@pytest.mark.parametrize("query", ["pgbouncer=true", "prepared_statement_cache_size=0", "statement_cache_size=0"])
def test_urls_that_name_a_pooler(query: str) -> None:
    """Each way to say so turns both caches of statements off."""
    url = database_url(f"postgres://h/db?{query}")
    assert dict(url.query) == {"statement_cache_size": "0", "prepared_statement_cache_size": "0"}
    assert database_url("postgres://h/db?pgbouncer=false").query == {}
