"""Forks: SQLite keeps the locks of a file once for a process. A child that was forked inside a transaction would have
its locks for ever, and read without any: a fork waits until SQLite is idle.
"""

import asyncio
import concurrent.futures.thread  # noqa: F401 - see the end
import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from ..errors import DatabaseUnavailable

WAIT = 5.0  # seconds that a fork waits for transactions
POLL = 0.002
TORN = "this process was forked while SQLite was in use; start processes with `spawn`, or before uploads are used"


class _Uses:
    """Who uses SQLite in this process: the number of uses on each event loop, and in threads (None)."""

    def __init__(self) -> None:
        self.is_torn = False  # whether this process was forked in the middle of a use
        self.forget()

    def forget(self) -> None:
        self.lock = threading.RLock()  # a signal's handler may fork inside of `change`
        self.numbers: Counter[asyncio.AbstractEventLoop | None] = Counter()
        self.is_fork_pending = False

    def change(self, loop: asyncio.AbstractEventLoop | None, by: int) -> None:
        with self.lock:
            self.numbers[loop] += by
            if not self.numbers[loop]:
                del self.numbers[loop]


_USES = _Uses()


@contextlib.asynccontextmanager
async def no_fork() -> AsyncIterator[None]:
    """Keep forks waiting; wait for one that waits already."""
    loop = asyncio.get_running_loop()
    while _USES.is_fork_pending:  # noqa: ASYNC110 - another thread ends that
        await asyncio.sleep(POLL)
    _USES.change(loop, 1)
    try:
        yield
    finally:
        _USES.change(loop, -1)


@contextlib.contextmanager
def no_fork_in_thread() -> Iterator[None]:
    """As `no_fork`; raises `DatabaseUnavailable` instead of waiting."""
    if _USES.is_fork_pending:
        raise DatabaseUnavailable("this process is about to fork")
    _USES.change(None, 1)
    try:
        yield
    finally:
        _USES.change(None, -1)


def check_not_torn() -> None:
    """Raise `DatabaseUnavailable` if SQLite cannot be used in this process."""
    if _USES.is_torn:
        raise DatabaseUnavailable(TORN)


def _before() -> None:
    """Wait for an idle moment, and hold the lock, so that it lasts. The event loop of this thread cannot go on."""
    try:
        here: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    give_up = time.monotonic() + WAIT
    _USES.is_fork_pending = True
    while True:
        _USES.lock.acquire()
        others = [loop for loop in _USES.numbers if loop is None or loop is not here]
        if not others or time.monotonic() > give_up:
            return
        _USES.lock.release()
        time.sleep(POLL)


def _in_parent() -> None:
    _USES.is_fork_pending = False
    _USES.lock.release()


def _in_child() -> None:
    _USES.is_torn = _USES.is_torn or bool(_USES.numbers)
    _USES.forget()


if hasattr(os, "register_at_fork"):  # hooks run in reverse: that of thread pools takes a lock that the others need
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
