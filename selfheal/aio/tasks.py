"""Background tasks, work that outlives a cancelled caller, and a semaphore for every event loop."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Coroutine
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

T = TypeVar("T")
_waiting: ContextVar[tuple[object, ...]] = ContextVar("waiting", default=())


class Tasks:
    """Background tasks, held by reference until they end."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start `work` in a task that is kept alive until it ends."""
        return self._start(work, ())

    def _start(self, work: Coroutine[Any, Any, T], waiting: tuple[object, ...]) -> asyncio.Task[T]:
        context = copy_context()
        context.run(_waiting.set, waiting)
        task = asyncio.get_running_loop().create_task(work, context=context)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` returns. If the caller is cancelled, `work` goes on in the background: no torn commit."""
        return await asyncio.shield(self._start(work, waiting_callers()))

    async def drain(self, seconds: float) -> None:
        """Wait up to `seconds` for all running tasks, and for those that they start; then cancel the rest."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self._running:
            _, late = await asyncio.wait(set(self._running), timeout=max(0.0, end - loop.time()))
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved: the caller may have left


def current_caller() -> object:
    """Return the running task; the thread if no event loop runs in it."""
    with contextlib.suppress(RuntimeError):
        return asyncio.current_task() or threading.current_thread()
    return threading.current_thread()


def waiting_callers() -> tuple[object, ...]:
    """Return the running task or thread, and the tasks that wait for it to end."""
    return (current_caller(), *_waiting.get())


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
