"""The file of a SQLite database: only `migrate` makes one, and connections follow the path to another file."""

import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from ..errors import SchemaError

Identity = tuple[int, int] | None
"""Device and inode; None if there is no file."""


def identity_of(path: Path) -> Identity:
    """Return which file a path leads to now."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def existing(path: Path) -> str:
    """Return a URI that opens a file only if it is there: SQLite itself would make an empty database."""
    return f"{path.absolute().as_uri()}?mode=rw"


def keep_to_file(engine: AsyncEngine, path: Path) -> None:
    """Open connections to an existing file only, and again if the path leads to another one (a restored backup)."""

    def connect(_dialect: Any, entry: ConnectionPoolEntry, args: list[Any], named: dict[str, Any]) -> None:
        entry.info["file"] = identity_of(path)  # before it is opened: a change in between is noticed
        if named.get("uri") and args[0] != existing(path):  # before SQLAlchemy 2.1 they are those of the last call
            return  # the app chose the mode
        if entry.info["file"] is None and not path.exists():
            raise SchemaError(f"there is no database {path}; put it back, or run `selfheal migrate` to make one")
        args[0], named["uri"] = existing(path), True

    def check(_driver: DBAPIConnection, entry: ConnectionPoolEntry, _proxy: PoolProxiedConnection) -> None:
        if entry.info["file"] != identity_of(path):
            raise InvalidatePoolError(f"{path} is another file now")

    sa.event.listen(engine.sync_engine, "do_connect", connect)
    sa.event.listen(engine.sync_engine, "checkout", check)
