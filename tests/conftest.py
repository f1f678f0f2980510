"""Fixtures of all tests, each named by a noun: directories, databases (SQLite, a real PostgreSQL), stores."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import pwd
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from selfheal import ImageStorage, UploadStore
from selfheal.sql.table_names import TableClaim
from tests.support.faults import BrokenDisk
from tests.support.middleware import TRANSPORTS, Wrapping
from tests.support.postgres import PostgresServer, start_postgres
from tests.support.requirements import NOT_INSTALLED, needs
from tests.support.waiting import PATIENCE, eventually

_finished = itertools.count(1)

# an example may take long on a busy machine
settings.register_profile("busy", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell lets its background jobs ignore SIGINT, and child processes inherit that; some tests interrupt theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--campaign`: tests of faults, damage and random input run for as long as in `make campaign`."""
    parser.addoption("--campaign", action="store_true", help="run the long campaigns, not their quick versions")


def pytest_collection_finish() -> None:
    """Leave the thousands of collected tests out of garbage collections, each of which takes half a second else."""
    gc.freeze()


def pytest_runtest_logfinish() -> None:
    """Leave out what anyio's runner keeps of each test as well: the frames of its fixtures, with their stores."""
    if next(_finished) % 100 == 0:
        gc.collect()
        gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the programs that skipped tests need, and the figures that the campaigns recorded."""
    skipped = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])}
    for reason in sorted(skipped):
        if NOT_INSTALLED in reason:
            terminalreporter.write_line(reason)
    for report in terminalreporter.stats.get("passed", []):
        for thing, figure in getattr(report, "user_properties", []):
            terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}: {thing}: {figure}")


@pytest.fixture
def times(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """Choose how often to try: the first number in `make test`, the second in a campaign."""
    is_campaign = request.config.getoption("--campaign")
    return lambda quick, campaign: campaign if is_campaign else quick


@pytest.fixture(params=[True, False], ids=["serve", "hand on"])
def serve(request: pytest.FixtureRequest) -> bool:
    """Both values of the middleware's option `serve`."""
    return bool(request.param)


@pytest.fixture(params=TRANSPORTS)
def wrapping(request: pytest.FixtureRequest) -> Wrapping:
    """The middleware for ASGI, and the one for WSGI."""
    return TRANSPORTS[request.param]


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _settings_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as complete at once, SQLite waits for no disk, busy machines are waited for, and nothing is swept.

    Tests about that choose a value of their own.
    """
    for method, name in ((UploadStore.__init__, "deadline"), (ImageStorage.__init__, "timeout")):
        monkeypatch.setitem(method.__kwdefaults__, name, PATIENCE)
    monkeypatch.setattr("selfheal.sql.sqlite.SYNCHRONOUS", "OFF")
    monkeypatch.setattr("selfheal.healing.sweep.START_AFTER", 86_400.0)  # it would begin in tests that take long
    monkeypatch.setattr("selfheal.store.SETTLED_AFTER", 0.0)
    monkeypatch.setenv("SELFHEAL_SETTLED_AFTER", "0")


# -- databases --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL server for the whole run, in a directory that its own user may enter."""
    with tempfile.TemporaryDirectory(prefix="selfheal-postgres-") as base:
        server = start_postgres(Path(base))
        yield server
        server.control("stop", "-m", "immediate")


@pytest.fixture(scope="session")
def postgres_database(postgres: PostgresServer) -> str:
    """A database for all tests: to create one takes longer than most tests."""
    name = f"t{uuid4().hex[:12]}"
    postgres.sql(f"CREATE DATABASE {name}")
    return name


@pytest.fixture
def postgres_url(postgres: PostgresServer, postgres_database: str) -> Iterator[str]:
    """An empty PostgreSQL database."""
    yield postgres.url(postgres_database)
    postgres.empty(postgres_database)


@pytest.fixture
def limited_url(postgres: PostgresServer, postgres_database: str, postgres_url: str) -> Iterator[str]:
    """An empty PostgreSQL database, for a role that may have 5 connections."""
    postgres.sql(f"CREATE ROLE few LOGIN CONNECTION LIMIT 5; GRANT ALL ON DATABASE {postgres_database} TO few")
    postgres.sql("GRANT ALL ON SCHEMA public TO few", postgres_database)
    yield postgres_url.replace("postgres@", "few@")
    postgres.empty(postgres_database)
    postgres.sql(f"REVOKE ALL ON DATABASE {postgres_database} FROM few; DROP ROLE few")


