"""Negative cache: names the database said do not exist, for 2 s."""

import asyncio
import time

from ..aio.tasks import LoopSemaphore

FORGET_AFTER = 2.0  # seconds for which a name is remembered
NAMES_AT_MOST = 10_000
TURNS_PER_ANSWER = 2  # turns of the event loop per answer "no such name": hits do not wait for a flood of them


class NegativeCache:
    """A set of names that forgets each of them after `FORGET_AFTER` seconds."""

    def __init__(self, limit: int = NAMES_AT_MOST) -> None:
        self._limit = limit
        self._until: dict[str, float] = {}
        self._one_at_a_time = LoopSemaphore(1)

    def __contains__(self, name: str) -> bool:
        return time.monotonic() < self._until.get(name, 0.0)

    def add(self, name: str) -> None:
        """Remember a name that does not exist."""
        if len(self._until) >= self._limit:
            self._until.clear()
        self._until[name] = time.monotonic() + FORGET_AFTER

    def discard(self, name: str) -> None:
        """Forget a name: it was saved."""
        self._until.pop(name, None)

    async def turn(self) -> None:
        """Wait for the turn of one answer "no such name"."""
        async with self._one_at_a_time:
            for _ in range(TURNS_PER_ANSWER):
                await asyncio.sleep(0)
