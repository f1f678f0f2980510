"""Copies on disk that must go: removed if the database has their bytes, set aside otherwise."""

from dataclasses import dataclass

from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.staged_file import StagedFile
from ..errors import DatabaseUnavailable
from ..events import Events, Kind, logger
from ..sql.models import Record
from .publish import Publisher


@dataclass(frozen=True, slots=True)
class DiskCopies:
    """Replaces, removes and sets aside the copies of names on disk."""

    disk: UploadsDirectory
    database: ImageStorage
    publisher: Publisher
    events: Events

    async def put(self, record: Record) -> None:
        """Write a record's bytes to its name; a copy that the database does not have is set aside."""
        with await self.disk.threads.run(self.disk.stage, record.name) as staged:
            async for _ in self.publisher.write_all(staged, self.database.blobs.read_unchecked(record)):
                pass
            await self.replace(record, staged)

    async def replace(self, record: Record, staged: StagedFile) -> None:
        """Publish a written file in place of the copy that has its name. Raises as `put` does."""
        (published,) = await self.disk.threads.run(self.publisher.publish, [(record, staged)])
        if published.error is not None:
            raise published.error
        if not published.inode:
            await self._set_aside_unrecorded(record, "other bytes than the recorded ones")
            await self.disk.threads.run(self.publisher.replace, staged)

    async def clear(self, record: Record, why: str) -> None:
        """Remove the copy of a name if the database has its bytes; set it aside otherwise."""
        if not await self._set_aside_unrecorded(record, why):
            await self.disk.threads.run(self.disk.remove, record.name)

    async def clear_old(self, record: Record) -> None:
        """Clear a copy that cannot be the record's: the disk did not take the new one, and the old is not served."""
        there = await self.disk.threads.run(self.disk.stat, record.name)
        if there is not None and not record.matches(there.st_mtime_ns, there.st_size):
            await self.clear(record, "other bytes than the recorded ones")

    async def set_aside(self, name: str, why: str) -> None:
        """Move the copy of a name to the quarantine."""
        moved = await self.disk.threads.run(self.disk.quarantine, name)
        if moved is not None:
            self.events.emit(Kind.QUARANTINED, name, detail=f"{why}; moved to {moved}")
            logger.warning("%r: %s; the disk copy was moved to %s", name, why, moved)

    async def _set_aside_unrecorded(self, record: Record, why: str) -> bool:
        """Set a copy aside unless the database has its bytes; return whether it was."""
        if await self._is_recorded(record):
            return False
        await self.set_aside(record.name, why)
        return True

    async def _is_recorded(self, record: Record) -> bool:
        """Whether the bytes on disk are this record's, or those of one of its versions."""
        file = await self.disk.threads.run(self.disk.open, record.name)
        if file is None:
            return True
        try:
            with file:
                digest = await self.disk.threads.run(file.sha256)
            versions = await self.database.history(record.name)
        except (DatabaseUnavailable, OSError):
            return False
        return digest in {record.sha256, *(version.sha256 for version in versions)}
