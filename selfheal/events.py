"""Events: counters, a hook for listeners, and log messages that cannot flood."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

logger = logging.getLogger("selfheal")


class Kind(StrEnum):
    """What can happen to a name."""

    HIT = "hit"
    RESTORED = "restored"
    STREAMED = "streamed"
    ABSENT = "absent"
    UNKNOWN = "unknown"
    CORRUPT = "corrupt"
    UNREADABLE = "unreadable"
    SAVED = "saved"
    DELETED = "deleted"
    UNDONE = "undone"
    ADOPTED = "adopted"
    REMOVED = "removed"
    SET_ASIDE = "set_aside"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to one name; `size` in bytes, `detail` for people."""

    kind: Kind
    name: str
    size: int = 0
    detail: str = ""


Listener = Callable[[Event], None]


class Events:
    """Counts events and calls the listeners."""

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self.listeners = tuple(listeners)
        self.counters: Counter[Kind] = Counter()
        self._logged: dict[str, float] = {}

    def emit(self, kind: Kind, name: str, size: int = 0, detail: str = "") -> None:
        """Count an event and call every listener; the exception of a listener is logged, and has no other effect."""
        self.counters[kind] += 1
        if not self.listeners:
            return
        event = Event(kind, name, size, detail)
        for listener in self.listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("a listener failed on %s", event)

    def log_once(self, level: int, topic: str, message: str, *, every: float = 60.0) -> None:
        """Log `message`, at most once in `every` seconds for each topic."""
        now = time.monotonic()
        if now - self._logged.get(topic, -every) >= every:
            self._logged[topic] = now
            logger.log(level, message)
