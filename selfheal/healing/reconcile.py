"""Reconcile: when disk and database differ, decide which one is right; and adopt what is only on disk."""

import contextlib
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from ..aio.batching import Batcher
from ..aio.tasks import LoopSemaphore, Tasks
from ..blobs.database import LARGE_FROM, LARGE_UPLOADS_AT_ONCE
from ..content.sources import CHUNK
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.open_file import Identity, OpenFile, identity_of
from ..errors import CorruptBlob, FileChanged, NotStored
from ..events import Events, Kind
from ..sql.models import Record
from .disk_copies import DiskCopies

SETTLED_AFTER = 1.0  # seconds without a change after which a file counts as complete


@dataclass(eq=False)
class Reconciler:
    """Makes a disk copy and its record agree. `started_ns` is the start of this process, in ns since the epoch."""

    disk: UploadsDirectory
    database: ImageStorage
    copies: DiskCopies
    events: Events
    tasks: Tasks
    started_ns: int = field(default_factory=time.time_ns)

    def __post_init__(self) -> None:
        self._threads = self.disk.threads
        self._records: Batcher[str, Record] = Batcher(self.database.catalogue.find, self.tasks, size=256, limit=1)
        self._large = LoopSemaphore(LARGE_UPLOADS_AT_ONCE)

    async def agrees(self, name: str, identity: Identity) -> bool:
        """Whether a file looks like its record: without a look at its bytes."""
        record = await self._records.get(name)
        return record is not None and not record.is_deleted and record.matches(*identity[:2])

    async def check(self, name: str, *, adopt: bool = True) -> None:
        """Make the disk copy of a name and its record agree. Raises `SelfHealError` or `OSError` if that fails."""
        there = await self._threads.run(self.disk.stat, name)
        if there is None:
            return
        record = await self._records.get(name)
        if record is None:
            if adopt:
                await self.adopt(name)
        elif record.is_deleted:
            await self.copies.clear(record, "deleted, and its bytes are not the recorded ones")
            self.events.emit(Kind.REMOVED, name)
        elif not record.matches(there.st_mtime_ns, there.st_size):
            await self._compare(name, record)

    async def adopt(self, name: str, *, overwrite: bool = False) -> Record:
        """Store a file that is only on disk, or (`overwrite`) differs. Raises `NotStored`, `FileChanged`."""
        file = await self._threads.run(self.disk.open, name)
        if file is None:
            raise NotStored(f"{name!r} is not on the disk; there is nothing to adopt")
        with file:
            record = await self._store(name, file, only_new=not overwrite)
        if record.is_deleted:
            raise NotStored(f"{name!r} was deleted; save it again to bring it back")
        return record

    async def heal(self, record: Record) -> None:
        """Put a record's bytes in place of other ones, which are set aside. Raises as `DiskCopies.put` does."""
        try:
            await self.copies.put(record)
        except CorruptBlob as error:
            self.events.emit(Kind.CORRUPT, record.name, record.size, error.why)
            raise
        self.events.emit(Kind.RESTORED, record.name, record.size)

    async def mend(self, record: Record) -> None:
        """Write a record's bytes into the database again, from a disk copy that matches (`CorruptBlob` otherwise)."""
        file = await self._threads.run(self.disk.open, record.name)
        if file is None:
            raise NotStored(f"{record.name!r} is not on the disk")
        with file:
            await self.database.mend(record, file.chunks())

    async def raise_if_changed(self, name: str, identity: Identity) -> None:
        """Raise `FileChanged` unless a name's file still has this identity."""
        now = await self._threads.run(self.disk.stat, name)
        if now is None or identity_of(now) != identity:
            raise FileChanged(f"{name!r} is still being written")

    async def _compare(self, name: str, record: Record) -> None:
        file = await self._threads.run(self.disk.open, name)
        if file is None:
            return
        with file:
            digest = await self._threads.run(file.sha256)
            now = await self.database.find(name)
            if now is None or now.generation != record.generation:
                await self.check(name)  # these bytes may be those of a save that was committed meanwhile
            elif digest == record.sha256:
                await self._threads.run(self.disk.set_modified, name, record.modified_ns)
            elif await self._is_overwrite(name, file, digest, record):
                await self._store(name, file, only_new=False)
            else:
                await self.heal(record)

    async def _is_overwrite(self, name: str, file: OpenFile, digest: str, record: Record) -> bool:
        """Whether the app overwrote the file; a deploy or `git pull` puts old bytes there, or older files."""
        if file.modified_ns <= max(self.started_ns, record.modified_ns):
            return False
        history = await self.database.history(name)
        return (digest, file.modified_ns) not in {(version.sha256, version.modified_ns) for version in history}

    async def _store(self, name: str, file: OpenFile, *, only_new: bool) -> Record:
        async with self._large if file.size > LARGE_FROM * CHUNK else contextlib.nullcontext():
            record = await self.database.store_image(
                name,
                self._unchanged(name, file),
                modified_ns=file.modified_ns,
                known=None if self._is_read_once(file) else await file.digests(),
                only_new=only_new,
            )
        self.events.emit(Kind.ADOPTED, name, file.size)
        return record

    def _is_read_once(self, file: OpenFile) -> bool:
        """Whether one read is enough: a file just written, or moved chunks of another writer, need two."""
        written_ns, changed_ns = file.identity[0], file.identity[3]
        return self.database.backend.has_one_writer and age(max(written_ns, changed_ns)) >= SETTLED_AFTER

    async def _unchanged(self, name: str, file: OpenFile) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file; raise `FileChanged` if it was changed before the last one was read."""
        async with aclosing(file.chunks()) as chunks:
            async for chunk in chunks:
                yield chunk
        await self.raise_if_changed(name, file.identity)


def age(moment_ns: int) -> float:
    """Return the seconds since a moment, in ns since the epoch; negative if it is in the future."""
    return (time.time_ns() - moment_ns) / 1e9
