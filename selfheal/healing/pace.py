"""Pace: what is done to a name again and again is done at growing intervals."""

import itertools
import time

FIRST = 1.0
LONGEST = 15.0  # seconds between two tries of what failed: at first, and at most
NAMES_AT_MOST = 100_000
DUE_AT_ONCE = 256


class Pace:
    """When each name is due again, and how long it waits: `first` seconds, then twice as long, `longest` at most."""

    def __init__(self, first: float | None = None, longest: float | None = None) -> None:
        self._first = FIRST if first is None else first
        self._longest = LONGEST if longest is None else longest
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
        """Let a name wait twice as long as before; after a long time in which it did not, it begins again."""
        if len(self._names) >= NAMES_AT_MOST:
            self._names.clear()
        now = time.monotonic()
        due, delay = self._names.pop(name, (now, 0.0))
        is_quiet = now - due > 4 * self._longest
        delay = min(self._first if is_quiet else max(2 * delay, self._first), self._longest)
        self._names[name] = (now + delay, delay)

    def forget(self, name: str) -> None:
        """A name succeeded."""
        self._names.pop(name, None)
