"""Settings: where the two halves are. `from_env` is the only reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from .errors import SettingsError

DEFAULT_DIRECTORY = "app/static/uploads"
DEFAULT_DATABASE = "sqlite+aiosqlite:///selfheal.db"
DEFAULT_PREFIX = "/static/uploads"

_ASYNC_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
}
_ASYNCPG = {
    "command_timeout",
    "host",
    "passfile",
    "port",
    "prepared_statement_cache_size",
    "ssl",
    "statement_cache_size",
    "target_session_attrs",
    "timeout",
}
_SPOKEN = ("sqlite+aiosqlite", "postgresql+asyncpg")


def database_url(url: str) -> URL:
    """The SQLAlchemy URL for a database URL as hosts hand it out (`postgres://…?sslmode=require`).

    Raises `SettingsError` if it is no URL, or names a database or driver that selfheal does not speak.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise SettingsError(f"the database URL cannot be read; write it as {DEFAULT_DATABASE}") from error
    parsed = parsed.set(drivername=_ASYNC_DRIVERS.get(parsed.drivername, parsed.drivername))
    if parsed.drivername not in _SPOKEN:
        raise SettingsError(f"the database {parsed.drivername!r} is not supported; use one of {', '.join(_SPOKEN)}")
    if parsed.drivername == "postgresql+asyncpg":
        return _for_asyncpg(parsed)
    return parsed


def sqlite_file(url: URL) -> Path | None:
    """The absolute path of a SQLite database's file; None for another database or one in memory."""
    if url.get_backend_name() != "sqlite" or is_in_memory(url):
        return None
    path = (url.database or "").removeprefix("file:")
    return Path(path.partition("?")[0]).absolute()


def is_in_memory(url: URL) -> bool:
    """Whether the database lives in the memory of one process."""
    return url.get_backend_name() == "sqlite" and (
        url.database in (None, "", ":memory:") or ":memory:" in str(url.database) or url.query.get("mode") == "memory"
    )


def _for_asyncpg(url: URL) -> URL:
    """libpq's `sslmode` is asyncpg's `ssl`; what only libpq knows is left out."""
    query = {key: value for key, value in url.query.items() if key in _ASYNCPG}
    if "sslmode" in url.query:
        query["ssl"] = url.query["sslmode"]
    return url.set(query=query)


@dataclass(frozen=True, slots=True)
class Settings:
    """The directory, the database and the URL prefix; validated when made (`SettingsError`)."""

    directory: Path = Path(DEFAULT_DIRECTORY)
    database: str = DEFAULT_DATABASE
    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        directory = Path(self.directory).absolute()
        if directory.resolve().parent == directory.resolve():
            raise SettingsError(f"the uploads directory cannot be {directory}; name a directory of its own")
        if directory.exists() and not directory.is_dir():
            raise SettingsError(f"{directory} is not a directory")
        file = sqlite_file(database_url(self.database))
        if file is not None and file.resolve().is_relative_to(directory.resolve()):
            raise SettingsError(f"the database {file} lies in the directory that is served; move it elsewhere")
        check_prefix(self.prefix)
        object.__setattr__(self, "directory", directory)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read `SELFHEAL_DIRECTORY`, `SELFHEAL_DATABASE_URL` (then `DATABASE_URL`) and `SELFHEAL_PREFIX`."""
        return cls(
            directory=Path(environ.get("SELFHEAL_DIRECTORY") or DEFAULT_DIRECTORY),
            database=environ.get("SELFHEAL_DATABASE_URL") or environ.get("DATABASE_URL") or DEFAULT_DATABASE,
            prefix=environ.get("SELFHEAL_PREFIX") or DEFAULT_PREFIX,
        )

    def override(
        self, *, directory: str | None = None, database: str | None = None, prefix: str | None = None
    ) -> Settings:
        """The same settings with what a flag said in their place."""
        return replace(
            self,
            directory=self.directory if directory is None else Path(directory),
            database=self.database if database is None else database,
            prefix=self.prefix if prefix is None else prefix,
        )


def check_prefix(prefix: str) -> str:
    """Return a URL prefix unchanged if it can be one; raise `SettingsError` otherwise."""
    if not prefix.startswith("/") or prefix.endswith("/") or "//" in prefix or "%" in prefix:
        raise SettingsError(f"the prefix {prefix!r} must be a decoded path like {DEFAULT_PREFIX}")
    return prefix
