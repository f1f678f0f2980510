"""Settings: the directory, the database, the URL prefix. `from_env` is the only reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import SettingsError
from .sql.backends import backend_of, database_url

DEFAULT_DIRECTORY = "app/static/uploads"
DEFAULT_DATABASE = "sqlite+aiosqlite:///selfheal.db"
DEFAULT_PREFIX = "/static/uploads"


@dataclass(frozen=True, slots=True)
class Settings:
    """The directory, the database and the URL prefix. Raises `SettingsError` if one of them cannot be used."""

    directory: Path = Path(DEFAULT_DIRECTORY)
    database: str = DEFAULT_DATABASE
    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        directory = Path(self.directory).absolute()
        if directory.resolve().parent == directory.resolve():
            raise SettingsError(f"the uploads directory cannot be {directory}; name a directory of its own")
        if directory.exists() and not directory.is_dir():
            raise SettingsError(f"{directory} is not a directory")
        file = self.database_file
        if file is not None and file.resolve().is_relative_to(directory.resolve()):
            raise SettingsError(f"the database {file} is in the directory that is served; move it elsewhere")
        object.__setattr__(self, "directory", directory)
        object.__setattr__(self, "prefix", check_prefix(self.prefix))

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
        """Read `SELFHEAL_DIRECTORY`, `SELFHEAL_DATABASE_URL` (then `DATABASE_URL`) and `SELFHEAL_PREFIX`."""
        return cls(
            directory=Path(environ.get("SELFHEAL_DIRECTORY") or DEFAULT_DIRECTORY),
            database=environ.get("SELFHEAL_DATABASE_URL") or environ.get("DATABASE_URL") or DEFAULT_DATABASE,
            prefix=environ.get("SELFHEAL_PREFIX") or DEFAULT_PREFIX,
        )


def check_prefix(prefix: str) -> str:
    """Return a URL prefix without its trailing slash; raise `SettingsError` if it cannot be one."""
    bare = prefix.removesuffix("/")
    if not bare.startswith("/") or bare.endswith("/") or "//" in bare or "%" in bare:
        raise SettingsError(f"the prefix {prefix!r} must be a decoded path like {DEFAULT_PREFIX}")
    return bare
