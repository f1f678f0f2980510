"""Batching: single questions that come at the same time are asked in one query."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

from .tasks import Tasks

K = TypeVar("K")
T = TypeVar("T")


class Batcher(Generic[K, T]):
    """Asks for many keys at once, up to `size` in one of `limit` queries; `ask` leaves out unknown keys."""

    def __init__(
        self, ask: Callable[[list[K]], Awaitable[Mapping[K, T]]], tasks: Tasks, *, size: int, limit: int
    ) -> None:
        self._ask = ask
        self._tasks = tasks
        self._size = size
        self._limit = limit
        self._begin()
        tasks.home.on_new_loop(self._begin)

    def _begin(self) -> None:
        self._free = self._limit
        self._waiting: dict[K, asyncio.Future[T | None]] = {}

    async def get(self, key: K) -> T | None:
        """Return the answer for `key`, or None if it is not known; raises what the query raised."""
        answer = self._waiting.get(key)
        if answer is None:
            answer = self._waiting[key] = asyncio.get_running_loop().create_future()
            self._start()
        return await asyncio.shield(answer)

    def _start(self) -> None:
        if self._free:
            self._free -= 1
            self._tasks.start(self._ask_all()).add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._free += 1
        if task.cancelled():  # the store closes: no later query answers those who wait
            waiting, self._waiting = self._waiting, {}
            for future in waiting.values():
                future.cancel()
        elif self._waiting:
            self._start()

    async def _ask_all(self) -> None:
        await asyncio.sleep(0)  # all callers that are ready to run join the first query
        while self._waiting:
            keys = list(self._waiting)[: self._size]
            await self._answer({key: self._waiting.pop(key) for key in keys})

    async def _answer(self, waiting: dict[K, asyncio.Future[T | None]]) -> None:
        try:
            answers = await self._ask(list(waiting))
        except BaseException as error:
            for future in waiting.values():
                future.set_exception(error)
                future.exception()  # marks it as retrieved: the caller may have left
            if not isinstance(error, Exception):
                raise
        else:
            for key, future in waiting.items():
                future.set_result(answers.get(key))
