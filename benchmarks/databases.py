"""Databases for the measurements: a SQLite file, and a separate PostgreSQL server with default settings."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from .data import scratch, sqlite
from .measure import Unavailable
from .servers import free_port


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Start a server and yield the URL of an empty database. Raise `Unavailable` if PostgreSQL is not installed."""
    with tempfile.TemporaryDirectory(prefix="selfheal-postgres-") as place:
        Path(place).chmod(0o755)
        data, port = Path(place, "data"), free_port()
        data.mkdir()
        user = _unprivileged()
        if user is not None:
            shutil.chown(data, user)

        def call(program: str, *arguments: str) -> None:
            subprocess.run(
                [_programs() / program, *arguments], user=user, check=True, cwd="/", stdout=subprocess.DEVNULL
            )

        call("initdb", "-A", "trust", "-U", "postgres", "-E", "UTF8", "-D", str(data))
        options = f"-h 127.0.0.1 -p {port} -k {data}"
        call("pg_ctl", "-D", str(data), "-w", "-l", str(data / "log"), "-o", options, "start")
        try:
            name = f"bench{uuid4().hex[:8]}"
            call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", name)
            yield f"postgresql+asyncpg://postgres@127.0.0.1:{port}/{name}"
        finally:
            call("pg_ctl", "-D", str(data), "-w", "-m", "immediate", "stop")


@contextlib.contextmanager
def databases() -> Iterator[dict[str, str]]:
    """Yield the URLs of empty databases: SQLite and, if it is installed, PostgreSQL."""
    with scratch() as place, contextlib.ExitStack() as stack:
        urls = {"SQLite": sqlite(place / "uploads.db")}
        with contextlib.suppress(Unavailable):
            urls["PostgreSQL"] = stack.enter_context(postgres())
        yield urls


def _programs() -> Path:
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    found = shutil.which("initdb")
    if not versions and found is None:
        raise Unavailable("PostgreSQL is not installed; run: apt-get install postgresql")
    return versions[-1] if versions else Path(str(found)).parent


def _unprivileged() -> str | None:
    """Return the user to run PostgreSQL as, because it refuses to run as root; None for the present user."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return "nobody"
