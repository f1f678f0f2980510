"""Many files at once, database → disk: staged together, one sync for all of them, and only then their names."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass

from ..aio.single_flight import ahead
from ..content.sources import CHUNK
from ..db import ImageStorage
from ..disk.directory import Opened, UploadsDirectory
from ..disk.staged_file import Staged
from ..errors import CorruptBlob, NotAFile, NotStored, SelfHealError, Unsettled
from ..sql.models import Found, Record

FILES_AT_ONCE = 256
BATCHES_AT_ONCE = 3
"""Batches that one process may be at work at."""
SMALL_AT_ONCE = 12 * 1024 * 1024
"""Bytes of small files in one batch, which are held in memory."""
LARGE_AT_ONCE = 128 * 1024 * 1024
"""Bytes of large files, which are streamed, that one sync brings to the disk."""
TRIES = 3
"""How often a record that changes meanwhile is looked at."""

Wanted = tuple[str, int]
"""A name, and the size in bytes that its record had."""


@dataclass(frozen=True, slots=True)
class Landed:
    """What became of a name that was to be restored: `error` is None if its file is on the disk.

    `inode` is that of the file if it was published here; 0 if somebody else was faster.
    """

    name: str
    record: Record | None
    error: Exception | None = None
    inode: int = 0


class Landing:
    """Restores many names to a directory; `at_once`: how many large files at a time."""

    def __init__(self, disk: UploadsDirectory, database: ImageStorage, at_once: int) -> None:
        self._disk = disk
        self._database = database
        self._threads = disk.threads
        self._places = asyncio.Semaphore(at_once)

    async def land(self, wanted: Sequence[Wanted]) -> AsyncGenerator[list[Landed], None]:
        """Restore names whose files are missing; what becomes of each, in no particular order.

        What is deleted meanwhile does not stay (`NotStored`); what is overwritten is restored as it is now.
        """
        for _ in range(TRIES):
            changed: list[Wanted] = []
            async with aclosing(ahead(self._land_all(wanted))) as batches:
                async for batch in batches:
                    landed, again = await self._look_again(batch)
                    changed += again
                    yield landed
            wanted = changed
        yield [Landed(name, None, Unsettled("it is overwritten as often as it is restored")) for name, _ in wanted]

    async def _land_all(self, wanted: Sequence[Wanted]) -> AsyncGenerator[list[Landed], None]:
        small = [one for one in wanted if one[1] <= CHUNK]
        large = [one for one in wanted if one[1] > CHUNK]
        async with aclosing(ahead(self._fetch(small))) as batches:
            async for batch in batches:
                yield await self._threads.run(self._land_small, batch)
        for names in in_batches(large, LARGE_AT_ONCE):
            yield await self._land_large([name for name, _ in names])

    async def _fetch(self, wanted: Sequence[Wanted]) -> AsyncGenerator[list[tuple[str, Found | None]], None]:
        for batch in in_batches(wanted, SMALL_AT_ONCE):
            found = await self._database.fetch(name for name, _ in batch)
            yield [(name, found.get(name)) for name, _ in batch]

    async def _land_large(self, names: Sequence[str]) -> list[Landed]:
        records = await self._database.find_many(names)
        with Opened() as opened, ExitStack() as stack:
            async with asyncio.TaskGroup() as group:
                work = [self._stage_large(name, records.get(name), stack, opened) for name in names]
                tasks = [group.create_task(one) for one in work]
            return await self._threads.run(self._publish_all, [task.result() for task in tasks])

    async def _stage_large(self, name: str, record: Record | None, stack: ExitStack, opened: Opened) -> _Ready | Landed:
        if record is None or record.is_deleted:
            return Landed(name, None)
        async with self._places:
            try:
                staged = stack.enter_context(await self._threads.run(self._disk.stage_among, opened, name))
                async with aclosing(ahead(self._database.read_whole(record))) as handfuls:
                    async for chunks in handfuls:
                        await self._threads.run(self._write, staged, chunks)
                return _Ready(record, _checked(staged, record))
            except (SelfHealError, OSError) as error:
                return Landed(name, record, self._meaning(error))

    async def _look_again(self, landed: list[Landed]) -> tuple[list[Landed], list[Wanted]]:
        """What is to be told, and what has changed: bytes that look damaged may only be old ones."""
        generations = await self._database.generations(one.name for one in landed)
        same = [one for one in landed if one.record and generations.get(one.name) == one.record.generation]
        if len(same) == len(landed):
            return landed, []
        changed = [one for one in landed if not one.record or generations.get(one.name) != one.record.generation]
        await self._threads.run(self._take_back, changed)
        now = await self._database.find_many(one.name for one in changed)
        again = [(record.name, record.size) for record in now.values() if not record.is_deleted]
        alive = {name for name, _ in again}
        deleted = NotStored("it was deleted meanwhile")
        return same + [Landed(one.name, None, deleted) for one in changed if one.name not in alive], again

    # -- in a thread ----------------------------------------------------------------------------------------------

    def _land_small(self, batch: Iterable[tuple[str, Found | None]]) -> list[Landed]:
        coming: list[_Ready | Landed] = []
        with Opened() as opened:
            try:
                for name, found in batch:
                    coming.append(self._stage_small(name, found, opened))
                return self._publish_all(coming)
            finally:
                for one in coming:
                    if isinstance(one, _Ready):
                        one.staged.close()

    def _stage_small(self, name: str, found: Found | None, opened: Opened) -> _Ready | Landed:
        if found is None or found.record.is_deleted or found.record.size > CHUNK:
            return Landed(name, None)
        record, staged = found.record, None
        try:
            if record.size and not isinstance(found.first, bytes):  # SQLite keeps what others wrote, text too
                raise CorruptBlob(name, "chunk 0 is missing")
            staged = self._disk.stage_among(opened, name)
            if found.first:
                staged.write(found.first)
            return _Ready(record, _checked(staged, record))
        except (SelfHealError, OSError) as error:
            if staged is not None:
                staged.close()
            return Landed(name, record, self._meaning(error))

    def _publish_all(self, coming: Sequence[_Ready | Landed]) -> list[Landed]:
        """One sync for all of them; only then does each get its name."""
        ready = [one for one in coming if isinstance(one, _Ready)]
        landed = [one for one in coming if isinstance(one, Landed)]
        try:
            with self._disk.writing():
                for one in ready:
                    one.staged.seal(one.record.modified_ns, self._disk.file_mode)
                self._disk.sync()
        except (SelfHealError, OSError) as error:
            return landed + [Landed(one.record.name, one.record, error) for one in ready]
        return landed + [self._publish(one.record, one.staged) for one in ready]

    def _publish(self, record: Record, staged: Staged) -> Landed:
        try:
            if staged.publish():
                return Landed(record.name, record, inode=os.fstat(staged.fd).st_ino)
            if self._disk.stat(record.name) is None:
                raise NotAFile(record.name)
        except (SelfHealError, OSError) as error:
            return Landed(record.name, record, self._meaning(error))
        return Landed(record.name, record)

    def _meaning(self, error: SelfHealError | OSError) -> Exception:
        return self._disk.refusal(error) if isinstance(error, OSError) else error

    def _take_back(self, changed: Iterable[Landed]) -> None:
        """Remove what was published here, unless an app has put another file in its place."""
        for one in changed:
            there = self._disk.stat(one.name) if one.inode else None
            if there is not None and there.st_ino == one.inode:
                self._disk.remove(one.name)

    def _write(self, staged: Staged, chunks: Iterable[bytes]) -> None:
        with self._disk.writing():
            for chunk in chunks:
                staged.write(chunk)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A file that is staged and checked; it has no name yet."""

    record: Record
    staged: Staged


def in_batches(wanted: Iterable[Wanted], size: int) -> Iterator[list[Wanted]]:
    """Names in lists of at most `FILES_AT_ONCE`, and of about `size` bytes."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = (descriptors - 128) // 3 // BATCHES_AT_ONCE  # a staged file holds two, its directory one
    most = max(1, min(FILES_AT_ONCE, files))
    batch: list[Wanted] = []
    held = 0
    for one in wanted:
        if len(batch) == most or (batch and held + one[1] > size):
            yield batch
            batch, held = [], 0
        batch.append(one)
        held += one[1]
    if batch:
        yield batch


def _checked(staged: Staged, record: Record) -> Staged:
    if staged.size != record.size or staged.sha256 != record.sha256:
        raise CorruptBlob(record.name, f"its {staged.size} bytes do not match the recorded digest")
    return staged
