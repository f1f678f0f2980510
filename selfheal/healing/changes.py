"""Changes of other nodes and processes: each node asks the catalogue for them while it has visitors."""

import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from .. import names
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..sql.changes import NUMBERED_AT_ONCE
from ..sql.models import Position

CHANGES_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class _Remembered:
    """How far a node has followed, and the generations of the newest records that it knows."""

    epoch: str
    sequence: int
    newest: Mapping[str, int]


class Follower:
    """Finds the names that others changed, and notices when the database went back in time.

    What it has followed is remembered on the disk that it is about: a node that was away catches up.
    """

    def __init__(self, database: ImageStorage, disk: UploadsDirectory) -> None:
        self._catalogue, self._changes = database.catalogue, database.changes
        self._disk = disk
        self._at: Position | None = None
        self._remembered: _Remembered | None = None

    async def went_back(self, newest: Mapping[str, int]) -> bool:
        """Whether the database is older than it was: its epoch is another one, or it lacks what this node knows.

        `newest` are generations of the records that were changed last, as far as this process knows.
        """
        position = await self._position()
        if self._at is None:
            self._at = await self._begin(position)
            newest = {**(self._remembered.newest if self._remembered else {}), **newest}
        is_older = position.sequence < self._at.sequence or await self._lacks(newest)
        if is_older and position.epoch == self._at.epoch:
            await self._changes.begin_epoch(position.epoch)
            position = await self._position()
        if position.epoch == self._at.epoch:
            return False
        self._at = position
        return True

    async def pages(self) -> AsyncGenerator[list[str], None]:
        """Yield the names that were changed since the last call; new ones are left out: they have no old copy."""
        is_last = self._at is None
        while self._at is not None and not is_last:
            changes = await self._changes.after(self._at.sequence, CHANGES_AT_ONCE)
            is_last = len(changes) < CHANGES_AT_ONCE
            if changes:
                yield [name for name, _ in changes if names.is_valid(name)]
                self._at = Position(self._at.epoch, changes[-1][1])

    async def remember(self, newest: Mapping[str, int]) -> None:
        """Write down how far this node has followed."""
        if self._at is None:
            return
        now = _Remembered(self._at.epoch, self._at.sequence, dict(newest))
        if now != self._remembered:
            self._remembered = now
            text = json.dumps({"epoch": now.epoch, "sequence": now.sequence, "newest": now.newest})
            await self._disk.threads.run(self._disk.write_followed, text)

    async def is_remembered(self) -> bool:
        """Whether a process of this node has written down that it follows this epoch: it has compared every file."""
        remembered = _parse(await self._disk.threads.run(self._disk.read_followed))
        return remembered is not None and self._at is not None and remembered.epoch == self._at.epoch

    async def _begin(self, position: Position) -> Position:
        self._remembered = _parse(await self._disk.threads.run(self._disk.read_followed))
        if self._remembered is None:
            return Position(position.epoch, 0)  # a disk that remembers nothing may have old copies
        return Position(self._remembered.epoch, self._remembered.sequence)

    async def _position(self) -> Position:
        position = await self._changes.position()
        if position.has_unnumbered:
            while await self._changes.number() == NUMBERED_AT_ONCE:
                pass  # a smaller number is the last one: an app that writes all the time always has some more
            position = await self._changes.position()
        return position

    async def _lacks(self, newest: Mapping[str, int]) -> bool:
        if not newest:
            return False
        now = await self._catalogue.generations(newest)
        return any(now.get(name, 0) < generation for name, generation in newest.items())


def _parse(text: str) -> _Remembered | None:
    try:
        found = json.loads(text)
        newest = {str(name): int(generation) for name, generation in found["newest"].items()}
        return _Remembered(str(found["epoch"]), int(found["sequence"]), newest)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
