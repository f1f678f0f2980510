"""The engine: one per process and loop, tuned, and with every failure told as *unknown*, never as *absent*."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import import_module
from typing import Any, TypeVar

from sqlalchemy import Select, event, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import Pool, PoolProxiedConnection, QueuePool

from ..aio.single_flight import Places, Tasks, to_its_end
from ..errors import DatabaseUnavailable, MissingExtra, SchemaError
from ..settings import database_url, is_in_memory, sqlite_file
from .postgresql import Readers
from .schema import SCHEMA_VERSION, Tables
from .sqlite import Direct
from .statements import DeadConnection, Statements
from .transactions import LOCK_TURN, is_shared, transaction

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]

_SAFE_WAL_PATCHES = {(3, 50): 7, (3, 44): 6}
_NO_SUCH = ("no such table", "no such column", "has no column named")
_POOL_AT_MOST = 10
_NO_SUCH_STATES = ("42P01", "42703")
_BROKEN_OFF_STATES = ("40P01", "40001", "55P03", "23505")
"""A deadlock, no order of transactions, a lock that was not to be had in time, others' rows that could not be seen."""


def wal_is_safe(version: tuple[int, ...]) -> bool:
    """Whether this SQLite has the fix for the WAL-reset corruption (3.51.3 and later, or 3.50.7, 3.44.6)."""
    return version >= (3, 51, 3) or version[2] >= _SAFE_WAL_PATCHES.get((version[0], version[1]), 1 << 30)


