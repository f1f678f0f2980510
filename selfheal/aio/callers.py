"""Who waits for the work that runs now: tasks and threads, also on other event loops."""

import asyncio
import contextlib
import threading
from contextvars import Context, ContextVar, copy_context

_waiting: ContextVar[tuple[object, ...]] = ContextVar("waiting", default=())


def current_caller() -> object:
    """Return the running task; the thread if no event loop runs in it."""
    with contextlib.suppress(RuntimeError):
        return asyncio.current_task() or threading.current_thread()
    return threading.current_thread()


def waiting_callers() -> tuple[object, ...]:
    """Return the running task or thread, and the tasks that wait for it to end."""
    return (current_caller(), *_waiting.get())


def context_of_work(*waiting: object) -> Context:
    """Return a context for work that these tasks and threads wait for."""
    context = copy_context()
    context.run(_waiting.set, waiting)
    return context
