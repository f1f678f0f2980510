"""What other nodes and processes did to names: a node asks for it every few seconds, for as long as it has visitors."""

from __future__ import annotations

from .. import names
from ..db import ImageStorage

CHANGES_AT_MOST = 10_000


class Follower:
    """The changes of names that exist for longer; a new name can have no old copy anywhere."""

    def __init__(self, database: ImageStorage) -> None:
        self._database = database
        self._since: object = None
        self._known: dict[str, tuple[int, bool]] = {}

    async def changed(self) -> list[str] | None:
        """Names that were changed since the last time but one; None if they are too many to be told.

        Who changes a name commits first, and then takes the file away: it is given the time between two askings.
        Raises `DatabaseUnavailable`.
        """
        changes, self._since = await self._database.changes(self._since, CHANGES_AT_MOST)
        now, due = dict[str, tuple[int, bool]](), list[str]()
        for name, generation in changes:
            before, was_told = self._known.get(name, (0, False))
            now[name] = generation, before == generation
            if before == generation and not was_told and names.is_valid(name):
                due.append(name)
        self._known = now
        return None if len(changes) >= CHANGES_AT_MOST else due
