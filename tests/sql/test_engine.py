"""The engine: every failure is *unknown*, never *absent*, in bounded time, and it recovers by itself."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import socket
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import anyio
import asyncpg
import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import MetaData

from selfheal import (
    DatabaseUnavailable,
    ImageStorage,
    MissingExtra,
    SchemaError,
    SelfHealError,
    define_tables,
)
from selfheal.aio.single_flight import Tasks
from selfheal.content.digests import Digests
from selfheal.content.sources import CHUNK
from selfheal.sql import transactions
from selfheal.sql.engine import Engine, wal_is_safe
from selfheal.sql.models import Record, SmallFile
from selfheal.sql.schema import SCHEMA_VERSION
from tests.support import environment
from tests.support.postgres import PostgresServer, start_postgres
from tests.support.proxy import Mode, Proxy
from tests.support.sides import sql
from tests.support.sockets import free_port

TIMEOUT = 1.0
SLACK = 8.0
"""Seconds beyond a timeout that a busy machine may take."""
LARGE = bytes(20 * CHUNK)


def a_record() -> Record:
    """A record as somebody may hold it who read it earlier."""
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    return Record("a.png", hashlib.sha256(b"x").hexdigest(), 1, "image/png", 1, 1, moment, moment)


async def read_all(images: ImageStorage) -> bytes:
    """The bytes of a record, of which only the database knows whether they are there."""
    return b"".join([chunk async for chunk in images.read(a_record())])


async def all_pages(images: ImageStorage) -> list[Any]:
    """Every page of the catalogue."""
    return [page async for page in images.pages()]


READING: dict[str, Callable[[ImageStorage], Awaitable[Any]]] = {
    "find": lambda images: images.find("a.png"),
    "find_many": lambda images: images.find_many(["a.png", "b.png"]),
    "fetch": lambda images: images.fetch(["a.png"]),
    "read": read_all,
    "history": lambda images: images.history("a.png"),
    "pages": all_pages,
    "count": lambda images: images.count(),
}
WRITING: dict[str, Callable[[ImageStorage], Awaitable[Any]]] = {
    "store_image": lambda images: images.store_image("a.png", b"new"),
    "store a large image": lambda images: images.store_image("a.png", LARGE),
    "store_many": lambda images: images.store_many([SmallFile("a.png", 1, 1, [b"x"], Digests.of([b"x"]))]),
    "mend": lambda images: images.mend(a_record(), b"x"),
    "bury": lambda images: images.bury("a.png"),
    "undo": lambda images: images.undo("a.png"),
    "purge": lambda images: images.purge(timedelta(days=30)),
}
ASKING = READING | WRITING
CREATING: dict[str, Callable[[ImageStorage], Awaitable[Any]]] = {"create_tables": lambda images: images.create_tables()}


@asynccontextmanager
async def opened(url: Any, timeout: float = TIMEOUT) -> AsyncIterator[ImageStorage]:
    """The database half over a URL or an engine; what still runs ends before it is closed."""
    tasks = Tasks()
    images = ImageStorage(url, timeout=timeout, tasks=tasks)
    try:
        yield images
    finally:
        await tasks.settle(20)
        await images.close()


@asynccontextmanager
async def prepared(url: str, timeout: float = TIMEOUT) -> AsyncIterator[ImageStorage]:
    """The same with its tables made, and `a.png` in it."""
    async with opened(url, timeout) as images:
        await images.create_tables()
        await images.store_image("a.png", b"one")
        yield images


async def check_unknown(
    images: ImageStorage, asked: dict[str, Callable[[ImageStorage], Awaitable[Any]]], error: type[Exception]
) -> list[Exception]:
    """Every one of these questions, asked one after the other, raises this error."""
    caught: list[Exception] = []
    for what, ask in asked.items():
        try:
            answer = await ask(images)
        except error as problem:
            caught.append(problem)
        except Exception as problem:
            pytest.fail(f"{what} raised {problem!r}")
        else:
            pytest.fail(f"{what} answered {answer!r}")
    return caught


async def bytes_of(images: ImageStorage, name: str) -> bytes | None:
    """The bytes that a name has; None if it has none."""
    record = await images.find(name)
    return None if record is None else b"".join([chunk async for chunk in images.read(record)])


# -- no answer ------------------------------------------------------------------------------------------------------


async def test_nobody_listens() -> None:
    """Where no server listens every question is unknown."""
    async with opened(f"postgresql+asyncpg://nobody@127.0.0.1:{free_port()}/nothing") as images:
        await check_unknown(images, ASKING | CREATING, DatabaseUnavailable)


@pytest.fixture
def black_hole() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        yield int(listening.getsockname()[1])


@pytest.mark.parametrize("asked", ["find", "store_image", "create_tables"])
async def test_a_black_hole(black_hole: int, asked: str) -> None:
    """A server that never answers is unknown within the timeout, not for ever."""
    async with opened(f"postgresql+asyncpg://nobody@127.0.0.1:{black_hole}/nothing") as images:
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            await (ASKING | CREATING)[asked](images)
        # the tables are tried three times
        assert time.monotonic() - began < 3 * TIMEOUT + SLACK


async def test_many_askers_of_a_black_hole(black_hole: int) -> None:
    """However many ask a server that never answers, none of them waits for the others."""
    async with opened(f"postgresql+asyncpg://nobody@127.0.0.1:{black_hole}/nothing") as images:
        began = time.monotonic()
        answers = await asyncio.gather(*(images.find(f"{n}.png") for n in range(40)), return_exceptions=True)
        assert {type(answer) for answer in answers} == {DatabaseUnavailable}
        assert time.monotonic() - began < 3 * TIMEOUT + SLACK


async def test_a_damaged_file(tmp_path: Path) -> None:
    """A file that is no SQLite database is unknown, and is left as it is."""
    garbage = b"this is no database, whatever its name says " * 1000
    (tmp_path / "a.db").write_bytes(garbage)
    async with opened(f"sqlite+aiosqlite:///{tmp_path}/a.db") as images:
        await check_unknown(images, ASKING | CREATING, DatabaseUnavailable)
    assert (tmp_path / "a.db").read_bytes() == garbage


async def test_damaged_pages(tmp_path: Path) -> None:
    """A database of which only the first page is left is unknown, never empty."""
    url = f"sqlite+aiosqlite:///{tmp_path}/a.db"
    async with prepared(url):
        pass
    await sql(url, "PRAGMA journal_mode=DELETE")
    whole = (tmp_path / "a.db").read_bytes()
    (tmp_path / "a.db").write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    async with opened(url) as images:
        for ask in (READING["find"], READING["count"], READING["pages"], READING["fetch"]):
            with pytest.raises(DatabaseUnavailable):
                await ask(images)


async def test_a_directory_as_file(tmp_path: Path) -> None:
    """A directory where the database's file should be is unknown."""
    async with opened(f"sqlite+aiosqlite:///{tmp_path}") as images:
        await check_unknown(images, ASKING | CREATING, DatabaseUnavailable)


