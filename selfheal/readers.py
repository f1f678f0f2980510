"""Connections to a server that are kept for reading: to have the pool hand one out takes as long as a small query."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import PoolProxiedConnection, QueuePool

from .statements import DeadConnection

T = TypeVar("T")

KEPT_AT_MOST = 2
"""Connections that are kept while nobody asks; to the pool they are taken."""
KEPT_FOR = 1800.0
"""Seconds after which one goes back into the pool, which opens it anew."""


class Readers:
    """Connections of asyncpg's, from the pool of an engine of our own; each is asked outside of any transaction."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.dialect = engine.dialect
        self._engine = engine
        self._kept: list[tuple[PoolProxiedConnection, float]] = []
        self._at_most = KEPT_AT_MOST

    @property
    def kept(self) -> int:
        """How many are kept now."""
        return len(self._kept)

    @property
    def has_idle(self) -> bool:
        """Whether one is there, kept or in the pool, without opening it."""
        pool = self._engine.pool
        return bool(self._kept) or (isinstance(pool, QueuePool) and pool.checkedin() > 0)

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """Ask the driver of one that is idle. One that the server has closed, or is silent on, is thrown away.

        Raises `DeadConnection` if that had happened to it before, and it cannot be opened anew.
        """
        reader, since = self._kept.pop() if self._kept else (await self._from_pool(), time.monotonic())
        try:
            answer = await question(reader.driver_connection)
        except BaseException as error:
            self._give_back(reader, since, is_lost=isinstance(error, TimeoutError))
            raise
        self._give_back(reader, since)
        return answer

    def close(self) -> None:
        """Throw all of them away."""
        self._at_most = 0
        for reader, _ in self._kept:
            reader.invalidate()
        self._kept.clear()

    async def _from_pool(self) -> PoolProxiedConnection:
        try:
            return await self._engine.raw_connection()
        except TimeoutError:
            raise
        except Exception as error:
            raise DeadConnection(str(error)) from error

    def _give_back(self, reader: PoolProxiedConnection, since: float, *, is_lost: bool = False) -> None:
        driver, pool = reader.driver_connection, self._engine.pool
        if is_lost or driver is None or driver.is_closed() or not self._at_most:
            reader.invalidate()
        elif len(self._kept) < self._at_most and time.monotonic() - since < KEPT_FOR:
            self._kept.append((reader, since))
        elif isinstance(pool, QueuePool) and pool.checkedin() < pool.size():
            reader.close()
        else:
            reader.invalidate()  # to close one that the pool has no place for, as one should, would take a round trip
