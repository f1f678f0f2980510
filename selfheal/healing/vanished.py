"""Vanished files: whether the app deleted them, which holds for the database too, or they were lost, and come back."""

import asyncio
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.open_file import Identity, identity_of
from ..errors import DatabaseUnavailable, SelfHealError
from ..events import logger
from ..sql.models import Record
from .reconcile import Reconciler
from .restore import Restorer
from .saving import Saver

HANDFUL = 5  # names that an app deletes at once; more are a loss
QUIET = 2.0  # seconds without another one after which it is known how many they are
ASKED_AT_MOST = 10_000  # vanished names that the database is asked for; more are a loss, whatever they are
RESTORED_FOR = 2.0  # seconds, at most, between a restore and the event that tells that the file had vanished
RETRY = 2.0  # seconds until the database is asked again after it gave no answer
REPLACED_FOR = 5.0
"""Seconds after an overwrite in which selfheal itself may have taken the old copy away, because the disk was full."""


@dataclass(eq=False)
class VanishedFiles:
    """The names whose files vanished while this process was watching."""

    disk: UploadsDirectory
    database: ImageStorage
    restorer: Restorer
    reconciler: Reconciler
    saver: Saver

    def __post_init__(self) -> None:
        self._vanished: dict[str, float] = {}
        self._deleted: dict[str, float] = {}
        self._lost_until = self._asked_from = 0.0

    async def decided(self, seconds: float) -> None:
        """Wait until it is decided what became of the files that have vanished so far, up to `seconds`."""
        undecided = self.restorer.undecided
        await asyncio.gather(*(undecided.decided(name, seconds) for name in (*self._vanished, *self._deleted)))

    async def note(self, gone: Iterable[str], back: Iterable[str]) -> None:
        """Files or directories vanished: see whether more follow. What has no record is not counted.

        Those that are back already count too, if a request has restored them meanwhile.
        """
        now, directories = time.monotonic(), {*gone, *back}
        vanished = [*gone, *(name for name in back if self.restorer.undecided.was_restored(name, RESTORED_FOR))]
        if vanished and len(vanished) <= ASKED_AT_MOST:
            try:
                records = await self.database.catalogue.find(vanished)
                vanished = [name for name in vanished if name in records and not records[name].is_deleted]
            except DatabaseUnavailable:
                pass  # it is asked again before anything is deleted
        self._vanished |= dict.fromkeys(vanished, now)
        self.restorer.undecided.add(vanished)
        if len(self._vanished) > HANDFUL or (vanished and now < self._lost_until):
            self.lose("many at once")
        elif any(name.rpartition("/")[0] in directories for name in self._vanished):
            self.lose("with their directory")

    def lose(self, how: str) -> None:
        """What vanished was lost, and so is what follows at once: it is restored at its next request."""
        self._lost_until = time.monotonic() + QUIET
        if self._vanished:
            logger.warning("%d files vanished from %s %s: lost, not deleted", len(self._vanished), self.disk.path, how)
        self.restorer.undecided.discard(self._vanished)
        self._vanished.clear()

    async def decide(self) -> None:
        """Delete the names whose files vanished alone, and that the app did not write again."""
        now = time.monotonic()
        if self._vanished and now >= max(self._vanished.values()) + QUIET:
            self._deleted |= self._vanished
            self._vanished.clear()
        for name in list(self._deleted) if now >= self._asked_from else ():
            try:
                await self._delete(name, now - self._deleted[name])
            except DatabaseUnavailable as error:
                self._asked_from = now + RETRY
                logger.warning("%r was deleted by the app, and will be in the database: %s", name, error)
                return
            except (SelfHealError, OSError) as error:
                logger.error("%r was deleted by the app, but not in the database: %s", name, error)
            del self._deleted[name]
            self.restorer.undecided.discard([name])

    async def _delete(self, name: str, age: float) -> None:
        there = await self.disk.threads.run(self.disk.stat, name)
        if there is not None and not await self._is_restored(name, identity_of(there), age):
            return
        record = await self.database.find(name)
        if record is None or record.is_deleted:
            return
        if not await self.disk.threads.run(os.path.isdir, self.disk.path_of(name).parent):
            logger.warning("%r vanished with its directory: lost, not deleted", name)
        elif await self._is_set_aside(record, age):
            logger.warning("%r is not on the disk: selfheal set its copy aside; it is restored", name)
        else:
            await self.saver.delete_vanished(name)
            logger.warning("%r was deleted by the app, and so in the database; `selfheal undo` brings it back", name)

    async def _is_restored(self, name: str, identity: Identity, age: float) -> bool:
        """Whether a file is there because a request has restored it, and not because the app wrote it again."""
        was_restored = self.restorer.undecided.was_restored(name, age + RESTORED_FOR)
        return was_restored and await self.reconciler.agrees(name, identity) is not None

    async def _is_set_aside(self, record: Record, age: float) -> bool:
        """Whether a process of selfheal took the copy away, `age` seconds ago, and could not put another one there."""
        if any(name == record.name for name, _ in await self.disk.threads.run(self.disk.quarantined, 0.0)):
            return True
        since_change = (await self.database.changes.now() - record.changed_at).total_seconds()
        return record.generation > 1 and since_change - age < REPLACED_FOR
