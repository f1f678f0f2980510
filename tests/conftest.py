"""Fixtures are nouns: a directory, a database (SQLite, a real PostgreSQL), a store over both, a PostgreSQL server."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import pytest

from selfheal import UploadStore

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a run in the background; what it starts is to be interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--campaign` lets the tests of faults, damage and random input run for as long as `make campaign` wants."""
    parser.addoption("--campaign", action="store_true", help="run the long campaigns, not their quick versions")


def needs(thing: str, command: str) -> None:
    """Skip the test, and say at the end of the run what would have let it run."""
    pytest.skip(f"{thing} is not installed; run: {command}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List what was skipped for want of something this machine lacks, and the figures that the campaigns recorded."""
    skipped = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])}
    for reason in sorted(skipped):
        if "is not installed; run: " in reason:
            terminalreporter.write_line(reason)
    for report in terminalreporter.stats.get("passed", []):
        for thing, figure in getattr(report, "user_properties", []):
            terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}: {thing}: {figure}")


@pytest.fixture
def times(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How often to try: the first number in `make test`, the second in a campaign."""
    is_campaign = request.config.getoption("--campaign")
    return lambda quick, campaign: campaign if is_campaign else quick


def make_socket(path: Path) -> None:
    """Make a Unix socket, as `os.mkfifo` makes a FIFO; its address may have 107 bytes, so it is bound from beside."""
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(path.parent):
        listener.bind(path.name)


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class PostgresServer:
    """A real server on loopback, without a password."""

    port: int
    data: Path
    programs: Path
    user: str | None

    def url(self, database: str, port: int | None = None) -> str:
        """The URL of one of its databases, or of a proxy's port in front of it."""
        return f"postgresql+asyncpg://postgres@127.0.0.1:{port or self.port}/{database}"

    def sql(self, statement: str, database: str = "postgres") -> str:
        """What psql prints for a statement, without decoration."""
        command = [str(self.programs / "psql"), "-XAtq", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres"]
        done = subprocess.run([*command, "-d", database, "-c", statement], capture_output=True, text=True, check=True)
        return done.stdout

    def control(self, *arguments: str) -> None:
        """Run pg_ctl, for instance `restart -m immediate`; what it says, and the server, goes to `run/said`.

        A pipe of ours would stay open with the server that it starts.
        """
        command = [str(self.programs / "pg_ctl"), "-D", str(self.data), "-w", *arguments]
        with (self.data.parent / "run" / "said").open("w+") as said:
            done = subprocess.run(command, user=self.user, stdout=said, stderr=said, cwd="/")
            said.seek(0)
            assert done.returncode == 0, f"pg_ctl {' '.join(arguments)}: {said.read()}"


def _postgres_programs() -> Path | None:
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    if versions:
        return versions[-1]
    found = shutil.which("initdb")
    return Path(found).parent if found else None


def start_postgres(base: Path) -> PostgresServer:
    """Make and start a PostgreSQL server with its data below `base`, as an unprivileged user when root."""
    programs = _postgres_programs()
    if programs is None:
        needs("PostgreSQL", "apt-get install postgresql")
        raise AssertionError
    user = None
    if os.geteuid() == 0:
        user = next((name for name in ("postgres", "nobody") if _has_user(name)), None)
    data, run = base / "data", base / "run"
    for directory in (data, run):
        directory.mkdir(parents=True)
        if user is not None:
            shutil.chown(directory, user)
    if user is not None:
        for parent in (base, *base.parents):
            if parent.owner() == "root" and parent != Path("/") and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
    port = free_port()
    initdb = [str(programs / "initdb"), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync", "-D", str(data)]
    subprocess.run(initdb, user=user, check=True, capture_output=True, cwd="/")
    options = f"-h 127.0.0.1 -p {port} -k {run} -c fsync=off -c max_connections=200"
    server = PostgresServer(port, data, programs, user)
    server.control("-l", str(run / "log"), "-o", options, "start")
    return server


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL server for the whole run, in a directory that its own user may enter."""
    with tempfile.TemporaryDirectory(prefix="selfheal-postgres-") as base:
        server = start_postgres(Path(base))
        yield server
        server.control("stop", "-m", "immediate")


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """A PostgreSQL database of its own for one test."""
    name = f"t{uuid4().hex[:12]}"
    postgres.sql(f"CREATE DATABASE {name}")
    yield postgres.url(name)
    postgres.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A SQLite database of its own for one test, outside the uploads."""
    return f"sqlite+aiosqlite:///{tmp_path}/catalogue.db"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Every database, one after the other."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An uploads directory that is not there yet."""
    return tmp_path / "app" / "static" / "uploads"


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio."""
    return "asyncio"


@pytest.fixture
async def store(directory: Path, database_url: str) -> AsyncIterator[UploadStore]:
    """A store over every database, its tables made."""
    async with UploadStore(directory, database_url) as store:
        await store.database.create_tables()
        yield store


@pytest.fixture
async def sqlite_store(directory: Path, sqlite_url: str) -> AsyncIterator[UploadStore]:
    """A store over SQLite, its tables made."""
    async with UploadStore(directory, sqlite_url) as store:
        await store.database.create_tables()
        yield store


async def eventually(holds: Callable[[], Coroutine[Any, Any, bool]], seconds: float = 10.0) -> None:
    """Wait until something holds that is done behind; fail if it does not in time."""
    end = time.monotonic() + seconds
    while not await holds():
        assert time.monotonic() < end, "it never came to hold"
        await anyio.sleep(0.05)
