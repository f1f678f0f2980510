"""SQLite through aiosqlite: all that is particular to it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import AsyncAdaptedQueuePool, PoolProxiedConnection, StaticPool

from ..errors import DatabaseUnavailable, SettingsError
from . import sqlite_space
from .backend import Backend, Values
from .own_transactions import changed_rows, own_transactions
from .pool_limit import PoolLimit
from .sqlite_file import keep_to_file
from .sqlite_reader import SQLiteReader, read_part
from .statements import compiled

SYNCHRONOUS = "FULL"  # each commit waits for the disk
LOCK_WAIT = 10.0  # seconds in which a writer tries to get SQLite's lock; SQLite gives it in no fair order

_SAFE_WAL_PATCHES = {(3, 50): 7, (3, 44): 6}


def wal_is_safe(version: tuple[int, ...]) -> bool:
    """Whether this SQLite has the fix for the WAL-reset corruption (3.51.3 and later, or 3.50.7, 3.44.6)."""
    return version >= (3, 51, 3) or version[2] >= _SAFE_WAL_PATCHES.get((version[0], version[1]), 1 << 30)


class _TextMoment(sa.DateTime):
    """A time as SQLite keeps it; STRICT tables know no DATETIME."""

    # Alembic writes types into scripts, by module and `repr`: this one as what it is in the database
    __module__ = "sqlalchemy.types"

    def __repr__(self) -> str:
        return "Text()"


@compiles(_TextMoment)
def _compile_moment(*_: Any, **__: Any) -> str:
    return "TEXT"


class SQLite(Backend):
    """The backend of SQLite."""

    name = "sqlite"
    driver = "aiosqlite"
    drivernames = ("sqlite", "sqlite+pysqlite", "sqlite+aiosqlite")
    has_one_writer = True
    types = {"name": sa.Text(), "text": sa.Text(), "integer": sa.Integer(), "moment": _TextMoment()}  # noqa: RUF012

    def file(self, url: URL) -> Path | None:
        if self.is_in_memory(url):
            return None
        return Path((url.database or "").removeprefix("file:").partition("?")[0]).absolute()

    def place(self, url: URL) -> Hashable:
        file = self.file(url)
        return object() if file is None else file.resolve()  # two databases in memory are never the same

    def is_in_memory(self, url: URL) -> bool:
        return ":memory:" in (url.database or ":memory:") or url.query.get("mode") == "memory"

    def create_engine(self, url: URL, timeout: float, limit: PoolLimit) -> AsyncEngine:
        limits: dict[str, Any] = {"pool_size": limit.kept, "max_overflow": limit.size - limit.kept}
        limits |= {"pool_timeout": timeout, "poolclass": AsyncAdaptedQueuePool}  # the default since SQLAlchemy 2.0.38
        limits = {} if self.is_in_memory(url) else limits
        # nothing to reset: reads open no transaction, and every write ends its own
        engine = create_async_engine(url, connect_args={"timeout": timeout}, pool_reset_on_return=None, **limits)
        file = self.file(url)
        if file is not None:
            keep_to_file(engine, file)
            sa.event.listen(engine.sync_engine, "connect", partial(sqlite_space.prepare, file))
        sa.event.listen(engine.sync_engine, "connect", _tune)
        return engine

    def create_plain_engine(self, url: URL, timeout: float) -> AsyncEngine:
        engine = create_async_engine(url, connect_args={"timeout": timeout})
        sa.event.listen(engine.sync_engine, "connect", _read_any_text)
        return engine

    def create_database(self, url: URL) -> None:
        file = self.file(url)
        if file is not None and "uri" not in url.query and not file.exists():
            file.touch(0o644)

    def create_reader(self, engine: AsyncEngine, limit: PoolLimit) -> SQLiteReader | None:
        file = self.file(engine.url)
        return None if file is None or engine.url.query else SQLiteReader(file)

    def check_schema(self, schema: str | None) -> None:
        if schema is not None:
            raise SettingsError(f"SQLite has no schema {schema!r}; use a table prefix, or a file for each store")

    async def prepare_schema(self, connection: AsyncConnection, schema: str) -> None:
        """An app's own engine may have attached a database of that name."""
        databases = await connection.execute(sa.text("PRAGMA database_list"))
        if schema not in [row[1] for row in databases]:
            self.check_schema(schema)

    def driver_errors(self) -> tuple[type[Exception], ...]:
        return (sqlite3.Error,)

    def is_missing_table(self, error: BaseException) -> bool:
        # the code of every error in a statement; ours are right, so the tables are not
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR

    def is_lock_timeout(self, error: BaseException) -> bool:
        return super().is_lock_timeout(error) or _is_locked(error)

    def is_wrong_statement(self, error: BaseException) -> bool:
        return self.is_missing_table(error)

    def place_of_row(self, columns: Iterable[str]) -> Sequence[sa.ColumnElement[Any]]:
        taken = {column.lower() for column in columns}  # a column of that name hides the number of the row
        return [sa.literal_column(name) for name in ("rowid", "_rowid_", "oid") if name not in taken][:1]

    async def place_of_bytes(
        self, connection: AsyncConnection, data: sa.ColumnClause[Any], columns: Iterable[str]
    ) -> sa.ColumnElement[Any]:
        """Return the number of the row: SQL would read the whole value for each part of it."""
        url, number, table = connection.engine.url, self.place_of_row(columns), cast("sa.TableClause", data.table)
        if not number or self.is_in_memory(url) or url.query:
            return sa.null()
        try:
            await connection.execute(sa.select(*number).select_from(table).limit(0))
        except sa.exc.OperationalError:  # WITHOUT ROWID
            return sa.null()
        return sa.case((sa.func.typeof(data) == "blob", number[0]))

    def read_part(
        self, url: URL, data: sa.ColumnClause[Any], place: Any, start: int, size: int
    ) -> tuple[bytes, int] | None:
        file, table = self.file(url), cast("sa.TableClause", data.table)
        return None if file is None else read_part(file, table.schema, table.name, data.name, place, start, size)

    async def fetch(self, driver: Any, text: str, values: Sequence[Any]) -> Any:
        try:
            return await driver.execute_fetchall(text, values)
        except sqlite3.OperationalError as error:
            if hasattr(error, "sqlite_errorcode"):
                raise
            error.__traceback__ = None  # it refers to the cursor, which locks the database as long as it lives
        # only Python's own error has no code: a text is not UTF-8. A decoder in Python is slow, and needed only here
        factory, driver.text_factory = driver.text_factory, lambda text: text.decode(errors="surrogateescape")
        try:
            return await driver.execute_fetchall(text, values)
        finally:
            driver.text_factory = factory

    async def execute_many(self, connection: AsyncConnection, statement: sa.Insert, rows: Sequence[Values]) -> None:
        if connection.dialect.driver != self.driver:
            await super().execute_many(connection, statement, rows)
            return
        text, order, _ = compiled(statement, connection.dialect, tuple(rows[0]))
        driver = await _driver_of(connection)
        await (await driver.executemany(text, [[row[key] for key in order] for row in rows])).close()

    @contextlib.asynccontextmanager
    async def transaction(self, connection: AsyncConnection) -> AsyncIterator[None]:
        """Take the lock at once (BEGIN IMMEDIATE): a lock that is taken later fails if another writer was first."""
        driver = await _driver_of(connection)
        is_always_in_one = driver.in_transaction  # with sqlite3's autocommit=False one begins wherever one ends
        is_shared = isinstance(connection.engine.pool, StaticPool)
        if is_always_in_one and is_shared:
            raise DatabaseUnavailable("a transaction is open on this engine's only connection")
        await connection.begin()
        if driver.in_transaction:  # begun by the app's own engine, without the lock
            await driver.execute_fetchall("ROLLBACK")
        try:
            if any(map(changed_rows, own_transactions(self, connection.engine.url))):
                await _begin_at_once(driver)
            else:
                await _begin_immediate(driver)
            yield
            await connection.commit()
        except BaseException:
            with contextlib.suppress(sqlite3.Error, ValueError):  # closed
                if driver.in_transaction is not is_always_in_one and not is_shared:  # else SQLAlchemy rolls back
                    await driver.execute_fetchall("BEGIN" if is_always_in_one else "ROLLBACK")
            raise
        if driver.in_transaction and not is_always_in_one and not is_shared:
            await driver.execute_fetchall("ROLLBACK")
            raise DatabaseUnavailable("this engine's connections commit nothing; is that sqlite3's autocommit=True?")

    async def is_autocommit(self, connection: AsyncConnection) -> bool:
        driver = await _driver_of(connection)
        return driver.isolation_level is None and not driver.in_transaction  # an app's hook may begin one

    def table_options(self) -> Values:
        """STRICT: SQLite refuses a value of another type, which other programs might write."""
        is_known = "strict" in dict(SQLiteDialect.construct_arguments or ())[sa.Table]  # since SQLAlchemy 2.0.37
        return {"sqlite_strict": True} if is_known and sqlite3.sqlite_version_info >= (3, 37) else {}

    async def version(self, connection: AsyncConnection) -> str:
        driver = await _driver_of(connection)
        ((journal,),) = await driver.execute_fetchall("PRAGMA journal_mode")
        lacks = "" if wal_is_safe(sqlite3.sqlite_version_info) else ", WAL is not used: it has a fault in this version"
        return f"SQLite {sqlite3.sqlite_version} (journal {journal}{lacks})"

    async def free_some(self, connection: AsyncConnection) -> int:
        return await sqlite_space.free_some(await _driver_of(connection))

    async def shrink(self, connection: AsyncConnection) -> None:
        await sqlite_space.shrink(await _driver_of(connection))

    def check_vacuum(self) -> None:
        """A file keeps its size."""

    async def vacuum(self, connection: AsyncConnection) -> int:
        return await sqlite_space.vacuum(await _driver_of(connection))

    async def space(self, connection: AsyncConnection, tables: Iterable[sa.Table]) -> tuple[int, int]:
        return await sqlite_space.space(await _driver_of(connection))

    def name_list(self, names: Iterable[str]) -> str:
        return json.dumps(list(names))

    def is_wanted(self, name: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
        each = sa.func.json_each(sa.bindparam("wanted", type_=sa.String)).table_valued("value")
        return name.in_(sa.select(each.c.value))

    def bound(self, parameter: str) -> sa.ColumnElement[Any]:
        return sa.cast(super().bound(parameter), sa.String)

    def bound_value(self, name: str) -> bytes:
        return name.encode(errors="surrogateescape")  # text that is not UTF-8 can only be bound as bytes

    def joined(self, name: sa.ColumnElement[str]) -> Any:
        # a literal: the value of char(10) would be copied for each name, a fifth of the time
        return sa.func.group_concat(name, sa.literal_column("'\n'"))

    def total(self, size: sa.ColumnElement[int]) -> Any:
        return sa.func.total(size)


async def _driver_of(connection: AsyncConnection) -> Any:
    return (await connection.get_raw_connection()).driver_connection


def _tune(connection: Any, _record: PoolProxiedConnection) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA synchronous={SYNCHRONOUS}")
    if wal_is_safe(sqlite3.sqlite_version_info):
        cursor.execute("PRAGMA journal_mode=WAL")
    cursor.close()


def _read_any_text(connection: Any, _record: PoolProxiedConnection) -> None:
    connection.driver_connection.text_factory = lambda text: text.decode(errors="surrogateescape")


async def _begin_immediate(driver: Any) -> None:
    give_up = time.monotonic() + LOCK_WAIT
    while True:
        try:
            await driver.execute_fetchall("BEGIN IMMEDIATE")  # one hop to its thread; through SQLAlchemy it takes three
            return
        except sqlite3.OperationalError as error:
            if time.monotonic() > give_up or not _is_locked(error):
                raise


async def _begin_at_once(driver: Any) -> None:
    """Take the lock, or raise without a wait: it belongs to one who waits for this transaction."""
    ((timeout,),) = await driver.execute_fetchall("PRAGMA busy_timeout")
    await driver.execute_fetchall("PRAGMA busy_timeout=0")
    try:
        await driver.execute_fetchall("BEGIN IMMEDIATE")
    finally:
        await driver.execute_fetchall(f"PRAGMA busy_timeout={timeout}")


def _is_locked(error: BaseException) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
