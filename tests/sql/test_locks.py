"""Locks between transactions in PostgreSQL: every save succeeds, and the app's own transaction is never aborted."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from selfheal import DatabaseUnavailable, ImageStorage
from selfheal.blobs.database import LARGE_UPLOADS_AT_ONCE, WRITE_AT_ONCE
from selfheal.content.digests import Digests
from selfheal.content.sources import CHUNK
from tests.support.postgres import PostgresServer
from tests.support.raw_sql import sql, wait_for_lock_waiters
from tests.support.records import bytes_of
from tests.support.sample_data import noise, pieces_of

LARGE = 2 * WRITE_AT_ONCE * CHUNK + 12345
"""Bytes that are stored in more than two transactions."""
AFTER_DEADLOCK_CHECK = 1.3
"""Seconds after which PostgreSQL has looked for a deadlock; after that, only a later transaction finds it."""


def large(seed: int) -> tuple[bytes, Digests]:
    """Return large bytes that differ by seed, and their digests."""
    data = bytes([seed]) + noise(LARGE - 1)
    return data, Digests.of(data[at : at + CHUNK] for at in range(0, LARGE, CHUNK))


@pytest.fixture
async def images(postgres_tables: str) -> AsyncIterator[ImageStorage]:
    """The database half, with its tables."""
    images = ImageStorage(postgres_tables, timeout=8)
    yield images
    await images.close()


@pytest.fixture
async def engine(postgres_url: str) -> AsyncIterator[AsyncEngine]:
    """The app's own engine."""
    engine = create_async_engine(postgres_url, poolclass=NullPool)
    yield engine
    await engine.dispose()


async def until(source: bytes, at: int, is_waiting: asyncio.Event, go_on: asyncio.Event) -> AsyncIterator[bytes]:
    """Yield bytes by chunks, and wait after `at` chunks until the test lets them go on."""
    async for piece in pieces_of(source, CHUNK):
        yield piece
        at -= 1
        if at == 0:
            is_waiting.set()
            await go_on.wait()


@asynccontextmanager
async def half_stored(
    images: ImageStorage, name: str, seed: int, connection: AsyncConnection | None = None
) -> AsyncIterator[None]:
    """Store a large file with known digests: inside the block, half of its chunks are stored; at the end, the rest."""
    data, known = large(seed)
    is_waiting, go_on = asyncio.Event(), asyncio.Event()
    source = until(data, WRITE_AT_ONCE + 20, is_waiting, go_on)
    storing = asyncio.create_task(images.store_image(name, source, known=known, connection=connection))
    await is_waiting.wait()
    while not connection and not await sql(images.url, "SELECT 1 FROM image_chunk"):
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        go_on.set()
        await storing


async def test_a_write_that_is_aborted_for_a_deadlock(postgres_url: str, engine: AsyncEngine) -> None:
    """A write that the server aborts because of a deadlock is repeated, and done once the other
    transaction has ended.
    """
    await sql(postgres_url, f"ALTER DATABASE {postgres_url.rpartition('/')[2]} SET deadlock_timeout = '200ms'")
    images = ImageStorage(postgres_url, timeout=8)
    await images.create_tables()
    await images.store_image("a.png", b"one")
    two = await images.store_image("two.png", b"two")
    async with engine.connect() as holder:
        await holder.execute(
            text("SET LOCAL deadlock_timeout = '1min'")
        )  # so that our transaction is the one that is aborted
        await holder.execute(text(f"SELECT 1 FROM image_blob WHERE sha256 = '{two.sha256}' FOR UPDATE"))
        storing = asyncio.create_task(images.store_image("a.png", b"two"))
        await wait_for_lock_waiters(postgres_url)
        await holder.execute(text("SELECT 1 FROM image_storage WHERE name = 'a.png' FOR UPDATE"))
        await holder.rollback()
    assert (await storing).generation == 2
    assert await bytes_of(images, "a.png") == b"two"
    await images.close()


async def test_a_lock_that_is_held_for_long(images: ImageStorage, engine: AsyncEngine) -> None:
    """A write waits for a lock that is held for a long time; reads do not wait."""
    await images.store_image("a.png", b"one")
    async with engine.begin() as holder:
        await holder.execute(text("SELECT 1 FROM image_storage FOR UPDATE"))
        storing = asyncio.create_task(images.store_image("a.png", b"two"))
        await asyncio.sleep(AFTER_DEADLOCK_CHECK)
        assert not storing.done()
        assert await bytes_of(images, "a.png") == b"one"
    assert (await storing).generation == 2


