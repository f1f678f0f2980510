"""Connections from a URL or from the app's own engine, for the process and the event loop that ask."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable

from sqlalchemy.engine import URL, Dialect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import Pool, QueuePool, StaticPool

from ..aio.tasks import Tasks
from . import forks
from .backend import Reader, state_of
from .backends import backend_of, url_of
from .own_transactions import watch
from .pool_limit import PoolLimit

POLL = 0.005  # seconds between two looks whether a connection has come back
_ABANDONED: list[object] = []
"""Connections of loops that ended, and of parent processes: when they are collected, they call those loops."""
POLL_AT_MOST = 0.5  # seconds between two connections that the server is asked for


class Connections:
    """Opens connections; those from before a fork, or of another event loop, are not used."""

    def __init__(
        self,
        database: str | URL | AsyncEngine,
        *,
        schema: str | None,
        pool_size: int,
        timeout: float,
        tasks: Tasks,
        before_opening: Callable[[], None],
    ) -> None:
        self.url = url_of(database)
        self.backend = backend_of(self.url)
        if not isinstance(database, AsyncEngine):
            self.backend.check_schema(schema)
        self._before_opening = before_opening
        self._has_file = self.backend.file(self.url) is not None
        self._given = database if isinstance(database, AsyncEngine) else None
        self.limit = PoolLimit(pool_size)
        self._timeout = timeout
        self._tasks = tasks
        self._engine: AsyncEngine | None = None
        self.reader: Reader | None = None
        self.dialect: Dialect
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        self.backend.import_driver()
        watch()

    @property
    def is_given(self) -> bool:
        """Whether the engine is the app's own."""
        return self._given is not None

    @property
    def is_shared(self) -> bool:
        """Whether there is one connection for everything, as to a database in memory."""
        return isinstance(self._given.pool, StaticPool) if self._given else self.backend.is_in_memory(self.url)

    def no_fork(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Return a context in which this process is not forked, if its child could not use the database then."""
        return forks.no_fork() if self._has_file else contextlib.nullcontext()

    @property
    def engine(self) -> AsyncEngine | None:
        """The engine of this process and event loop; None if it was not opened."""
        return self._engine if self._owner == (os.getpid(), asyncio.get_running_loop()) else None

    async def connect(self) -> AsyncConnection:
        """Take a connection, or open one; a cancelled opening goes on: SQLAlchemy would leave it half made."""
        engine = self._get_engine()
        if not self._opens_a_connection(engine.pool):
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
        """Wait for a connection of ours to come back while the server has no room for another one."""
        give_up, pause = time.monotonic() + self._timeout, POLL
        while True:
            if self.reader is not None:
                self.reader.make_room()
            if self._must_wait(engine.pool):
                if time.monotonic() > give_up:
                    raise TimeoutError("all connections that the server allows are in use")
                await asyncio.sleep(POLL)
                continue
            try:
                return await engine.connect()
            except Exception as error:
                if state_of(error) not in self.backend.full_states or time.monotonic() > give_up:
                    raise
                self.limit.refused(_existing(engine.pool))
            await asyncio.sleep(pause)
            pause = min(2 * pause, POLL_AT_MOST)

    def share(self, processes: int) -> int:
        """Share the pool among processes to be forked; return for how many of them it is large enough."""
        if self._has_file:
            return processes
        processes = min(processes, self.limit.size)
        self.limit = PoolLimit(self.limit.size // processes)
        return processes

    def _must_wait(self, pool: Pool) -> bool:
        if not self.limit.is_lower or not isinstance(pool, QueuePool):
            return False  # a full pool has a queue of its own
        return not pool.checkedin() and pool.checkedout() >= self.limit.now

    def _opens_a_connection(self, pool: Pool) -> bool:
        """Whether the next connection is a new one: none is idle, and there may be more."""
        return not isinstance(pool, QueuePool) or not (pool.checkedin() or pool.checkedout() >= self.limit.size)

    def _get_engine(self) -> AsyncEngine:
        if self.engine is not None:
            return self.engine
        self._before_opening()
        if self._has_file:
            forks.check_not_torn()
        if self._given is not None:
            if self._owner is not None and self._owner[0] != os.getpid():
                self._abandon(self._given)
            self._engine = self._given
        else:
            if self._engine is not None:
                self._abandon(self._engine)
                _ABANDONED.append(self.reader)
            self._engine = self.backend.create_engine(self.url, self._timeout, self.limit)
            self.reader = self.backend.create_reader(self._engine, self.limit)
        self.dialect = self._engine.dialect
        self._owner = (os.getpid(), asyncio.get_running_loop())
        return self._engine

    def _abandon(self, engine: AsyncEngine) -> None:
        """Its connections belong to a parent process, or to a loop that has ended: they are neither used nor closed."""
        _ABANDONED.append(engine.sync_engine.pool)
        engine.sync_engine.dispose(close=False)


def _existing(pool: Pool) -> int:
    return pool.checkedin() + pool.checkedout() if isinstance(pool, QueuePool) else 0


async def _close(opening: asyncio.Task[AsyncConnection]) -> None:
    await (await opening).close()
