"""Undecided names: their files vanished a moment ago. Requests wait until it is known whether the app deleted them."""

import asyncio
import contextlib
import time
from collections.abc import Iterable

RESTORED_AT_MOST = 10_000  # names that are remembered; the oldest go first


class Undecided:
    """The names that are not to be restored yet, and those that were, before anybody knew that they had vanished."""

    def __init__(self) -> None:
        self._names: dict[str, asyncio.Event] = {}
        self._restored: dict[str, float] = {}

    def add(self, names: Iterable[str]) -> None:
        """From now on requests for these names wait."""
        for name in names:
            self._names.setdefault(name, asyncio.Event())

    def discard(self, names: Iterable[str]) -> None:
        """It is decided what becomes of these names: requests go on."""
        for name in names:
            decision = self._names.pop(name, None)
            if decision is not None:
                decision.set()

    async def decided(self, name: str, seconds: float) -> None:
        """Wait until a name is decided, up to `seconds`."""
        decision = self._names.get(name)
        if decision is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(decision.wait(), seconds)

    def note_restored(self, name: str) -> None:
        """A request found a name missing, and it was restored for it."""
        self._restored.pop(name, None)
        if len(self._restored) >= RESTORED_AT_MOST:
            del self._restored[next(iter(self._restored))]
        self._restored[name] = time.monotonic()

    def was_restored(self, name: str, seconds: float) -> bool:
        """Whether a name was restored in the last `seconds`."""
        return time.monotonic() - self._restored.get(name, float("-inf")) < seconds
