"""Reconcile: when disk and database differ, decide which one is right; and adopt what is only on disk."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime

from ..aio.batching import Batcher
from ..aio.tasks import LoopSemaphore, Tasks
from ..blobs.database import LARGE_FROM, LARGE_UPLOADS_AT_ONCE
from ..content.sources import CHUNK
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.exclusions import Exclusions
from ..disk.open_file import Identity, OpenFile, identity_of
from ..errors import CorruptBlob, FileChanged, NotStored
from ..events import Events, Kind
from ..sql.models import Record
from .disk_copies import DiskCopies
from .evidence import Evidence
from .pace import Pace

OVERWRITES_FROM, OVERWRITES_EVERY = 5.0, 60.0
"""Seconds between two adoptions of one name, at first and at most: an app that rewrites a file for ever stores few
versions.
"""


@dataclass(frozen=True, slots=True)
class Judged:
    """A file that agrees with its record; `generation` is 0 if the name has none."""

    identity: Identity
    generation: int = 0
    changed_at: datetime | None = None
    content_type: str = ""
    sha256: str = ""


@dataclass(eq=False)
class Reconciler:
    """Makes a disk copy and its record agree. `settled_after`: seconds that a file holds still before it is adopted."""

    disk: UploadsDirectory
    database: ImageStorage
    copies: DiskCopies
    events: Events
    tasks: Tasks
    exclusions: Exclusions
    settled_after: float

    def __post_init__(self) -> None:
        self._threads = self.disk.threads
        self.evidence = Evidence(self.disk, self.database)
        self._records: Batcher[str, Record] = Batcher(self.database.catalogue.find, self.tasks, size=256, limit=1)
        self._large = LoopSemaphore(LARGE_UPLOADS_AT_ONCE)
        self._overwrites = Pace(OVERWRITES_FROM, OVERWRITES_EVERY)

    async def agrees(self, name: str, identity: Identity) -> Judged | None:
        """Return what there is to know of a file that looks like its record: without a look at its bytes."""
        record = await self._records.get(name)
        return _judged(identity, record) if record is not None and self._matches(identity, record) else None

    async def check(self, name: str, *, adopt: bool = True, before: Judged | None = None) -> Judged | None:
        """Make the disk copy of a name and its record agree; return what is on the disk then, None if nothing.

        `before` is what was known of the file: a record that is older than that was lost by the database, and is
        stored again. Raises `SelfHealError` (`FileChanged` if the file is still being written) or `OSError`.
        """
        there = await self._threads.run(self.disk.stat, name)
        if there is None:
            return None
        identity = identity_of(there)
        record = await self._records.get(name)
        generation = 0 if record is None else record.generation
        if before is not None and before.identity == identity and before.generation > generation:
            await self.adopt(name, overwrite=True)
            return await self.check(name)
        if record is None:
            if not adopt or self.exclusions.covers(name):
                return Judged(identity)
            await self._hold_still(name, identity)
            record = await self.adopt(name)
            return _judged(identity, record) if self._matches(identity, record) else None
        if record.is_deleted and not self.evidence.is_watched(identity):
            await self._clear(record)
            return None
        return _judged(identity, record) if self._matches(identity, record) else await self._compare(name, record)

    async def adopt(self, name: str, *, overwrite: bool = False) -> Record:
        """Store a file that is only on disk, or (`overwrite`) differs. Raises `NotStored`, `FileChanged`."""
        file = await self._threads.run(self.disk.open, name)
        if file is None:
            raise NotStored(f"{name!r} is not on the disk; there is nothing to adopt")
        with file:
            record = await self._store(name, file, over=None if overwrite else 0)
            if overwrite and record.modified_ns != file.modified_ns:
                await self._threads.run(self._set_time, file, record)
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
            await self.database.versions.mend(record, file.chunks())

    async def raise_if_changed(self, name: str, identity: Identity) -> None:
        """Raise `FileChanged` unless a name's file still has this identity."""
        now = await self._threads.run(self.disk.stat, name)
        if now is None or identity_of(now) != identity:
            raise FileChanged(f"{name!r} is still being written")

    async def is_newer_on_disk(self, record: Record) -> bool:
        """Whether a disk copy of other bytes is newer than its record, so that it would be adopted."""
        file = await self._threads.run(self.disk.open, record.name)
        if file is None:
            return False
        with file:
            return await self.evidence.is_overwrite(file, await file.digest(), record)

    async def _compare(self, name: str, record: Record) -> Judged | None:
        file = await self._threads.run(self.disk.open_distrusted, name)
        if file is None:
            return None
        with file:
            digest = await self._threads.run(file.sha256)
            now = await self.database.find(name)
            if now is None or now.generation != record.generation:
                pass  # these bytes may be those of a save that was committed meanwhile
            elif digest == record.sha256 and not record.is_deleted:
                return await self._threads.run(self._set_time, file, record)
            elif await self._is_overwrite(file, digest, record):
                return await self._adopt_overwrite(file, digest, record)
            elif record.is_deleted:
                await self._clear(record)
            else:
                await self.heal(record)
        return await self.check(name)

    async def _is_overwrite(self, file: OpenFile, digest: str, record: Record) -> bool:
        if not await self.evidence.is_newer(file, digest, record):
            return False
        if not await self.evidence.is_torn(file, digest, record):
            return True
        await self._hold_still(record.name, file.identity)  # the app may just have begun to write it
        return False

    async def _clear(self, record: Record) -> None:
        """Remove the copy of a deleted name."""
        await self.copies.clear(record.name, "it is deleted")
        self.events.emit(Kind.REMOVED, record.name)

    def _set_time(self, file: OpenFile, record: Record) -> Judged:
        """Give a file that was read the recorded time; another one may have its name by now."""
        if identity_of(os.fstat(file.fd)) != file.identity:
            raise FileChanged(f"{record.name!r} was changed while it was read")
        self.disk.set_time(file, record.modified_ns)
        return _judged(identity_of(os.fstat(file.fd)), record)

    async def _adopt_overwrite(self, file: OpenFile, digest: str, record: Record) -> Judged:
        """Adopt a file, unless its record is changed or deleted meanwhile: then it is compared again later."""
        name = record.name
        if not self._overwrites.is_due(name):
            raise FileChanged(f"{name!r} was adopted a moment ago")
        await self._hold_still(name, file.identity)
        adopted = await self._store(name, file, over=record.generation)
        if adopted.is_deleted or adopted.sha256 != digest:
            raise FileChanged(f"{name!r} was changed while it was adopted")
        self._overwrites.slow_down(name)
        return await self._threads.run(self._set_time, file, adopted)

    async def _hold_still(self, name: str, identity: Identity) -> None:
        """Wait until a file was not changed for `settled_after` seconds; a time in the future says nothing."""
        seconds = age(max(identity[0], identity[3]))
        if seconds < self.settled_after:
            await asyncio.sleep(min(self.settled_after, self.settled_after - seconds))
            await self.raise_if_changed(name, identity)

    def _matches(self, identity: Identity, record: Record) -> bool:
        modified_ns, size = self.disk.kept_ns(record.modified_ns), record.size
        return not record.is_deleted and identity[:2] == (modified_ns, size)

    async def _store(self, name: str, file: OpenFile, *, over: int | None) -> Record:
        async with self._large if file.size > LARGE_FROM * CHUNK else contextlib.nullcontext():
            record = await self.database.store_image(
                name,
                self._unchanged(name, file),
                modified_ns=file.modified_ns,
                known=None if self._is_read_once(file) else await file.digests(),
                over=over,
            )
        self.events.emit(Kind.ADOPTED, name, file.size)
        return record

    def _is_read_once(self, file: OpenFile) -> bool:
        """Whether one read is enough: a file just written, or moved chunks of another writer, need two."""
        written_ns, changed_ns = file.identity[0], file.identity[3]
        return self.database.backend.has_one_writer and age(max(written_ns, changed_ns)) >= self.settled_after

    async def _unchanged(self, name: str, file: OpenFile) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file; raise `FileChanged` if it was changed before the last one was read."""
        async with aclosing(file.chunks()) as chunks:
            async for chunk in chunks:
                yield chunk
        await self.raise_if_changed(name, file.identity)


def age(moment_ns: int) -> float:
    """Return the seconds since a moment, in ns since the epoch; negative if it is in the future."""
    return (time.time_ns() - moment_ns) / 1e9


def _judged(identity: Identity, record: Record) -> Judged:
    return Judged(identity, record.generation, record.changed_at, record.content_type, record.sha256)
