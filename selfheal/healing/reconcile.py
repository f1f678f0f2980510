"""Disk → database, and what to do when the two sides differ: nothing is lost, and nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ..aio.single_flight import Batches, Places, Tasks
from ..blobs.database import LARGE_FROM, LARGE_UPLOADS_AT_ONCE
from ..content.sources import CHUNK
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.open_file import Identity, OpenFile, identity_of
from ..errors import CorruptBlob, DatabaseUnavailable, NotStored, SelfHealError, Unsettled
from ..events import Events, Kind, logger
from ..sql.models import Record
from .changes import Follower
from .restore import Restorer

SETTLED_AFTER = 1.0
"""Seconds for which a file must have held still before it is taken for whole."""
QUIET_FOR = 5.0
"""Seconds for which nothing is asked behind hits after the database gave no answer."""
FOLLOWED_EVERY = 2.0
"""Seconds, at least, between two askings what other nodes did."""
CHANGING_FOR = 60.0
"""Seconds for which every hit of a changed name is compared: how long a caller's own transaction may take."""
CHANGING_AT_MOST = 10_000
SEEN_AT_MOST = 200_000
BEHIND_AT_ONCE = 256


class Reconciler:
    """Compares a disk copy with its record and settles what differs. `started_ns` is when this process began."""

    def __init__(
        self, disk: UploadsDirectory, database: ImageStorage, restorer: Restorer, events: Events, tasks: Tasks
    ) -> None:
        self.started_ns = time.time_ns()
        self._disk = disk
        self._database = database
        self._restorer = restorer
        self._events = events
        self._tasks = tasks
        self._threads = disk.threads
        self._records: Batches[str, Record] = Batches(database.find_many, tasks, size=256, at_once=1)
        self._seen: dict[str, Identity] = {}
        self._changing: dict[str, float] = {}
        self._behind: set[str] = set()
        self._large = Places(LARGE_UPLOADS_AT_ONCE)
        self._quiet_until = 0.0
        self._follower = Follower(database)
        self._follow_from = 0.0
        self._following: asyncio.Task[None] | None = None

    def noticed(self, name: str, identity: Identity, *, adopt: bool) -> None:
        """A hit was answered: if this process has not seen this file yet, ask the database about it, behind."""
        if self._seen.get(name) == identity or name in self._behind or len(self._behind) >= BEHIND_AT_ONCE:
            return
        if time.monotonic() < self._quiet_until:
            return
        self._behind.add(name)
        self._tasks.start(self._look_behind(name, identity, adopt=adopt))

    def follow(self) -> None:
        """A visitor came: every few seconds, ask behind what other nodes did."""
        now = time.monotonic()
        if now < self._follow_from or now < self._quiet_until:
            return
        if self._following is None or self._following.done():
            self._following = self._tasks.start(self._follow())

    def forget(self, name: str) -> None:
        """A name was changed: what was seen of it says nothing any more."""
        self._seen.pop(name, None)

    def expect(self, name: str) -> None:
        """A name will be changed when somebody else's transaction is committed."""
        now = time.monotonic()
        if len(self._changing) >= CHANGING_AT_MOST:
            self._changing = {name: until for name, until in self._changing.items() if until > now}
        self._changing[name] = now + CHANGING_FOR

    def saw(self, name: str, identity: Identity) -> None:
        """Remember that this file is what its record says."""
        if self._changing.get(name, 0.0) > time.monotonic():
            return
        if len(self._seen) >= SEEN_AT_MOST:
            self._seen.clear()
        self._seen[name] = identity

    async def check(self, name: str, *, adopt: bool = True) -> None:
        """Make the disk's copy of a name and its record agree. Raises `SelfHealError` or `OSError` if it cannot."""
        there = await self._threads.run(self._disk.stat, name)
        if there is None:
            return
        record = await self._records.get(name)
        if record is None:
            if adopt:
                await self.adopt(name)
        elif record.is_deleted:
            await self._drop(name, record)
        elif (record.modified_ns, record.size) != (there.st_mtime_ns, there.st_size):
            await self._settle(name, record)

    async def adopt(self, name: str) -> Record:
        """Bring a file that is only on disk into the database; returns its record.

        Raises `NotStored` if there is no file, or if the name was deleted; `Unsettled` if it is still being written.
        """
        file = await self._threads.run(self._disk.open, name)
        if file is None:
            raise NotStored(f"{name!r} is not on the disk; there is nothing to adopt")
        with file:
            record = await self._store(name, file, only_new=True)
        if record.is_deleted:
            raise NotStored(f"{name!r} was deleted; save it anew to bring it back")
        return record

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """What other nodes changed counts as seen no more, and goes from this disk even if nobody asks for it."""
        try:
            changed = await self._follower.changed()
            if changed is None:
                self._seen.clear()
            for name in changed or ():  # all of them first: what follows may be broken off
                self.forget(name)
            for name in changed or ():
                with contextlib.suppress(OSError):  # a disk that gives no answer: told at the next hit
                    there = await self._threads.run(self._disk.stat, name)
                    if there is not None:
                        await self._look_behind(name, identity_of(there), adopt=False)
        except DatabaseUnavailable:
            self._quiet_until = time.monotonic() + QUIET_FOR
        finally:
            self._follow_from = time.monotonic() + FOLLOWED_EVERY

    async def _look_behind(self, name: str, identity: Identity, *, adopt: bool) -> None:
        try:
            if not await self._agrees(name, identity):
                await self._settled(name, identity)
                await self.check(name, adopt=adopt)
        except Unsettled:
            pass  # the next hit asks again
        except DatabaseUnavailable:
            self._quiet_until = time.monotonic() + QUIET_FOR
        except (SelfHealError, OSError) as error:
            logger.warning("%r could not be compared with its record: %s", name, error)
            self.saw(name, identity)
        else:
            self.saw(name, identity)
        finally:
            self._behind.discard(name)

    async def _drop(self, name: str, record: Record) -> None:
        """A deleted name is still on disk: bytes that the history holds go, others go to quarantine."""
        if await self._restorer.is_recorded(record):
            await self._threads.run(self._disk.remove, name)
        else:
            await self._restorer.quarantine(name, "deleted, and its bytes are not the recorded ones")
        self._events.emit(Kind.REMOVED, name)

    async def _settle(self, name: str, record: Record) -> None:
        file = await self._threads.run(self._disk.open, name)
        if file is None:
            return
        with file:
            digest = await self._threads.run(file.sha256)
            now = await self._database.find(name)
            if now is None or now.generation != record.generation:
                await self.check(name)  # these bytes may be those of a save that was committed meanwhile
            elif digest == record.sha256:
                await self._threads.run(self._disk.set_modified, name, record.modified_ns)
            elif await self._is_overwrite(name, file, digest, record):
                await self._store(name, file, only_new=False)
            else:
                await self.heal(record)

    async def _is_overwrite(self, name: str, file: OpenFile, digest: str, record: Record) -> bool:
        """Whether the app itself overwrote the file: after this process began, after the record, with no old copy.

        A deploy or a `git pull` lays old bytes, and its files are older than the process that serves them.
        """
        if file.modified_ns <= max(self.started_ns, record.modified_ns):
            return False
        history = await self._database.history(name)
        return (digest, file.modified_ns) not in {(version.sha256, version.modified_ns) for version in history}

    async def take_over(self, name: str) -> Record:
        """The disk's bytes become a name's next generation. Raises as `adopt` does."""
        file = await self._threads.run(self._disk.open, name)
        if file is None:
            raise NotStored(f"{name!r} is not on the disk")
        with file:
            return await self._store(name, file, only_new=False)

    async def heal(self, record: Record) -> None:
        """The database wins; but only once its bytes are known to be good (`CorruptBlob` otherwise)."""
        try:
            await self._restorer.put(record)
        except CorruptBlob as error:
            self._events.emit(Kind.CORRUPT, record.name, record.size, error.why)
            raise
        self._events.emit(Kind.RESTORED, record.name, record.size)

    async def _store(self, name: str, file: OpenFile, *, only_new: bool) -> Record:
        async with self._large.one() if file.size > LARGE_FROM * CHUNK else contextlib.nullcontext():
            record = await self._database.store_image(
                name,
                self._unmoved(name, file),
                modified_ns=file.modified_ns,
                known=None if self._is_read_once(file) else await file.digests(),
                only_new=only_new,
            )
        self._events.emit(Kind.ADOPTED, name, file.size)
        return record

    def _is_read_once(self, file: OpenFile) -> bool:
        """A file that was written a moment ago is read twice, and compared: a write may leave its times as they are.

        So is every file where another who stores the same bytes could come between chunks that are moved.
        """
        written_ns, changed_ns = file.identity[0], file.identity[3]
        return self._database.has_one_writer and _age(max(written_ns, changed_ns)) >= SETTLED_AFTER

    async def _unmoved(self, name: str, file: OpenFile) -> AsyncGenerator[bytes, None]:
        """The bytes of a file; raises `Unsettled` if it is seen to change before the last one is read."""
        async with aclosing(file.chunks()) as chunks:
            async for chunk in chunks:
                yield chunk
        await self._raise_if_moved(name, file.identity)

    async def _agrees(self, name: str, identity: Identity) -> bool:
        record = await self._records.get(name)
        return record is not None and not record.is_deleted and (record.modified_ns, record.size) == identity[:2]

    async def _settled(self, name: str, identity: Identity) -> None:
        age = _age(identity[0])
        if age < SETTLED_AFTER:  # or of the future, which says nothing
            await asyncio.sleep(min(SETTLED_AFTER, SETTLED_AFTER - age))
            await self._raise_if_moved(name, identity)

    async def _raise_if_moved(self, name: str, identity: Identity) -> None:
        now = await self._threads.run(self._disk.stat, name)
        if now is None or identity_of(now) != identity:
            raise Unsettled(f"{name!r} is still being written")


def _age(moment_ns: int) -> float:
    """Seconds since a moment, in ns since the epoch; less than none if that is of the future."""
    return (time.time_ns() - moment_ns) / 1e9
