"""Both halves: what an app does with its uploads."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, Self
from uuid import uuid4

from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.schema import MetaData

from . import names
from .aio.single_flight import Tasks
from .aio.threads import Threads
from .content.digests import Digests, chunk_digest
from .content.policy import UploadPolicy
from .content.sources import Readable, Source
from .content.sources import chunks as chunks_of
from .db import ImageStorage
from .disk.directory import UploadsDirectory
from .disk.open_file import Identity, OpenFile
from .disk.staged_file import Staged
from .errors import DiskUnwritable, NotStored, SelfHealError
from .events import Events, Kind, Listener, logger
from .healing.bodies import FromDatabase, Incoming, InMemory, Landed
from .healing.reconcile import Reconciler
from .healing.restore import Restorer
from .settings import Settings
from .sql.models import Record, earlier

CLOSING_GRACE = 20.0
"""Seconds that work under way is given when the store closes."""


class Upload(Readable, Protocol):
    """What a framework hands to the app for an uploaded file."""

    @property
    def filename(self) -> str | None:
        """As the client says; never a path."""


@dataclass(frozen=True, slots=True)
class Saved(Record):
    """A record with the absolute `path` of its file on this node."""

    path: Path = Path()


class UploadStore:
    """An app's uploads, on disk and in the database.

    `database` is a URL or the app's own `AsyncEngine`. It opens with the app's lifespan, or at first use. `policy` is
    what `save_uploaded_file` accepts; `deadline`, in seconds, bounds how long a missing file may be unknown.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        database: str | URL | AsyncEngine,
        *,
        policy: UploadPolicy | None = None,
        metadata: MetaData | None = None,
        deadline: float = 5.0,
        quarantine: str | os.PathLike[str] | None = None,
        require_marker: bool = False,
        file_mode: int = 0o644,
        directory_mode: int = 0o755,
        listeners: Iterable[Listener] = (),
    ) -> None:
        self.policy = policy or UploadPolicy()
        self.events = Events(listeners)
        self.tasks = Tasks()
        self.threads = Threads()
        self.disk = UploadsDirectory(
            directory,
            file_mode=file_mode,
            directory_mode=directory_mode,
            quarantine=quarantine,
            require_marker=require_marker,
            threads=self.threads,
        )
        self.database = ImageStorage(
            database, metadata=metadata, timeout=deadline * 0.8, threads=self.threads, tasks=self.tasks
        )
        self._restorer = Restorer(self.disk, self.database, self.events, self.tasks, deadline=deadline)
        self._reconciler = Reconciler(self.disk, self.database, self._restorer, self.events, self.tasks)

    @classmethod
    def from_env(cls) -> Self:
        """A store as the environment says; see `Settings.from_env`. Raises `SettingsError`."""
        settings = Settings.from_env()
        return cls(settings.directory, settings.database)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Sweep what dead processes left. Everything else opens at first use; the database may be down."""
        await self.threads.run(self.disk.sweep)

    async def close(self) -> None:
        """Let restores under way end (up to 20 s), then close the connections."""
        await self.tasks.settle(CLOSING_GRACE)
        await self.database.close()
        self.disk.close()

    # -- what an app does -----------------------------------------------------------------------------------------

    async def save_uploaded_file(self, upload: Upload, *, folder: str = "") -> Saved:
        """Save an upload under a UUID with its own extension, in `folder` if one is given.

        Raises `UploadRefused` (its `status` is 413, 415 or 422) if it breaks the policy, and what `save` raises.
        """
        end = self.policy.check_extension(upload.filename or "")
        name = f"{uuid4().hex}.{end}" if end else uuid4().hex
        source = self.policy.watch(end, chunks_of(upload, self.threads))
        return await self.save(f"{folder}/{name}" if folder else name, source)

    async def save(
        self, name: str, source: Source, *, connection: AsyncConnection | AsyncSession | None = None
    ) -> Saved:
        """Save bytes, a path, a file object, an async iterator or an UploadFile under `name`, on both sides.

        It streams. If the disk takes no file it is saved all the same, and healed later. With `connection` only the
        database half is done, in the caller's transaction; the file appears on disk at its first request.
        Raises `InvalidName`, `DatabaseUnavailable` (then nothing is on the disk), and what the source raises.
        """
        names.check(name)
        if connection is None:
            record = await self._save(name, source)
        else:
            record = await self.database.store_image(name, source, connection=connection)
            self._reconciler.expect(name)
        self._forget(name)
        self.events.emit(Kind.SAVED, name, record.size)
        return self._saved(record)

    async def delete(self, name: str) -> bool:
        """Delete a name on both sides, until somebody saves it anew; False if there was no such name.

        What is only on disk is brought into the database first, so that every deletion can be undone.
        """
        names.check(name)
        record = await self.database.find(name)
        if record is None and await self.threads.run(self.disk.stat, name) is not None:
            await self._reconciler.adopt(name)
        elif record is None or record.is_deleted:
            return False
        await self.tasks.finish(self._delete(name))
        self.events.emit(Kind.DELETED, name)
        return True

    async def undo(self, name: str, generation: int | None = None) -> Saved:
        """Undo a name's last overwrite or deletion, or go back to `generation`. Raises `NotStored` if it cannot."""
        names.check(name)
        record = await self.tasks.finish(self._undo(name, generation))
        self.events.emit(Kind.UNDONE, name, record.size)
        return self._saved(record)

    async def restore(self, name: str) -> Saved:
        """Bring a name's file back from the database, if it is missing on disk.

        Raises `NotStored`, `CorruptBlob`, `DiskUnwritable`, `DatabaseUnavailable`.
        """
        names.check(name)
        if await self.threads.run(self.disk.stat, name) is None and not await self.is_on_disk_again(name):
            raise NotStored(f"{name!r} is not in the database")
        record = await self.database.find(name)
        if record is None or record.is_deleted:
            raise NotStored(f"{name!r} is not in the database")
        return self._saved(record)

    async def adopt(self, name: str) -> Saved:
        """Bring a file that is only on disk into the database. Raises `NotStored` if it is not there or was deleted."""
        return self._saved(await self._reconciler.adopt(names.check(name)))

    async def check(self, name: str) -> None:
        """Make both sides of a name agree, as is done behind hits."""
        await self._reconciler.check(names.check(name))

    # -- what the bulk runs do -----------------------------------------------------------------------------------

    async def heal(self, record: Record) -> None:
        """Put a record's bytes on the disk in place of others, which go to quarantine. See `Reconciler.heal`."""
        await self._reconciler.heal(record)

    async def take_over(self, name: str) -> Saved:
        """The disk's bytes become a name's next generation, whatever the database holds."""
        return self._saved(await self._reconciler.take_over(names.check(name)))

    async def mend(self, record: Record) -> None:
        """Write a record's bytes into the database anew, from a disk copy that matches (else `CorruptBlob`)."""
        file = await self.threads.run(self.disk.open, record.name)
        if file is None:
            raise NotStored(f"{record.name!r} is not on the disk")
        with file:
            await self.database.mend(record, file.chunks())

    # -- what a server does ---------------------------------------------------------------------------------------

    async def bring_back(self, name: str) -> OpenFile | Incoming | FromDatabase | InMemory | None:
        """What to answer for a name that is missing on disk; None if there is no such name (`Restorer.bring_back`)."""
        return await self._restorer.bring_back(name)

    async def is_on_disk_again(self, name: str) -> bool:
        """Restore a missing name to the disk, to the end; False if there is no such name. Raises `DiskUnwritable`."""
        body = await self._restorer.bring_back(name)
        if body is None:
            return False
        try:
            if isinstance(body, Incoming):
                await body.finished()
            elif not isinstance(body, OpenFile | Landed):
                raise DiskUnwritable(f"{name!r} is in the database, but the disk takes no file")
        finally:
            body.close()
        return True

    async def set_aside(self, name: str) -> None:
        """A disk copy that cannot be read goes to quarantine."""
        await self._restorer.quarantine(name, "the disk copy cannot be read")

    def follow(self) -> None:
        """A visitor came, for whatever: every few seconds, take over what other nodes deleted or overwrote, behind."""
        self._reconciler.follow()

    def noticed(self, name: str, identity: Identity, *, adopt: bool) -> None:
        """A hit was answered from the file with this identity; compare it with its record, behind."""
        self._reconciler.noticed(name, identity, adopt=adopt)

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _save(self, name: str, source: Source) -> Record:
        digests: list[bytes] = []
        try:
            staged = await self.threads.run(self.disk.stage, name)
        except DiskUnwritable:
            return await self._save_without_disk(name, source)
        try:
            async with aclosing(chunks_of(source, self.threads)) as chunks:
                async for chunk in chunks:
                    try:
                        await self.threads.run(self._write, staged, chunk, digests)
                    except DiskUnwritable:
                        async with aclosing(self._read_back(staged, name, chunk, chunks)) as rest:
                            record = await self._save_without_disk(name, rest)
                        staged.close()
                        return record
        except BaseException:
            staged.close()
            raise
        return await self.tasks.finish(self._commit(name, staged, digests))

    async def _save_without_disk(self, name: str, source: Source) -> Record:
        record = await self.database.store_image(name, source)
        await self._withdraw(record, "the disk takes no file")
        return record

    async def _withdraw(self, record: Record, why: str) -> None:
        self.events.emit(Kind.STREAMED, record.name, record.size, why)
        try:
            await self._restorer.withdraw(record)
        except (SelfHealError, OSError) as error:
            logger.error("%r: an old copy stays on the disk, and is served: %s", record.name, error)

    async def _commit(self, name: str, staged: Staged, digests: list[bytes]) -> Record:
        """The record first, then the file; then a look whether another process was faster."""
        with staged:
            async with aclosing(self._read_back(staged, name)) as source:
                record = await self.database.store_image(name, source, known=Digests(staged.sha256, digests))
            try:
                await self._restorer.place(staged, record)
            except DiskUnwritable as error:
                await self._withdraw(record, str(error))
                return record
        now = await self.database.find(name)
        if now is None or now.generation != record.generation:
            await self._reconciler.check(name)
        return record

    def _forget(self, name: str) -> None:
        self._restorer.forget(name)
        self._reconciler.forget(name)

    async def _delete(self, name: str) -> None:
        record = await self.database.bury(name)
        self._forget(name)
        if record is None or await self._is_kept(record):
            await self.threads.run(self.disk.remove, name)
        else:
            await self._restorer.quarantine(name, "deleted, and its bytes are not the recorded ones")

    async def _is_kept(self, record: Record) -> bool:
        """Whether the database holds what is on disk; what has the record's time and size is taken for it."""
        there = await self.threads.run(self.disk.stat, record.name)
        looks_same = there is None or (there.st_mtime_ns, there.st_size) == (record.modified_ns, record.size)
        return looks_same or await self._restorer.is_recorded(record)

    async def _undo(self, name: str, generation: int | None) -> Record:
        record = await self.database.find(name)
        version = None if record is None else earlier(record, await self.database.history(name), generation)
        if version is not None:
            await self._restorer.check(version)  # a name does not go back to what nobody can bring back
            generation = version.generation
        record = await self.database.undo(name, generation)
        self._forget(name)
        try:
            await self._restorer.put(record)
        except DiskUnwritable as error:
            await self._withdraw(record, str(error))
        return record

    async def _read_back(
        self, staged: Staged, name: str, then: bytes = b"", rest: AsyncIterable[bytes] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """What was staged so far, and what comes after it."""
        with self.disk.reader(staged, name) as reader:
            async for piece in reader.pieces(0, staged.size):
                yield piece
        if then:
            yield then
        if rest is not None:
            async for chunk in rest:
                yield chunk

    def _write(self, staged: Staged, chunk: bytes, digests: list[bytes]) -> None:
        with self.disk.writing():
            staged.write(chunk)
        digests.append(chunk_digest(len(digests), chunk))

    def _saved(self, record: Record) -> Saved:
        values = {field.name: getattr(record, field.name) for field in fields(record)}
        return Saved(**values | {"path": self.disk.path_of(record.name)})
