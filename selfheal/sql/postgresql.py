"""PostgreSQL through asyncpg: all that is particular to it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import PoolProxiedConnection, QueuePool

from ..errors import MissingExtra
from .backend import LOCK_TIMEOUT, Backend, Reader, Rows, state_of
from .libpq import in_asyncpgs_words
from .pool_limit import PoolLimit
from .statements import DeadConnection

T = TypeVar("T")

KEPT_AT_MOST = 2  # Idle connections that a reader keeps; the pool counts them as taken
KEPT_FOR = 60.0  # seconds after which a kept connection goes back to the pool, which checks its age

_TOO_MANY_CONNECTIONS = "53300"  # of a role, of a database, of the server, or but for the reserved ones
_UNTRANSLATABLE_CHARACTER, _CHARACTER_NOT_IN_REPERTOIRE = "22P05", "22021"
_UNDEFINED_TABLE, _UNDEFINED_COLUMN = "42P01", "42703"
_IS_STORED_OTHERWISE = (  # and this role may change that
    "SELECT 1 FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid WHERE a.attrelid = to_regclass(:name)"
    " AND a.attname = 'data' AND a.attstorage <> 'e' AND pg_has_role(c.relowner, 'USAGE')"
)
_WRONG_SYNTAX_OR_RIGHTS, _WRONG_VALUE = "42", "22"  # classes of errors
_DEADLOCK, _SERIALIZATION_FAILURE, _LOCK_NOT_AVAILABLE, _UNIQUE_VIOLATION = "40P01", "40001", "55P03", "23505"


class PostgreSQL(Backend):
    """The backend of PostgreSQL."""

    name = "postgresql"
    driver = "asyncpg"
    drivernames = ("postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2", "postgresql+asyncpg")
    types = {"name": sa.Text(collation="C")}  # noqa: RUF012
    # a unique violation: another transaction's rows, which a stricter level than READ COMMITTED does not see
    full_states = (_TOO_MANY_CONNECTIONS,)
    unstorable_states = (_UNTRANSLATABLE_CHARACTER, _CHARACTER_NOT_IN_REPERTOIRE)
    retried_states = (_DEADLOCK, _SERIALIZATION_FAILURE, _LOCK_NOT_AVAILABLE, _UNIQUE_VIOLATION)

    def url(self, url: URL) -> URL:
        return in_asyncpgs_words(super().url(url))

    def import_driver(self) -> None:
        with contextlib.suppress(ImportError):  # reported when an engine is made
            asyncpg = import_module("asyncpg")  # a tenth of a second
            self.must_finish = [int(part) for part in asyncpg.__version__.split(".")[:2]] < [0, 32]

    def create_engine(self, url: URL, timeout: float, limit: PoolLimit) -> AsyncEngine:
        try:
            return create_async_engine(
                url,
                pool_size=limit.kept,
                max_overflow=limit.size - limit.kept,
                pool_timeout=timeout,
                pool_recycle=1800,
                connect_args=_arguments(url, timeout),
            )
        except ImportError as error:
            raise MissingExtra("postgres", "asyncpg") from error

    def create_reader(self, engine: AsyncEngine, limit: PoolLimit) -> PostgreSQLReader:
        return PostgreSQLReader(engine, limit)

    def driver_errors(self) -> tuple[type[Exception], ...]:
        asyncpg = sys.modules.get("asyncpg")
        names = ("PostgresError", "InterfaceError", "InternalClientError")  # they have no base class in common
        return () if asyncpg is None else tuple(getattr(asyncpg, name) for name in names)

    def is_missing_table(self, error: BaseException) -> bool:
        return getattr(error, "sqlstate", None) in (_UNDEFINED_TABLE, _UNDEFINED_COLUMN)

    def is_wrong_statement(self, error: BaseException) -> bool:
        return str(state_of(error))[:2] in (_WRONG_SYNTAX_OR_RIGHTS, _WRONG_VALUE)

    def place_of_row(self, columns: Iterable[str]) -> Sequence[sa.ColumnElement[Any]]:
        return [sa.literal_column("tableoid"), sa.literal_column("ctid")]  # each partition counts for itself

    async def fetch(self, driver: Any, text: str, values: Sequence[Any]) -> Rows:
        return await _fetch(driver, text, values)

    @contextlib.asynccontextmanager
    async def transaction(self, connection: AsyncConnection) -> AsyncIterator[None]:
        """READ COMMITTED, whatever the default: other levels refuse a write that waited for another one."""
        await connection.execution_options(isolation_level="READ COMMITTED")
        yield
        await connection.commit()

    async def prepare_schema(self, connection: AsyncConnection, schema: str) -> None:
        names = await connection.run_sync(lambda sync: sa.inspect(sync).get_schema_names())
        if schema not in names:  # IF NOT EXISTS alone asks for the right to make one, also if it is there
            await connection.execute(sa.schema.CreateSchema(schema, if_not_exists=True))

    async def limit_lock_waits(self, connection: AsyncConnection) -> None:
        await connection.exec_driver_sql(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT * 1000:.0f}")

    async def lock_blob(self, connection: AsyncConnection, sha256: str) -> None:
        """An advisory lock: an UPDATE locks rows in no order, and rows yet to come have no lock."""
        key = int(sha256[:16], 16) - (1 << 63)
        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))

    def prepare_chunks(self, chunks: sa.Table) -> None:
        """Images do not compress: PostgreSQL would try it on every chunk, and then could not read a part of one."""
        sa.event.listen(chunks, "after_create", _store_externally().execute_if(dialect=self.name))

    async def mend_chunks(self, connection: AsyncConnection, chunks: sa.Table) -> None:
        table = connection.dialect.identifier_preparer.format_table(chunks)
        if (await connection.execute(sa.text(_IS_STORED_OTHERWISE), {"name": table})).first():  # ALTER locks all out
            await connection.execute(_store_externally().against(chunks))

    async def space(self, connection: AsyncConnection, tables: Iterable[sa.Table]) -> tuple[int, int]:
        names = [connection.dialect.identifier_preparer.format_table(table) for table in tables]
        total = "SELECT sum(pg_total_relation_size(to_regclass(name))) FROM unnest(CAST(:names AS text[])) AS name"
        return int((await connection.execute(sa.text(total), {"names": names})).scalar_one()), 0

    def is_wanted(self, name: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
        return name == sa.any_(sa.bindparam("wanted", type_=sa.ARRAY(sa.String)))


class PostgreSQLReader(Reader):
    """Keeps connections out of SQLAlchemy's pool, where taking one costs as much as a small query."""

    def __init__(self, engine: AsyncEngine, limit: PoolLimit) -> None:
        self._engine = engine
        self._limit = limit
        self._kept_at_most = min(KEPT_AT_MOST, limit.size // 3)
        self._kept: list[tuple[PoolProxiedConnection, float]] = []

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be ending
            self._give_all_back()  # else the pool warns of connections that were never given back

    @property
    def has_idle(self) -> bool:
        """Whether a connection can be asked without opening one."""
        return bool(self._kept) or self._pool.checkedin() > 0

    async def rows(self, text: str, values: Sequence[Any]) -> Rows | None:
        return await self.ask(lambda driver: _fetch(driver, text, values)) if self.has_idle else None

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """Ask a connection of the driver. Raises `DeadConnection` if it was closed, and no other can be opened."""
        connection, since = self._take() or (await self._from_pool(), time.monotonic())
        try:
            answer = await question(connection.driver_connection)
        except BaseException as error:
            has_answered = getattr(error, "sqlstate", None) is not None or isinstance(error, asyncio.CancelledError)
            self._give_back(connection, since, is_lost=not has_answered)
            raise
        self._give_back(connection, since)
        return answer

    def make_room(self) -> None:
        if self._kept and self._is_exhausted():
            self._give_all_back()

    def close(self) -> None:
        """Give all connections back to the pool, which is closed next; a query under way throws its own away."""
        self._kept_at_most = 0
        self._give_all_back()

    @property
    def _pool(self) -> QueuePool:
        return cast(QueuePool, self._engine.pool)

    def _is_exhausted(self) -> bool:
        return self._pool.checkedout() >= self._limit.now

    def _take(self) -> tuple[PoolProxiedConnection, float] | None:
        while self._kept:
            connection, since = self._kept.pop()
            if time.monotonic() - since < KEPT_FOR:
                return connection, since
            self._return(connection)
        return None

    async def _from_pool(self) -> PoolProxiedConnection:
        try:
            return await self._engine.raw_connection()
        except TimeoutError:
            raise
        except Exception as error:
            raise DeadConnection(str(error)) from error

    def _give_back(self, connection: PoolProxiedConnection, since: float, *, is_lost: bool = False) -> None:
        driver = connection.driver_connection
        if is_lost or driver is None or driver.is_closed() or not self._kept_at_most:
            connection.invalidate()
        elif len(self._kept) < self._kept_at_most and not self._is_exhausted():
            self._kept.append((connection, since))
        else:
            self._return(connection)

    def _return(self, connection: PoolProxiedConnection) -> None:
        if self._pool.checkedin() < self._pool.size():
            connection.close()
        else:
            connection.invalidate()  # the pool would close it in order, which takes a round trip

    def _give_all_back(self) -> None:
        while self._kept:
            self._return(self._kept.pop()[0])


def _store_externally() -> sa.DDL:
    return sa.DDL("ALTER TABLE %(fullname)s ALTER COLUMN data SET STORAGE EXTERNAL")  # type: ignore[no-untyped-call]


def _arguments(url: URL, timeout: float) -> dict[str, Any]:
    """Return asyncpg's arguments: seconds, and parameters of the URL that SQLAlchemy would pass as text."""
    arguments: dict[str, Any] = {}
    for key in ("timeout", "command_timeout"):
        given = float(str(url.query.get(key, 0)))
        arguments[key] = min(given, timeout) if given > 0 else timeout  # libpq: 0 waits for ever
    if "statement_cache_size" in url.query:
        arguments["statement_cache_size"] = int(str(url.query["statement_cache_size"]))
    if arguments.get("statement_cache_size") == 0:
        arguments["prepared_statement_name_func"] = str  # no name: before 0.32 asyncpg keeps those that have one
    return arguments


async def _fetch(driver: Any, text: str, values: Sequence[Any]) -> Rows:
    try:
        rows: Rows = await driver.fetch(text, *values)
    except OverflowError:  # of the driver: a time that Python's years 1 to 9999 do not have
        return await _fetch_with_times_as_text(driver, text, values)
    except Exception as error:
        if driver.is_closed():
            raise DeadConnection(str(error)) from error
        raise
    return rows


async def _fetch_with_times_as_text(driver: Any, text: str, values: Sequence[Any]) -> Rows:
    kind = {"typename": "timestamptz", "schema": "pg_catalog"}
    await driver.set_type_codec(**kind, encoder=str, decoder=str)
    try:
        rows: Rows = await driver.fetch(text, *values)
    finally:
        await driver.reset_type_codec(**kind)
    return rows
