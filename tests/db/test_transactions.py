"""Saves in the caller's own transaction. Over every database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from selfheal import ImageStorage, InvalidName, Record
from selfheal.blobs.database import WRITE_AT_ONCE
from selfheal.content.sources import CHUNK
from selfheal.errors import FileChanged
from tests.support.raw_sql import sql
from tests.support.records import bytes_of, digests_of, sha256_of
from tests.support.tables import contents

LARGE = WRITE_AT_ONCE * CHUNK + 12345
"""Bytes that are stored in more than one transaction."""
Caller = Callable[[str, Callable[[Any], Awaitable[None]]], Awaitable[None]]


async def with_connection(url: str, work: Callable[[Any], Awaitable[None]]) -> None:
    """Run work in a transaction of an AsyncConnection; roll it back if the work fails."""
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await work(connection)
    finally:
        await engine.dispose()


async def with_session(url: str, work: Callable[[Any], Awaitable[None]]) -> None:
    """Run work in a transaction of an AsyncSession; roll it back if the work fails."""
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with AsyncSession(engine) as session, session.begin():
            await work(session)
    finally:
        await engine.dispose()


CALLERS = pytest.mark.parametrize("caller", [with_connection, with_session])
APP_TABLE = "CREATE TABLE app_cat (name varchar(99) PRIMARY KEY)"


@CALLERS
@pytest.mark.parametrize("data", [b"new", b"", bytes(LARGE)], ids=["small", "nothing", "large"])
async def test_in_a_transaction_that_commits(
    images: ImageStorage, database_url: str, caller: Caller, data: bytes
) -> None:
    """A file stored in the caller's transaction exists after its commit, with the app's own rows."""
    await sql(database_url, APP_TABLE)
    await images.store_image("old.png", b"old")
    returned: list[Record] = []

    async def work(connection: AsyncConnection | AsyncSession) -> None:
        await connection.execute(text("INSERT INTO app_cat VALUES ('tom')"))
        for name in ("new.png", "old.png"):
            returned.append(await images.store_image(name, data, connection=connection))

    await caller(database_url, work)
    assert await sql(database_url, "SELECT name FROM app_cat") == [("tom",)]
    assert [await images.find(name) for name in ("new.png", "old.png")] == returned
    assert [record.generation for record in returned] == [1, 2]
    assert [await bytes_of(images, name) for name in ("new.png", "old.png")] == [data, data]
    assert [version.sha256 for version in await images.history("old.png")] == [sha256_of(b"old")]


@CALLERS
@pytest.mark.parametrize("data", [b"new", bytes(LARGE)], ids=["small", "large"])
async def test_in_a_transaction_that_is_rolled_back(
    images: ImageStorage, database_url: str, caller: Caller, data: bytes
) -> None:
    """A file stored in the caller's transaction leaves nothing after its rollback."""
    await sql(database_url, APP_TABLE)
    await images.store_image("old.png", b"old")
    before = await contents(database_url)

    async def work(connection: AsyncConnection | AsyncSession) -> None:
        await connection.execute(text("INSERT INTO app_cat VALUES ('tom')"))
        for name in ("new.png", "old.png"):
            await images.store_image(name, data, connection=connection)
        raise EOFError("the app has failed")

    with pytest.raises(EOFError):
        await caller(database_url, work)
    assert await contents(database_url) == before
    assert await sql(database_url, "SELECT name FROM app_cat") == []
    assert await bytes_of(images, "old.png") == b"old"
    assert await images.find("new.png") is None


@CALLERS
async def test_a_transaction_sees_its_own_saves(images: ImageStorage, database_url: str, caller: Caller) -> None:
    """Saves of one name in one transaction are generations that follow each other."""
    generations: list[int] = []

    async def work(connection: AsyncConnection | AsyncSession) -> None:
        for data in (b"one", b"two", b"two", b"three"):
            generations.append((await images.store_image("a.png", data, connection=connection)).generation)

    await caller(database_url, work)
    assert generations == [1, 2, 2, 3]
    assert await bytes_of(images, "a.png") == b"three"
    assert [version.generation for version in await images.history("a.png")] == [2, 1]


@CALLERS
async def test_a_refusal_inside_a_transaction(images: ImageStorage, database_url: str, caller: Caller) -> None:
    """After a refused save, the caller's transaction can go on, and has nothing of that save."""

    async def work(connection: AsyncConnection | AsyncSession) -> None:
        with pytest.raises(InvalidName):
            await images.store_image("../a.png", b"x", connection=connection)
        with pytest.raises(FileChanged):
            await images.store_image("a.png", b"x", known=digests_of(b"y"), connection=connection)
        await images.store_image("b.png", b"good", connection=connection)

    await caller(database_url, work)
    assert await images.find("a.png") is None
    assert await bytes_of(images, "b.png") == b"good"
