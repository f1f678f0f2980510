"""UploadStore: what an app calls to save, delete and restore its uploads."""

import os
from collections.abc import Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, Self, Unpack, overload
from uuid import uuid4

from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from . import names
from .aio.home import HomeLoop
from .aio.tasks import Tasks
from .aio.threads import Threads
from .content.policy import UploadPolicy
from .content.sources import Readable, Source, portable, read_chunks, rewind
from .db import DatabaseOptions, ImageStorage
from .disk.directory import UploadsDirectory
from .disk.exclusions import Exclusions
from .events import Events, Kind, Listener, logger
from .healing.healing import Healing
from .healing.reading import Opening
from .healing.upkeep import Upkeep
from .http.addresses import Addresses
from .settings import (
    DEFAULT_PREFIX,
    SETTLED_AFTER,
    SWEEP_EVERY,
    Settings,
    check_seconds,
    check_sweep_every,
    refuse_served_database,
    refuse_served_quarantine,
)
from .sql.models import Record
from .sql.table_names import TableClaim
from .sql.transactions import AnyConnection
from .sync import SyncUploadStore

DEADLINE = 5.0  # seconds after which a missing file is unknown
CLOSING_GRACE = 20.0  # seconds that running tasks get when the store closes


class Upload(Readable, Protocol):
    """An uploaded file, as a framework passes it to the app: with a `filename`, or with a `name` (Django)."""


@dataclass(frozen=True, slots=True)
class Saved(Record):
    """A record, the absolute `path` of its file on this node, and the path of its `url`."""

    path: Path = Path()
    url: str = ""


