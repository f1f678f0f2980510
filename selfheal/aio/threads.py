"""A thread pool for everything that may wait for a disk."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from .tasks import run_to_end

P = ParamSpec("P")
T = TypeVar("T")
WORKERS = 32
THREAD_NAME = "selfheal"  # what the names of all our threads begin with


class Threads:
    """A thread pool of its own, made at first use in each process: a slow disk must not use up the app's threads."""

    def __init__(self, workers: int = WORKERS) -> None:
        self._workers = workers
        self._pid = -1
        self._pool: ThreadPoolExecutor | None = None

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` in a thread, to its end even if cancelled: a descriptor closed in use may be another file's."""
        if self._pool is None or self._pid != os.getpid():
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix=THREAD_NAME)
            self._pid = os.getpid()
        call = asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args, **kwargs))
        try:
            return await run_to_end(call)
        except asyncio.CancelledError:
            close = None if call.exception() is not None else getattr(call.result(), "close", None)
            if close is not None:
                close()
            raise

    def close(self) -> None:
        """Let the threads end; a later `run` starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.shutdown(wait=False)
