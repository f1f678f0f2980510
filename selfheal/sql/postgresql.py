"""Connections to a server that are kept for reading: to have the pool hand one out takes as long as a small query."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import PoolProxiedConnection, QueuePool

from .statements import DeadConnection

T = TypeVar("T")

KEPT_AT_MOST = 2
"""Connections that are kept while nobody asks; to the pool they are taken."""
KEPT_FOR = 60.0
"""Seconds after which one goes back into the pool before it is asked, and the pool looks at its age."""


class Readers:
    """Connections of asyncpg's, from the pool of an engine of our own, `in_all` of them at most.

    Each is asked outside of any transaction. None is kept that somebody else is waiting for.
    """

    def __init__(self, engine: AsyncEngine, in_all: int) -> None:
        self.dialect = engine.dialect
        self._engine = engine
        self._in_all = in_all
        self._at_most = KEPT_AT_MOST
        self._kept: list[tuple[PoolProxiedConnection, float]] = []

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be ending
            self._let_go()  # or the pool complains of connections that were never given back

    @property
    def kept(self) -> int:
        """How many are kept now."""
        return len(self._kept)

    @property
    def has_idle(self) -> bool:
        """Whether one is there, kept or in the pool, without opening it."""
        return bool(self._kept) or self._pool.checkedin() > 0

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """Ask the driver of one that is idle. It is thrown away after any error but one of the server's own words.

        Raises `DeadConnection` if that had happened to it before, and it cannot be opened anew.
        """
        reader, since = self._take() or (await self._from_pool(), time.monotonic())
        try:
            answer = await question(reader.driver_connection)
        except BaseException as error:
            has_answered = getattr(error, "sqlstate", None) is not None or isinstance(error, asyncio.CancelledError)
            self._give_back(reader, since, is_lost=not has_answered)
            raise
        self._give_back(reader, since)
        return answer

    def make_room(self) -> None:
        """Let somebody else have those that are kept, if the pool has no other left."""
        if self._kept and self._is_exhausted():
            self._let_go()

    def close(self) -> None:
        """Give all of them back to the pool, which is closed next; what is being asked is thrown away after it."""
        self._at_most = 0
        self._let_go()

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def _pool(self) -> QueuePool:
        return cast(QueuePool, self._engine.pool)

    def _is_exhausted(self) -> bool:
        return self._pool.checkedout() >= self._in_all

    def _take(self) -> tuple[PoolProxiedConnection, float] | None:
        while self._kept:
            reader, since = self._kept.pop()
            if time.monotonic() - since < KEPT_FOR:
                return reader, since
            self._return(reader)
        return None

    async def _from_pool(self) -> PoolProxiedConnection:
        try:
            return await self._engine.raw_connection()
        except TimeoutError:
            raise
        except Exception as error:
            raise DeadConnection(str(error)) from error

    def _give_back(self, reader: PoolProxiedConnection, since: float, *, is_lost: bool = False) -> None:
        driver = reader.driver_connection
        if is_lost or driver is None or driver.is_closed() or not self._at_most:
            reader.invalidate()
        elif len(self._kept) < self._at_most and not self._is_exhausted():
            self._kept.append((reader, since))
        else:
            self._return(reader)

    def _return(self, reader: PoolProxiedConnection) -> None:
        if self._pool.checkedin() < self._pool.size():
            reader.close()
        else:
            reader.invalidate()  # to close one that the pool has no place for, as one should, would take a round trip

    def _let_go(self) -> None:
        while self._kept:
            self._return(self._kept.pop()[0])
