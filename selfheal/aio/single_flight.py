"""Many askers, one piece of work: flights by name, lookups by the handful, and the next item while one is used.

The work runs in a task of its own. An asker that goes away (a client hangs up, a deadline passes) never takes it down.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")


class Tasks:
    """Tasks that outlive whoever started them, held by reference until they end."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start `work` in a task that is kept alive until it ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end even if the caller is cancelled meanwhile: a commit is never torn in two."""
        return await asyncio.shield(self.start(work))

    async def settle(self, grace: float) -> None:
        """Wait up to `grace` seconds for what is running; cancel the rest."""
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        while self._running:  # what ends may have started more
            _, late = await asyncio.wait(set(self._running), timeout=max(0.0, end - loop.time()))
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # read, so that a failure whose asker has gone is not reported as never retrieved


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end; a caller that is cancelled meanwhile is so after it."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((task,))
        raise


class Places:
    """So many at once, in each event loop: `async with places.one():`."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._places: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    def one(self) -> asyncio.Semaphore:
        """A place, to be entered and left."""
        loop = asyncio.get_running_loop()
        if self._places is None or self._places[0] is not loop:
            self._places = (loop, asyncio.Semaphore(self._at_once))
        return self._places[1]


async def ahead(source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The items of `source`, the next one in the making while one is used: reading and writing overlap."""
    async with aclosing(source):
        coming = asyncio.create_task(_next(source))
        try:
            while item := await coming:
                coming = asyncio.create_task(_next(source))
                yield item[0]
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


async def in_order(source: AsyncGenerator[Coroutine[Any, Any, R], None], at_once: int) -> AsyncGenerator[R, None]:
    """What the coroutines of `source` return, in their order, so many of them at work at once."""
    making = deque[asyncio.Task[R]]()
    async with aclosing(source):
        try:
            async for work in source:
                making.append(asyncio.create_task(work))
                if len(making) == at_once:
                    yield await making.popleft()
            while making:
                yield await making.popleft()
        finally:
            for task in making:
                task.cancel()
            await asyncio.gather(*making, return_exceptions=True)


async def _next(source: AsyncGenerator[T, None]) -> tuple[T] | None:
    async for item in source:
        return (item,)
    return None


class Flights(Generic[K, T]):
    """One flight per key: who asks while it is under way joins it, who asks after it starts anew."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._flights: dict[K, T] = {}

    def join(self, key: K, board: Callable[[], tuple[T, Coroutine[Any, Any, object]]]) -> T:
        """The flight of `key`; `board` makes it, and the work that ends it, if none is under way."""
        flight = self._flights.get(key)
        if flight is None:
            flight, work = board()
            self._flights[key] = flight
            self._tasks.start(work).add_done_callback(lambda _: self._flights.pop(key, None))
        return flight


class Batches(Generic[K, T]):
    """Single questions, asked together: what is asked while a query runs waits for the next one.

    `ask` answers many keys at once and leaves out those it does not know.
    """

    def __init__(
        self, ask: Callable[[list[K]], Awaitable[Mapping[K, T]]], tasks: Tasks, *, size: int, at_once: int
    ) -> None:
        self._ask = ask
        self._tasks = tasks
        self._size = size
        self._free = at_once
        self._waiting: dict[K, asyncio.Future[T | None]] = {}

    async def get(self, key: K) -> T | None:
        """The answer for `key`, or None if it is not known; raises what the query raised."""
        answer = self._waiting.get(key)
        if answer is None:
            answer = self._waiting[key] = asyncio.get_running_loop().create_future()
            self._start()
        return await asyncio.shield(answer)

    def _start(self) -> None:
        if self._free:
            self._free -= 1
            self._tasks.start(self._drain()).add_done_callback(self._drained)

    def _drained(self, drain: asyncio.Task[None]) -> None:
        self._free += 1
        if drain.cancelled():  # nobody else will ask for those who wait
            waiting, self._waiting = self._waiting, {}
            for future in waiting.values():
                future.cancel()
        elif self._waiting:
            self._start()

    async def _drain(self) -> None:
        await asyncio.sleep(0)  # let everybody who is ready to ask join the first query
        while self._waiting:
            keys = list(self._waiting)[: self._size]
            await self._answer({key: self._waiting.pop(key) for key in keys})

    async def _answer(self, waiting: dict[K, asyncio.Future[T | None]]) -> None:
        try:
            answers = await self._ask(list(waiting))
        except BaseException as error:
            for future in waiting.values():
                future.set_exception(error)
                future.exception()  # read: an asker may be gone
            if not isinstance(error, Exception):
                raise
        else:
            for key, future in waiting.items():
                future.set_result(answers.get(key))
