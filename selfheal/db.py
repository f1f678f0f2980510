"""The database half: records, their history, and the bytes behind them. The record is the one commit point."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.schema import MetaData

from . import names
from .aio.single_flight import Tasks, ahead
from .aio.threads import Threads
from .blobs.chunk_rows import rows_of_files
from .blobs.database import READ_AT_ONCE, Blobs, Write
from .content.content_types import content_type as type_of
from .content.digests import Digests, add_all
from .content.sources import Source
from .errors import CorruptBlob, DatabaseUnavailable, NotStored
from .sql.catalogue import Catalogue
from .sql.engine import Engine, check_version, unavailable, url_of
from .sql.models import (
    RECORD_COLUMNS,
    Found,
    KeyRange,
    Purged,
    Record,
    SmallFile,
    Summary,
    Version,
    to_name,
    to_record,
    to_utc,
    to_version,
)
from .sql.queries import ByName, Queries
from .sql.schema import SCHEMA_VERSION, define_tables
from .sql.transactions import check_is_one, give_way

GRACE = timedelta(hours=24)
"""How long bytes without a record are left alone: longer than any upload."""


class ImageStorage:
    """The catalogue and its blobs, in the database of a URL or of the app's own engine.

    `timeout` (seconds) bounds every statement. Every method raises `DatabaseUnavailable` if there is no answer.
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
        self._queries = Queries(self.tables, self._engine.dialect)
        self._blobs = Blobs(self._engine, self.tables, self._queries.chunks, self._threads)
        self._catalogue = Catalogue(self.tables, self._blobs.insert)

    @property
    def url(self) -> URL:
        """Where the database is."""
        return self._engine.url

    async def create_tables(self) -> None:
        """Make the tables that are not there; two processes may do so at once."""
        for tries_left in (2, 1, 0):
            try:
                await self._engine.write_schema(self._create_tables)
            except (DatabaseUnavailable, IntegrityError) as error:
                cause = error.__cause__ if isinstance(error, DatabaseUnavailable) else error
                if not tries_left or not isinstance(cause, DBAPIError):
                    raise
            else:
                return

    async def close(self) -> None:
        """Close the connections that were opened here; the app's own engine stays open."""
        await self._own_tasks.settle(self._engine.timeout)
        await self._engine.close()

    # -- asking ---------------------------------------------------------------------------------------------------

    async def find(self, name: str) -> Record | None:
        """The record of a name (a tombstone if it was deleted); None if the database answered that there is none."""
        return (await self.find_many([name])).get(name)

    async def find_many(self, wanted: Iterable[str]) -> dict[str, Record]:
        """The records, tombstones among them, of those names that have one."""
        rows = await self._engine.rows(self._queries.find, wanted=self._queries.as_list(wanted))
        return {row[0]: to_record(row) for row in rows}

    async def generations(self, wanted: Iterable[str]) -> dict[str, int]:
        """The generations of those names that have a record: what tells whether anything became of a name meanwhile."""
        return {row[0]: row[1] for row in await self._rows_of(self._queries.generations, list(wanted))}

    async def fetch(self, wanted: Iterable[str]) -> dict[str, Found]:
        """As `find_many`, with the first chunk of each: one query brings a small image back."""
        return {row[0]: _to_found(row) for row in await self._rows_of(self._queries.fetch, list(wanted))}

    async def read(
        self, version: Record | Version, first: int = 0, *, at_once: int = READ_AT_ONCE
    ) -> AsyncGenerator[bytes, None]:
        """The bytes of a record from chunk number `first` on, chunk by chunk, each checked against its own digest.

        So many chunks are in memory `at_once`, and no connection is held meanwhile. Raises `CorruptBlob`; the whole
        digest is the reader's to check.
        """
        async with aclosing(self._blobs.read(version.name, version.sha256, version.size, first, at_once)) as handfuls:
            async for chunks in handfuls:
                for chunk in chunks:
                    yield chunk

    @property
    def has_one_writer(self) -> bool:
        """Whether nobody else writes while a transaction does."""
        return self._engine.has_one_writer

    @property
    def is_at_hand(self) -> bool:
        """Whether `fetch_here` and `generation_here` can be asked, from any thread."""
        return self._engine.is_at_hand

    def fetch_here(self, name: str) -> Found | None:
        """As `fetch`, of one name, in the calling thread; raises `DatabaseUnavailable` if it had to wait."""
        rows = self._engine.rows_here(self._queries.fetch.one, name=name)
        return _to_found(rows[0]) if rows else None

    def generation_here(self, name: str) -> int | None:
        """As `generations`, of one name, in the calling thread; raises `DatabaseUnavailable` if it had to wait."""
        rows = self._engine.rows_here(self._queries.generations.one, name=name)
        return rows[0][1] if rows else None

    def read_handfuls(self, version: Record | Version, first: int = 0) -> AsyncGenerator[list[bytes], None]:
        """As `read`, a few chunks at a time: for those who take them to a thread."""
        return self._blobs.read(version.name, version.sha256, version.size, first, READ_AT_ONCE)

    def read_whole(self, record: Record, first: bytes | None = None) -> AsyncGenerator[list[bytes], None]:
        """As `read_handfuls`, for who believes none of it before the whole digest is checked.

        `first` is the first chunk, if it was fetched with the record.
        """
        return self._blobs.read_whole(record.name, record.sha256, record.size, first)

    async def digest(self, version: Record | Version) -> str:
        """The SHA-256 of a record's stored bytes, to be compared with the recorded one; raises `CorruptBlob`."""
        whole = hashlib.sha256()
        async with aclosing(ahead(self.read_handfuls(version))) as handfuls:
            async for chunks in handfuls:
                await self._threads.run(add_all, whole, chunks)
        return whole.hexdigest()

    async def history(self, name: str) -> list[Version]:
        """What a name was before, newest first."""
        return [to_version(row) for row in await self._engine.rows(self._queries.history, name=name)]

    async def pages(self, *, deleted: bool | None = False, size: int = 1000) -> AsyncGenerator[list[Record], None]:
        """Records without bytes in the order of names, `size` at a time: the living, the deleted, or (None) all."""
        query, after = self._queries.pages[deleted], ""
        while rows := await self._engine.rows(query, **self._queries.bounds(after=after), size=size):
            yield [to_record(row) for row in rows]
            after = rows[-1][0]

    async def key_ranges(self, size: int) -> AsyncGenerator[KeyRange, None]:
        """All names there are, in ranges that so many records lie in at most, but for what is saved meanwhile."""
        first: Any = ""
        while rows := await self._engine.rows(self._queries.next_range, **self._queries.bounds(first=first), size=size):
            yield KeyRange(first, rows[0][0])
            first = rows[0][0]
        yield KeyRange(first, None)

    async def summary(self, key_range: KeyRange) -> Summary:
        """What lies in a range as one row."""
        return Summary(*(await self._rows_in(self._queries.summary, key_range))[0])

    async def names_in(self, key_range: KeyRange, *, deleted: bool = False) -> list[tuple[str, int]]:
        """Names in a range with their sizes, in the order of names: of the living, or of the deleted."""
        return [to_name(row) for row in await self._rows_in(self._queries.names[deleted], key_range)]

    async def changes(self, since: object, size: int) -> tuple[list[tuple[str, int]], object]:
        """Names, not new ones, that were changed `since`, at most `size`, with their generations; and the next `since`.

        It lies a minute back, on the database's clock: a transaction may be committed so long after its changes.
        None asks for nothing but the next.
        """
        if since is None:
            return [], (await self._engine.rows(self._queries.moment))[0][0]
        rows = await self._engine.rows(self._queries.changes, since=since, size=size)
        return [(to_name((row[0], 0))[0], row[1]) for row in rows], rows[0][2] if rows else since

    async def count(self) -> int:
        """How many living records there are."""
        return int((await self._engine.rows(self._queries.count))[0][0])

    # -- changing -------------------------------------------------------------------------------------------------

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

        `known` digests are those that the bytes must have (`Unsettled` otherwise). `only_new` leaves a name that has a
        record, tombstones included, as it is. With `connection` everything is part of the caller's transaction.
        Raises `InvalidName`.
        """
        names.check(name)
        is_own = connection is None
        write: Write = self._engine.write if connection is None else _within(connection)
        received = await self._blobs.receive(write, data, known, is_within=not is_own)
        values = {
            "name": name,
            "sha256": received.sha256,
            "size": received.size,
            "content_type": content_type or type_of(name),
            "modified_ns": time.time_ns() if modified_ns is None else modified_ns,
        }

        async def work(connection: AsyncConnection) -> Record:
            # everybody locks in this order (record, history, blob, chunks), so that nobody waits in a circle
            record = await self._catalogue.put(connection, values, only_new=only_new)
            if is_own:
                await give_way(connection)
            await self._blobs.finish(connection, received)
            return record

        record: Record = await write(work)
        return record

    async def store_many(self, files: Sequence[SmallFile]) -> set[str]:
        """Store files whose names are new, in one transaction; returns the names that have these bytes now."""
        if not files:
            return set()
        blobs, chunks = rows_of_files(files)
        values = [
            {
                "name": names.check(file.name),
                "sha256": file.digests.whole,
                "size": file.size,
                "content_type": type_of(file.name),
                "modified_ns": file.modified_ns,
            }
            for file in sorted(files, key=lambda file: file.name)
        ]

        async def work(connection: AsyncConnection) -> None:
            await self._catalogue.put_new(connection, values)
            await give_way(connection)
            await self._blobs.put_blobs(connection, blobs)
            await self._blobs.put_chunks(connection, chunks)

        await self._engine.write(work)
        wanted = self._queries.as_list(file.name for file in files)
        now = dict(map(tuple, await self._engine.rows(self._queries.digests, wanted=wanted)))
        return {file.name for file in files if now.get(file.name) == file.digests.whole}

    async def mend(self, record: Record, data: Source) -> None:
        """Write the bytes of a record anew. Raises `CorruptBlob`, and changes nothing, if `data` are others."""
        received = await self._blobs.receive(self._engine.write, data)
        if received.sha256 != record.sha256:
            raise CorruptBlob(record.name, "the bytes that came are not the ones that were recorded")
        await self._engine.write(lambda connection: self._blobs.finish(connection, received))

    async def bury(self, name: str) -> Record | None:
        """Delete a name: its record becomes a tombstone, its bytes stay for `undo`. None if it has no record."""
        return await self._engine.write(lambda connection: self._catalogue.bury(connection, name))

    async def undo(self, name: str, generation: int | None = None) -> Record:
        """Make a name what it was before its last overwrite or deletion, or what it was as `generation`.

        Raises `NotStored` if there is nothing to go back to.
        """

        async def work(connection: AsyncConnection) -> Record:
            record = await self._catalogue.lock(connection, name)
            if record is None:
                raise NotStored(f"{name!r} is not in the database; there is nothing to undo")
            await give_way(connection)
            version = await self._catalogue.earlier(connection, record, generation)
            if version is None:
                raise NotStored(f"{name!r} has no such earlier version; `selfheal history` lists what there is")
            if not await self._blobs.keep(connection, version.sha256):
                raise NotStored(f"the bytes of {name!r}, generation {version.generation}, were purged")
            return await self._catalogue.change(connection, record, version)

        return await self._engine.write(work)

    async def purge(self, keep: timedelta, *, grace: timedelta = GRACE, dry_run: bool = False) -> Purged:
        """Drop history older than `keep`, then the bytes that nothing refers to and that are older than `grace`."""

        async def work(connection: AsyncConnection) -> Purged:
            now = to_utc((await connection.execute(select(func.now()))).scalar_one())
            versions = await self._catalogue.drop_history(connection, now - keep)
            await give_way(connection)
            blobs, size = await self._blobs.sweep(connection, self._catalogue.digests(), now - grace)
            if dry_run:
                await connection.rollback()
            return Purged(versions, blobs, size)

        return await self._engine.write(work)

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _rows_in(self, query: Mapping[bool, Select[Any]], key_range: KeyRange) -> Sequence[Sequence[Any]]:
        is_last = key_range.stop is None
        bounds = {"first": key_range.first} | ({} if is_last else {"stop": key_range.stop})
        return await self._engine.rows(query[is_last], **self._queries.bounds(**bounds))

    async def _rows_of(self, query: ByName, wanted: Sequence[str]) -> Sequence[Sequence[Any]]:
        if len(wanted) == 1:
            return await self._engine.rows(query.one, name=wanted[0])
        return await self._engine.rows(query.many, wanted=self._queries.as_list(wanted))

    async def _create_tables(self, connection: AsyncConnection) -> None:
        for table in self.tables.all():
            await connection.run_sync(table.create, checkfirst=True)
        for index in self.tables.records.indexes:  # of a table that an earlier selfheal made
            await connection.run_sync(index.create, checkfirst=True)
        version = (await connection.execute(select(func.max(self.tables.schema.c.version)))).scalar_one()
        check_version(version)
        ours = self._blobs.insert(self.tables.schema).values(version=SCHEMA_VERSION)
        await connection.execute(ours.on_conflict_do_nothing())


def _within(connection: AsyncConnection | AsyncSession) -> Write:
    """Run work inside the caller's transaction, which the caller commits."""

    async def write(work: Callable[[AsyncConnection], Awaitable[Any]], /) -> Any:
        try:
            inner = await connection.connection() if isinstance(connection, AsyncSession) else connection
            await check_is_one(inner)
            return await work(inner)
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise unavailable(error) from error

    return write


def _to_found(row: Sequence[Any]) -> Found:
    first, digest, chunks = row[RECORD_COLUMNS:]
    return Found(to_record(row), first, digest, chunks is not None)
