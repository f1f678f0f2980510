"""Many small files at once: staged together, one sync for all of them, and only then their names."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import resource
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from .blobs import chunk_digest
from .db import ImageStorage
from .disk import UploadsDirectory
from .errors import CorruptBlob, NotAFile, NotStored, SelfHealError, Unsettled
from .files import identity_of
from .records import Found, Record, SmallFile
from .sources import CHUNK
from .staging import Staged
from .threads import Threads

FILES_AT_ONCE = 256
BYTES_AT_ONCE = 32 * 1024 * 1024
"""How much is staged, or read, before it is synced or committed."""
LARGE = 4 * 1024 * 1024
"""Bytes from which a file is better streamed than held in memory."""
TRIES = 3
"""How often a record that changes meanwhile is looked at."""


@dataclass(frozen=True, slots=True)
class Landed:
    """What became of a record that was to be restored: `error` is None if its file has its name.

    `inode` is that of the file if it was published here; 0 if somebody else was faster.
    """

    record: Record
    error: Exception | None = None
    inode: int = 0


@dataclass(frozen=True, slots=True)
class Read:
    """What became of a file that was to be read: the file, or why it could not be."""

    name: str
    file: SmallFile | None = None
    error: Exception | None = None


class Landing:
    """Restores many records to a directory; `at_once`: how many large ones at a time."""

    def __init__(self, disk: UploadsDirectory, database: ImageStorage, at_once: int) -> None:
        self._disk = disk
        self._database = database
        self._places = asyncio.Semaphore(at_once)

    async def land(self, records: Sequence[Record]) -> AsyncGenerator[Landed, None]:
        """Restore records whose files are missing; what becomes of each, in no particular order.

        What is deleted meanwhile does not stay (`NotStored`); what is overwritten is restored as it is now.
        """
        for _ in range(TRIES):
            changed: list[Record] = []
            async with aclosing(self._land_all(records)) as landed:
                async for one, now in landed:
                    if now is None:
                        yield one
                    else:
                        changed.append(now)
            records = changed
        for record in records:
            yield Landed(record, Unsettled("it is overwritten as often as it is restored; run again"))

    async def _land_all(self, records: Sequence[Record]) -> AsyncGenerator[tuple[Landed, Record | None], None]:
        """What became of each record, and the record that it was replaced with meanwhile."""
        small = [record for record in records if record.size <= CHUNK]
        large = [record for record in records if record.size > CHUNK]
        for batch in in_batches(small):
            for pair in await self._look_again(await self._land_small(batch)):
                yield pair
        for batch in in_batches(large):
            for pair in await self._look_again(await self._land_large(batch)):
                yield pair

    async def _land_small(self, records: Sequence[Record]) -> list[Landed]:
        found = await self._database.fetch(record.name for record in records)
        return await self._disk.threads.run(self._land_found, records, found)

    async def _land_large(self, records: Sequence[Record]) -> list[Landed]:
        with contextlib.ExitStack() as stack:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._stage_large(record, stack)) for record in records]
            staged = [task.result() for task in tasks]
            return await self._disk.threads.run(self._publish_all, records, staged)

    async def _stage_large(self, record: Record, stack: contextlib.ExitStack) -> Staged | Exception:
        async with self._places:
            try:
                staged = stack.enter_context(await self._disk.threads.run(self._disk.stage, record.name))
            except (SelfHealError, OSError) as error:
                return error
            try:
                async with aclosing(self._database.read(record)) as chunks:
                    async for chunk in chunks:
                        await self._disk.threads.run(self._write, staged, chunk)
                _check(staged, record)
            except (SelfHealError, OSError) as error:
                staged.close()
                return error
            return staged

    async def _look_again(self, landed: list[Landed]) -> list[tuple[Landed, Record | None]]:
        """Records that changed while they were on their way: bytes that look damaged may only be old ones."""
        records = await self._database.find_many(one.record.name for one in landed)
        return [await self._unless_changed(one, records.get(one.record.name)) for one in landed]

    async def _unless_changed(self, one: Landed, now: Record | None) -> tuple[Landed, Record | None]:
        if now is not None and now.generation == one.record.generation:
            return one, None
        await self._disk.threads.run(self._take_back, one)
        if now is None or now.is_deleted:
            return Landed(one.record, NotStored("it was deleted meanwhile")), None
        return one, now

    # -- in a thread ----------------------------------------------------------------------------------------------

    def _land_found(self, records: Sequence[Record], found: dict[str, Found]) -> list[Landed]:
        with contextlib.ExitStack() as stack:
            staged = [self._stage_found(record, found.get(record.name), stack) for record in records]
            return self._publish_all(records, staged)

    def _stage_found(self, record: Record, found: Found | None, stack: contextlib.ExitStack) -> Staged | Exception:
        try:
            staged = stack.enter_context(self._disk.stage(record.name))
        except (SelfHealError, OSError) as error:
            return error
        try:
            if record.size:
                self._write(staged, _first(record, found))
            _check(staged, record)
        except (SelfHealError, OSError) as error:
            staged.close()
            return error
        return staged

    def _publish_all(self, records: Sequence[Record], staged: Sequence[Staged | Exception]) -> list[Landed]:
        """One sync for all of them; only then does each get its name."""
        try:
            with self._disk.writing():
                for record, one in zip(records, staged, strict=True):
                    if isinstance(one, Staged):
                        one.seal(record.modified_ns, self._disk.file_mode)
                self._disk.sync()
        except (SelfHealError, OSError) as error:
            staged = [error if isinstance(one, Staged) else one for one in staged]
        return [self._publish(record, one) for record, one in zip(records, staged, strict=True)]

    def _publish(self, record: Record, staged: Staged | Exception) -> Landed:
        if isinstance(staged, Exception):
            return Landed(record, staged)
        try:
            with self._disk.writing():
                if staged.publish():
                    return Landed(record, inode=os.fstat(staged.fd).st_ino)
                if self._disk.stat(record.name) is None:
                    raise NotAFile(record.name)
        except (SelfHealError, OSError) as error:
            return Landed(record, error)
        return Landed(record)

    def _take_back(self, one: Landed) -> None:
        """Remove a file that was published here, unless an app has put another one in its place."""
        there = self._disk.stat(one.record.name) if one.inode else None
        if there is not None and there.st_ino == one.inode:
            self._disk.remove(one.record.name)

    def _write(self, staged: Staged, chunk: bytes) -> None:
        with self._disk.writing():
            staged.write(chunk)


def in_batches(records: Sequence[Record]) -> list[list[Record]]:
    """Records in lists of at most `FILES_AT_ONCE`, and of about `BYTES_AT_ONCE` bytes."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = max(1, min(FILES_AT_ONCE, (descriptors - 128) // 4))  # a staged file holds three
    batches: list[list[Record]] = [[]]
    size = 0
    for record in records:
        if len(batches[-1]) == most or (batches[-1] and size + record.size > BYTES_AT_ONCE):
            batches.append([])
            size = 0
        batches[-1].append(record)
        size += record.size
    return [batch for batch in batches if batch]


