"""Background tasks, work that outlives a cancelled caller, and a semaphore for every event loop."""

import asyncio
import contextlib
from collections.abc import Awaitable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

from .callers import context_of_work, waiting_callers
from .home import HomeLoop

T = TypeVar("T")


class Tasks:
    """Background tasks on the home loop, held by reference until they end."""

    def __init__(self, home: HomeLoop | None = None) -> None:
        self.home = home or HomeLoop()
        self._running: set[asyncio.Task[Any]] = set()
        self._abandoned: list[set[asyncio.Task[Any]]] = []  # of a loop that ended: asyncio logs each that is collected
        self.home.on_new_loop(self._abandon)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start `work` in a task that is kept alive until it ends."""
        return self._start(work, context_of_work())

    def _start(self, work: Coroutine[Any, Any, T], context: Context) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, context=context)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` returns. If the caller is cancelled, `work` goes on in the background: no torn commit."""
        return await asyncio.shield(self._start(work, context_of_work(*waiting_callers())))

    async def end(self, seconds: float) -> None:
        """As `drain`, after the calls that others have begun at home."""
        began = asyncio.get_running_loop().time()
        await self.home.wait_for_calls(seconds)
        await self.drain(began + seconds - asyncio.get_running_loop().time())

    async def drain(self, seconds: float) -> None:
        """Wait up to `seconds` for all running tasks, and for those that they start; then cancel the rest."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self._running:
            _, late = await asyncio.wait(set(self._running), timeout=max(0.0, end - loop.time()))
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _abandon(self) -> None:
        if self._running:
            self._abandoned.append(self._running)
            self._running = set()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved: the caller may have left


async def run_to_end(work: Awaitable[T]) -> T:
    """Finish `work` even if the caller is cancelled, then re-raise the cancellation."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((task,))
        raise


class LoopSemaphore:
    """A semaphore for every event loop that uses it: `async with semaphore:`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._current: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    async def __aenter__(self) -> None:
        await self._of_this_loop().acquire()

    async def __aexit__(self, *_: object) -> None:
        self._of_this_loop().release()

    def _of_this_loop(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._current is None or self._current[0] is not loop:
            self._current = (loop, asyncio.Semaphore(self._limit))
        return self._current[1]
