"""The home of a store: the one event loop on which it lives. Calls from other loops and threads are handed to it."""

import asyncio
import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, ParamSpec, TypeVar

from .callers import context_of_work, waiting_callers
from .loop_thread import LoopThread
from .streams import next_item

P = ParamSpec("P")
T = TypeVar("T")

EXITING_GRACE = 5.0  # seconds that a store that nobody closed gets when the interpreter exits
POLL = 0.01  # seconds between two looks whether all calls have ended
LOOK_EVERY = 1.0  # seconds between two looks whether the loop that was asked still runs
ENDED = "the event loop of the store ended before it answered; close the store on the loop that opened it"
NO_ASYNCIO = "a store needs asyncio's event loop here; elsewhere (trio) call `uploads.sync` in a thread"
_HOMES: "weakref.WeakSet[HomeLoop]" = weakref.WeakSet()


class HomeLoop:
    """The loop that `settle` was called on; without that one in a thread of its own, or, if it `prefers_caller` (the
    app's engine has its connections there), the first loop that asks. A fork begins anew.
    """

    def __init__(self, *, prefers_caller: bool = False) -> None:
        self._prefers_caller = prefers_caller
        self._resets: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: LoopThread | None = None
        self._closing: Callable[[], Coroutine[Any, Any, object]] = _nothing
        self._calling: set[asyncio.Task[Any] | None] = set()
        _HOMES.add(self)

    @property
    def is_here(self) -> bool:
        """Whether the running loop is the home."""
        return self._loop is not None and _running_loop() is self._loop

    @property
    def is_own(self) -> bool:
        """Whether the home is a thread of its own."""
        return self._thread is not None

    def on_new_loop(self, reset: Callable[[], None]) -> None:
        """Call `reset` when the home moves away from a loop that has ended, and in a forked process."""
        self._resets.append(reset)

    def closes_with(self, owner: object, closing: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Await `closing` when the interpreter exits, or nothing refers to `owner` any more (`closing` must not), if
        the home is a thread of its own then.
        """
        self._closing = closing
        weakref.finalize(owner, self._drop).atexit = False

    def settle(self) -> None:
        """Make the running loop the home, unless another one is, and runs."""
        loop = _asyncio_loop()
        with self._lock:
            if not self._runs():
                self._move_to(loop)

    async def run(self, work: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await `work` at home, from any loop; to cancel the caller cancels the work."""
        here, loop = _asyncio_loop(), self._find()
        if loop is here:
            return await self._call(work, *args, **kwargs)
        return await _ask(loop, self._call, work, *args, **kwargs)

    def call(self, work: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `work` returns at home, to synchronous code. Raises `RuntimeError` in the thread of the home."""
        loop = self._find()
        if loop is _running_loop():
            raise RuntimeError("this thread runs the store's own event loop: await the method, or call it in a thread")
        answer = _submit(loop, self._call(work, *args, **kwargs))
        try:
            return _wait(answer, loop)
        except CancelledError:
            raise RuntimeError(ENDED) from None
        except BaseException:
            _give_up(answer)
            raise

    async def wait_for_calls(self, seconds: float) -> None:
        """Wait, at home, up to `seconds` for the end of the calls that other tasks and threads have begun."""
        self._calling.discard(asyncio.current_task())
        end = time.monotonic() + seconds
        while self._calling and time.monotonic() < end:  # noqa: ASYNC110 - an event would cost every call
            await asyncio.sleep(POLL)

    async def _call(self, work: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        task = asyncio.current_task()
        if task in self._calling:
            return await work(*args, **kwargs)
        self._calling.add(task)
        try:
            return await work(*args, **kwargs)
        finally:
            self._calling.discard(task)

    def soon(self, function: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `function` at home: now if this is it, else as soon as it can."""
        loop = self._find()
        if loop is _running_loop():
            function(*args, **kwargs)
        else:
            loop.call_soon_threadsafe(lambda: function(*args, **kwargs))

    def release(self, function: Callable[[], object]) -> None:
        """Call `function` at home, or here if that has ended. It waits for nothing, not even for a lock: the garbage
        collection of any thread may call this.
        """
        loop = self._loop
        if loop is not None and loop.is_running():
            loop.call_soon_threadsafe(function)
        else:
            function()

    def iterate(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Yield on the running loop what an async generator yields at home."""
        loop = self._find()
        return items if loop is _running_loop() else relayed(items, loop)

    async def leave(self) -> None:
        """The home has no more work: end its thread, if it is one of its own."""
        thread = self._leave()
        if thread is not None:
            await asyncio.to_thread(thread.stop)

    def leave_waiting(self) -> None:
        """As `leave`, for synchronous code."""
        thread = self._leave()
        if thread is not None:
            thread.stop()

    def exit(self) -> None:
        """The interpreter exits: close what lives in a thread of its own, and end that thread."""
        loop = self._loop
        if self._thread is not None and loop is not None and loop.is_running():
            with contextlib.suppress(Exception):
                _submit(loop, self._closing()).result(EXITING_GRACE)
            self.leave_waiting()

    def _drop(self) -> None:
        """As `exit`, but without waiting, not even for the lock: the garbage collection of any thread calls this.

        The loop stays the home of what goes on in the background, until it ends.
        """
        thread, self._thread = self._thread, None
        if thread is not None and thread.loop.is_running():
            asyncio.run_coroutine_threadsafe(thread.end_after(self._closing), thread.loop)

    def _leave(self) -> "LoopThread | None":
        with self._lock:
            thread, self._thread, self._loop = self._thread, None, None
        return thread

    def _find(self) -> asyncio.AbstractEventLoop:
        loop = self._loop
        if loop is not None and loop.is_running():
            return loop
        with self._lock:
            if not self._runs():
                running = _running_loop() if self._prefers_caller else None
                self._move_to(running or self._start_thread())
            assert self._loop is not None  # noqa: S101 - for the type checker
            return self._loop

    def _runs(self) -> bool:
        return self._loop is not None and self._loop.is_running()

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not None:
            self._reset()
        self._loop = loop

    def _start_thread(self) -> asyncio.AbstractEventLoop:
        self._thread = LoopThread()
        return self._thread.loop

    def _reset(self) -> None:
        self._calling = set()
        for reset in self._resets:
            reset()

    def forked(self) -> None:
        """This is a forked process: the loop, its thread and all tasks are the parent's."""
        self._lock = threading.Lock()
        self._loop = self._thread = None
        self._reset()


async def _nothing() -> None:
    """Do nothing."""


async def relayed(items: AsyncGenerator[T, None], loop: asyncio.AbstractEventLoop) -> AsyncGenerator[T, None]:
    """Yield on the running loop what an async generator yields on another one. Raises `RuntimeError` if that ends."""
    try:
        while item := await _ask(loop, next_item, items):
            yield item[0]
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended
            await _ask(loop, items.aclose)


async def _ask(
    loop: asyncio.AbstractEventLoop, work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
) -> T:
    answer = asyncio.wrap_future(handed := _submit(loop, work(*args, **kwargs)))
    try:
        while not (await asyncio.wait((answer,), timeout=LOOK_EVERY))[0]:
            if not loop.is_running():
                raise RuntimeError(ENDED)
    except asyncio.CancelledError:
        answer.cancel()
        _give_up(handed)
        raise
    if answer.cancelled():
        raise RuntimeError(ENDED)
    return answer.result()


def _give_up(answer: Future[Any]) -> None:
    """Cancel work, or close what it has returned already (an open file)."""
    if not answer.cancel() and answer.exception() is None:
        close = getattr(answer.result(), "close", None)
        if close is not None:
            close()


def _wait(answer: Future[T], loop: asyncio.AbstractEventLoop) -> T:
    while not answer.done() and loop.is_running():
        with contextlib.suppress(TimeoutError):
            return answer.result(LOOK_EVERY)
    if not answer.done():
        raise RuntimeError(ENDED)
    return answer.result()


def _submit(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> Future[T]:
    return context_of_work(*waiting_callers()).run(asyncio.run_coroutine_threadsafe, work, loop)


def _asyncio_loop() -> asyncio.AbstractEventLoop:
    loop = _running_loop()
    if loop is None:
        raise RuntimeError(NO_ASYNCIO)
    return loop


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _forget_parents() -> None:
    for home in list(_HOMES):
        home.forked()


def _close_all() -> None:
    for home in list(_HOMES):
        home.exit()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parents)