async def test_a_missing_directory(tmp_path: Path) -> None:
    """A file in a directory that is not there is unknown, and nothing is made."""
    async with opened(f"sqlite+aiosqlite:///{tmp_path}/none/a.db") as images:
        await check_unknown(images, ASKING | CREATING, DatabaseUnavailable)
    assert list(tmp_path.iterdir()) == []


async def test_a_locked_file(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody else holds SQLite's lock questions are unknown; once it is free they are answered."""
    monkeypatch.setattr(transactions, "LOCK_PATIENCE", 0.0)
    async with prepared(sqlite_url, timeout=0.2) as images:
        holder = sqlite3.connect(sqlite_url.partition("///")[2], isolation_level=None)
        try:
            holder.execute("BEGIN EXCLUSIVE")
            await check_unknown(images, WRITING, DatabaseUnavailable)
            if not wal_is_safe(sqlite3.sqlite_version_info):  # behind a WAL readers go on
                await check_unknown(images, READING, DatabaseUnavailable)
        finally:
            holder.close()
        assert await bytes_of(images, "a.png") == b"one"
        await images.store_image("b.png", b"two")


async def test_waiting_for_a_lock(sqlite_url: str) -> None:
    """A lock that is given back in time is waited for."""
    async with prepared(sqlite_url, timeout=5) as images:
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
    """A table that somebody else has locked is unknown within the timeout; once it is free there is an answer."""
    async with prepared(postgres_url) as images:
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


async def test_a_driver_that_is_confused(postgres_url: str) -> None:
    """asyncpg has an error for that which is none of its others; it is as unknown as any."""

    async def confuse(_: AsyncConnection) -> None:
        raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")

    async with prepared(postgres_url) as images:
        with pytest.raises(DatabaseUnavailable, match="cannot switch"):
            await images._engine.read(confuse)
        assert await bytes_of(images, "a.png") == b"one"


async def test_a_database_that_takes_no_writes(postgres_url: str) -> None:
    """Where nothing can be written, saving fails as unknown, and reading goes on."""
    async with prepared(postgres_url):
        pass
    name = postgres_url.rpartition("/")[2]
    await sql(postgres_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with opened(postgres_url) as images:
        with pytest.raises(DatabaseUnavailable):
            await images.store_image("a.png", b"two")
        assert await bytes_of(images, "a.png") == b"one"


async def test_no_connection_is_kept_from_who_needs_it(postgres_url: str) -> None:
    """However many were reading before: as many as may be have one each, all at once."""
    async with prepared(postgres_url) as images:
        for _ in range(2):
            await asyncio.gather(*(images.find("a.png") for _ in range(4)))
        have_one = asyncio.Barrier(10)

        async def hold(_: AsyncConnection) -> None:
            await have_one.wait()

        began = time.monotonic()
        await asyncio.gather(*(images._engine.read(hold) for _ in range(10)))
        assert time.monotonic() - began < TIMEOUT


async def test_every_connection_is_taken(database_url: str) -> None:
    """Whoever finds no free connection within the timeout is told so; then there are connections again."""
    tasks = Tasks()
    engine = Engine(database_url, define_tables(MetaData()), timeout=TIMEOUT, tasks=tasks)
    async with opened(database_url) as images:
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
    await tasks.settle(20)
    await engine.close()


# -- tables of another shape ----------------------------------------------------------------------------------------


async def test_no_tables(database_url: str) -> None:
    """In a database without tables every question says that they are missing, and what to run."""
    async with opened(database_url) as images:
        caught = await check_unknown(images, ASKING, SchemaError)
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
    """A table or a column that is missing is told as such, by whatever needs it, never as an absent name."""
    for statement, needing in MISSING.items():
        async with prepared(database_url):
            pass
        await sql(database_url, statement)
        async with opened(database_url) as images:
            await check_unknown(images, {what: ASKING[what] for what in needing}, SchemaError)
        for table in ("storage", "blob", "chunk", "history", "schema"):
            await sql(database_url, f"DROP TABLE IF EXISTS image_{table}")


async def test_no_mark_of_the_schema(database_url: str) -> None:
    """Without the table that says of which version the others are, nothing is trusted."""
    async with prepared(database_url):
        pass
    await sql(database_url, "DROP TABLE image_schema")
    async with opened(database_url) as images:
        await check_unknown(images, ASKING, SchemaError)


@pytest.mark.parametrize(
    ("change", "says"), [(1, "upgrade selfheal"), (-1, "selfheal migrate")], ids=["newer", "older"]
)
async def test_tables_of_another_version(database_url: str, change: int, says: str) -> None:
    """Tables of another version are not touched, and the message says what to do."""
    async with prepared(database_url):
        pass
    await sql(database_url, f"UPDATE image_schema SET version = {SCHEMA_VERSION + change}")
    async with opened(database_url) as images:
        caught = await check_unknown(images, ASKING, SchemaError)
        assert all(says in str(error) for error in caught)
        await sql(database_url, f"UPDATE image_schema SET version = {SCHEMA_VERSION}")
        assert await bytes_of(images, "a.png") == b"one"


async def test_missing_tables_inside_the_callers_transaction(database_url: str) -> None:
    """Inside the caller's transaction too, missing tables are told as such."""
    engine = create_async_engine(database_url, poolclass=NullPool)
    async with opened(database_url) as images, engine.connect() as connection:
        with pytest.raises(SchemaError):
            await images.store_image("a.png", b"x", connection=connection)
    await engine.dispose()


# -- a server that comes and goes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server of this file's own, which may be stopped and started."""
    server = start_postgres(tmp_path_factory.mktemp("own-postgres"))
    yield server
    server.control("stop", "-m", "immediate")


def control(server: PostgresServer, verb: str) -> None:
    """Restart, stop or start a server; its log goes to a file, for a pipe of ours would stay open with the server."""
    run = server.data.parent / "run"
    log = ("-l", str(run / "log"))
    crash = ("-m", "immediate")
    options = ("-o", f"-h 127.0.0.1 -p {server.port} -k {run} -c fsync=off -c max_connections=200")
    server.control(verb, *{"restart": (*log, *crash), "stop": crash, "start": (*log, *options)}[verb])


async def warm(images: ImageStorage) -> None:
    """Have several connections open in the pool."""
    await asyncio.gather(*(images.find("a.png") for _ in range(10)))


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "unnoticed"])
async def test_a_restart(own_postgres: PostgresServer, noticed: bool) -> None:
    """After the server restarted every read is answered at once: each is tried again on a fresh connection."""
    async with prepared(own_postgres.url("postgres"), timeout=5) as images:
        await warm(images)
        if noticed:
            await anyio.to_thread.run_sync(control, own_postgres, "restart")
        else:
            control(own_postgres, "restart")  # the loop stands still, and sees nothing of it
        answers = await asyncio.gather(*(images.find("a.png") for _ in range(5)))
        assert {None if answer is None else answer.name for answer in answers} == {"a.png"}
        assert await bytes_of(images, "a.png") is not None
        await images.store_image("a.png", b"after")
        assert await bytes_of(images, "a.png") == b"after"


