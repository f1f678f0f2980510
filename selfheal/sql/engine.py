"""The engine: reads, writes and retries; every failure means *unknown*, never *absent*."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from functools import wraps
from typing import Any, TypeVar, cast

from sqlalchemy import Select, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ..aio.tasks import LoopSemaphore, Tasks, run_to_end
from ..errors import DatabaseUnavailable, SchemaError, SelfHealError, UnstorableName
from .backend import LOCK_TIMEOUT, Backend, Rows, state_of
from .backends import shown
from .connections import Connections
from .own_transactions import own_transactions
from .pool_limit import POOL_SIZE
from .queries import ByName
from .schema import Tables, check_version
from .statements import DeadConnection, bind
from .transactions import transaction

F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])
T = TypeVar("T")
MISSING = "the tables are missing, old or another app's; run `selfheal migrate` to make them"
NOT_MADE = "the tables cannot be made: {}"
OWN_TRANSACTION = "pass connection= to be part of it, or commit it first"
Work = Callable[[AsyncConnection], Awaitable[T]]


def _at_home(method: F) -> F:
    """Let a method run where the store lives: its connections belong to that event loop."""

    @wraps(method)
    async def handed(self: "Engine", *args: Any, **kwargs: Any) -> Any:
        return await self.home.run(method, self, *args, **kwargs)

    return cast(F, handed)


class Engine:
    """Connections from a URL or the app's engine. `timeout` (seconds) bounds every wait; `before_opening` may raise."""

    def __init__(
        self,
        database: str | URL | AsyncEngine,
        tables: Tables,
        *,
        pool_size: int = POOL_SIZE,
        database_from: str = "",
        timeout: float,
        tasks: Tasks,
        before_opening: Callable[[], None] = lambda: None,
    ) -> None:
        self._connections = Connections(
            database,
            schema=tables.records.schema,
            pool_size=pool_size,
            timeout=timeout,
            tasks=tasks,
            before_opening=before_opening,
        )
        self.url, self.backend = self._connections.url, self._connections.backend
        self.share_connections = self._connections.share
        self.where = f"{shown(self.url)}, set by {database_from}" if database_from else shown(self.url)
        self.timeout, self._tables, self._tasks, self.home = timeout, tables, tasks, tasks.home
        self._checked: AsyncEngine | None = None
        # one connection for everything has one transaction
        self._shared = LoopSemaphore(1) if self._connections.is_shared else None

    @_at_home
    async def read(self, work: Work[T]) -> T:
        """Run `work` on a connection; again for as long as the pool hands out connections that have died."""
        if self._shared is not None:
            async with self._shared:  # a read that is broken off would be rolled back under the next caller
                return await run_to_end(self._read(work))
        for _ in range(self._connections.limit.size):
            try:
                return await self._answer(self._read(work))
            except DatabaseUnavailable as error:
                if not _was_dead(error.__cause__):
                    raise
        return await self._answer(self._read(work))

    @_at_home
    async def write(self, work: Work[T]) -> T:
        """Run `work` in a transaction to its end, even if cancelled; again if the server breaks it off."""
        return await self._tasks.finish(self._write(work))

    @_at_home
    async def write_schema(self, work: Work[T]) -> T:
        """As `write`, in a database that may have no tables yet."""
        if not self._connections.is_given:
            try:
                self.backend.create_database(self.url)
            except OSError as error:
                raise self.unavailable(error) from error
        try:
            return await self._tasks.finish(self._write(work, needs_tables=False))
        except IntegrityError as error:  # others make them at the same time, or a table is another app's
            raise _named(SchemaError(NOT_MADE.format(_first_line(error))), self.where) from error

    @_at_home
    async def read_schema(self, work: Work[T]) -> T:
        """As `read`, in a database that may have no tables yet."""
        async with self._shared or contextlib.nullcontext(), self._connection(needs_tables=False) as connection:
            return await work(connection)

    @_at_home
    async def rows(self, query: Select[Any], **values: Any) -> Rows:
        """Return all rows of a query; `values` are those of its parameters. Times come as the driver returns them."""
        reader = self._connections.reader
        if reader is not None and self._is_ready:
            try:
                rows = await self._answer(reader.rows(*bind(query, self._connections.dialect, values)))
            except _errors(self.backend) as error:
                if not _was_dead(error):
                    raise self.unavailable(error) from error
            else:
                if rows is not None:
                    return rows
        return await self.read(lambda connection: self._fetch(connection, query, values))

    async def rows_by_name(self, query: ByName, wanted: Iterable[str]) -> Rows:
        """Return all rows about the names in `wanted`; a name that the database cannot hold has none."""
        names = list(wanted)
        try:
            if len(names) == 1:
                return await self.rows(query.one, name=names[0])
            return await self.rows(query.many, wanted=self.backend.name_list(names))
        except UnstorableName:
            if len(names) == 1:
                return []
        half = len(names) // 2  # the others in the list are asked again without it
        return [*await self.rows_by_name(query, names[:half]), *await self.rows_by_name(query, names[half:])]

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
        except _errors(self.backend) as error:
            raise self.unavailable(error) from error

    def unavailable(self, error: BaseException, missing: str = MISSING) -> SelfHealError:
        """Return what a failure of the database means to us; the message holds no password."""
        cause = getattr(error, "orig", None) or error
        if self.backend.is_lock_timeout(cause) and any(own_transactions(self.backend, self.url)):
            return DatabaseUnavailable(f"the caller's own transaction is open on {self.where}: {OWN_TRANSACTION}")
        return _meaning(cause, self.backend) or _named(SchemaError(missing.format(_first_line(cause))), self.where)

    async def close(self) -> None:
        """Close what was opened here; the app's own engine stays open."""
        self._checked = None
        await self._connections.close()

    @property
    def _is_ready(self) -> bool:
        """Whether the schema was checked through the engine that is in use now."""
        return self._checked is not None and self._checked is self._connections.engine

    def _answer(self, question: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        return self._tasks.finish(question) if self.backend.must_finish else question

    async def _read(self, work: Work[T]) -> T:
        async with self._connection() as connection:
            return await work(connection)

    async def _write(self, work: Work[T], *, needs_tables: bool = True) -> T:
        for _ in range(math.ceil(self.timeout / LOCK_TIMEOUT)):
            try:
                return await self._write_once(work, needs_tables=needs_tables)
            except DatabaseUnavailable as error:
                if state_of(error.__cause__) not in self.backend.retried_states:
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
            async with self._connections.no_fork():
                connection = await self._connect()
                try:
                    if needs_tables and not self._is_ready:
                        await self._check_schema(connection)
                    yield connection
                except TimeoutError:
                    await connection.invalidate()  # the server is silent: this connection is lost
                    raise
                finally:
                    await asyncio.shield(self._tasks.start(connection.close()))
        except SchemaError as error:
            raise _named(error, self.where) from error.__cause__
        except (IntegrityError, DataError) as error:
            if state_of(error) in self.backend.unstorable_states:
                raise self.unavailable(error) from error
            raise
        except _errors(self.backend) as error:
            raise self.unavailable(error, MISSING if needs_tables else NOT_MADE) from error

    async def _connect(self) -> AsyncConnection:
        try:
            return await self._connections.connect()
        except SelfHealError:
            raise
        except Exception as error:
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


def _errors(backend: Backend) -> tuple[type[Exception], ...]:
    return (SQLAlchemyError, OSError, *backend.driver_errors())


def _named(error: SchemaError, where: str) -> SchemaError:
    return type(error)(f"{error} (the database is {where})")


def _meaning(cause: BaseException, backend: Backend) -> SelfHealError | None:
    """Return what a driver's error means; None if tables are missing."""
    message = _first_line(cause)
    if state_of(cause) in backend.unstorable_states:
        return UnstorableName(f"the database cannot hold this name: {message}; use a database in UTF8")
    if backend.is_missing_table(cause):
        return None
    if state_of(cause) in backend.full_states:
        message += "; a lower SELFHEAL_POOL_SIZE leaves room for all processes"
    return DatabaseUnavailable(f"the database gave no answer: {message}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _was_dead(cause: BaseException | None) -> bool:
    return isinstance(cause, DeadConnection) or (isinstance(cause, DBAPIError) and cause.connection_invalidated)
