"""Pace: a name that could not be compared with its record is tried again later, at growing intervals."""

import itertools
import time

FIRST = 1.0
LONGEST = 15.0  # seconds between two tries: the first, and at most
NAMES_AT_MOST = 100_000
DUE_AT_ONCE = 256


class Pace:
    """Names that failed, when each is due again, and how long it waited."""

    def __init__(self) -> None:
        self._names: dict[str, tuple[float, float]] = {}

    def is_due(self, name: str) -> bool:
        """Whether a name may be tried now."""
        waiting = self._names.get(name)
        return waiting is None or time.monotonic() >= waiting[0]

    def due(self) -> list[str]:
        """Return some of the names that failed before and may be tried again now: those that failed first."""
        now = time.monotonic()
        return list(itertools.islice((name for name, (at, _) in self._names.items() if now >= at), DUE_AT_ONCE))

    def slow_down(self, name: str) -> None:
        """A name failed: wait twice as long as before."""
        if len(self._names) >= NAMES_AT_MOST:
            self._names.clear()
        delay = min(2 * self._names.pop(name, (0.0, FIRST / 2))[1], LONGEST)
        self._names[name] = (time.monotonic() + delay, delay)

    def forget(self, name: str) -> None:
        """A name succeeded."""
        self._names.pop(name, None)