async def test_down_and_up_again(own_postgres: PostgresServer) -> None:
    """While the server is down every question is unknown; when it is up again there are answers."""
    async with prepared(own_postgres.url("postgres"), timeout=5) as images:
        await warm(images)
        await anyio.to_thread.run_sync(control, own_postgres, "stop")
        try:
            await check_unknown(images, ASKING, DatabaseUnavailable)
        finally:
            await anyio.to_thread.run_sync(control, own_postgres, "start")
        assert await bytes_of(images, "a.png") is not None
        await images.store_image("a.png", b"again")


@asynccontextmanager
async def proxied(postgres: PostgresServer, url: str) -> AsyncIterator[tuple[Proxy, ImageStorage]]:
    """A prepared database whose connections all go through a proxy."""
    async with (
        Proxy(postgres.port) as proxy,
        prepared(postgres.url(url.rpartition("/")[2], proxy.port)) as images,
    ):
        yield proxy, images
        await proxy.turn("pass")


@pytest.mark.parametrize("mode", ["stall", "cut", "refuse"])
async def test_recovery(postgres: PostgresServer, postgres_url: str, mode: Mode) -> None:
    """However a server fails, questions are unknown in bounded time, and the pool recovers by itself."""
    async with proxied(postgres, postgres_url) as (proxy, images):
        await warm(images)
        await proxy.turn(mode)
        began = time.monotonic()
        answers = await asyncio.gather(*(images.find("a.png") for _ in range(25)), return_exceptions=True)
        assert {type(answer) for answer in answers} == {DatabaseUnavailable}
        with pytest.raises(DatabaseUnavailable):
            await images.store_image("b.png", b"two")
        assert time.monotonic() - began < 5 * TIMEOUT + SLACK
        await proxy.turn("pass")
        records = await asyncio.gather(*(images.find("a.png") for _ in range(25)))
        assert all(record is not None for record in records)
        await images.store_image("b.png", b"two")
        assert await bytes_of(images, "b.png") == b"two"


