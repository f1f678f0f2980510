"""Where the tables are: the prefix of their names and their schema, and which directory they belong to."""

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

from sqlalchemy.engine import URL

from ..errors import SettingsError
from .backends import backend_of

TABLE_NAMES = ("image_storage", "image_blob", "image_chunk", "image_history", "image_schema")
_PREFIX = re.compile(r"[a-z_][a-z0-9_]{0,30}")
_SCHEMA = re.compile(r"[^\W\d][\w$-]{0,62}")


def check_table_prefix(prefix: str) -> str:
    """Return a prefix of table names; raise `SettingsError` if it cannot be one."""
    if prefix and not _PREFIX.fullmatch(prefix):
        raise SettingsError(f"the table prefix {prefix!r} must be up to 31 of a-z, 0-9 and _, with no digit first")
    return prefix


def check_schema(schema: str | None) -> str | None:
    """Return the name of a schema, or None for the database's own; raise `SettingsError` if it cannot be one."""
    if schema and not _SCHEMA.fullmatch(schema):
        raise SettingsError(f"the schema {schema!r} must be up to 63 letters, digits, _, - and $, with no digit first")
    return schema or None


class TableClaim:
    """A store's use of tables. Two stores of one process that share tables would serve each other's files."""

    _taken: ClassVar[WeakSet["TableClaim"]] = WeakSet()

    def __init__(self, url: URL, options: Mapping[str, object], directory: Path) -> None:
        self._tables = (*database_of(url), options.get("table_prefix") or "", options.get("schema") or "")
        self._directory = directory

    def take(self) -> None:
        """Use the tables; raise `SettingsError` if an open store of this process has them for another directory."""
        directory = self._directory.resolve()
        for other in list(self._taken):
            if other._tables == self._tables and other._directory.resolve() != directory:
                raise SettingsError(
                    f"the tables of {directory} are those of {other._directory} too, and each would serve the other's "
                    "files; give each store a table_prefix, a schema or a database of its own"
                )
        self._taken.add(self)

    def release(self) -> None:
        """Use the tables no more."""
        self._taken.discard(self)


def database_of(url: URL) -> tuple[Hashable, ...]:
    """Return what tells a database from others; the user and the DSN may choose a search path."""
    return backend_of(url).place(url), url.username, url.query.get("dsn")
