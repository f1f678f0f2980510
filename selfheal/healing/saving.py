"""Save, delete and undo: both the database and the disk, in the order that loses nothing."""

from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from dataclasses import dataclass

from ..aio.tasks import Tasks
from ..content.digests import Digests, chunk_digest
from ..content.sources import Source, read_chunks
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.staged_file import StagedFile
from ..errors import CorruptBlob, DiskUnwritable, FileChanged, NotAFile, SelfHealError
from ..events import Events, Kind, logger
from ..sql.models import Record, earlier
from ..sql.transactions import AnyConnection
from .background import BackgroundChecks
from .disk_copies import OTHER_BYTES, DiskCopies
from .publish import Publisher
from .reconcile import Reconciler
from .restore import Restorer


@dataclass(frozen=True, slots=True)
class Saver:
    """Changes names. A change that has begun is finished, even if its caller is cancelled."""

    disk: UploadsDirectory
    database: ImageStorage
    publisher: Publisher
    copies: DiskCopies
    restorer: Restorer
    reconciler: Reconciler
    background: BackgroundChecks
    events: Events
    tasks: Tasks

    async def save(self, name: str, source: Source, *, only_free: bool = False) -> Record:
        """Save bytes under a name; if the disk takes no file, only in the database. Raises `NameTaken`."""
        record = await self._save(name, source, only_free)
        self.forget(name)
        self.background.know(record)
        self.events.emit(Kind.SAVED, name, record.size)
        return record

    async def delete(self, name: str) -> bool:
        """Delete a name; False if there is no such name. A file that is only on disk is adopted first."""
        record = await self.database.find(name)
        if record is None and await self.disk.threads.run(self.disk.stat, name) is not None:
            await self.reconciler.adopt(name)
        elif record is None or record.is_deleted:
            return False
        await self.tasks.finish(self._delete(name))
        self.events.emit(Kind.DELETED, name)
        return True

    async def delete_vanished(self, name: str) -> None:
        """Delete a name whose file the app has deleted; what the app has written there since then stays."""
        await self.database.bury(name)
        self.forget(name)
        self.tasks.start(self._check(name))
        self.events.emit(Kind.DELETED, name)

    async def undo(self, name: str, generation: int | None) -> Record:
        """Undo the last overwrite or deletion, or go back to `generation`. Raises `NotStored`, `CorruptBlob`."""
        record = await self.tasks.finish(self._undo(name, generation))
        self.events.emit(Kind.UNDONE, name, record.size)
        return record

    async def bury(self, name: str, connection: AnyConnection) -> bool:
        """Delete a name in the caller's transaction; False if there is none. A file only on disk is stored before."""
        known = await self.database.find(name)
        file = await self.disk.threads.run(self.disk.open, name) if known is None else None
        if file is not None:
            with file:
                await self.database.store_image(
                    name, file.chunks(), modified_ns=file.modified_ns, only_new=True, connection=connection
                )
        buried = await self.database.bury(name, connection=connection)
        return buried is not None and buried != known  # it was deleted already

    def expect(self, name: str) -> None:
        """A name was changed in a transaction of the caller's, who may commit it soon."""
        self.forget(name)
        self.background.expect(name)

    def forget(self, name: str) -> None:
        """Forget what was cached of a name: it was changed."""
        self.restorer.forget(name)
        self.background.forget(name)

    async def _save(self, name: str, source: Source, only_free: bool) -> Record:
        digests: list[bytes] = []
        conflict = await self.disk.threads.run(self.disk.conflict, name)
        if conflict:
            raise NotAFile(f"{name!r} cannot be saved: {conflict}")
        try:
            staged = await self.disk.threads.run(self.disk.stage, name)
        except DiskUnwritable:
            return await self._save_without_disk(name, source, only_free)
        try:
            async with aclosing(read_chunks(source, self.disk.threads)) as chunks:
                async for chunk in chunks:
                    try:
                        await self.disk.threads.run(self._write, staged, chunk, digests)
                    except DiskUnwritable:
                        async with aclosing(self._read_back(staged, name, chunk, chunks)) as rest:
                            record = await self._save_without_disk(name, rest, only_free)
                        staged.close()
                        return record
        except BaseException:
            staged.close()
            raise
        return await self.tasks.finish(self._commit(name, staged, digests, only_free))

    def _write(self, staged: StagedFile, chunk: bytes, digests: list[bytes]) -> None:
        self.publisher.write(staged, [chunk])
        digests.append(chunk_digest(len(digests), chunk))

    async def _save_without_disk(self, name: str, source: Source, only_free: bool) -> Record:
        record = await self.database.store_image(name, source, only_free=only_free)
        await self._leave_disk(record, "the disk takes no file")
        return record

    async def _commit(self, name: str, staged: StagedFile, digests: list[bytes], only_free: bool) -> Record:
        """The record is committed first, then the file is published; another process may have been faster."""
        with staged:
            async with aclosing(self._read_back(staged, name)) as source:
                record = await self.database.store_image(
                    name, source, known=Digests(staged.sha256, digests), only_free=only_free
                )
            try:
                await self.copies.replace(record, staged)
            except DiskUnwritable as error:
                await self._leave_disk(record, str(error))
                return record
            except FileChanged:
                pass  # others save this name at the same moment: the record decides
        now = await self.database.find(name)
        if now is None or now.generation != record.generation:
            await self._check(name)
        return record

    async def _check(self, name: str) -> None:
        """Make disk and record agree; the save is committed, and does not fail if that has to wait."""
        try:
            await self.reconciler.check(name)
        except (SelfHealError, OSError) as error:
            logger.warning("%r is not on the disk yet as it is recorded: %s", name, error)
            self.background.retry(name)

    async def _read_back(
        self, staged: StagedFile, name: str, then: bytes = b"", rest: AsyncIterable[bytes] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield what was staged so far, and what comes after it."""
        with self.disk.reader(staged, name) as reader:
            async for piece in reader.pieces(0, staged.size):
                yield piece
        if then:
            yield then
        if rest is not None:
            async for chunk in rest:
                yield chunk

    async def _leave_disk(self, record: Record, why: str) -> None:
        """The disk did not take a file: clear the old copy, which must not be served for the new record."""
        self.events.emit(Kind.STREAMED, record.name, record.size, why)
        await self._clear(record.name, OTHER_BYTES, unless=record)

    async def _clear(self, name: str, why: str, *, unless: Record | None = None) -> None:
        """Clear a copy, unless it is a record's; one that cannot be moved away is not served.

        It is tried twice: the next process does not know of a copy that an error left, and would serve it once.
        """
        for is_last in (False, True):
            try:
                there = await self.disk.threads.run(self.disk.stat, name)
                if there is not None and not (unless and unless.matches(there.st_mtime_ns, there.st_size)):
                    await self.copies.clear(name, why)
            except (DiskUnwritable, OSError) as error:
                if is_last:
                    logger.error("%s", error)
                    self.background.retry(name)
            else:
                return

    async def _delete(self, name: str) -> None:
        await self.database.bury(name)
        self.forget(name)
        await self._clear(name, "it is deleted")

    async def _undo(self, name: str, generation: int | None) -> Record:
        record = await self.database.find(name)
        version = None if record is None else earlier(record, await self.database.history(name), generation)
        if version is not None:
            if await self.database.digest(version) != version.sha256:  # nothing goes back to what is lost
                raise CorruptBlob(version.name, "the whole does not match its digest")
            generation = version.generation
        record = await self.database.undo(name, generation)
        self.forget(name)
        try:
            await self.copies.put(record)
        except DiskUnwritable as error:
            await self._leave_disk(record, str(error))
        except FileChanged:
            await self._check(name)
        return record