async def test_connections_that_were_cut(postgres: PostgresServer, postgres_url: str) -> None:
    """Connections that died while nobody used them cost a read nothing: it is answered."""
    async with proxied(postgres, postgres_url) as (proxy, images):
        await warm(images)
        await proxy.turn("cut")
        await proxy.turn("pass")
        records = await asyncio.gather(*(images.find("a.png") for _ in range(10)))
        assert all(record is not None for record in records)


async def test_a_black_hole_that_forgets(postgres: PostgresServer, postgres_url: str) -> None:
    """When a silent network comes back without our connections, as after a fail-over, there are answers again."""
    async with proxied(postgres, postgres_url) as (proxy, images):
        await warm(images)
        await proxy.turn("stall")
        with pytest.raises(DatabaseUnavailable):
            await images.find("a.png")
        await proxy.turn("cut")
        await proxy.turn("pass")
        assert await bytes_of(images, "a.png") == b"one"


async def test_cut_while_saving(postgres: PostgresServer, postgres_url: str) -> None:
    """A save whose connection is cut at any moment is all there or not at all, and repeating it is harmless."""
    async with proxied(postgres, postgres_url) as (proxy, images):
        for number in range(12):
            name, data = f"{number}.png", os.urandom(18 * CHUNK)
            saving = asyncio.create_task(images.store_image(name, data))
            await asyncio.sleep(number * 0.02)
            await proxy.turn("cut")
            await proxy.turn("pass")
            (outcome,) = await asyncio.gather(saving, return_exceptions=True)
            assert isinstance(outcome, (Record, DatabaseUnavailable)), repr(outcome)
            assert await bytes_of(images, name) in ((None, data) if isinstance(outcome, Exception) else (data,))
            again = await images.store_image(name, data)
            assert again.generation == 1
            assert await bytes_of(images, name) == data


