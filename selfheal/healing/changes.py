"""Changes of other nodes and processes: each node asks the catalogue for them while it has visitors."""

from .. import names
from ..sql.catalogue import Catalogue

CHANGES_AT_MOST = 10_000


class Follower:
    """Finds the names that others changed. New names are left out: no node has an old copy of them."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._since: object = None
        self._seen: dict[str, tuple[int, bool]] = {}

    async def changed(self) -> list[str] | None:
        """Return names that the last call saw change: their writers have had time for the disk. None if too many."""
        changes, self._since = await self._catalogue.changes(self._since, CHANGES_AT_MOST)
        now, due = dict[str, tuple[int, bool]](), list[str]()
        for name, generation in changes:
            before, is_reported = self._seen.get(name, (0, False))
            now[name] = generation, before == generation
            if before == generation and not is_reported and names.is_valid(name):
                due.append(name)
        self._seen = now
        return None if len(changes) >= CHANGES_AT_MOST else due