@pytest.fixture
def no_server_errors(postgres: PostgresServer) -> Iterator[None]:
    """Fail if the server aborts a statement during the test, except one that waits its turn to store the same bytes:
    on a slow machine it begins anew.
    """
    log = postgres.data.parent / "run" / "log"
    before = log.stat().st_size
    yield
    statements = re.findall(r"(?s)ERROR: .*?STATEMENT: +([^\n]*)", log.read_text()[before:])
    assert [statement for statement in statements if "pg_advisory_xact_lock" not in statement] == []


@pytest.mark.usefixtures("no_server_errors")
async def test_a_lock_that_others_want_all_the_time(images: ImageStorage, engine: AsyncEngine) -> None:
    """A write that waits for a lock gets it in its turn, and does not start to wait again behind the others."""
    await images.store_image("a.png", b"one")
    is_over = asyncio.Event()

    async def take_the_lock() -> None:
        while not is_over.is_set():
            async with engine.begin() as connection:
                await connection.execute(text("SELECT 1 FROM image_storage FOR UPDATE"))
                await asyncio.sleep(0.4)

    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(take_the_lock())
        await asyncio.sleep(0.2)
        for number in range(2):
            await images.store_image("a.png", b"%d" % number)
        is_over.set()
    assert await bytes_of(images, "a.png") == b"1"


