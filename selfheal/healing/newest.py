"""Newest records: the few that were changed last. A database that lacks one of them later went back in time."""

from .reconcile import Judged

NEWEST_AT_MOST = 16


class NewestRecords:
    """The records that were changed last, as far as this process knows."""

    def __init__(self) -> None:
        self._known: dict[str, Judged] = {}

    def know(self, name: str, judged: Judged) -> None:
        """A name has this record; without one, there is nothing to know."""
        if judged.changed_at is None:
            return
        self._known[name] = judged
        if len(self._known) > NEWEST_AT_MOST:
            del self._known[min(self._known, key=self._changed_at)]

    def generations(self) -> dict[str, int]:
        """Return the generation of each name."""
        return {name: judged.generation for name, judged in self._known.items()}

    def clear(self) -> None:
        """Forget them."""
        self._known.clear()

    def _changed_at(self, name: str) -> float:
        moment = self._known[name].changed_at
        return 0.0 if moment is None else moment.timestamp()
