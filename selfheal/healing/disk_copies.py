"""Copies on disk that must go: each is moved aside first, then hashed, and removed once the database has its bytes."""

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from .. import names
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.open_file import OpenFile, identity_of
from ..disk.staged_file import StagedFile
from ..errors import DiskUnwritable, FileChanged, SelfHealError
from ..events import Events, Kind, logger
from ..sql.models import Record
from .publish import Publisher

TRIES = 3  # how often a file is published whose name others take meanwhile
DRAINED_AFTER = 60.0  # seconds in quarantine after which no process is at work on a file any more
OTHER_BYTES = "other bytes than the recorded ones"


@dataclass(frozen=True, slots=True)
class DiskCopies:
    """Replaces and removes the copies of names on disk. No byte goes that the database does not have."""

    disk: UploadsDirectory
    database: ImageStorage
    publisher: Publisher
    events: Events

    async def put(self, record: Record) -> None:
        """Write a record's bytes to its name. Raises `CorruptBlob`, `DiskUnwritable`: then the name is as before."""
        with await self.disk.threads.run(self.disk.stage, record.name) as staged:
            async for _ in self.publisher.write_all(staged, self.database.blobs.read_unchecked(record)):
                pass
            await self.replace(record, staged)

    async def replace(self, record: Record, staged: StagedFile) -> None:
        """Publish a written file in place of the copy that has its name. Raises as `put` does, and `FileChanged`."""
        moved: list[Path | None] = []
        try:
            for _ in range(TRIES):
                (published,) = await self.disk.threads.run(self.publisher.publish, [(record, staged)])
                if published.error is not None:
                    raise published.error
                if published.inode:
                    return
                moved.append(await self._move_away(record.name, OTHER_BYTES))
            raise FileChanged(f"{record.name!r} is written by others as often as it is replaced")
        finally:
            for path in moved:
                await self._keep(record.name, path, OTHER_BYTES)

    async def clear(self, name: str, why: str) -> bool:
        """Move the copy of a name away; False if there is none. It is removed, or becomes a version of the name.

        Raises `DiskUnwritable` if it stays: it is not served any more, whatever the disk has.
        """
        moved = await self._move_away(name, why)
        await self._keep(name, moved, why)
        return moved is not None

    async def quarantine(self, name: str, why: str) -> None:
        """Move the copy of a name that cannot be read to the quarantine."""
        moved = await self.disk.threads.run(self.disk.quarantine, name)
        if moved is not None:
            self._leave(name, moved, why)

    async def drain(self) -> None:
        """Store what waits in quarantine: the database did not answer, or the process died, when it was moved there."""
        errors = list[OSError]()
        for name, path in await self.disk.threads.run(self.disk.quarantined, DRAINED_AFTER, errors):
            if names.is_valid(name):
                await self._keep(name, path, "it waited in quarantine")
        await self.disk.threads.run(self.disk.sweep_quarantine, DRAINED_AFTER)
        if errors:
            self.events.log_once(logging.WARNING, "quarantine", f"the quarantine cannot be read: {errors[0]}")

    async def _move_away(self, name: str, why: str) -> Path | None:
        try:
            return await self.disk.threads.run(self.disk.quarantine, name)
        except OSError as error:
            if error.errno == errno.EXDEV and await self._keep_in_place(name, why):
                return None
            await self.disk.threads.run(self.disk.distrust, name)
            raise DiskUnwritable(f"{name!r}: {why}; the copy on disk cannot be moved away: {error}") from error

    async def _keep(self, name: str, moved: Path | None, why: str) -> None:
        """Store a moved copy as a version unless the database has its bytes, then remove it."""
        if moved is None:
            return
        try:
            await self._store(name, await self.disk.threads.run(self.disk.open_quarantined, moved), why)
            await self.disk.threads.run(self.disk.remove_quarantined, moved)
        except FileNotFoundError:
            pass  # another process drained the quarantine
        except (SelfHealError, OSError) as error:
            self._leave(name, moved, f"{why} (it stays in quarantine: {error})")

    async def _keep_in_place(self, name: str, why: str) -> bool:
        """Store and remove a copy on a file system without a quarantine (mounted below the root); False if it stays."""
        try:
            file = await self.disk.threads.run(self.disk.open_distrusted, name)
            if file is None:
                return True
            await self._store(name, file, why)
            there = await self.disk.threads.run(self.disk.stat, name)
            if there is not None and identity_of(there) == file.identity:
                await self.disk.threads.run(self.disk.remove, name)
        except (SelfHealError, OSError) as error:
            logger.warning("%r: %s; it stays on the disk: %s", name, why, error)
            return False
        return True

    async def _store(self, name: str, file: OpenFile, why: str) -> None:
        with file:
            digest = await self.disk.threads.run(file.sha256)
            if not await self.database.versions.has_bytes(name, digest):
                await self.database.versions.set_aside(name, file.chunks(), modified_ns=file.modified_ns, reason=why)
                self.events.emit(Kind.SET_ASIDE, name, file.size, why)
                logger.warning("%r: %s; the copy is a version now, see `selfheal history`", name, why)
            if identity_of(os.fstat(file.fd)) != file.identity:
                raise FileChanged("it is still being written")

    def _leave(self, name: str, moved: Path, why: str) -> None:
        self.events.emit(Kind.QUARANTINED, name, detail=f"{why}; moved to {moved}")
        logger.warning("%r: %s; the disk copy was moved to %s", name, why, moved)
