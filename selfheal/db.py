"""ImageStorage: the database. It keeps records, their history, and blobs; the record is the one commit point."""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from datetime import timedelta
from functools import partial
from typing import Any, TypedDict

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.schema import MetaData

from . import names
from .aio.home import HomeLoop
from .aio.tasks import Tasks
from .aio.threads import Threads
from .blobs.blob_store import READ_AT_ONCE, BlobStore
from .blobs.copies import Copies
from .blobs.database import DatabaseBlobs
from .blobs.image_writer import ImageWriter
from .blobs.versions import GRACE, KEEP, Versions
from .content.digests import Digests
from .content.sources import Source, portable
from .errors import DatabaseUnavailable
from .sql.backends import url_of
from .sql.catalogue import Catalogue
from .sql.changes import Changes
from .sql.engine import Engine
from .sql.models import Contents, Purged, Record, SmallFile, Version
from .sql.pool_limit import POOL_SIZE
from .sql.record_copies import RecordCopies
from .sql.record_writer import RecordWriter
from .sql.schema import create_tables, define_tables, refuse_foreign
from .sql.statistics import Statistics, read_statistics
from .sql.transactions import AnyConnection, Write, within


class DatabaseOptions(TypedDict, total=False):
    """Which tables: the app's own `metadata`, `table_prefix`, `schema`; and the most connections, `pool_size`.
    `database_from` is what set the database (a flag, a variable), for messages.
    """

    metadata: MetaData | None
    table_prefix: str
    schema: str | None
    pool_size: int
    database_from: str


