"""Names of which the database has said that there are none: remembered for a moment, and told so in turns."""

from __future__ import annotations

import asyncio
import time

from ..aio.single_flight import Places

ABSENT_FOR = 2.0
"""Seconds for which an absent name is remembered."""
ABSENT_AT_MOST = 10_000
TURNS_OF_AN_ABSENT = 2
"""Turns of the event loop per answer that a name is absent: a flood of such names waits for hits, not they for it."""


class AbsentNames:
    """A set of names that forgets each of them after `ABSENT_FOR` seconds."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._turns = Places(1)

    def __contains__(self, name: str) -> bool:
        return time.monotonic() < self._until.get(name, 0.0)

    def add(self, name: str) -> None:
        """The database has just said so of a name."""
        if len(self._until) >= ABSENT_AT_MOST:
            self._until.clear()
        self._until[name] = time.monotonic() + ABSENT_FOR

    def discard(self, name: str) -> None:
        """A name was saved."""
        self._until.pop(name, None)

    async def turn(self) -> None:
        """Wait until an answer that a name is absent may be given."""
        async with self._turns.one():
            for _ in range(TURNS_OF_AN_ABSENT):
                await asyncio.sleep(0)
