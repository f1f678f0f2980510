"""What differs between databases: a backend is one database and its driver, with all that is particular to it."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ..errors import SettingsError
from .pool_limit import PoolLimit

Rows = Sequence[Sequence[Any]]
Values = dict[str, Any]

LOCK_TIMEOUT = 0.9
"""Seconds that a transaction of ours, which holds locks, waits for another one; then it is run again.

Of two transactions that wait for each other, PostgreSQL breaks one off after a second: that must not be the app's own.
"""


def state_of(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of a server's error."""
    return getattr(getattr(error, "orig", None) or error, "sqlstate", None)


class Reader:
    """Reads past SQLAlchemy's pool where that is faster, for an engine of our own. Raises the driver's errors."""

    can_read_in_thread = False  # whether `rows_in_thread` works

    async def rows(self, text: str, values: Sequence[Any]) -> Rows | None:
        """Return all rows of a query; None if there is no idle connection, and the pool is to be asked."""
        return None

    def rows_in_thread(self, text: str, values: Sequence[Any]) -> Rows:
        """Return all rows of a query in the calling thread; raise, without waiting, if the database is locked."""
        raise NotImplementedError

    def make_room(self) -> None:
        """Give connections back to the pool if it has no other left."""

    def close(self) -> None:
        """Close the reader's connections; no thread may be reading."""