class ImageStorage:
    """The catalogue and its blobs, in the database of a URL or of the app's own engine. `timeout` (seconds) bounds
    every statement; every method raises `DatabaseUnavailable` if there is no answer. `catalogue`, `changes`, `blobs`,
    `versions`, `copies` and `backend` are the inside: many names, their changes, bytes, and what databases differ in.
    """

    def __init__(
        self,
        database: str | URL | AsyncEngine,
        *,
        metadata: MetaData | None = None,
        table_prefix: str = "",
        schema: str | None = None,
        pool_size: int = POOL_SIZE,
        database_from: str = "",
        timeout: float = 4.0,
        before_opening: Callable[[], None] = lambda: None,
        threads: Threads | None = None,
        tasks: Tasks | None = None,
    ) -> None:
        dialects = () if metadata is not None else (url_of(database).get_backend_name(),)
        self.app_engine = database if isinstance(database, AsyncEngine) else None  # never closed here
        self.tables = define_tables(metadata or MetaData(), *dialects, table_prefix=table_prefix, schema=schema)
        self._threads = threads or Threads()
        self._own_tasks = Tasks(tasks.home if tasks else HomeLoop(prefers_caller=self.app_engine is not None))
        self.home = self._own_tasks.home
        self._leaves_home = tasks is None
        tasks = tasks or self._own_tasks
        self._engine = Engine(
            database,
            self.tables,
            pool_size=pool_size,
            database_from=database_from,
            timeout=timeout,
            tasks=tasks,
            before_opening=before_opening,
        )
        self.backend, self.share_connections = self._engine.backend, self._engine.share_connections
        self._close_all = partial(_close, self._own_tasks, self._engine)
        if self._leaves_home:
            self.home.closes_with(self, self._close_all)
        self._set_up_parts()

    def _set_up_parts(self) -> None:
        self._records = RecordWriter(self.tables, self.backend)
        self.catalogue, self.changes = Catalogue(self._engine, self.tables), Changes(self._engine, self.tables)
        self.blobs: BlobStore = DatabaseBlobs(self._engine, self.tables, self._threads)
        self._writer = ImageWriter(self._engine, self._records, self.blobs, self.catalogue)
        self.versions = Versions(self._engine, self._records, self.blobs)
        self.copies = Copies(self._engine, RecordCopies(self.tables, self.backend, self._records), self.blobs)

    @property
    def url(self) -> URL:
        """The URL of the database, as its driver understands it."""
        return self._engine.url

    @property
    def where(self) -> str:
        """Which database this is, for messages, without its password; and what set it, if that is known."""
        return self._engine.where

    @property
    def can_read_in_thread(self) -> bool:
        """Whether a thread may call `blobs.fetch_in_thread` and `catalogue.generation_in_thread` now."""
        return self._engine.can_read_in_thread

    async def create_tables(self) -> None:
        """Create the tables and indexes that are missing; two processes may do so at the same time."""
        for tries_left in (2, 1, 0):
            try:
                await self.home.run(
                    self._engine.write_schema, partial(create_tables, tables=self.tables, backend=self.backend)
                )
            except DatabaseUnavailable as error:
                if not tries_left or not isinstance(error.__cause__, DBAPIError):
                    raise
            else:
                return

    async def refuse_foreign_tables(self) -> None:
        """Raise `ForeignTables` if another app has a table of our name; a missing table or file is no error."""
        file = self.backend.file(self.url)
        if file is None or file.exists():
            await self.home.run(self._engine.read_schema, lambda one: one.run_sync(refuse_foreign, self.tables))

    async def close(self) -> None:
        """Close the connections that were opened here; the app's own engine stays open."""
        self.home.settle()
        await self.home.run(self.close_at_home)
        if self._leaves_home:
            await self.home.leave()

    async def close_at_home(self) -> None:
        """As `close`, but on the loop where the storage lives, which may be used again."""
        await self._close_all()

    async def find(self, name: str) -> Record | None:
        """Return the record of a name (a tombstone if it was deleted); None if there is no such name."""
        return (await self.home.run(self.catalogue.find, [name])).get(name)

    def read(self, version: Contents, first: int = 0, *, at_once: int = READ_AT_ONCE) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a record from chunk `first` on; the caller checks the whole. Raises `CorruptBlob`."""
        return self.home.iterate(self._read(version, first, at_once))

    async def _read(self, version: Contents, first: int, at_once: int) -> AsyncGenerator[bytes, None]:
        async with aclosing(self.blobs.read(version, first, at_once)) as batches:
            async for chunks in batches:
                for chunk in chunks:
                    yield chunk

    async def digest(self, version: Contents) -> str:
        """Return the SHA-256 of the stored bytes; the recorded one may differ. Raises `CorruptBlob`."""
        return await self.home.run(self.blobs.digest, version)

    async def history(self, name: str) -> list[Version]:
        """Return the versions of a name, newest first."""
        return await self.home.run(self.catalogue.history, name)

    def pages(self, *, deleted: bool | None = False, size: int = 1000) -> AsyncGenerator[list[Record], None]:
        """Yield records in the order of names, `size` at a time: the living, the deleted, or (None) all."""
        return self.home.iterate(self.catalogue.pages(deleted=deleted, size=size))

    async def version(self) -> str:
        """Return the name and the version of the database, for people."""
        return await self.home.run(self._engine.read, self.backend.version)

    async def count(self) -> int:
        """Return the number of living records."""
        return await self.home.run(self.catalogue.count)

    async def store_image(
        self,
        name: str,
        data: Source,
        *,
        content_type: str | None = None,
        modified_ns: int | None = None,
        known: Digests | None = None,
        only_new: bool = False,
        over: int | None = None,
        only_free: bool = False,
        connection: AnyConnection | None = None,
    ) -> Record:
        """Store bytes under a name and return its record; storing the same bytes again changes nothing.

        The bytes must have the `known` digests (`FileChanged`). With `only_new`, a name that has a record or a
        tombstone keeps it; with `over`, one of another generation does. With `only_free`, a name that has a record
        raises `NameTaken`. With `connection` everything is part of the caller's transaction. Raises `InvalidName`.
        """
        names.check(name)
        put = self._records.put_free if only_free else partial(self._records.put, over=0 if only_new else over)
        how: dict[str, Any] = {
            "content_type": content_type,
            "modified_ns": time.time_ns() if modified_ns is None else modified_ns,
            "known": known,
            "put": put,
        }
        if connection is not None:
            return await self._writer.store(
                name, data, within(connection, self.backend, self._engine.unavailable), **how
            )
        return await self.home.run(self._writer.store, name, portable(data, self._threads, self.home), **how)

    async def store_many(self, files: Sequence[SmallFile]) -> set[str]:
        """Store files under new names, or none (`NotAFile`); return the names that have these bytes now."""
        return await self.home.run(self._writer.store_many, files)

    async def bury(self, name: str, *, connection: AnyConnection | None = None) -> Record | None:
        """Delete a name: its record becomes a tombstone, its bytes stay for `undo`. None if it has no record.

        With `connection` it is part of the caller's transaction.
        """
        if connection is not None:
            record: Record | None = await self._within(connection)(partial(self._records.bury, name=name))
            return record
        return await self.home.run(self._engine.write, partial(self._records.bury, name=name))

    async def undo(self, name: str, generation: int | None = None) -> Record:
        """Undo the last overwrite or deletion, or go back to `generation`. Raises `NotStored` if it is not there."""
        return await self.home.run(self.versions.undo, name, generation)

    async def purge(self, keep: timedelta, *, grace: timedelta = GRACE, dry_run: bool = False) -> Purged:
        """Drop history older than `keep`, then the blobs that nothing refers to and that are older than `grace`."""
        return await self.home.run(self.versions.purge, keep, grace, dry_run=dry_run)

    async def vacuum(self) -> int:
        """Write a SQLite file anew, without free space, and return the bytes by which it is smaller.

        Others cannot use the file meanwhile. Raises `SettingsError` for another database.
        """
        return await self.home.run(self._engine.read, self.backend.vacuum)

    async def statistics(self, keep: timedelta = KEEP, *, grace: timedelta = GRACE) -> Statistics:
        """Count names, versions and bytes, and what a purge would drop."""
        read = partial(read_statistics, tables=self.tables, backend=self.backend, keep=keep, grace=grace)
        return await self.home.run(self._engine.read, read)

    def _within(self, connection: AnyConnection) -> Write:
        return within(connection, self.backend, self._engine.unavailable)


async def _close(tasks: Tasks, engine: Engine) -> None:
    await tasks.end(engine.timeout)
    await engine.close()