@pytest.fixture
def ordinary_directory() -> Iterator[Path]:
    """A directory of an ordinary user, as whom the test runs: root may read and write everything."""
    path = Path(tempfile.mkdtemp(prefix="selfheal-test-"))
    is_root = os.geteuid() == 0
    try:
        if is_root:
            nobody = pwd.getpwnam("nobody").pw_uid
            try:
                os.chown(path, nobody, -1)
                os.seteuid(nobody)
            except OSError:
                needs("a second user", "the tests as an ordinary user, or as the real root")
        yield path
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(path)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A new SQLite database for one test, outside the uploads directory."""
    return f"sqlite+aiosqlite:///{tmp_path}/catalogue.db"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Every kind of database, one after the other."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture(scope="session")
def sqlite_with_tables(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SQLite file with selfheal's tables: to make them takes longer than most tests."""
    file = tmp_path_factory.mktemp("tables") / "catalogue.db"
    asyncio.run(_create_tables(f"sqlite+aiosqlite:///{file}"))
    return file.read_bytes()


@pytest.fixture(scope="session")
def postgres_with_tables(postgres: PostgresServer) -> str:
    """The statements that make selfheal's tables in PostgreSQL."""
    postgres.sql("CREATE DATABASE with_tables")
    asyncio.run(_create_tables(postgres.url("with_tables")))
    return postgres.dump("with_tables")


async def _create_tables(url: str) -> None:
    images = ImageStorage(url)
    await images.create_tables()
    await images.close()


@pytest.fixture
def sqlite_tables(sqlite_url: str, sqlite_with_tables: bytes) -> str:
    """As `sqlite_url`, with selfheal's tables."""
    Path(sqlite_url.partition("///")[2]).write_bytes(sqlite_with_tables)
    return sqlite_url


@pytest.fixture
def postgres_tables(
    postgres: PostgresServer, postgres_database: str, postgres_url: str, postgres_with_tables: str
) -> str:
    """As `postgres_url`, with selfheal's tables."""
    postgres.sql(postgres_with_tables, postgres_database)
    return postgres_url


@pytest.fixture
def database_tables(request: pytest.FixtureRequest, database_url: str) -> str:
    """As `database_url`, with selfheal's tables."""
    return str(request.getfixturevalue("sqlite_tables" if database_url.startswith("sqlite") else "postgres_tables"))


# -- stores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nodes_in_one_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stores of one process share tables: tests of several nodes do. `claimed_tables` turns this off."""
    if "claimed_tables" not in request.fixturenames:
        monkeypatch.setattr(TableClaim, "take", lambda _claim: None)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An uploads directory that does not exist yet."""
    return tmp_path / "app" / "static" / "uploads"


@pytest.fixture
async def store(directory: Path, database_tables: str) -> AsyncIterator[UploadStore]:
    """A store over every kind of database, with its tables."""
    async with UploadStore(directory, database_tables) as store:
        yield store


@pytest.fixture
async def sqlite_store(directory: Path, sqlite_tables: str) -> AsyncIterator[UploadStore]:
    """A store over SQLite, with its tables."""
    async with UploadStore(directory, sqlite_tables) as store:
        yield store


@pytest.fixture
def images(store: UploadStore) -> ImageStorage:
    """The database half of `store`."""
    return store.database


@pytest.fixture
async def other_store(store: UploadStore, tmp_path: Path) -> AsyncIterator[UploadStore]:
    """Another node's store: a directory of its own, and the database of `store`."""
    async with UploadStore(tmp_path / "elsewhere" / "uploads", store.database.url) as other:
        yield other


@pytest.fixture
async def engine(store: UploadStore) -> AsyncIterator[AsyncEngine]:
    """The app's own engine, for the database of `store`."""
    engine = create_async_engine(store.database.url)
    yield engine
    await engine.dispose()


# -- a disk and a database that fail ----------------------------------------------------------------------------------


@pytest.fixture
def broken_disk(monkeypatch: pytest.MonkeyPatch) -> BrokenDisk:
    """A disk whose system calls a test can make fail or wait."""
    return BrokenDisk(monkeypatch)


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that refuses connections; it is bound, so that no other process takes it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture(params=["sqlite", "postgres"])
async def broken_store(
    request: pytest.FixtureRequest, directory: Path, tmp_path: Path, dead_port: int
) -> AsyncIterator[UploadStore]:
    """A store whose database cannot be reached, of every kind."""
    url = {
        "sqlite": f"sqlite+aiosqlite:///{tmp_path}/no/such/directory/a.db",
        "postgres": f"postgresql+asyncpg://nobody@127.0.0.1:{dead_port}/none",
    }[request.param]
    before = set(threading.enumerate())
    async with UploadStore(directory, url) as store:
        yield store
    # after a failed connect a thread of the driver still calls the event loop
    await eventually(lambda: before.issuperset(threading.enumerate()))
