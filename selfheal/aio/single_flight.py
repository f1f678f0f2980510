"""Single flight: many callers ask for one key, the work runs once, and each caller gets its answer."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from .tasks import Tasks

K = TypeVar("K")
T = TypeVar("T")


class Call(Generic[T]):
    """Work under way, and its callers: `share` makes what one caller gets, `release` takes back what it left."""

    def __init__(self, share: Callable[[T], T], release: Callable[[T], None]) -> None:
        self._share = share
        self._release = release
        self._callers: set[asyncio.Future[T]] = set()
        self._end: Callable[[asyncio.Future[T]], None] | None = None

    @property
    def is_answered(self) -> bool:
        """Whether the callers have their answer, or an error."""
        return self._end is not None

    def answer(self, value: T) -> None:
        """Give `value` to all callers, and to those who still come while the work goes on; only the first counts."""
        self._end_with(lambda caller: caller.set_result(self._share(value)))

    def fail(self, error: BaseException) -> None:
        """Raise `error` in all callers that have no answer yet."""
        self._end_with(lambda caller: caller.set_exception(error))

    async def wait(self, timeout: float) -> T:
        """Return a share of the answer. Raises `TimeoutError` after `timeout` seconds, and what the work raises."""
        caller: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._end is not None:
            self._end(caller)
            return caller.result()
        self._callers.add(caller)
        try:
            await asyncio.wait((caller,), timeout=timeout)
        except asyncio.CancelledError:
            if caller.done() and caller.exception() is None:
                self._release(caller.result())
            raise
        finally:
            self._callers.discard(caller)
            caller.cancel()  # without effect if it is done
        if caller.cancelled():
            raise TimeoutError
        return caller.result()

    def _end_with(self, end: Callable[[asyncio.Future[T]], None]) -> None:
        if self._end is None:
            self._end = end
            for caller in self._callers:
                if not caller.done():
                    end(caller)


class SingleFlight(Generic[K, T]):
    """Runs `work(key, call)` once, in a task of its own, for all callers that ask for the key meanwhile."""

    def __init__(
        self,
        tasks: Tasks,
        work: Callable[[K, Call[T]], Coroutine[Any, Any, None]],
        *,
        share: Callable[[T], T] = lambda value: value,
        release: Callable[[T], None] = lambda _: None,
    ) -> None:
        self._tasks = tasks
        self._work = work
        self._share = share
        self._release = release
        self._calls: dict[K, Call[T]] = {}
        tasks.home.on_new_loop(self._calls.clear)

    async def get(self, key: K, timeout: float) -> T:
        """Return the answer for `key`; raises `TimeoutError` after `timeout` seconds, and what the work raises."""
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = Call(self._share, self._release)
            self._tasks.start(self._run(key, call)).add_done_callback(lambda _: self._ended(key, call))
        return await call.wait(timeout)

    async def _run(self, key: K, call: Call[T]) -> None:
        try:
            await self._work(key, call)
        except BaseException as error:
            call.fail(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._calls.pop(key, None)  # at once: what the work has closed must not be shared any more

    def _ended(self, key: K, call: Call[T]) -> None:
        if self._calls.get(key) is call:  # the task was cancelled before its first step
            del self._calls[key]
            call.fail(asyncio.CancelledError())