@pytest.mark.parametrize("way", ["read", "connect"])
async def test_cancelled_questions(database_url: str, way: str) -> None:
    """Questions that are cancelled at any moment cost the pool no connection."""
    async with prepared(database_url) as images:
        for number in range(60):
            asking = asyncio.create_task(images.find("a.png"))
            await asyncio.sleep(0 if way == "connect" and number % 2 else number * 0.0002)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        records = await asyncio.gather(*(images.find("a.png") for _ in range(20)))
        assert all(record is not None for record in records)
        await images.store_image("a.png", b"two")


# -- whose engine it is ---------------------------------------------------------------------------------------------


async def test_the_apps_own_engine_over_postgres(postgres_url: str) -> None:
    """An app's own engine is used, its settings with it, and is as open after `close` as before."""
    await sql(postgres_url, "CREATE SCHEMA apart")
    arguments = {"server_settings": {"search_path": "apart"}}
    engine = create_async_engine(postgres_url, pool_size=1, max_overflow=0, connect_args=arguments)

    async def server_process() -> int:
        async with engine.connect() as connection:
            return int((await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one())

    before = await server_process()
    async with prepared(engine) as images:  # type: ignore[arg-type]
        assert await bytes_of(images, "a.png") == b"one"
    assert await server_process() == before
    await engine.dispose()
    assert await sql(postgres_url, "SELECT name FROM apart.image_storage") == [("a.png",)]


async def test_the_apps_own_engine_over_sqlite() -> None:
    """A database that only the app's engine can see is used through it, and outlives `close`."""
    engine = create_async_engine("sqlite+aiosqlite://")
    async with prepared(engine) as images:  # type: ignore[arg-type]
        assert await bytes_of(images, "a.png") == b"one"
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT name FROM image_storage"))).all() == [("a.png",)]
    await engine.dispose()


def beginning_by_hooks(url: str) -> AsyncEngine:
    """An engine that begins every transaction itself, as SQLAlchemy's documentation shows it for savepoints."""
    engine = create_async_engine(url)

    @event.listens_for(engine.sync_engine, "connect")
    def begin_nothing(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def beginning_by_driver(url: str) -> AsyncEngine:
    """The same by the setting that it shows for Python 3.12 and later: the driver is never without a transaction."""
    if sys.version_info < (3, 12):
        pytest.skip("sqlite3 has no `autocommit` before Python 3.12")
    return create_async_engine(url, connect_args={"autocommit": False})


def beginning_by_asking(url: str) -> AsyncEngine:
    """One that asks something of every connection that it hands out, as SQLAlchemy shows it for a test of its own."""
    engine = create_async_engine(url)

    @event.listens_for(engine.sync_engine, "engine_connect")
    def ask(connection: Connection) -> None:
        connection.scalar(text("SELECT 1"))

    return engine


@pytest.mark.parametrize("make", [beginning_by_hooks, beginning_by_driver, beginning_by_asking])
async def test_the_apps_own_engine_that_begins_its_transactions_itself(
    sqlite_url: str, make: Callable[[str], AsyncEngine]
) -> None:
    """Everything works as without, and a write waits for the lock, for which what it begins with would not."""
    engine = make(sqlite_url)
    async with prepared(engine) as images, opened(sqlite_url) as others:  # type: ignore[arg-type]
        for ask in WRITING.values():
            with contextlib.suppress(SelfHealError):
                await ask(images)
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
    """What is stored in it is there once it is committed, and gone if it is rolled back, however it was begun."""
    engine, data = make(sqlite_url), b"x" * size
    async with prepared(engine) as images:  # type: ignore[arg-type]
        async with engine.connect() as connection:
            await images.store_image("b.png", data, connection=connection)
            await connection.rollback()
            assert await bytes_of(images, "b.png") is None
            await images.store_image("b.png", data, connection=connection)
            await connection.commit()
        assert await bytes_of(images, "b.png") == data
    await engine.dispose()


async def test_a_sqlite_connection_that_commits_each_statement_is_no_transaction(sqlite_url: str) -> None:
    """A record could come to stand without its bytes: it is refused, and nothing is stored."""
    engine = create_async_engine(sqlite_url, isolation_level="AUTOCOMMIT")
    async with prepared(sqlite_url) as images, engine.connect() as connection:
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
    """It is told as that, and the connection is as good as before."""
    monkeypatch.setattr(transactions, "LOCK_PATIENCE", 0.0)
    engine = make(f"{sqlite_url}?timeout=0.1")
    async with prepared(engine) as images:  # type: ignore[arg-type]
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
    """Where the driver commits nothing a write is refused, and leaves nothing behind, nor a lock."""
    if sys.version_info < (3, 12):
        pytest.skip("sqlite3 has no `autocommit` before Python 3.12")
    engine = create_async_engine(sqlite_url, connect_args={"autocommit": True})
    async with prepared(sqlite_url) as others, opened(engine) as images:  # type: ignore[arg-type]
        with pytest.raises(DatabaseUnavailable, match="autocommit=True"):
            await images.store_image("a.png", b"two")
        assert await bytes_of(images, "a.png") == b"one"
        await others.store_image("a.png", b"three")
        with pytest.raises(DatabaseUnavailable, match="autocommit=True"):
            await images.purge(timedelta(0), dry_run=True)
        assert [version.generation for version in await others.history("a.png")] == [1]
    await engine.dispose()


async def test_many_writes_on_one_connection() -> None:
    """A database in memory has one connection: each write is a transaction of its own all the same."""
    async with prepared("sqlite+aiosqlite:///:memory:") as images:
        names = [f"{index}.png" for index in range(60)]
        await asyncio.gather(*(images.store_image(name, name.encode()) for name in names))
        assert [await bytes_of(images, name) for name in names] == [name.encode() for name in names]


@pytest.mark.parametrize("is_given", [False, True], ids=["ours", "the app's own"])
async def test_reads_beside_writes_on_one_connection(is_given: bool) -> None:
    """Who reads, and goes away or not, ends no write: a connection that is given back is rolled back."""
    url = "sqlite+aiosqlite://"
    engine: Any = create_async_engine(url) if is_given else url
    async with prepared(engine) as images:
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
    """A write of ours does not become a part of it, and is not told to be done: it is refused."""
    engine = create_async_engine("sqlite+aiosqlite://")
    async with prepared(engine) as images:  # type: ignore[arg-type]
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE image_storage SET modified_ns = 77"))
            with pytest.raises(DatabaseUnavailable, match="only connection"):
                await images.store_image("b.png", b"two")
        assert await images.find("b.png") is None
        await images.store_image("b.png", b"two")
        assert await bytes_of(images, "b.png") == b"two"
    await engine.dispose()


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "READ COMMITTED", "SERIALIZABLE"])
@pytest.mark.parametrize("skips", [False, True], ids=["", "rolling nothing back at it"])
@pytest.mark.parametrize("how", ["from the beginning", "by an option"])
async def test_the_apps_own_engine_of_another_isolation_level(
    database_url: str, level: Any, how: str, skips: bool
) -> None:
    """Whatever the app's own statements do, a write of ours happens whole or not at all, and waits for others."""
    if database_url.startswith("sqlite") and level == "READ COMMITTED":
        pytest.skip("SQLite has no such level")
    if how == "by an option":
        engine = create_async_engine(database_url, skip_autocommit_rollback=skips)
        engine = engine.execution_options(isolation_level=level)
    else:
        engine = create_async_engine(database_url, isolation_level=level, skip_autocommit_rollback=skips)
    tasks = Tasks()
    ours = Engine(engine, define_tables(MetaData()), timeout=TIMEOUT, tasks=tasks)

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(text("DELETE FROM image_storage"))
        raise EOFError("thought better of it")

    async with prepared(engine) as images:  # type: ignore[arg-type]
        with pytest.raises(EOFError):
            await ours.write(work)
        assert await bytes_of(images, "a.png") == b"one"
        saves = [images.store_image("a.png", b"%d" % index) for index in range(20)]
        generations = sorted(record.generation for record in await asyncio.gather(*saves))
        assert generations == list(range(2, 22))
        async with engine.connect() as connection:  # and the app's own are as before
            await connection.execute(text("UPDATE image_storage SET modified_ns = 77"))
        record = await images.find("a.png")
        assert record is not None
        assert (record.modified_ns == 77) is (level == "AUTOCOMMIT")
    await tasks.settle(20)
    await engine.dispose()


