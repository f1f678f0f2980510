"""The engine: reads, writes and retries; every failure means *unknown*, never *absent*."""

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import Pool, QueuePool, StaticPool

from ..aio.tasks import LoopSemaphore, Tasks, run_to_end
from ..errors import DatabaseUnavailable, MissingExtra, SchemaError
from .backend import LOCK_TIMEOUT, POOL_AT_MOST, Reader, Rows
from .backends import backend_of, url_of
from .queries import ByName
from .schema import Tables, check_version
from .statements import DeadConnection, bind
from .transactions import transaction

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]


class Connections:
    """Opens connections; those from before a fork, or of another event loop, are not used."""

    def __init__(self, database: str | URL | AsyncEngine, *, timeout: float, tasks: Tasks) -> None:
        self.url = url_of(database)
        self.backend = backend_of(self.url)
        self._given = database if isinstance(database, AsyncEngine) else None
        self._timeout = timeout
        self._tasks = tasks
        self._engine: AsyncEngine | None = None
        self.reader: Reader | None = None
        self.dialect: Dialect
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._abandoned: list[object] = []
        self.backend.import_driver()

    @property
    def is_shared(self) -> bool:
        """Whether there is one connection for everything, as to a database in memory."""
        return isinstance(self._given.pool, StaticPool) if self._given else self.backend.is_in_memory(self.url)

    @property
    def engine(self) -> AsyncEngine | None:
        """The engine of this process and event loop; None if it was not opened."""
        return self._engine if self._owner == (os.getpid(), asyncio.get_running_loop()) else None

    async def connect(self) -> AsyncConnection:
        """Take a connection, or open one; a cancelled opening goes on: SQLAlchemy would leave it half made."""
        engine = self._get_engine()
        if not _opens_a_connection(engine.pool):
            return await self._connect(engine)
        opening = self._tasks.start(self._connect(engine))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._tasks.start(_close(opening))
            raise

    async def close(self) -> None:
        """Close what was opened here; the app's own engine stays open."""
        engine, self._engine = self.engine, None
        reader, self.reader = self.reader, None
        if engine is not None and engine is not self._given:
            if reader is not None:
                reader.close()
            await engine.dispose()

    async def _connect(self, engine: AsyncEngine) -> AsyncConnection:
        if self.reader is not None:
            self.reader.make_room()
        return await engine.connect()

    def _get_engine(self) -> AsyncEngine:
        if self.engine is not None:
            return self.engine
        if self._given is not None:
            if self._owner is not None and self._owner[0] != os.getpid():
                self._abandon(self._given)
            self._engine = self._given
        else:
            if self._engine is not None:
                self._abandon(self._engine)
                self._abandoned.append(self.reader)
            self._engine = self.backend.create_engine(self.url, self._timeout)
            self.reader = self.backend.create_reader(self._engine)
        self.dialect = self._engine.dialect
        self._owner = (os.getpid(), asyncio.get_running_loop())
        return self._engine

    def _abandon(self, engine: AsyncEngine) -> None:
        """Its connections belong to a parent process, or to a loop that has ended: they are neither used nor closed."""
        self._abandoned.append(engine.sync_engine.pool)
        engine.sync_engine.dispose(close=False)


