"""Settings: the directory, the database, the URL prefix and more. `from_env` is the only reader of the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from .errors import SettingsError
from .sql.backends import backend_of, database_url, url_of
from .sql.pool_limit import POOL_SIZE, check_pool_size
from .sql.table_names import check_schema, check_table_prefix

DEFAULT_DIRECTORY = "app/static/uploads"
DEFAULT_DATABASE = "sqlite+aiosqlite:///selfheal.db"
DEFAULT_PREFIX = "/static/uploads"
DATABASE_FROM = "SELFHEAL_DATABASE_FROM"  # what set the database; commands set it for this process and its workers
SETTLED_AFTER = 3.0  # seconds without a change after which a file counts as complete
SWEEP_EVERY = 3600.0  # seconds from one sweep of the disk to the next


@dataclass(frozen=True, slots=True)
class Settings:
    """What a store and its middleware need. Raises `SettingsError` if a value cannot be used."""

    directory: Path = Path(DEFAULT_DIRECTORY)
    database: str = DEFAULT_DATABASE
    prefix: str = DEFAULT_PREFIX
    table_prefix: str = ""
    schema: str | None = None
    pool_size: int = POOL_SIZE
    settled_after: float = SETTLED_AFTER
    database_from: str = field(default="", compare=False)  # the flag or variable that set the database, for messages
    sweep_every: float = SWEEP_EVERY

    def __post_init__(self) -> None:
        directory = Path(self.directory).absolute()
        if directory.resolve().parent == directory.resolve():
            raise SettingsError(f"the uploads directory cannot be {directory}; name a directory of its own")
        if directory.exists() and not directory.is_dir():
            raise SettingsError(f"{directory} is not a directory")
        url = refuse_served_database(self.database, directory)
        check_table_prefix(self.table_prefix)
        check_pool_size(self.pool_size)
        backend_of(url).check_schema(check_schema(self.schema))
        object.__setattr__(self, "directory", directory)
        object.__setattr__(self, "prefix", check_prefix(self.prefix))
        object.__setattr__(self, "settled_after", check_seconds(self.settled_after))
        object.__setattr__(self, "sweep_every", check_sweep_every(self.sweep_every))

    @property
    def database_file(self) -> Path | None:
        """The absolute path of the database's file; None for a server or a database in memory."""
        url = database_url(self.database)
        return backend_of(url).file(url)

    @property
    def is_in_memory(self) -> bool:
        """Whether the database is in the memory of one process."""
        url = database_url(self.database)
        return backend_of(url).is_in_memory(url)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables that begin with `SELFHEAL_`, and `DATABASE_URL`; docs/commands.md lists them."""
        database = environ.get("SELFHEAL_DATABASE_URL")
        other = environ.get("DATABASE_URL")
        source = "SELFHEAL_DATABASE_URL" if database else "DATABASE_URL" if other else "the default"
        return cls(
            directory=Path(environ.get("SELFHEAL_DIRECTORY") or DEFAULT_DIRECTORY),
            database=database or other or DEFAULT_DATABASE,
            prefix=environ.get("SELFHEAL_PREFIX") or DEFAULT_PREFIX,
            settled_after=check_seconds(environ.get("SELFHEAL_SETTLED_AFTER") or SETTLED_AFTER),
            sweep_every=check_sweep_every(environ.get("SELFHEAL_SWEEP_EVERY") or SWEEP_EVERY),
            table_prefix=environ.get("SELFHEAL_TABLE_PREFIX") or "",
            schema=environ.get("SELFHEAL_SCHEMA") or None,
            database_from=environ.get(DATABASE_FROM) or source,
            pool_size=check_pool_size(environ.get("SELFHEAL_POOL_SIZE") or POOL_SIZE),
        )


def refuse_served_database(database: str | URL | AsyncEngine, directory: Path) -> URL:
    """Return the URL of a database; raise `SettingsError` if its file is inside the uploads directory."""
    url = url_of(database)
    file = backend_of(url).file(url)
    if file is not None:  # its journals are beside it
        _refuse_served("database", file, directory)
    return url


def refuse_served_quarantine(
    quarantine: str | os.PathLike[str] | None, directory: str | os.PathLike[str]
) -> Path | None:
    """Return the directory for a quarantine; raise `SettingsError` if it is the uploads directory, or in it."""
    if quarantine is None:
        return None
    _refuse_served("quarantine", Path(quarantine), Path(directory))
    return Path(quarantine)


def _refuse_served(what: str, path: Path, directory: Path) -> None:
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise SettingsError(f"the {what} {path} is in the directory that is served; move it elsewhere")


def check_prefix(prefix: str) -> str:
    """Return a URL prefix without its trailing slash; raise `SettingsError` if it cannot be one."""
    bare = prefix.removesuffix("/")
    if not bare.startswith("/") or bare.endswith("/") or "//" in bare or "%" in bare:
        raise SettingsError(f"the prefix {prefix!r} must be a decoded path like {DEFAULT_PREFIX}")
    return bare


def check_seconds(seconds: float | str) -> float:
    """Return the seconds after which a file counts as complete; raise `SettingsError` unless they are 0 to 3,600."""
    with contextlib.suppress(ValueError):
        if 0 <= float(seconds) <= 3600:
            return float(seconds)
    raise SettingsError(f"a file cannot count as complete after {seconds!r} seconds; give a number from 0 to 3600")


def check_sweep_every(seconds: float | str | None) -> float:
    """Return the seconds between two sweeps, 0 for none; raise `SettingsError` if they cannot be that."""
    with contextlib.suppress(ValueError):
        every = float(seconds or 0)
        if every == 0 or 1 <= every < float("inf"):
            return every
    raise SettingsError(f"the disk cannot be swept every {seconds!r} seconds; give a number from 1 on, or 0 for never")