async def test_used_again_after_closing(database_url: str) -> None:
    """What was closed opens anew at its next use."""
    async with prepared(database_url) as images:
        await images.close()
        await images.close()
        assert await bytes_of(images, "a.png") == b"one"


async def test_in_memory() -> None:
    """A database in memory lives as long as it is open."""
    async with prepared("sqlite+aiosqlite:///:memory:") as images:
        assert await bytes_of(images, "a.png") == b"one"


def fork_and_use(url: str) -> None:
    """Use a storage in a parent and in its forked child; run in a process of its own."""

    async def parent() -> None:
        images = ImageStorage(url)
        await images.create_tables()
        await images.store_image("a.png", b"parent")
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(use_in_child(images))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, "the child failed"
        for _ in range(3):
            assert await bytes_of(images, "a.png") == b"child"
        await images.store_image("a.png", b"parent again")
        assert await bytes_of(images, "a.png") == b"parent again"
        await images.close()

    asyncio.run(parent())


async def use_in_child(images: ImageStorage) -> None:
    """What a worker does with a storage that was made, and used, before the fork."""
    assert await bytes_of(images, "a.png") == b"parent"
    await images.store_image("a.png", b"child")
    assert await bytes_of(images, "a.png") == b"child"
    await images.close()


async def test_a_forked_child(database_url: str) -> None:
    """A child that was forked from a parent with open connections makes its own, and spoils none of the parent's."""
    program = f"import sys, {__name__} as tests; tests.fork_and_use(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", program, database_url]
    done = await anyio.run_process(command, check=False, env=environment())
    assert done.returncode == 0, done.stderr.decode()


