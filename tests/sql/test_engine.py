"""The engine: its transactions, SQLite's settings, and its life across closes, forks and event loops."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import threading
import traceback
from typing import Any

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import MetaData

from selfheal import DatabaseUnavailable, ImageStorage, MissingExtra, define_tables
from selfheal.aio.tasks import Tasks
from selfheal.sql.engine import Engine
from selfheal.sql.sqlite import SYNCHRONOUS, wal_is_safe
from tests.support import environment
from tests.support.open_files import open_now, opened_since
from tests.support.postgres import PostgresServer
from tests.support.records import bytes_of
from tests.support.sockets import free_port
from tests.support.storage import (
    READS,
    TIMEOUT,
    assert_all_raise,
    opened_storage,
    prepared_storage,
)
from tests.support.waiting import eventually

# -- SQLite's settings -------------------------------------------------------------------------------------------------


VERSIONS = {
    "3.7.0": False, "3.40.1": False, "3.44.5": False, "3.44.6": True, "3.44.7": True, "3.45.0": False, "3.50.6": False,
    "3.50.7": True, "3.51.0": False, "3.51.2": False, "3.51.3": True, "3.52.0": True, "4.0.0": True,
}  # fmt: skip


@pytest.mark.parametrize(("version", "safe"), VERSIONS.items())
def test_where_wal_is_safe(version: str, safe: bool) -> None:
    """A WAL is used only with a library that has the fix for the WAL-reset corruption."""
    assert wal_is_safe(tuple(int(part) for part in version.split("."))) is safe


@pytest.mark.parametrize(("version", "mode"), [((3, 40, 1), "delete"), ((3, 50, 7), "wal"), ((3, 51, 3), "wal")])
async def test_pragmas(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], mode: str
) -> None:
    """Every connection has full synchronisation, foreign keys, a busy timeout, and a journal mode that its library
    supports.
    """
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    monkeypatch.setattr("selfheal.sql.sqlite.SYNCHRONOUS", SYNCHRONOUS)
    async with opened_storage(sqlite_url) as images:
        await images.create_tables()
    tasks = Tasks()
    tasks.home.settle()
    engine = Engine(sqlite_url, define_tables(MetaData()), timeout=TIMEOUT, tasks=tasks)

    async def ask(connection: AsyncConnection) -> list[Any]:
        names = ("synchronous", "foreign_keys", "busy_timeout", "journal_mode")
        return [(await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one() for name in names]

    for answer in await asyncio.gather(*(engine.read(ask) for _ in range(4))):
        assert answer == [2, 1, int(TIMEOUT * 1000), mode]
    await tasks.drain(20)
    await engine.close()


# -- transactions ------------------------------------------------------------------------------------------------------


async def test_writes_take_the_lock_at_once(sqlite_url: str) -> None:
    """A write has SQLite's lock before it reads anything, so that no other write comes in between."""
    tasks = Tasks()
    tasks.home.settle()
    engine = Engine(sqlite_url, define_tables(MetaData()), timeout=TIMEOUT, tasks=tasks)
    async with prepared_storage(sqlite_url):
        pass

    async def work(connection: AsyncConnection) -> str:
        other = sqlite3.connect(sqlite_url.partition("///")[2], timeout=0, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            return str(error)
        finally:
            other.close()
        return "another connection got the lock"

    assert await engine.write(work) == "database is locked"
    await tasks.drain(20)
    await engine.close()


async def test_a_write_that_fails(database_url: str) -> None:
    """Work that raises an error changes nothing, and its error reaches the caller."""
    tasks = Tasks()
    tasks.home.settle()
    engine = Engine(database_url, define_tables(MetaData()), timeout=TIMEOUT, tasks=tasks)
    async with prepared_storage(database_url) as images:

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(text("DELETE FROM image_storage"))
            raise EOFError("the caller has failed")

        with pytest.raises(EOFError):
            await engine.write(work)
        assert await bytes_of(images, "a.png") == b"one"
    await tasks.drain(20)
    await engine.close()


async def test_a_write_whose_caller_is_cancelled(database_url: str) -> None:
    """A write whose caller is cancelled finishes and commits."""
    tasks = Tasks()
    tasks.home.settle()
    engine = Engine(database_url, define_tables(MetaData()), timeout=TIMEOUT, tasks=tasks)
    async with prepared_storage(database_url) as images:
        begun = asyncio.Event()

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(text("UPDATE image_storage SET modified_ns = 77"))
            begun.set()
            await asyncio.sleep(0.1)

        writing = asyncio.create_task(engine.write(work))
        await begun.wait()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await tasks.drain(20)
        record = await images.find("a.png")
        assert record is not None
        assert record.modified_ns == 77
    await engine.close()


async def test_a_read_whose_caller_is_cancelled(database_url: str) -> None:
    """A read that is cancelled at any moment leaves nothing open after the storage is closed."""
    async with prepared_storage(database_url):
        pass
    before = open_now()
    for steps in range(40):
        async with opened_storage(database_url) as images:
            finding = asyncio.create_task(images.find("a.png"))
            for _ in range(steps):
                await asyncio.sleep(0)
            finding.cancel()
            await asyncio.gather(finding, return_exceptions=True)
            if steps % 2:
                assert await images.count() == 1
    await eventually(lambda: opened_since(before) == [])


# -- closes, forks and event loops -------------------------------------------------------------------------------------


async def test_used_again_after_closing(database_url: str) -> None:
    """A storage that was closed opens again at its next use."""
    async with prepared_storage(database_url) as images:
        await images.close()
        await images.close()
        assert await bytes_of(images, "a.png") == b"one"


async def test_in_memory() -> None:
    """An in-memory database lives as long as its storage is open."""
    async with prepared_storage("sqlite+aiosqlite:///:memory:") as images:
        assert await bytes_of(images, "a.png") == b"one"


async def test_a_forked_child(database_url: str) -> None:
    """A child that is forked from a process with open connections opens its own, and does not disturb the parent's."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.forked_storage", database_url]
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
    """A second event loop in another thread has its own connections, and the first goes on."""
    async with prepared_storage(sqlite_url) as images:
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


# -- messages ----------------------------------------------------------------------------------------------------------


SECRET = "s3cr3t-w0rd"


async def test_the_password_is_never_shown(postgres: PostgresServer, black_hole: int) -> None:
    """Whatever fails, the password is in no error message, in none of its causes, and in no URL that is shown."""
    addresses = (
        f"127.0.0.1:{free_port()}/x",
        f"127.0.0.1:{black_hole}/x",
        f"127.0.0.1:{postgres.port}/there_is_none",
        "no.such.host.invalid/x",
    )
    for address in addresses:
        async with opened_storage(f"postgresql+asyncpg://postgres:{SECRET}@{address}") as images:
            caught = await assert_all_raise(images, {"find": READS["find"]}, DatabaseUnavailable)
            shown = "".join(traceback.format_exception(caught[0])) + repr(images.url) + str(images.url)
        assert SECRET not in shown


def test_a_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the driver, the error names the extra to install."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)

    async def use() -> None:
        images = ImageStorage("postgresql+asyncpg://nobody@127.0.0.1:1/x")
        with pytest.raises(MissingExtra, match=r"pip install 'selfheal-uploads\[postgres\]'"):
            await images.find("a.png")

    asyncio.run(use())