class Engine:
    """Connections for reading and for writing, from a URL or from the app's own `AsyncEngine`.

    `timeout` (seconds) bounds connecting, every statement, and waiting for a lock or for a free connection.
    Raises `DatabaseUnavailable` (or `SchemaError`) whenever there is no answer.
    """

    def __init__(self, database: str | URL | AsyncEngine, tables: Tables, *, timeout: float, tasks: Tasks) -> None:
        self._given = database if isinstance(database, AsyncEngine) else None
        self.url = url_of(database)
        self.timeout = timeout
        self._tables = tables
        self._tasks = tasks
        self._engine: AsyncEngine | None = None
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._checked = False
        self._left: list[object] = []
        self._is_shared = is_in_memory(self.url) if self._given is None else is_shared(self._given)
        self._turns = Places(1)  # on a connection that all share: it has one transaction
        self._statements = Statements()
        self._direct: Direct | None = None
        self._readers: Readers | None = None
        if self.dialect == "postgresql":
            with contextlib.suppress(ImportError):  # told when it is needed
                import_module("asyncpg")  # now: it takes a tenth of a second, for which no event loop must stand still

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self.url.get_backend_name()

    @property
    def has_one_writer(self) -> bool:
        """Whether nobody else writes while a transaction does: SQLite locks all of a file."""
        return self.dialect == "sqlite"

    async def read(self, work: Work[T]) -> T:
        """Run `work` on a connection; anew for as long as the pool hands out connections that have died."""
        if self._is_shared:  # not to be broken off: what is given back late is rolled back under whoever is next
            async with self._turns.one():
                return await to_its_end(self._read(work))
        for _ in range(_POOL_AT_MOST):
            try:
                return await self._read(work)
            except DatabaseUnavailable as error:
                if not _was_dead(error.__cause__):
                    raise
        return await self._read(work)

    async def write(self, work: Work[T]) -> T:
        """Run `work` in a transaction of its own; it ends, one way or the other, even if the caller is cancelled.

        It is run anew where the server breaks it off because others have what it waits for, until it has waited for as
        long as the timeout.
        """
        return await self._tasks.finish(self._write(work))

    async def write_schema(self, work: Work[T]) -> T:
        """As `write`, on a database whose tables may not be there yet."""
        return await self._tasks.finish(self._write(work, has_tables=False))

    async def rows(self, query: Select[Any], **values: Any) -> Sequence[Sequence[Any]]:
        """All rows of a query, read as by `read`; `values` are those of its bound parameters.

        Times come as the driver gives them (see `to_utc`). A query that is always the same object is compiled once.
        """
        readers = self._readers
        if readers is not None and self._checked and self._is_ours() and readers.has_idle:
            try:
                return await readers.ask(lambda driver: self._statements.ask(driver, readers.dialect, query, values))
            except _database_errors() as error:
                if not _was_dead(error):
                    raise unavailable(error) from error
        return await self.read(lambda connection: self._statements.fetch(connection, query, values))

    @property
    def is_at_hand(self) -> bool:
        """Whether any thread can ask the database itself (`rows_here`)."""
        return self._direct is not None and self._checked and self._is_ours()

    def rows_here(self, query: Select[Any], **values: Any) -> Sequence[Sequence[Any]]:
        """As `rows`, in the calling thread, without waiting for a lock; only while the database `is_at_hand`."""
        engine, direct = self._engine, self._direct
        if engine is None or direct is None:
            raise DatabaseUnavailable("the database was closed meanwhile")
        return direct.rows(*self._statements.bind(engine.dialect, query, values))

    async def close(self) -> None:
        """Close what was opened here; the app's own engine is the app's to close."""
        engine, self._engine = self._engine, None
        direct, self._direct = self._direct, None
        readers, self._readers = self._readers, None
        if engine is not None and engine is not self._given and self._is_ours():
            if readers is not None:
                readers.close()
            await engine.dispose()
            if direct is not None:
                direct.close()

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _read(self, work: Work[T]) -> T:
        async with self._connection() as connection:
            return await work(connection)

    async def _write(self, work: Work[T], *, has_tables: bool = True) -> T:
        for _ in range(math.ceil(self.timeout / LOCK_TURN)):
            try:
                return await self._write_once(work, has_tables=has_tables)
            except DatabaseUnavailable as error:
                if _state_of(error.__cause__) not in _BROKEN_OFF_STATES:
                    raise
        return await self._write_once(work, has_tables=has_tables)

    async def _write_once(self, work: Work[T], *, has_tables: bool) -> T:
        async with (
            self._turns.one() if self._is_shared else contextlib.nullcontext(),
            self._connection(has_tables=has_tables) as connection,
            transaction(connection),
        ):
            return await work(connection)

    @contextlib.asynccontextmanager
    async def _connection(self, *, has_tables: bool = True) -> AsyncIterator[AsyncConnection]:
        try:
            connection = await self._connect(self._get_engine())
        except MissingExtra:
            raise
        except Exception as error:
            raise unavailable(error) from error
        try:
            try:
                if has_tables and not self._checked:
                    await self._check_schema(connection)
                yield connection
            except TimeoutError:
                await connection.invalidate()  # the server is silent: this connection never comes back
                raise
            finally:
                await asyncio.shield(self._tasks.start(connection.close()))
        except (IntegrityError, DataError):
            raise
        except _database_errors() as error:
            raise unavailable(error) from error

    async def _connect(self, engine: AsyncEngine) -> AsyncConnection:
        """A connection. Who breaks off what opens one leaves it behind half made, so the caller alone is broken off."""
        if not _opens_one(engine.pool):
            return await self._opened(engine)
        opening = self._tasks.start(self._opened(engine))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._tasks.start(_closed(opening))
            raise

    async def _opened(self, engine: AsyncEngine) -> AsyncConnection:
        if self._readers is not None:
            self._readers.make_room()
        return await engine.connect()

    async def _check_schema(self, connection: AsyncConnection) -> None:
        rows = await self._statements.fetch(connection, select(self._tables.schema.c.version), {})
        check_version(max((row[0] for row in rows), default=None))
        self._checked = True

    def _is_ours(self) -> bool:
        return self._owner == (os.getpid(), asyncio.get_running_loop())

    def _get_engine(self) -> AsyncEngine:
        """The engine of this process and loop: connections made before a fork, or in another loop, are not ours."""
        if self._engine is not None and self._is_ours():
            return self._engine
        if self._given is not None:
            if self._owner is not None and self._owner[0] != os.getpid():
                self._leave(self._given)
            self._engine = self._given
        else:
            if self._engine is not None:
                self._leave(self._engine)
                self._left += [self._direct, self._readers]
            self._engine = _make(self.url, self.timeout)
            self._direct = _make_direct(self.url)
            self._readers = None if self.has_one_writer else Readers(self._engine, _POOL_AT_MOST)
        self._owner = (os.getpid(), asyncio.get_running_loop())
        self._checked = False
        return self._engine

    def _leave(self, engine: AsyncEngine) -> None:
        """Its connections belong to a parent process, or to a loop that has ended: not to be used, nor to be closed."""
        self._left.append(engine.sync_engine.pool)
        engine.sync_engine.dispose(close=False)