def test_one_loop_after_the_other(database_url: str) -> None:
    """A storage that one event loop has used and closed can be used by the next."""
    images = ImageStorage(database_url)

    async def use(turn: int) -> None:
        await images.create_tables()
        await images.store_image("a.png", b"%d" % turn)
        assert await bytes_of(images, "a.png") == b"%d" % turn
        await images.close()

    for turn in range(3):
        asyncio.run(use(turn))


async def test_a_second_loop(sqlite_url: str) -> None:
    """A second event loop, in a thread of its own, has its own connections; the first goes on."""
    async with prepared(sqlite_url) as images:
        failed: list[BaseException] = []

        async def use() -> None:
            assert await bytes_of(images, "a.png") == b"one"
            await images.store_image("b.png", b"two")
            await images.close()

        def elsewhere() -> None:
            try:
                asyncio.run(use())
            except BaseException as error:
                failed.append(error)

        await images.close()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
        assert failed == []
        assert await bytes_of(images, "b.png") == b"two"
        assert await bytes_of(images, "a.png") == b"one"


# -- what is said ---------------------------------------------------------------------------------------------------

SECRET = "s3cr3t-w0rd"


async def test_the_password_is_never_said(postgres: PostgresServer, black_hole: int) -> None:
    """Whatever fails, the password is in no message, no cause of it and no URL that is shown."""
    places = (
        f"127.0.0.1:{free_port()}/x",
        f"127.0.0.1:{black_hole}/x",
        f"127.0.0.1:{postgres.port}/there_is_none",
        "no.such.host.invalid/x",
    )
    for place in places:
        async with opened(f"postgresql+asyncpg://postgres:{SECRET}@{place}") as images:
            caught = await check_unknown(images, {"find": READING["find"]}, DatabaseUnavailable)
            said = "".join(traceback.format_exception(caught[0])) + repr(images.url) + str(images.url)
        assert SECRET not in said


def test_a_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the driver the error names the extra that brings it."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)

    async def use() -> None:
        images = ImageStorage("postgresql+asyncpg://nobody@127.0.0.1:1/x")
        with pytest.raises(MissingExtra, match=r"pip install 'selfheal\[postgres\]'"):
            await images.find("a.png")

    asyncio.run(use())