def read_small(disk: UploadsDirectory, name: str) -> Read:
    """Read a file whole; what changed while it was read is not taken."""
    try:
        file = disk.open(name)
        if file is None:
            return Read(name, error=NotStored("it vanished while it was read"))
        with file:
            data = file.read_waiting(0, min(file.size, LARGE) + 1)
            there = disk.stat(name)
            if there is None or len(data) != file.size or identity_of(there) != file.identity:
                return Read(name, error=Unsettled("it changed while it was read; run again"))
            chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
            digest = hashlib.sha256(data).hexdigest()
            return Read(name, SmallFile(name, digest, file.size, file.modified_ns, chunks))
    except (SelfHealError, OSError) as error:
        return Read(name, error=error)


async def fault_in_database(database: ImageStorage, found: Found, threads: Threads) -> str:
    """Why the recorded bytes could not be brought back; empty if they could."""
    record = found.record
    if record.size <= CHUNK and _is_sound(found):
        return ""
    whole = hashlib.sha256()
    try:
        async with aclosing(database.read(record)) as chunks:
            async for chunk in chunks:
                await threads.run(whole.update, chunk)
    except CorruptBlob as error:
        return error.why
    if whole.hexdigest() != record.sha256:
        return "the whole does not match its digest"
    return "" if found.has_blob else "its blob has no row, or another size"


def _is_sound(found: Found) -> bool:
    """Whether a record of one chunk, as it was fetched, is whole in the database."""
    record, first = found.record, found.first
    if not found.has_blob:
        return False
    if first is None:
        return record.size == 0 and record.sha256 == hashlib.sha256().hexdigest()
    same = isinstance(first, bytes) and len(first) == record.size and hashlib.sha256(first).hexdigest() == record.sha256
    return same and chunk_digest(0, first) == found.digest


def _first(record: Record, found: Found | None) -> bytes:
    if found is None or not isinstance(found.first, bytes):  # SQLite keeps whatever somebody else wrote, text too
        raise CorruptBlob(record.name, "chunk 0 is missing")
    return found.first


def _check(staged: Staged, record: Record) -> None:
    if staged.size != record.size or staged.sha256 != record.sha256:
        raise CorruptBlob(record.name, f"its {staged.size} bytes do not match the recorded digest")
