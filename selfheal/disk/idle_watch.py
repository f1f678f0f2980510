"""A thread that closes what is not used any more, and then ends."""

import contextlib
import threading
from collections.abc import Callable

from ..aio.threads import THREAD_NAME

LOOK_EVERY = 2.0  # seconds


class IdleWatch:
    """Calls `close_if_idle` every two seconds until it returns True. It has no lock: a fork could copy it locked."""

    def __init__(self, close_if_idle: Callable[[], bool]) -> None:
        self._close_if_idle = close_if_idle
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Watch, if no thread does yet: the thread of a parent process is none. Two threads would do no harm."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._watch, args=(self._stopped,), name=f"{THREAD_NAME}-idle", daemon=True
            )
            with contextlib.suppress(RuntimeError):  # no more threads: it stays open until the next try
                self._thread.start()

    def stop(self) -> None:
        """Let the thread end."""
        self._stopped.set()
        self._stopped = threading.Event()
        self._thread = None

    def _watch(self, stopped: threading.Event) -> None:
        while not stopped.wait(LOOK_EVERY):
            if self._close_if_idle():
                self._thread = None
                if self._close_if_idle():  # nothing was opened before that line
                    return