# -- SQLite's tuning ------------------------------------------------------------------------------------------------

VERSIONS = {
    "3.7.0": False, "3.40.1": False, "3.44.5": False, "3.44.6": True, "3.44.7": True, "3.45.0": False, "3.50.6": False,
    "3.50.7": True, "3.51.0": False, "3.51.2": False, "3.51.3": True, "3.52.0": True, "4.0.0": True,
}  # fmt: skip


@pytest.mark.parametrize(("version", "safe"), VERSIONS.items())
def test_where_wal_is_safe(version: str, safe: bool) -> None:
    """A WAL is used only where the library has the fix for the WAL-reset corruption."""
    assert wal_is_safe(tuple(int(part) for part in version.split("."))) is safe


@pytest.mark.parametrize(("version", "mode"), [((3, 40, 1), "delete"), ((3, 50, 7), "wal"), ((3, 51, 3), "wal")])
async def test_pragmas(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], mode: str
) -> None:
    """Every connection syncs fully, keeps foreign keys, waits for locks, and has the journal its library can bear."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    async with opened(sqlite_url) as images:
        await images.create_tables()
    tasks = Tasks()
    engine = Engine(sqlite_url, define_tables(MetaData()), timeout=TIMEOUT, tasks=tasks)

    async def ask(connection: AsyncConnection) -> list[Any]:
        names = ("synchronous", "foreign_keys", "busy_timeout", "journal_mode")
        return [(await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one() for name in names]

    for answer in await asyncio.gather(*(engine.read(ask) for _ in range(4))):
        assert answer == [2, 1, int(TIMEOUT * 1000), mode]
    await tasks.settle(20)
    await engine.close()


async def test_writes_take_the_lock_at_once(sqlite_url: str) -> None:
    """A write has SQLite's lock before it reads anything: nobody gets in between."""
    tasks = Tasks()
    engine = Engine(sqlite_url, define_tables(MetaData()), timeout=TIMEOUT, tasks=tasks)
    async with prepared(sqlite_url):
        pass

    async def work(connection: AsyncConnection) -> str:
        other = sqlite3.connect(sqlite_url.partition("///")[2], timeout=0, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            return str(error)
        finally:
            other.close()
        return "somebody else got the lock"

    assert await engine.write(work) == "database is locked"
    await tasks.settle(20)
    await engine.close()


async def test_a_write_that_fails(database_url: str) -> None:
    """Work that raises leaves nothing behind, and its error reaches the caller."""
    tasks = Tasks()
    engine = Engine(database_url, define_tables(MetaData()), timeout=TIMEOUT, tasks=tasks)
    async with prepared(database_url) as images:

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(text("DELETE FROM image_storage"))
            raise EOFError("thought better of it")

        with pytest.raises(EOFError):
            await engine.write(work)
        assert await bytes_of(images, "a.png") == b"one"
    await tasks.settle(20)
    await engine.close()


async def test_a_read_whose_caller_goes_away(database_url: str) -> None:
    """At whatever moment the caller of a read is cancelled, what was opened for it is closed at the end."""
    async with prepared(database_url):
        pass
    gc.collect()
    before = os.listdir("/proc/self/fd")
    for turns in range(40):
        async with opened(database_url) as images:
            finding = asyncio.create_task(images.find("a.png"))
            for _ in range(turns):
                await asyncio.sleep(0)
            finding.cancel()
            await asyncio.gather(finding, return_exceptions=True)
            if turns % 2:
                assert await images.count() == 1
    assert os.listdir("/proc/self/fd") == before


async def test_a_write_whose_caller_goes_away(database_url: str) -> None:
    """A write goes on to its end, and commits, though its caller is cancelled."""
    tasks = Tasks()
    engine = Engine(database_url, define_tables(MetaData()), timeout=TIMEOUT, tasks=tasks)
    async with prepared(database_url) as images:
        begun = asyncio.Event()

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(text("UPDATE image_storage SET modified_ns = 77"))
            begun.set()
            await asyncio.sleep(0.1)

        writing = asyncio.create_task(engine.write(work))
        await begun.wait()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await tasks.settle(20)
        record = await images.find("a.png")
        assert record is not None
        assert record.modified_ns == 77
    await engine.close()