@pytest.mark.usefixtures("no_server_errors")
async def test_many_saves_of_the_same_large_bytes(postgres_url: str, images: ImageStorage) -> None:
    """The same large bytes can be stored under many names at once, with known digests or without."""
    others = ImageStorage(postgres_url, timeout=8)
    for seed in range(3):
        data, known = large(seed)
        storing = [
            storage.store_image(f"{seed}/{number}.png", pieces_of(data, CHUNK), known=known if number % 2 else None)
            for number in range(4)
            for storage in (images, others)
        ]
        await asyncio.gather(*storing)
    await others.close()
    assert await bytes_of(images, "1/3.png") == large(1)[0]


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
@pytest.mark.parametrize("name", ["a.png", "b.png"], ids=["same name", "other name"])
async def test_half_stored_in_the_callers_transaction(
    images: ImageStorage, engine: AsyncEngine, name: str, known: bool
) -> None:
    """A large file that is half stored in the caller's transaction delays no other save of the same bytes, and is
    stored.
    """
    data, digests = large(1)
    async with engine.begin() as connection, half_stored(images, name, 1, connection):
        await images.store_image("a.png", pieces_of(data, CHUNK), known=digests if known else None)
        assert await bytes_of(images, "a.png") == data
    assert await bytes_of(images, name) == data
    assert await sql(images.url, "SELECT count(*) FROM image_chunk") == [(-(-LARGE // CHUNK),)]


async def test_the_callers_transaction_beside_a_half_stored_file(images: ImageStorage, engine: AsyncEngine) -> None:
    """A save in the caller's transaction replaces the chunks that another save has half stored, and both are stored."""
    async with half_stored(images, "a.png", 1), AsyncSession(engine) as session, session.begin():
        await images.store_image("b.png", pieces_of(large(1)[0], CHUNK), connection=session)
    assert await bytes_of(images, "a.png") == await bytes_of(images, "b.png") == large(1)[0]


async def test_two_large_files_in_the_callers_transaction(images: ImageStorage, engine: AsyncEngine) -> None:
    """Other saves wait for the caller's transaction, and it waits for none of them."""
    (one, known), (two, known_too) = large(1), large(2)
    async with engine.begin() as connection:
        await images.store_image("one.png", one, known=known, connection=connection)
        names = [f"{number}.png" for number in range(LARGE_UPLOADS_AT_ONCE)]
        saving = [asyncio.create_task(images.store_image(name, one, known=known)) for name in names]
        await wait_for_lock_waiters(str(images.url), len(names))
        async with asyncio.timeout(3):
            await images.store_image("two.png", two, known=known_too, connection=connection)
    await asyncio.gather(*saving)
    assert await bytes_of(images, names[-1]) == one
    assert await bytes_of(images, "two.png") == two


Step = Callable[[ImageStorage, AsyncConnection | None], Awaitable[object]]


def store(name: str, data: bytes) -> Step:
    """Return a step that stores bytes, in the caller's transaction if there is one."""
    return lambda images, connection: images.store_image(name, data, connection=connection)


def purge(images: ImageStorage, _: AsyncConnection | None) -> Awaitable[object]:
    """Purge everything that no record refers to."""
    return images.purge(timedelta(0), grace=timedelta(seconds=-9))


DEADLOCKS: dict[str, tuple[Step, Step, Step]] = {
    "small, then large": (store("a.png", b"new"), store("b.png", large(1)[0]), store("a.png", large(1)[0])),
    "large, then small": (store("a.png", large(1)[0]), store("b.png", b"new"), store("b.png", large(1)[0])),
    "one name twice": (store("a.png", b"new"), store("a.png", large(1)[0]), store("a.png", large(1)[0])),
    "small ones": (store("a.png", b"one"), store("b.png", b"new"), store("b.png", b"one")),
    "a purge": (store("a.png", b"2"), store("b.png", b"1"), purge),
    "a purge, the other way": (store("a.png", b"1"), store("b.png", b"2"), purge),
}


@pytest.mark.parametrize(("first", "second", "other"), DEADLOCKS.values(), ids=DEADLOCKS)
async def test_the_callers_transaction_is_not_aborted(
    images: ImageStorage, engine: AsyncEngine, first: Step, second: Step, other: Step
) -> None:
    """The caller's transaction is not aborted if another call waits for its locks and holds a lock
    that it needs next.
    """
    for name in ("a.png", "b.png", "1.png", "2.png"):
        await images.store_image(name, name[0].encode())
        if name[0].isdigit():
            await images.bury(name)
    async with engine.begin() as connection:
        await first(images, connection)
        waiting = asyncio.ensure_future(other(images, None))
        await wait_for_lock_waiters(str(images.url))
        await asyncio.sleep(AFTER_DEADLOCK_CHECK)
        await second(images, connection)
    await waiting
    async for page in images.pages():
        for record in page:
            assert await images.digest(record) == record.sha256


@pytest.mark.usefixtures("no_server_errors")
async def test_a_stricter_default_isolation_level(postgres_url: str, images: ImageStorage) -> None:
    """With a default isolation level of REPEATABLE READ, no save of the same bytes as others is aborted."""
    name = postgres_url.rpartition("/")[2]
    await sql(postgres_url, f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'")
    stricter = ImageStorage(postgres_url)
    stricter.home.settle()  # the test holds what is inside of it
    for seed in range(4):
        async with half_stored(stricter, f"{seed}/known.png", seed):
            saving = [stricter.store_image(f"{seed}/{number}.png", large(seed)[0]) for number in range(4)]
            await asyncio.gather(*saving)
        assert await bytes_of(images, f"{seed}/known.png") == await bytes_of(images, f"{seed}/3.png") == large(seed)[0]
    await stricter.close()


async def test_a_stricter_transaction_of_the_caller_is_refused(images: ImageStorage, engine: AsyncEngine) -> None:
    """A save in a caller's transaction that cannot see the rows that it must replace is refused,
    and changes nothing.
    """
    stricter = engine.execution_options(isolation_level="REPEATABLE READ")
    async with stricter.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM image_chunk"))).scalar_one() == 0
        async with half_stored(images, "a.png", 1):
            with pytest.raises(DatabaseUnavailable):
                await images.store_image("b.png", pieces_of(large(1)[0], CHUNK), connection=connection)
            await connection.rollback()
    assert await bytes_of(images, "a.png") == large(1)[0]
    assert await images.find("b.png") is None


async def test_a_connection_that_commits_each_statement_is_no_transaction(
    images: ImageStorage, engine: AsyncEngine
) -> None:
    """A connection that commits each statement is refused, because a record could be stored without its bytes."""
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    async with autocommit.connect() as connection, AsyncSession(autocommit) as session:
        for given in (connection, session):
            for data in (b"small", large(1)[0]):
                with pytest.raises(DatabaseUnavailable, match="commits each statement"):
                    await images.store_image("a.png", data, connection=given)
    assert await sql(images.url, "SELECT 1 FROM image_chunk UNION ALL SELECT 1 FROM image_storage") == []
