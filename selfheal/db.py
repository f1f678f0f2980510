"""ImageStorage: the database. It keeps records, their history, and blobs; the record is the one commit point."""

import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import timedelta
from functools import partial
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.schema import MetaData

from . import names
from .aio.streams import prefetch
from .aio.tasks import Tasks
from .aio.threads import Threads
from .blobs.blob_store import READ_AT_ONCE, BlobStore
from .blobs.database import DatabaseBlobs
from .content.content_types import content_type as type_of
from .content.digests import Digests, update_all
from .content.sources import Source
from .errors import CorruptBlob, DatabaseUnavailable, NotStored
from .sql.backends import url_of
from .sql.catalogue import Catalogue
from .sql.engine import Engine
from .sql.models import Contents, Purged, Record, SmallFile, Version, to_utc
from .sql.record_writer import RecordWriter
from .sql.schema import create_tables, define_tables
from .sql.transactions import Write, within

GRACE = timedelta(hours=24)  # how long blobs without a record are kept: longer than any upload


class ImageStorage:
    """The catalogue and its blobs, in the database of a URL or of the app's own engine. `timeout` (seconds) bounds
    every statement; every method raises `DatabaseUnavailable` if there is no answer. `catalogue`, `blobs` and
    `backend` are the inside: reads of many names, bytes, and what differs between databases.
    """

    def __init__(
        self,
        database: str | URL | AsyncEngine,
        *,
        metadata: MetaData | None = None,
        timeout: float = 4.0,
        threads: Threads | None = None,
        tasks: Tasks | None = None,
    ) -> None:
        dialects = () if metadata is not None else (url_of(database).get_backend_name(),)
        self.tables = define_tables(MetaData() if metadata is None else metadata, *dialects)
        self._threads = threads or Threads()
        self._own_tasks = Tasks()
        self._engine = Engine(database, self.tables, timeout=timeout, tasks=tasks or self._own_tasks)
        self.backend = self._engine.backend
        self._records = RecordWriter(self.tables, self.backend)
        self.catalogue = Catalogue(self._engine, self.tables)
        self.blobs: BlobStore = DatabaseBlobs(self._engine, self.tables, self._threads)

    @property
    def url(self) -> URL:
        """The URL of the database, as its driver understands it."""
        return self._engine.url

    @property
    def can_read_in_thread(self) -> bool:
        """Whether a thread may call `blobs.fetch_in_thread` and `catalogue.generation_in_thread` now."""
        return self._engine.can_read_in_thread

    async def create_tables(self) -> None:
        """Create the tables and indexes that are missing; two processes may do so at the same time."""
        for tries_left in (2, 1, 0):
            try:
                await self._engine.write_schema(partial(create_tables, tables=self.tables, backend=self.backend))
            except (DatabaseUnavailable, IntegrityError) as error:
                cause = error.__cause__ if isinstance(error, DatabaseUnavailable) else error
                if not tries_left or not isinstance(cause, DBAPIError):
                    raise
            else:
                return

    async def close(self) -> None:
        """Close the connections that were opened here; the app's own engine stays open."""
        await self._own_tasks.drain(self._engine.timeout)
        await self._engine.close()

    async def find(self, name: str) -> Record | None:
        """Return the record of a name (a tombstone if it was deleted); None if there is no such name."""
        return (await self.catalogue.find([name])).get(name)

    async def read(
        self, version: Contents, first: int = 0, *, at_once: int = READ_AT_ONCE
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a record from chunk `first` on; the caller checks the whole. Raises `CorruptBlob`."""
        async with aclosing(self.blobs.read(version, first, at_once)) as batches:
            async for chunks in batches:
                for chunk in chunks:
                    yield chunk

    async def digest(self, version: Contents) -> str:
        """Return the SHA-256 of the stored bytes; the recorded one may differ. Raises `CorruptBlob`."""
        whole = hashlib.sha256()
        async with aclosing(prefetch(self.blobs.read(version))) as batches:
            async for chunks in batches:
                await self._threads.run(update_all, whole, chunks)
        return whole.hexdigest()

    async def history(self, name: str) -> list[Version]:
        """Return the versions of a name, newest first."""
        return await self.catalogue.history(name)

    def pages(self, *, deleted: bool | None = False, size: int = 1000) -> AsyncGenerator[list[Record], None]:
        """Yield records in the order of names, `size` at a time: the living, the deleted, or (None) all."""
        return self.catalogue.pages(deleted=deleted, size=size)

    async def count(self) -> int:
        """Return the number of living records."""
        return await self.catalogue.count()

    async def store_image(
        self,
        name: str,
        data: Source,
        *,
        content_type: str | None = None,
        modified_ns: int | None = None,
        known: Digests | None = None,
        only_new: bool = False,
        connection: AsyncConnection | AsyncSession | None = None,
    ) -> Record:
        """Store bytes under a name and return its record; storing the same bytes again changes nothing.

        The bytes must have the `known` digests (`FileChanged`). With `only_new`, a name that has a record or a
        tombstone keeps it. With `connection` everything is part of the caller's transaction. Raises `InvalidName`.
        """
        names.check(name)
        is_own = connection is None
        write: Write = (
            self._engine.write if connection is None else within(connection, self.backend, self._engine.unavailable)
        )
        received = await self.blobs.put(write, data, known, in_transaction=not is_own)
        modified_ns = time.time_ns() if modified_ns is None else modified_ns
        values = _record_values(name, received.sha256, received.size, modified_ns)
        if content_type is not None:
            values["content_type"] = content_type

        async def work(connection: AsyncConnection) -> Record:
            # every transaction locks in this order (record, history, blob, chunks), so that none wait in a circle
            record = await self._records.put(connection, values, only_new=only_new)
            if is_own:
                await self.backend.limit_lock_waits(connection)
            await self.blobs.finish(connection, received)
            return record

        record: Record = await write(work)
        return record

    async def store_many(self, files: Sequence[SmallFile]) -> set[str]:
        """Store files under new names in one transaction; return the names that have these bytes now."""
        if not files:
            return set()
        by_name = {names.check(file.name): file for file in files}
        values = [
            _record_values(name, file.digests.whole, file.size, file.modified_ns)
            for name, file in sorted(by_name.items())
        ]

        async def work(connection: AsyncConnection) -> None:
            await self._records.put_new(connection, values)
            await self.backend.limit_lock_waits(connection)
            await self.blobs.put_files(connection, files)

        await self._engine.write(work)
        stored = await self.catalogue.digests(by_name)
        return {name for name, file in by_name.items() if stored.get(name) == file.digests.whole}

    async def mend(self, record: Record, data: Source) -> None:
        """Write the bytes of a record again. Raises `CorruptBlob`, and changes nothing, if `data` are other bytes."""
        received = await self.blobs.put(self._engine.write, data)
        if received.sha256 != record.sha256:
            raise CorruptBlob(record.name, "the given bytes are not the recorded ones")
        await self._engine.write(lambda connection: self.blobs.finish(connection, received))

    async def bury(self, name: str) -> Record | None:
        """Delete a name: its record becomes a tombstone, its bytes stay for `undo`. None if it has no record."""
        return await self._engine.write(lambda connection: self._records.bury(connection, name))

    async def undo(self, name: str, generation: int | None = None) -> Record:
        """Undo the last overwrite or deletion, or go back to `generation`. Raises `NotStored` if it is not there."""

        async def work(connection: AsyncConnection) -> Record:
            record = await self._records.lock(connection, name)
            if record is None:
                raise NotStored(f"{name!r} is not in the database; there is nothing to undo")
            await self.backend.limit_lock_waits(connection)
            version = await self._records.earlier(connection, record, generation)
            if version is None:
                raise NotStored(f"{name!r} has no such earlier version; `selfheal history` lists them")
            if not await self.blobs.keep(connection, version.sha256):
                raise NotStored(f"the bytes of {name!r}, generation {version.generation}, were purged")
            return await self._records.change(connection, record, version)

        return await self._engine.write(work)

    async def purge(self, keep: timedelta, *, grace: timedelta = GRACE, dry_run: bool = False) -> Purged:
        """Drop history older than `keep`, then the blobs that nothing refers to and that are older than `grace`."""

        async def work(connection: AsyncConnection) -> Purged:
            now = to_utc((await connection.execute(select(func.now()))).scalar_one())
            versions = await self._records.drop_history(connection, now - keep)
            await self.backend.limit_lock_waits(connection)
            blobs, size = await self.blobs.drop_unreferenced(connection, self._records.referenced(), now - grace)
            if dry_run:
                await connection.rollback()
            return Purged(versions, blobs, size)

        return await self._engine.write(work)


def _record_values(name: str, sha256: str, size: int, modified_ns: int) -> dict[str, Any]:
    kind = type_of(name)
    return {"name": name, "sha256": sha256, "size": size, "content_type": kind, "modified_ns": modified_ns}
