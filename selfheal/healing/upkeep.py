"""Upkeep: what a server does for its uploads whether it is asked for them or not."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from ..aio.home import HomeLoop
from ..events import logger

AGAIN_AFTER = 60.0  # seconds until work is begun again that an unexpected error ended
Work = Callable[[], Coroutine[Any, Any, None]]


class Upkeep:
    """Runs work that has no end, where the store lives, until it is stopped. `Tasks.drain` does not wait for it.

    `before_stop` is awaited first: it finishes what the next process could not do.
    """

    def __init__(self, home: HomeLoop, works: Iterable[Work], before_stop: Iterable[Work] = ()) -> None:
        self._home = home
        self._works, self._before_stop = list(works), list(before_stop)
        self._is_started = False
        self._tasks: list[asyncio.Task[None]] = []
        home.on_new_loop(self._forget)

    def start(self) -> None:
        """Start all work, unless it was started before. Any thread may call this, and every request does."""
        if not self._is_started:
            self._is_started = True
            try:
                self._home.soon(self._start)
            except OSError:
                self._is_started = False
                raise

    async def stop(self) -> None:
        """Cancel the work, and wait for that; a later `start` starts it anew."""
        for finish in self._before_stop if self._tasks else ():
            await finish()
        tasks = self._tasks
        self._forget()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(_run(work)) for work in self._works]

    def _forget(self) -> None:
        self._is_started, self._tasks = False, []


async def _run(work: Work) -> None:
    while True:
        try:
            await work()
        except Exception:  # noqa: BLE001 - of any kind: the work must begin again
            logger.exception("the upkeep of the uploads failed; it begins again in %g s", AGAIN_AFTER)
        await asyncio.sleep(AGAIN_AFTER)