def check_version(version: int | None) -> None:
    """Raise `SchemaError` unless the tables are of our version, or nobody said of which (a migration made them)."""
    if version is not None and version > SCHEMA_VERSION:
        raise SchemaError(f"the tables are of version {version}, made by a newer selfheal; upgrade selfheal")
    if version is not None and version < SCHEMA_VERSION:
        raise SchemaError(f"the tables are of version {version}; run `selfheal migrate` to bring them up to date")


def url_of(database: str | URL | AsyncEngine) -> URL:
    """Where a database is, in the words of the driver that we use. Raises `SettingsError`."""
    if isinstance(database, AsyncEngine):
        return database.url
    return database_url(database if isinstance(database, str) else database.render_as_string(hide_password=False))


def _opens_one(pool: Pool) -> bool:
    """Whether the next connection is a new one: none is idle, and there may be more (of another's pool: a guess)."""
    return not isinstance(pool, QueuePool) or not (pool.checkedin() or pool.checkedout() >= _POOL_AT_MOST)


async def _closed(opening: asyncio.Task[AsyncConnection]) -> None:
    await (await opening).close()


def _make(url: URL, timeout: float) -> AsyncEngine:
    if url.get_backend_name() == "sqlite":
        limits = {} if is_in_memory(url) else {"pool_size": 5, "max_overflow": 5, "pool_timeout": timeout}
        # nothing to reset: reads open no transaction, and every write ends its own
        engine = create_async_engine(url, connect_args={"timeout": timeout}, pool_reset_on_return=None, **limits)
        event.listen(engine.sync_engine, "connect", _tune_sqlite)
        return engine
    try:
        return create_async_engine(
            url,
            pool_size=5,
            max_overflow=5,
            pool_timeout=timeout,
            pool_recycle=1800,
            connect_args={"timeout": timeout, "command_timeout": timeout},
        )
    except ImportError as error:
        raise MissingExtra("postgres", "asyncpg") from error


def _make_direct(url: URL) -> Direct | None:
    file = sqlite_file(url)
    return None if file is None or url.query else Direct(file)


def _tune_sqlite(connection: Any, _record: PoolProxiedConnection) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA page_size=16384")  # of a new file: a quarter of the writes that 4 KiB pages take
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA synchronous=FULL")
    if wal_is_safe(sqlite3.sqlite_version_info):
        cursor.execute("PRAGMA journal_mode=WAL")
    cursor.close()


def _was_dead(cause: BaseException | None) -> bool:
    return isinstance(cause, DeadConnection) or (isinstance(cause, DBAPIError) and cause.connection_invalidated)


def _database_errors() -> tuple[type[Exception], ...]:
    """What SQLAlchemy and the drivers raise; asyncpg is an extra, and only there if it was needed."""
    asyncpg = sys.modules.get("asyncpg")
    names = ("PostgresError", "InterfaceError", "InternalClientError")  # the last is not one of the others
    of_asyncpg = () if asyncpg is None else tuple(getattr(asyncpg, name) for name in names)
    return (SQLAlchemyError, OSError, sqlite3.Error, *of_asyncpg)


def _state_of(error: BaseException | None) -> str | None:
    """The SQLSTATE that PostgreSQL gave with an error."""
    return getattr(getattr(error, "orig", None) or error, "sqlstate", None)


def unavailable(error: BaseException) -> DatabaseUnavailable:
    """What a failure of the database means to us; the message says what to do, and holds no password."""
    cause = getattr(error, "orig", None) or error
    said = str(cause).partition("\n")[0] or type(cause).__name__
    if _state_of(error) in _NO_SUCH_STATES or any(words in said for words in _NO_SUCH):
        return SchemaError("the catalogue's tables are missing or old; run `selfheal migrate` to make them")
    return DatabaseUnavailable(f"the database gave no answer: {said}")