class Engine:
    """Connections from a URL or the app's engine. `timeout` (seconds) bounds every wait: `DatabaseUnavailable`."""

    def __init__(self, database: str | URL | AsyncEngine, tables: Tables, *, timeout: float, tasks: Tasks) -> None:
        self._connections = Connections(database, timeout=timeout, tasks=tasks)
        self.url = self._connections.url
        self.backend = self._connections.backend
        self.timeout = timeout
        self._tables = tables
        self._tasks = tasks
        self._checked: AsyncEngine | None = None
        # one connection for everything has one transaction
        self._shared = LoopSemaphore(1) if self._connections.is_shared else None

    async def read(self, work: Work[T]) -> T:
        """Run `work` on a connection; again for as long as the pool hands out connections that have died."""
        if self._shared is not None:
            async with self._shared:  # a read that is broken off would be rolled back under the next caller
                return await run_to_end(self._read(work))
        for _ in range(POOL_AT_MOST):
            try:
                return await self._read(work)
            except DatabaseUnavailable as error:
                if not _was_dead(error.__cause__):
                    raise
        return await self._read(work)

    async def write(self, work: Work[T]) -> T:
        """Run `work` in a transaction to its end, even if cancelled; again if the server breaks it off."""
        return await self._tasks.finish(self._write(work))

    async def write_schema(self, work: Work[T]) -> T:
        """As `write`, in a database that may have no tables yet."""
        return await self._tasks.finish(self._write(work, needs_tables=False))

    async def rows(self, query: Select[Any], **values: Any) -> Rows:
        """Return all rows of a query; `values` are those of its parameters. Times come as the driver returns them."""
        reader = self._connections.reader
        if reader is not None and self._is_ready:
            try:
                rows = await reader.rows(*bind(query, self._connections.dialect, values))
            except self._errors() as error:
                if not _was_dead(error):
                    raise self.unavailable(error) from error
            else:
                if rows is not None:
                    return rows
        return await self.read(lambda connection: self._fetch(connection, query, values))

    async def rows_by_name(self, query: ByName, wanted: Iterable[str]) -> Rows:
        """Return all rows about the names in `wanted`."""
        names = list(wanted)
        if len(names) == 1:
            return await self.rows(query.one, name=names[0])
        return await self.rows(query.many, wanted=self.backend.name_list(names))

    @property
    def can_read_in_thread(self) -> bool:
        """Whether `rows_in_thread` works now."""
        reader = self._connections.reader
        return reader is not None and reader.can_read_in_thread and self._is_ready

    def rows_in_thread(self, query: Select[Any], **values: Any) -> Rows:
        """As `rows`, in the calling thread; raises `DatabaseUnavailable` rather than wait for a lock."""
        reader = self._connections.reader
        if reader is None:
            raise DatabaseUnavailable("the database was closed meanwhile")
        try:
            return reader.rows_in_thread(*bind(query, self._connections.dialect, values))
        except self._errors() as error:
            raise self.unavailable(error) from error

    def unavailable(self, error: BaseException) -> DatabaseUnavailable:
        """Return what a failure of the database means to us; the message holds no password."""
        cause = getattr(error, "orig", None) or error
        message = str(cause).partition("\n")[0] or type(cause).__name__
        if self.backend.is_missing_table(cause):
            return SchemaError("the catalogue's tables are missing or old; run `selfheal migrate` to make them")
        return DatabaseUnavailable(f"the database gave no answer: {message}")

    async def close(self) -> None:
        """Close what was opened here; the app's own engine stays open."""
        self._checked = None
        await self._connections.close()

    @property
    def _is_ready(self) -> bool:
        """Whether the schema was checked through the engine that is in use now."""
        return self._checked is not None and self._checked is self._connections.engine

    async def _read(self, work: Work[T]) -> T:
        async with self._connection() as connection:
            return await work(connection)

    async def _write(self, work: Work[T], *, needs_tables: bool = True) -> T:
        for _ in range(math.ceil(self.timeout / LOCK_TIMEOUT)):
            try:
                return await self._write_once(work, needs_tables=needs_tables)
            except DatabaseUnavailable as error:
                if _state_of(error.__cause__) not in self.backend.retried_states:
                    raise
        return await self._write_once(work, needs_tables=needs_tables)

    async def _write_once(self, work: Work[T], *, needs_tables: bool) -> T:
        async with (
            self._shared or contextlib.nullcontext(),
            self._connection(needs_tables=needs_tables) as connection,
            transaction(connection, self.backend),
        ):
            return await work(connection)

    @contextlib.asynccontextmanager
    async def _connection(self, *, needs_tables: bool = True) -> AsyncIterator[AsyncConnection]:
        try:
            connection = await self._connections.connect()
        except MissingExtra:
            raise
        except Exception as error:
            raise self.unavailable(error) from error
        try:
            try:
                if needs_tables and not self._is_ready:
                    await self._check_schema(connection)
                yield connection
            except TimeoutError:
                await connection.invalidate()  # the server is silent: this connection is lost
                raise
            finally:
                await asyncio.shield(self._tasks.start(connection.close()))
        except (IntegrityError, DataError):
            raise
        except self._errors() as error:
            raise self.unavailable(error) from error

    async def _check_schema(self, connection: AsyncConnection) -> None:
        rows = await self._fetch(connection, select(self._tables.schema.c.version), {})
        check_version(max((row[0] for row in rows), default=None))
        self._checked = self._connections.engine

    async def _fetch(self, connection: AsyncConnection, query: Select[Any], values: dict[str, Any]) -> Any:
        """Ask the driver itself if it is the one that we know: through SQLAlchemy a query takes several hops."""
        pooled = connection.sync_connection
        if pooled is None or connection.dialect.driver != self.backend.driver:
            return (await connection.execute(query, values)).all()
        text, positional = bind(query, connection.dialect, values)
        try:
            return await self.backend.fetch(pooled.connection.driver_connection, text, positional)
        except DeadConnection:
            await connection.invalidate()
            raise

    def _errors(self) -> tuple[type[Exception], ...]:
        return (SQLAlchemyError, OSError, *self.backend.driver_errors())


def _was_dead(cause: BaseException | None) -> bool:
    return isinstance(cause, DeadConnection) or (isinstance(cause, DBAPIError) and cause.connection_invalidated)


def _state_of(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of a server's error."""
    return getattr(getattr(error, "orig", None) or error, "sqlstate", None)


def _opens_a_connection(pool: Pool) -> bool:
    """Whether the next connection is a new one: none is idle, and there may be more."""
    return not isinstance(pool, QueuePool) or not (pool.checkedin() or pool.checkedout() >= POOL_AT_MOST)


async def _close(opening: asyncio.Task[AsyncConnection]) -> None:
    await (await opening).close()