class UploadStore(Addresses):
    """An app's uploads, on disk and in the database.

    `database` is a URL or the app's own `AsyncEngine`. The store opens with the app's lifespan, or at first use.
    `policy` is what `save_uploaded_file` accepts; `deadline`: seconds after which a missing file is unknown.
    `exclude`: globs of files that are not taken from the disk into the database, besides dotfiles and other litter.
    `settled_after`: seconds without a change after which a file on disk counts as complete; by default 3.
    `table_prefix` and `schema` keep the tables of several stores in one database apart; `metadata` may have them.
    `pool_size` is the most connections that a process opens; half of them stay open while idle.
    `prefix`: the URL path of the uploads, as visitors see it; by default the middleware's.
    `sweep_every`: seconds between two sweeps that store what is only on disk; None or 0 for none.
    `watch`: what the app deletes, writes or overwrites on disk is so in the database too (needs the extra `watch`).
    The directory is made at once, for apps that mount it as they start (`StaticFiles`), unless it needs a marker.
    Any thread and event loop may use it: calls are handed to the loop on which it lives (see `open`). `sync` has the
    same methods for synchronous code. `disk`, `restorer`, `reconciler`, `background` and `upkeep` are the inside.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        database: str | URL | AsyncEngine,
        *,
        policy: UploadPolicy | None = None,
        deadline: float = DEADLINE,
        quarantine: str | os.PathLike[str] | None = None,
        require_marker: bool = False,
        file_mode: int | None = None,
        directory_mode: int | None = None,
        exclude: Iterable[str] = (),
        settled_after: float | None = None,
        prefix: str = DEFAULT_PREFIX,
        sweep_every: float | None = SWEEP_EVERY,
        watch: bool = False,
        make_directory: bool = True,
        listeners: Iterable[Listener] = (),
        **options: Unpack[DatabaseOptions],
    ) -> None:
        self.policy, self.exclusions, self.events = policy or UploadPolicy(), Exclusions(exclude), Events(listeners)
        self.home, self.threads = HomeLoop(prefers_caller=isinstance(database, AsyncEngine)), Threads()
        self.tasks = Tasks(self.home)
        self.disk = UploadsDirectory(
            directory,
            file_mode=file_mode,
            directory_mode=directory_mode,
            quarantine=refuse_served_quarantine(quarantine, directory),
            require_marker=require_marker,
            threads=self.threads,
        )
        self._set_up_database(database, deadline, options)
        self.settled_after = check_seconds(SETTLED_AFTER if settled_after is None else settled_after)
        self._set_up_healing(deadline, check_sweep_every(sweep_every), watch=watch)
        super().__init__(self.database, self._reader, prefix)
        if make_directory:
            self.disk.prepare()

    def _set_up_database(self, database: str | URL | AsyncEngine, deadline: float, options: DatabaseOptions) -> None:
        self._claim = TableClaim(refuse_served_database(database, self.disk.path), options, self.disk.path)
        self.database = ImageStorage(
            database,
            **options,
            timeout=deadline * 0.8,
            before_opening=self._claim.take,
            threads=self.threads,
            tasks=self.tasks,
        )

    def _set_up_healing(self, deadline: float, sweep_every: float, *, watch: bool) -> None:
        parts, after = (self.disk, self.database, self.exclusions, self.events, self.tasks), self.settled_after
        healing = Healing(*parts, deadline=deadline, settled_after=after, sweep_every=sweep_every, watch=watch)
        self.restorer, self.reconciler, self.background = healing.restorer, healing.reconciler, healing.background
        self.upkeep, self._saver, self._reader = healing.upkeep, healing.saver, healing.reader
        self._close_all = partial(_close, self.upkeep, self.tasks, self.database, self.disk, self._claim)
        self.home.closes_with(self, self._close_all)

    @classmethod
    def from_env(cls) -> Self:
        """Make a store from the environment; see `Settings.from_env`. Raises `SettingsError`."""
        return cls.from_settings(Settings.from_env())

    @classmethod
    def from_settings(cls, settings: Settings, *, deadline: float = DEADLINE, make_directory: bool = True) -> Self:
        """Make a store from settings that were read before."""
        values: dict[str, Any] = {field.name: getattr(settings, field.name) for field in fields(settings)}
        return cls(**values, deadline=deadline, make_directory=make_directory)

    @cached_property
    def sync(self) -> SyncUploadStore:
        """The same methods for synchronous code."""
        return SyncUploadStore(self)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @overload
    def open(self) -> Coroutine[Any, Any, None]: ...
    @overload
    def open(self, name: str) -> Opening: ...
    def open(self, name: str | None = None) -> Coroutine[Any, Any, None] | Opening:
        """Open a name's file to be read, restored first if it was missing: `async with uploads.open(name) as file`.

        `with await uploads.open(name) as file` does the same. Raises what `ensure` raises; on a full or read-only disk
        the file is a temporary one. Without a name, open the store, as the middleware does: it lives on the running
        event loop then, unless it lives on another one already.
        """
        if name is None:
            return self._open_here()
        return Opening(self.home.run(self._reader.open, names.check(name)))

    async def _open_here(self) -> None:
        if self.home.is_own and not self.home.is_here:  # it was used before the server started
            await self.close()
        self.home.settle()
        await self.home.run(self._open)

    async def _open(self) -> None:
        """Remove what dead processes left behind, and mark the disk as in use. Either side may be down."""
        self._claim.take()
        await self.threads.run(_look_through, self.disk)

    async def close(self) -> None:
        """Wait up to 20 s for running calls and tasks, then close connections, threads and descriptors."""
        self.home.settle()
        await self.home.run(self.close_at_home)
        await self.home.leave()

    async def close_at_home(self) -> None:
        """As `close`, but on the loop where the store lives, which may be used again."""
        await self._close_all()

    async def save_uploaded_file(
        self, upload: Upload, *, folder: str = "", connection: AnyConnection | None = None
    ) -> Saved:
        """Save an upload under a UUID, with the extension of its true type, in `folder` if one is given.

        The upload is what a framework gives the app: an `UploadFile`, a `FileStorage`, Django's `UploadedFile`. With
        `connection` it is saved as `save` does. Raises `UploadRefused` (its `status` is 413, 415 or 422) if it breaks
        the policy, and what `save` raises.
        """
        await rewind(upload, self.threads)
        async with aclosing(read_chunks(upload, self.threads)) as chunks:
            extension, source = await self.policy.check(_client_name(upload), chunks)
            name = f"{uuid4().hex}.{extension}" if extension else uuid4().hex
            return await self.save(f"{folder}/{name}" if folder else name, source, connection=connection)

    async def save(self, name: str, source: Source, *, connection: AnyConnection | None = None) -> Saved:
        """Save bytes, a path, a file object, an async iterator or an UploadFile, on disk and in the database.

        It streams. If the disk takes no file it is saved in the database alone, and restored later. With `connection`
        it is saved in the database alone, in the caller's transaction; the file appears on disk at its first request.
        Raises `InvalidName`, `DatabaseUnavailable` (then nothing is on the disk), and what the source raises.
        """
        names.check(name)
        if connection is None:
            source = portable(source, self.threads, self.home)
            return self._saved(await self.home.run(self._saver.save, name, source))
        record = await self.database.store_image(name, source, connection=connection)
        self.home.soon(self._saver.expect, name)
        self.events.emit(Kind.SAVED, name, record.size)
        return self._saved(record)

    async def create(self, name: str, source: Source) -> Saved:
        """As `save`, for a name that is not stored, or was deleted. Raises `NameTaken`: then nothing has changed."""
        source = portable(source, self.threads, self.home)
        return self._saved(await self.home.run(self._saver.save, names.check(name), source, only_free=True))

    async def delete(self, name: str, *, connection: AnyConnection | None = None) -> bool:
        """Delete a name; only a save or `undo` undoes it. False if there is no such name.

        With `connection` it is deleted in the caller's transaction, and the file goes some seconds after the commit.
        """
        names.check(name)
        if connection is None:
            return await self.home.run(self._saver.delete, name)
        is_deleted = await self._saver.bury(name, connection)
        self.home.soon(self._saver.expect, name)
        return is_deleted

    async def undo(self, name: str, generation: int | None = None) -> Saved:
        """Undo the last overwrite or deletion, or go back to `generation`. Raises `NotStored`, `CorruptBlob`."""
        return self._saved(await self.home.run(self._saver.undo, names.check(name), generation))

    async def restore(self, name: str) -> Saved:
        """Restore a missing file. Raises `NotStored`, `CorruptBlob`, `DiskUnwritable`, `DatabaseUnavailable`."""
        return self._saved(await self.home.run(self.restorer.restore_missing, names.check(name)))

    async def adopt(self, name: str) -> Saved:
        """Store a file that is only on disk in the database. Raises `NotStored` if it is not there, or was deleted."""
        return self._saved(await self.home.run(self.reconciler.adopt, names.check(name)))

    def _saved(self, record: Record) -> Saved:
        values = {field.name: getattr(record, field.name) for field in fields(record)}
        return Saved(**values | {"path": self.disk.path_of(record.name), "url": self.url(record.name)})


async def _close(
    upkeep: Upkeep, tasks: Tasks, database: ImageStorage, disk: UploadsDirectory, claim: TableClaim
) -> None:
    await upkeep.stop()
    await tasks.end(CLOSING_GRACE)
    await database.close()
    disk.close()
    claim.release()


def _look_through(disk: UploadsDirectory) -> None:
    try:
        disk.sweep()
        disk.marked_ns()
    except OSError as error:
        logger.warning("the uploads directory cannot be looked through: %s", error)


def _client_name(upload: Upload) -> str:
    """Return the name that the client gave a file; it is never used as a path."""
    return getattr(upload, "filename", None) or getattr(upload, "name", None) or ""