class Backend:
    """What differs between databases, with what most of them have in common. See sqlite.py and postgresql.py."""

    name: str  # SQLAlchemy's name of the dialect
    driver: str  # the driver that is asked past SQLAlchemy; an app's own engine may have another one
    drivernames: tuple[str, ...]  # the names of the database in URLs; the last one is ours
    has_one_writer = False  # whether a write transaction locks all others out
    must_finish = False  # whether a query that is cancelled may break the next one of its connection
    full_states: tuple[str, ...] = ()  # SQLSTATEs of a server that has no room for another connection
    unstorable_states: tuple[str, ...] = ()  # SQLSTATEs of a text that the database's encoding cannot hold
    retried_states: tuple[str, ...] = ()  # SQLSTATEs of a transaction that lost against another one: it is run again
    types: Mapping[str, sa.types.TypeEngine[Any]] = {}
    """Column types of its own, by kind: `name`, `text`, `integer`, `moment`."""
    has_partial_indexes = True

    def url(self, url: URL) -> URL:
        """Return a URL as hosts write it in the form that the driver understands."""
        return url.set(drivername=self.drivernames[-1])

    def file(self, url: URL) -> Path | None:
        """Return the absolute path of the database's file; None for a server or a database in memory."""
        return None

    def place(self, url: URL) -> Hashable:
        """Return what tells a database from others."""
        return url.query.get("host", url.host), url.query.get("port", url.port), url.database

    def is_in_memory(self, url: URL) -> bool:
        """Whether the database is in the memory of one process."""
        return False

    def check_schema(self, schema: str | None) -> None:
        """Raise `SettingsError` if an engine of our own cannot have tables in this schema."""

    def import_driver(self) -> None:
        """Import the driver now, if it is installed, so that the event loop does not wait for that later."""

    def create_engine(self, url: URL, timeout: float, limit: PoolLimit) -> AsyncEngine:
        """Make an engine of our own; `timeout` (seconds) bounds connecting and statements. Raises `MissingExtra`."""
        raise NotImplementedError

    def create_plain_engine(self, url: URL, timeout: float) -> AsyncEngine:
        """Make an engine that only reads another app's tables, and changes no setting of the database."""
        return self.create_engine(url, timeout, PoolLimit(2))

    def create_database(self, url: URL) -> None:
        """Make the database's file if it is missing. Raises `OSError`."""

    def create_reader(self, engine: AsyncEngine, limit: PoolLimit) -> Reader | None:
        """Make the reader of an engine of our own; None if the pool is as fast."""
        return None

    def driver_errors(self) -> tuple[type[Exception], ...]:
        """Return the driver's own exception classes."""
        raise NotImplementedError

    def is_missing_table(self, error: BaseException) -> bool:
        """Whether a driver's error means that a table or a column is missing."""
        raise NotImplementedError

    def is_lock_timeout(self, error: BaseException) -> bool:
        """Whether an error means that a lock, or a connection, was not free in time."""
        return isinstance(error, (TimeoutError, sa.exc.TimeoutError))

    def is_wrong_statement(self, error: BaseException) -> bool:
        """Whether a driver's error means that a statement which a user wrote a part of is wrong."""
        raise NotImplementedError

    def place_of_row(self, columns: Iterable[str]) -> Sequence[sa.ColumnElement[Any]]:
        """Return what tells the rows of a table with these `columns`, but no primary key, apart, in an order."""
        raise NotImplementedError

    async def place_of_bytes(
        self, connection: AsyncConnection, data: sa.ColumnClause[Any], columns: Iterable[str]
    ) -> sa.ColumnElement[Any]:
        """Return what `read_part` finds the bytes of a row by; NULL where SQL reads a part of them as fast."""
        return sa.null()

    def read_part(
        self, url: URL, data: sa.ColumnClause[Any], place: Any, start: int, size: int
    ) -> tuple[bytes, int] | None:
        """Return a part of the bytes in a row, and the number of all; None if SQL is to be asked.

        The calling thread waits for the disk.
        """
        return None

    async def fetch(self, driver: Any, text: str, values: Sequence[Any]) -> Rows:
        """Ask a connection of the driver: one hop or round trip instead of five. Raises `DeadConnection`."""
        raise NotImplementedError

    async def execute_many(self, connection: AsyncConnection, statement: sa.Insert, rows: Sequence[Values]) -> None:
        """Execute an INSERT for each of `rows`, which are not empty and have the same keys."""
        await connection.execute(statement, rows)

    def insert(self, table: sa.Table) -> Any:
        """Return the dialect's own INSERT, which knows ON CONFLICT. Only the dialect in use is loaded."""
        return import_module(f"sqlalchemy.dialects.{self.name}").insert(table)

    def transaction(self, connection: AsyncConnection) -> AbstractAsyncContextManager[None]:
        """Begin a transaction; commit it at the end, or roll it back. Raises `DatabaseUnavailable` if that fails."""
        raise NotImplementedError

    async def is_autocommit(self, connection: AsyncConnection) -> bool:
        """Whether a connection that is in a transaction for SQLAlchemy commits every statement all the same."""
        pooled: Any = await connection.get_raw_connection()
        return bool(pooled.dbapi_connection.autocommit)

    async def prepare_schema(self, connection: AsyncConnection, schema: str) -> None:
        """Make the schema if it is missing. Raises `SettingsError` if the database has no schemas."""
        raise NotImplementedError

    async def limit_lock_waits(self, connection: AsyncConnection) -> None:
        """Wait no longer than `LOCK_TIMEOUT` for a lock from now on: others may wait for those held."""

    async def lock_blob(self, connection: AsyncConnection, sha256: str) -> None:
        """Keep others from writing chunks of these bytes until the transaction ends."""

    def table_options(self) -> Values:
        """Return the options of every table."""
        return {}

    def prepare_chunks(self, chunks: sa.Table) -> None:
        """Add to the table of chunks what only this database knows."""

    async def mend_chunks(self, connection: AsyncConnection, chunks: sa.Table) -> None:
        """Add the same to a table that is there: Alembic does not write it."""

    async def version(self, connection: AsyncConnection) -> str:
        """Return the name and the version of the database, for people."""
        return f"{connection.dialect.name} {'.'.join(map(str, connection.dialect.server_version_info or ()))}"

    async def free_some(self, connection: AsyncConnection) -> int:
        """Give space that a purge left back to the disk, in a transaction; return the bytes, 0 if there is no more."""
        return 0

    async def shrink(self, connection: AsyncConnection) -> None:
        """Let the file have no more bytes than it needs after `free_some`."""

    def check_vacuum(self) -> None:
        """Raise `SettingsError` if the database frees its space itself."""
        raise SettingsError(f"{self.name} frees its space itself; only SQLite needs --vacuum")

    async def vacuum(self, connection: AsyncConnection) -> int:
        """Write the whole file anew, without free space; return the bytes by which it is smaller."""
        self.check_vacuum()
        return 0

    async def space(self, connection: AsyncConnection, tables: Iterable[sa.Table]) -> tuple[int, int]:
        """Return the bytes of the file, or of the tables, and how many of them are free."""
        raise NotImplementedError

    def name_list(self, names: Iterable[str]) -> Any:
        """Return the value of the parameter `wanted` of `is_wanted`."""
        return list(names)

    def is_wanted(self, name: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
        """Whether a name is in the list `wanted`: one parameter, however long the list is."""
        raise NotImplementedError

    def bound(self, parameter: str) -> sa.ColumnElement[Any]:
        """Return a parameter for a name that a range of names begins or ends with."""
        return sa.bindparam(parameter, type_=sa.String)

    def bound_value(self, name: str) -> Any:
        """Return the value of such a parameter."""
        return name

    def joined(self, name: sa.ColumnElement[str]) -> Any:
        """Return the aggregate of all names, joined by newlines."""
        return sa.func.string_agg(name, sa.literal_column("'\n'"))

    def total(self, size: sa.ColumnElement[int]) -> Any:
        """Return the aggregate of all sizes, which must not overflow."""
        return sa.func.sum(size)
