"""The threads in which everything waits that may have to wait for a disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A pool of its own, made at first use in each process: a slow disk must not eat the app's threads."""

    def __init__(self, workers: int = 32) -> None:
        self._workers = workers
        self._owner = -1
        self._pool: ThreadPoolExecutor | None = None

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` in a thread. An asker that is cancelled still waits for its end: nobody must close a descriptor,
        and so give its number to another file, while a thread is at work on it.
        """
        if self._pool is None or self._owner != os.getpid():
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="selfheal")
            self._owner = os.getpid()
        call = asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args, **kwargs))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            while not call.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait((call,))
            close = None if call.exception() is not None else getattr(call.result(), "close", None)
            if close is not None:
                close()  # whoever was to close it has gone
            raise

    def close(self) -> None:
        """Let the threads end; a later `run` starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None and self._owner == os.getpid():
            pool.shutdown(wait=False)
