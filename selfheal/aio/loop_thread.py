"""An event loop in a thread of its own, for code that has none."""

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

GREEN_THREADS = (
    ("gevent.monkey", "is_module_patched", "threading"),
    ("eventlet.patcher", "is_monkey_patched", "thread"),
)
"""Modules that replace threads, how they are asked whether they did, and for what."""


def refuse_green_threads() -> None:
    """Raise `RuntimeError` if gevent or eventlet has replaced the threads: an event loop in one would stop all."""
    for module, question, threads in GREEN_THREADS:
        is_patched = getattr(sys.modules.get(module), question, None)
        if is_patched is not None and is_patched(threads):
            library = module.partition(".")[0]
            raise RuntimeError(
                f"{library} has replaced Python's threads, and an event loop cannot run in one of its own: use workers "
                "with real threads (gunicorn --worker-class gthread --threads 16)"
            )


class LoopThread:
    """An event loop in a daemon thread.

    anyio's portal is one too. A portal that is not closed waits for its loop when its generator is collected: at the
    exit of the interpreter, or of a forked child, it waits for ever.
    """

    def __init__(self) -> None:
        refuse_green_threads()
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=_run_loop, args=(started,), name="selfheal-loop", daemon=True)
        self._thread.start()
        self.loop, self._stopped = started.result()

    def stop(self) -> None:
        """Cancel what still runs, close the loop, and wait for the end of the thread."""
        self.loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    async def end_after(self, closing: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """As `stop`, in the thread itself."""
        try:
            await closing()
        finally:
            self._stopped.set()


def _run_loop(started: "Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]") -> None:
    async def stay() -> None:
        started.set_result((asyncio.get_running_loop(), stopped := asyncio.Event()))
        await stopped.wait()

    try:
        with asyncio.Runner() as runner:
            runner.run(stay())
    except OSError as error:  # no descriptors: who waits for the start must hear of it
        if started.done():
            raise
        started.set_exception(error)
