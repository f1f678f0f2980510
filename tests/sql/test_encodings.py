"""Databases whose encoding cannot hold every name: such a name is absent, and takes no other name with it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette

from selfheal import SelfHealError, SelfHealMiddleware, UploadStore, bulk
from selfheal.bulk.outcomes import Outcome
from tests.support.postgres import PostgresServer
from tests.support.records import bytes_of, small_file
from tests.support.uploads import get

BAD = "日本.png"
GOOD = [f"größe{number}.png" for number in range(40)]


@pytest.fixture(scope="module")
def latin1_url(postgres: PostgresServer) -> str:
    """A database in LATIN1."""
    name = f"t{uuid4().hex[:12]}"
    postgres.sql(f"CREATE DATABASE {name} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    return postgres.url(name)


@pytest.fixture
async def latin1_store(latin1_url: str, postgres: PostgresServer, directory: Path) -> AsyncIterator[UploadStore]:
    """A store over a database in LATIN1, with its tables."""
    async with UploadStore(directory, latin1_url) as store:
        await store.database.create_tables()
        yield store
    postgres.empty(latin1_url.rpartition("/")[2])


async def test_lookups_at_the_same_time(latin1_store: UploadStore) -> None:
    """Of many misses at the same time, the names that cannot be recorded are absent, and all others are restored."""
    for name in GOOD:
        (await latin1_store.save(name, name.encode())).path.unlink()
    app = SelfHealMiddleware(Starlette(), latin1_store)
    asked = [name for pair in zip(GOOD, [f"{number}{BAD}" for number in range(40)], strict=True) for name in pair]
    answers = await asyncio.gather(*(get(app, name) for name in asked))
    assert {name: answer.status_code for name, answer in zip(asked, answers, strict=True)} == {
        name: 200 if name in GOOD else 404 for name in asked
    }


async def test_reads_of_many_names(latin1_store: UploadStore) -> None:
    """Every read of a list of names returns what there is of the others."""
    names = [*GOOD[:3], BAD, *GOOD[3:5]]
    for name in GOOD[:5]:
        await latin1_store.database.store_image(name, b"x")
    catalogue, known = latin1_store.database.catalogue, set(GOOD[:5])
    assert set(await catalogue.find(names)) == known
    assert await catalogue.generations(names) == dict.fromkeys(known, 1)
    assert await catalogue.digests(names) == dict.fromkeys(known, hashlib.sha256(b"x").hexdigest())
    assert set(await latin1_store.database.blobs.fetch(names)) == known


async def test_reads_of_one_name(latin1_store: UploadStore) -> None:
    """A name that cannot be recorded has no record and no history."""
    assert await latin1_store.database.find(BAD) is None
    assert await latin1_store.database.history(BAD) == []
    assert await latin1_store.database.catalogue.generations([BAD]) == {}
    assert await latin1_store.database.blobs.fetch([BAD]) == {}


@pytest.mark.parametrize("size", [5, 3_000_000])
async def test_a_save(size: int, latin1_store: UploadStore) -> None:
    """A save of such a name fails, says why, and leaves no file; the next save works."""
    with pytest.raises(SelfHealError, match=r"cannot hold this name: .*LATIN1\W+use a database in UTF8"):
        await latin1_store.save(BAD, bytes(size))
    assert not latin1_store.disk.path_of(BAD).exists()
    await latin1_store.save(GOOD[0], bytes(size))
    assert await bytes_of(latin1_store.database, GOOD[0]) == bytes(size)


async def test_a_save_in_the_callers_transaction(latin1_store: UploadStore, latin1_url: str) -> None:
    """In the app's own transaction the error is the same."""
    engine = create_async_engine(latin1_url)
    async with engine.connect() as connection:
        with pytest.raises(SelfHealError, match="cannot hold this name"):
            await latin1_store.save(BAD, b"x", connection=connection)
    await engine.dispose()


async def test_other_writes(latin1_store: UploadStore) -> None:
    """Deletion and undo of such a name say why they cannot be done."""
    for write in (latin1_store.database.bury, latin1_store.database.undo):
        with pytest.raises(SelfHealError, match="cannot hold this name"):
            await write(BAD)


async def test_storing_many(latin1_store: UploadStore) -> None:
    """Of many files all are stored but those whose names cannot be recorded."""
    names = [BAD, *GOOD[:9], f"2{BAD}"]
    stored = await latin1_store.database.store_many([small_file(name, name.encode()) for name in names])
    assert stored == set(GOOD[:9])
    assert await latin1_store.database.store_many([small_file(BAD, b"x")]) == set()


async def test_a_migration(latin1_store: UploadStore) -> None:
    """A run stores every other file, and reports the names that the database cannot hold."""
    for name in (BAD, *GOOD):
        path = latin1_store.disk.path_of(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    results = [result async for result in bulk.migrate(latin1_store)]
    assert {result.name for result in results if result.outcome is Outcome.MIGRATED} == set(GOOD)
    (failed,) = (result for result in results if result.is_problem)
    assert (failed.name, failed.outcome) == (BAD, Outcome.FAILED)
    assert "encoding" in failed.detail
    assert [result async for result in bulk.verify(latin1_store) if result.name in GOOD and result.is_problem] == []


async def test_a_database_without_encoding(postgres: PostgresServer, directory: Path) -> None:
    """A database in SQL_ASCII takes every byte, and every name."""
    name = f"t{uuid4().hex[:12]}"
    postgres.sql(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    async with UploadStore(directory, postgres.url(name)) as store:
        await store.database.create_tables()
        for wanted in (BAD, GOOD[0]):
            (await store.save(wanted, wanted.encode())).path.unlink()
            assert (await get(SelfHealMiddleware(Starlette(), store), wanted)).content == wanted.encode()
        assert set(await store.database.catalogue.find([BAD, GOOD[0], "none.png"])) == {BAD, GOOD[0]}
