"""Restore one name for all its callers: fetch, publish, check, answer."""

import contextlib
import hashlib
import logging
from contextlib import aclosing
from dataclasses import dataclass

from ..aio.batching import Batcher
from ..aio.single_flight import Call
from ..aio.tasks import LoopSemaphore, Tasks
from ..blobs.blob_store import READ_AT_ONCE
from ..content.sources import CHUNK
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.staged_file import StagedFile
from ..errors import CorruptBlob, DatabaseUnavailable, DiskUnwritable, SelfHealError
from ..events import Events, Kind, logger
from ..sql.models import Found, Record
from .bodies import Body, FromDatabase, InMemory, Restoring
from .negative_cache import NegativeCache
from .publish import Published, Publisher, outdated

WHOLE_FIRST = 16 * 1024 * 1024
"""Bytes up to which a file is restored and checked whole before its answer begins; a larger one streams meanwhile."""
RESTORES_AT_ONCE = 32
LOOKUPS_AT_ONCE = 64
THREADS_AT_MOST = 8  # threads that may read the database themselves; the others are for the disk
TRIES = 3


@dataclass(eq=False)
class FileRestorer:
    """Restores one name for all its callers. `patience`: seconds that they wait for the next bytes of a large file."""

    disk: UploadsDirectory
    database: ImageStorage
    publisher: Publisher
    negative_cache: NegativeCache
    events: Events
    tasks: Tasks
    patience: float

    def __post_init__(self) -> None:
        self._threads = self.disk.threads
        self._limit = LoopSemaphore(RESTORES_AT_ONCE)
        self._lookups: Batcher[str, Found] = Batcher(
            self.database.blobs.fetch, self.tasks, size=LOOKUPS_AT_ONCE, limit=2
        )
        self._reading_threads = 0

    async def restore(self, name: str, call: Call[Body | None]) -> None:
        """Restore a name and answer its callers: a body, or None if there is no such name."""
        async with self._limit:
            for _ in range(TRIES):
                with contextlib.suppress(_Changed):
                    await self._restore_once(name, call)
                    return
        raise DatabaseUnavailable(f"{name!r} is changed as often as it is restored")

    async def _restore_once(self, name: str, call: Call[Body | None]) -> None:
        found, published = await self._fetch(name)
        if found is None or found.record.is_deleted:
            self.negative_cache.add(name)
            call.answer(None)
            self.events.emit(Kind.ABSENT, name)
            return
        record = found.record
        try:
            if record.size > CHUNK:
                await self._restore_large(found, call)
            else:
                call.answer(await self._restore_small(found, published))
            self.events.emit(Kind.RESTORED, name, record.size)
        except CorruptBlob as error:
            await self._raise_unless_changed(record, error)
        except DiskUnwritable as error:
            self.events.log_once(logging.WARNING, "unwritable", f"{error}; served from the database meanwhile")
            if not call.is_answered:
                call.answer(await self._without_disk(found, error))
            self.events.emit(Kind.STREAMED, name, record.size, str(error))

    async def _fetch(self, name: str) -> tuple[Found | None, Published | None]:
        """Read a record and its first chunk; where a thread can read the database, it publishes a small file too."""
        if self.database.can_read_in_thread and self._reading_threads < THREADS_AT_MOST:
            self._reading_threads += 1
            try:
                return await self._threads.run(self._fetch_and_publish, name)
            except DatabaseUnavailable:
                pass  # it is locked: wait without a thread
            finally:
                self._reading_threads -= 1
        return await self._lookups.get(name), None

    def _fetch_and_publish(self, name: str) -> tuple[Found | None, Published | None]:
        found = self.database.blobs.fetch_in_thread(name)
        if found is None or found.record.is_deleted or found.record.size > CHUNK:
            return found, None
        (published,) = self.publisher.publish_small([found])
        if published.error is None:
            with contextlib.suppress(DatabaseUnavailable):  # the record was right a moment ago
                if outdated([published], {name: self.database.catalogue.generation_in_thread(name)}):
                    self.publisher.take_back([published])
                    raise _Changed
        return found, published

    async def _restore_small(self, found: Found, published: Published | None) -> InMemory:
        if published is None:
            (published,) = await self._threads.run(self.publisher.publish_small, [found])
            await self._keep_if_current(published)
        if published.error is not None:
            raise published.error
        return InMemory(found.first or b"", found.record, published.modified_ns)

    async def _restore_large(self, found: Found, call: Call[Body | None]) -> None:
        record = found.record
        error: SelfHealError | None = DatabaseUnavailable(f"the restore of {record.name!r} was broken off")
        with await self._threads.run(self.disk.stage, record.name) as staged:
            reader = self.disk.reader(staged, record.name)
            body = Restoring(record, reader, FromDatabase(self.database, record), self.patience)
            try:
                await self._write(staged, found, body, call)
                (published,) = await self._threads.run(self.publisher.publish, [(record, staged)])
                if published.error is not None:
                    raise published.error
                with contextlib.suppress(_Changed) if call.is_answered else contextlib.nullcontext():
                    await self._keep_if_current(published)  # answered callers get the whole old file
                error = None
            except SelfHealError as failure:
                error = failure
                raise
            finally:
                body.finish(error)
                if error is None and not call.is_answered:
                    body.modified_ns = published.modified_ns
                    call.answer(body)
                body.close()

    async def _write(self, staged: StagedFile, found: Found, body: Restoring, call: Call[Body | None]) -> None:
        """Write a file of several chunks; a very large one is sent to the callers meanwhile, chunk by checked chunk."""
        record, blobs = found.record, self.database.blobs
        is_sent = record.size > WHOLE_FIRST
        source = blobs.read(record) if is_sent else blobs.read_unchecked(record, found.first)
        async with aclosing(self.publisher.write_all(staged, source)) as sizes:
            async for size in sizes:
                if is_sent:
                    body.advance(size)
                    call.answer(body)

    async def _keep_if_current(self, published: Published) -> None:
        """Take a file back if its name was deleted or overwritten meanwhile (raises `_Changed`)."""
        if published.error is not None:
            return
        try:
            generations = await self.database.catalogue.generations([published.record.name])
        except DatabaseUnavailable:
            return  # the record was right a moment ago
        if outdated([published], generations):
            await self._threads.run(self.publisher.take_back, [published])
            raise _Changed

    async def _raise_unless_changed(self, record: Record, error: CorruptBlob) -> None:
        """Bytes that were dropped or replaced while they were read look like damage."""
        now = await self.database.find(record.name)
        if now is None or now.generation != record.generation:
            raise _Changed from error
        self.events.emit(Kind.CORRUPT, record.name, record.size, error.why)
        logger.error("%s", error)
        raise error

    async def _without_disk(self, found: Found, error: DiskUnwritable) -> FromDatabase | InMemory:
        """The bytes of a small file are checked as a whole before the answer begins."""
        record = found.record
        if record.size > READ_AT_ONCE * CHUNK:
            return FromDatabase(self.database, record)
        async with aclosing(self.database.read(record)) as chunks:
            data = b"".join([chunk async for chunk in chunks])
        if (await self._threads.run(hashlib.sha256, data)).hexdigest() != record.sha256:
            raise CorruptBlob(record.name, "the whole does not match its digest")
        return InMemory(data, record, record.modified_ns, error)


class _Changed(Exception):
    """The record was changed or deleted while it was restored."""
