"""Database → disk, one name: one flight that many askers follow, and from which each is served as the bytes come."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing
from typing import Any

from ..aio.single_flight import Batches, Flights, Places, Tasks, ahead
from ..blobs.database import READ_AT_ONCE
from ..content.sources import CHUNK
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.open_file import OpenFile
from ..disk.staged_file import Staged
from ..errors import CorruptBlob, DatabaseUnavailable, DiskUnwritable, SelfHealError
from ..events import Events, Kind, logger
from ..sql.models import Found, Record, Version
from .bodies import FromDatabase, Incoming, InMemory, Landed
from .negative_cache import AbsentNames

WHOLE_FIRST = 16 * 1024 * 1024
"""Bytes up to which a file is restored and checked whole before its answer begins; a larger one streams meanwhile."""
LOOKUPS_AT_ONCE = 64
HERE_AT_ONCE = 8
"""Threads that may be asking the database themselves; the others are there for the disk."""


class OnDisk:
    """Says that the file stands on the disk, for everybody to open."""


Answer = Incoming | FromDatabase | InMemory | OnDisk | None


_LookedUp = tuple[Found | None, Landed | OnDisk | None, SelfHealError | None]
"""What was found of a name; its file, if it stands on the disk already; and why it does not, if that was tried."""


class _Gone(Exception):
    pass


class Restorer:
    """Brings missing names back. `deadline`: seconds until an asker gets an answer; `at_once`: restores at a time."""

    def __init__(
        self,
        disk: UploadsDirectory,
        database: ImageStorage,
        events: Events,
        tasks: Tasks,
        *,
        deadline: float,
        at_once: int = 32,
    ) -> None:
        self._disk = disk
        self._database = database
        self._events = events
        self._threads = disk.threads
        self._deadline = deadline
        self._places = Places(at_once)
        self._flights: Flights[str, asyncio.Future[Answer]] = Flights(tasks)
        self._lookups: Batches[str, Found] = Batches(database.fetch, tasks, size=LOOKUPS_AT_ONCE, at_once=2)
        self._absent = AbsentNames()
        self._here = 0

    async def bring_back(self, name: str) -> OpenFile | Incoming | FromDatabase | InMemory | None:
        """What to answer for a name that is missing on disk; None if the database says that there is no such name.

        Raises `DatabaseUnavailable` if nobody can tell by the deadline, `CorruptBlob`, `NotAFile`, `OSError`.
        """
        body = await self._bring_back(name)
        if body is None:
            await self._absent.turn()
        return body

    def forget(self, name: str) -> None:
        """A name was saved: it is no longer known to be absent."""
        self._absent.discard(name)

    async def put(self, record: Record) -> None:
        """Make the disk's copy of a living record what the record says; what stands there unrecorded is quarantined.

        Raises `CorruptBlob` (and leaves the disk as it is), `DiskUnwritable`, `DatabaseUnavailable`.
        """
        with await self._threads.run(self._stage, record) as staged:
            async for _ in self._write_all(staged, self._database.read_whole(record)):
                pass
            await self.place(staged, record)

    async def place(self, staged: Staged, record: Record) -> None:
        """Publish a staged file in place of what has its name; what is not in the history goes to quarantine."""
        await self._threads.run(self._seal, staged, record)
        if not await self._threads.run(self._publish, staged):
            if not await self.is_recorded(record):
                await self.quarantine(record.name, "other bytes than the recorded ones")
            await self._threads.run(self._replace, staged)

    async def check(self, version: Version) -> None:
        """Read all bytes of a version; raises `CorruptBlob` if they are not the recorded ones."""
        if await self._database.digest(version) != version.sha256:
            raise CorruptBlob(version.name, "the whole does not match its digest")

    async def withdraw(self, record: Record) -> None:
        """The disk did not take a record's file: at least what has its name must not be served for it."""
        there = await self._threads.run(self._disk.stat, record.name)
        if there is None or (there.st_mtime_ns, there.st_size) == (record.modified_ns, record.size):
            return
        if await self.is_recorded(record):
            await self._threads.run(self._disk.remove, record.name)
        else:
            await self.quarantine(record.name, "other bytes than the recorded ones")

    async def is_recorded(self, record: Record) -> bool:
        """Whether the bytes on disk are this record's, or some that its history holds; then they can go."""
        file = await self._threads.run(self._disk.open, record.name)
        if file is None:
            return True
        try:
            with file:
                digest = await self._threads.run(file.sha256)
            versions = await self._database.history(record.name)
        except (DatabaseUnavailable, OSError):
            return False
        return digest in {record.sha256, *(version.sha256 for version in versions)}

    async def quarantine(self, name: str, why: str) -> None:
        """Move a disk copy to where nobody is served from, and say so."""
        moved = await self._threads.run(self._disk.quarantine, name)
        if moved is not None:
            self._events.emit(Kind.QUARANTINED, name, detail=f"{why}; moved to {moved}")
            logger.warning("%r: %s; the disk copy was moved to %s", name, why, moved)

    # -- one flight -----------------------------------------------------------------------------------------------

    async def _bring_back(self, name: str) -> OpenFile | Incoming | FromDatabase | InMemory | None:
        failed: SelfHealError | None = None
        for _ in range(3):
            if name in self._absent:
                return None
            answer = await self._join(name)
            failed = answer.progress.error if isinstance(answer, Incoming) else None
            if isinstance(answer, Incoming) and (not answer.progress.is_over or isinstance(failed, DiskUnwritable)):
                return answer.hold()  # which sends from the database what the disk did not take
            if not isinstance(answer, OnDisk | Incoming):
                return answer
            try:
                file = self._disk.open_cached(name)  # it was named a moment ago
            except BlockingIOError:
                file = await self._threads.run(self._disk.open, name)
            if file is not None:
                return file
        raise failed or DatabaseUnavailable(f"{name!r} vanishes as often as it is restored")

    async def _join(self, name: str) -> Answer:
        flight = self._flights.join(name, lambda: self._board(name))
        done, _ = await asyncio.wait((flight,), timeout=self._deadline)
        if not done:
            raise DatabaseUnavailable(f"the database gave no answer within {self._deadline:g} s")
        return flight.result()

    def _board(self, name: str) -> tuple[asyncio.Future[Answer], Coroutine[Any, Any, None]]:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        return answer, self._fly(name, answer)

    async def _fly(self, name: str, answer: asyncio.Future[Answer]) -> None:
        try:
            async with self._places.one():
                await self._restore_as_it_is(name, answer)
        except BaseException as error:
            if answer.done():
                if not isinstance(error, SelfHealError):
                    raise
                return
            answer.set_exception(error)
            answer.exception()  # read: the askers may have gone
            if not isinstance(error, Exception):
                raise

    async def _restore_as_it_is(self, name: str, answer: asyncio.Future[Answer]) -> None:
        for _ in range(3):
            with contextlib.suppress(_Gone):
                await self._restore(name, answer)
            if answer.done():
                return
        raise DatabaseUnavailable(f"{name!r} is changed as often as it is restored")

    async def _restore(self, name: str, answer: asyncio.Future[Answer]) -> None:
        found, there, error = await self._look_up(name)
        if found is None or found.record.is_deleted:
            self._settle(name, 0, None, answer)
            return
        record = found.record
        try:
            if error is not None:
                raise error
            if there is None and record.size <= CHUNK:
                there = await self._threads.run(self._land, found)
                await self._look_again(record, published=isinstance(there, Landed))
            elif there is None:
                with await self._threads.run(self._stage, record) as staged:
                    await self._fill(staged, found, answer)
            self._settle(name, record.size, there or OnDisk(), answer)
        except CorruptBlob as error:
            await self._raise_if_still(record, error)
        except DiskUnwritable as error:
            self._events.log_once(logging.WARNING, "unwritable", f"{error}; served from the database meanwhile")
            if not answer.done():
                answer.set_result(await self._without_disk(found))
            self._events.emit(Kind.STREAMED, name, record.size, str(error))

    async def _look_up(self, name: str) -> _LookedUp:
        """What the database has of a name; where any thread can ask it, small files are restored on the way."""
        if self._database.is_at_hand and self._here < HERE_AT_ONCE:
            self._here += 1
            try:
                return await self._threads.run(self._restore_here, name)
            except DatabaseUnavailable:
                pass  # it is locked: others wait for it without holding a thread
            finally:
                self._here -= 1
        return await self._lookups.get(name), None, None

    def _settle(self, name: str, size: int, there: Landed | OnDisk | None, answer: asyncio.Future[Answer]) -> None:
        """A name was restored and is there, or there is no such name."""
        if there is None:
            self._absent.add(name)
        if not answer.done():
            answer.set_result(there)
        self._events.emit(Kind.ABSENT if there is None else Kind.RESTORED, name, size)

    async def _fill(self, staged: Staged, found: Found, answer: asyncio.Future[Answer]) -> None:
        record = found.record
        if record.size > WHOLE_FIRST:
            await self._fill_while_answering(staged, record, answer)
            return
        async for _ in self._write_all(staged, self._database.read_whole(record, found.first)):
            pass
        await self._look_again(record, published=await self._threads.run(self._seal_and_publish, staged, record))

    async def _fill_while_answering(self, staged: Staged, record: Record, answer: asyncio.Future[Answer]) -> None:
        reader = self._disk.reader(staged, record.name)
        incoming = Incoming(record, reader, FromDatabase(self._database, record), self._deadline)
        error: SelfHealError | None = DatabaseUnavailable(f"the restore of {record.name!r} was broken off")
        try:
            async for checked in self._write_all(staged, self._database.read_handfuls(record)):
                incoming.progress.move(checked)
                if not answer.done():
                    answer.set_result(incoming)
            published = await self._threads.run(self._seal_and_publish, staged, record)
            with contextlib.suppress(_Gone):  # who is being sent it meanwhile gets the whole old file
                await self._look_again(record, published=published)
            error = None
        except SelfHealError as failed:
            error = failed
            raise
        finally:
            incoming.progress.end(error)
            incoming.close()

    async def _write_all(self, staged: Staged, source: AsyncGenerator[list[bytes], None]) -> AsyncGenerator[int, None]:
        async with aclosing(ahead(source)) as handfuls:
            async for chunks in handfuls:
                await self._threads.run(self._write, staged, chunks)
                yield staged.size

    async def _look_again(self, record: Record, *, published: bool) -> None:
        """Was the name deleted or overwritten meanwhile? Then what was published does not stay (raises `_Gone`)."""
        try:
            now = await self._database.generations([record.name])
        except DatabaseUnavailable:
            return  # it was right a moment ago
        if now.get(record.name) != record.generation:
            if published:
                await self._threads.run(self._disk.remove, record.name)
            raise _Gone

    async def _raise_if_still(self, record: Record, error: CorruptBlob) -> None:
        """Bytes that were dropped or replaced while they were read look like damage; they are not."""
        now = await self._database.find(record.name)
        if now is None or now.generation != record.generation:
            raise _Gone from error
        self._events.emit(Kind.CORRUPT, record.name, record.size, error.why)
        logger.error("%s", error)
        raise error

    async def _without_disk(self, found: Found) -> FromDatabase | InMemory:
        """What is small is checked whole before the answer begins."""
        record = found.record
        if record.size > READ_AT_ONCE * CHUNK:
            return FromDatabase(self._database, record)
        async with aclosing(self._database.read(record)) as chunks:
            data = b"".join([chunk async for chunk in chunks])
        if (await self._threads.run(hashlib.sha256, data)).hexdigest() != record.sha256:
            raise CorruptBlob(record.name, "the whole does not match its digest")
        return InMemory(data, record.modified_ns)

    # -- in a thread ----------------------------------------------------------------------------------------------

    def _restore_here(self, name: str) -> _LookedUp:
        """Look up and restore a file of one chunk in one go."""
        found = self._database.fetch_here(name)
        if found is None or found.record.is_deleted or found.record.size > CHUNK:
            return found, None, None
        try:
            there = self._land(found)
        except SelfHealError as error:
            return found, None, error
        with contextlib.suppress(DatabaseUnavailable):  # it was right a moment ago
            if self._database.generation_here(name) != found.record.generation:
                if isinstance(there, Landed):
                    self._disk.remove(name)
                raise _Gone
        return found, there, None

    def _stage(self, record: Record) -> Staged:
        return self._disk.stage(record.name)

    def _write(self, staged: Staged, chunks: Iterable[bytes]) -> None:
        with self._disk.writing():
            for chunk in chunks:
                staged.write(chunk)

    def _land(self, found: Found) -> Landed | OnDisk:
        """Restore a record of one chunk, all of it in one go; what is `OnDisk` took its name meanwhile."""
        record = found.record
        if record.size and not isinstance(found.first, bytes):  # SQLite keeps what others wrote, text too
            raise CorruptBlob(record.name, "chunk 0 is missing")
        data = found.first or b""
        with self._disk.stage(record.name) as staged:
            self._write(staged, [data])
            return Landed(data, staged.modified_ns) if self._seal_and_publish(staged, record) else OnDisk()

    def _seal_and_publish(self, staged: Staged, record: Record) -> bool:
        self._seal(staged, record)
        return self._publish(staged)

    def _seal(self, staged: Staged, record: Record) -> None:
        if staged.size != record.size or staged.sha256 != record.sha256:
            raise CorruptBlob(record.name, f"its {staged.size} bytes do not match the recorded digest")
        with self._disk.writing():
            staged.seal(record.modified_ns, self._disk.file_mode)
            staged.sync()

    def _publish(self, staged: Staged) -> bool:
        with self._disk.writing():
            return staged.publish()

    def _replace(self, staged: Staged) -> None:
        with self._disk.writing():
            staged.replace()
