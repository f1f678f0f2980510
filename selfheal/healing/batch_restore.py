"""Restore many names: database → disk, in batches with one sync each."""

import asyncio
import resource
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass

from ..aio.streams import prefetch
from ..content.sources import CHUNK
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.root import OpenFolders
from ..disk.staged_file import StagedFile
from ..errors import FileChanged, NotStored, SelfHealError
from ..sql.models import Found, Record
from .publish import Published, Publisher, outdated

FILES_AT_ONCE = 256
BATCHES_AT_ONCE = 3  # batches that one process works on at the same time
SMALL_AT_ONCE = 12 * 1024 * 1024  # bytes of small files in one batch, which are held in memory
LARGE_AT_ONCE = 128 * 1024 * 1024  # bytes of large files, which are streamed, in one batch
TRIES = 3  # how often a record is restored that changes meanwhile

Wanted = tuple[str, int]  # A name, and the size in bytes of its record


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of a name that was to be restored: its file is on the disk unless there is an `error`."""

    name: str
    record: Record | None = None
    error: Exception | None = None


class BatchRestorer:
    """Restores many names to a directory; `limit`: large files at the same time."""

    def __init__(self, disk: UploadsDirectory, database: ImageStorage, limit: int) -> None:
        self._disk = disk
        self._threads = disk.threads
        self._database = database
        self._publisher = Publisher(disk)
        self._limit = asyncio.Semaphore(limit)

    async def restore(self, wanted: Sequence[Wanted]) -> AsyncGenerator[list[Restored], None]:
        """Restore names whose files are missing; yield what became of each, in no particular order."""
        for _ in range(TRIES):
            changed: list[Wanted] = []
            async with aclosing(prefetch(self._restore_once(wanted))) as batches:
                async for published, gone in batches:
                    restored, again = await self._keep_current(published, gone)
                    changed += again
                    yield restored
            wanted = changed
        often = FileChanged("it is overwritten as often as it is restored")
        yield [Restored(name, error=often) for name, _ in wanted]

    async def _restore_once(self, wanted: Sequence[Wanted]) -> AsyncGenerator[tuple[list[Published], list[str]], None]:
        """Yield what was published, and the names whose records are not what they were."""
        small = [one for one in wanted if one[1] <= CHUNK]
        large = [one for one in wanted if one[1] > CHUNK]
        async with aclosing(prefetch(self._fetch(small))) as batches:
            async for found, gone in batches:
                yield await self._threads.run(self._publisher.publish_small, found), gone
        for batch in in_batches(large, LARGE_AT_ONCE):
            records = await self._database.catalogue.find(name for name, _ in batch)
            living = [record for record in records.values() if not record.is_deleted]
            gone = [name for name, _ in batch if name not in {record.name for record in living}]
            yield await self._publish_large(living), gone

    async def _fetch(self, wanted: Sequence[Wanted]) -> AsyncGenerator[tuple[list[Found], list[str]], None]:
        for batch in in_batches(wanted, SMALL_AT_ONCE):
            found = await self._database.blobs.fetch(name for name, _ in batch)
            small = [one for one in found.values() if not one.record.is_deleted and one.record.size <= CHUNK]
            names = {one.record.name for one in small}
            yield small, [name for name, _ in batch if name not in names]

    async def _publish_large(self, records: Sequence[Record]) -> list[Published]:
        with OpenFolders() as folders, ExitStack() as files:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._stage(record, folders, files)) for record in records]
            staged = [task.result() for task in tasks]
            failed = [one for one in staged if isinstance(one, Published)]
            written = [one for one in staged if not isinstance(one, Published)]
            return failed + await self._threads.run(self._publisher.publish, written)

    async def _stage(
        self, record: Record, folders: OpenFolders, files: ExitStack
    ) -> tuple[Record, StagedFile] | Published:
        async with self._limit:
            try:
                staged = files.enter_context(await self._threads.run(self._disk.stage_among, folders, record.name))
                source = self._database.blobs.read_unchecked(record)
                async with aclosing(self._publisher.write_all(staged, source)) as sizes:
                    async for _ in sizes:
                        pass
            except OSError as error:
                return Published(record, self._disk.refusals.meaning(error, record.name))
            except SelfHealError as error:
                return Published(record, error)
            return record, staged

    async def _keep_current(self, published: list[Published], gone: list[str]) -> tuple[list[Restored], list[Wanted]]:
        """Return the results, and the names to restore again: bytes that look damaged may only be old ones."""
        generations = await self._database.catalogue.generations(one.record.name for one in published)
        old = outdated(published, generations)
        if not old and not gone:
            return [Restored(one.record.name, one.record, one.error) for one in published], []
        await self._threads.run(self._publisher.take_back, old)
        changed = [*gone, *(one.record.name for one in old)]
        now = await self._database.catalogue.find(changed)
        again = [(record.name, record.size) for record in now.values() if not record.is_deleted]
        living = {name for name, _ in again}
        deleted = NotStored("it was deleted meanwhile")
        restored = [Restored(one.record.name, one.record, one.error) for one in published if one not in old]
        return restored + [Restored(name, error=deleted) for name in changed if name not in living], again


def in_batches(wanted: Iterable[Wanted], size: int) -> Iterator[list[Wanted]]:
    """Yield names in lists of at most `FILES_AT_ONCE`, and of about `size` bytes."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = (descriptors - 128) // 3 // BATCHES_AT_ONCE  # a staged file holds two, its directory one
    most = max(1, min(FILES_AT_ONCE, files))
    batch: list[Wanted] = []
    total = 0
    for one in wanted:
        if len(batch) == most or (batch and total + one[1] > size):
            yield batch
            batch, total = [], 0
        batch.append(one)
        total += one[1]
    if batch:
        yield batch
