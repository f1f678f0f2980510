"""The blob store in the database: chunks are written in short transactions, and read a few at a time."""

import hashlib
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..aio.streams import in_batches, prefetch
from ..aio.tasks import LoopSemaphore
from ..aio.threads import Threads
from ..content.digests import Digests, chunk_digest, update_all
from ..content.sources import CHUNK, Source, read_chunks
from ..errors import CorruptBlob
from ..sql.backend import Backend, Rows
from ..sql.engine import Engine
from ..sql.models import Contents, Found, SmallFile, to_found
from ..sql.queries import ByName, by_name
from ..sql.schema import Tables, record_columns
from ..sql.transactions import Write
from .blob_store import READ_AT_ONCE, BlobStore
from .chunk_rows import Hasher, Received, Row, rows_of_files

HASH_AT_ONCE = 8  # chunks that are hashed in one call (2 MiB) while others are read, and others written
WRITE_AT_ONCE = 24  # chunks in one transaction (6 MiB) of a large upload: other writers get the lock in between
LARGE_FROM = 16  # chunks (4 MiB) up to which any number of uploads may be in memory at the same time
LARGE_UPLOADS_AT_ONCE = 2  # larger uploads of files on disk, which come fast, at the same time: each holds up to 20 MiB
MOVE_AT_ONCE = 256  # chunks (64 MiB) that are moved in one transaction of a database with one writer

_SHA256_OF_NOTHING = hashlib.sha256(b"").hexdigest()


class DatabaseBlobs(BlobStore):
    """The tables `image_blob` and `image_chunk`; see `BlobStore`."""

    def __init__(self, engine: Engine, tables: Tables, threads: Threads) -> None:
        self._engine = engine
        self._backend = engine.backend
        self._blobs = tables.blobs
        self._chunks = tables.chunks
        self._threads = threads
        self._large_uploads = LoopSemaphore(LARGE_UPLOADS_AT_ONCE)
        self._put_chunks = self._upsert(tables.chunks, "data", "digest")
        self._put_blobs = self._upsert(tables.blobs, "size", "chunks")
        self._records = _records_with_first_chunks(tables, engine.backend)
        self._some_chunks = _some_chunks(tables.chunks)
        self._recorded = _recorded_blob(tables)

    async def fetch(self, wanted: Iterable[str]) -> dict[str, Found]:
        return {row[0]: to_found(row) for row in await self._engine.rows_by_name(self._records, wanted)}

    def fetch_in_thread(self, name: str) -> Found | None:
        rows = self._engine.rows_in_thread(self._records.one, name=name)
        return to_found(rows[0]) if rows else None

    async def read(
        self, version: Contents, first: int = 0, at_once: int = READ_AT_ONCE
    ) -> AsyncGenerator[list[bytes], None]:
        async with aclosing(self._read_rows(version, first, at_once)) as batches:
            async for rows in batches:
                why = await self._threads.run(_damage, rows)
                if why is not None:
                    raise CorruptBlob(version.name, why)
                yield [data for _, _, data in rows]

    async def read_unchecked(
        self, version: Contents, first_chunk: bytes | None = None
    ) -> AsyncGenerator[list[bytes], None]:
        start = 0
        if first_chunk is not None and len(first_chunk) == CHUNK < version.size:
            yield [first_chunk]
            start = 1
        async with aclosing(self._read_rows(version, start, READ_AT_ONCE)) as batches:
            async for rows in batches:
                yield [data for _, _, data in rows]

    async def _read_rows(self, version: Contents, first: int, at_once: int) -> AsyncGenerator[Rows, None]:
        """No connection is held between two batches."""
        size = version.size
        if size < 0 or (size == 0 and version.sha256 != _SHA256_OF_NOTHING):
            raise CorruptBlob(version.name, f"its size is {size}")
        count = -(-size // CHUNK)
        for start in range(first, count, at_once):
            wanted = range(start, min(count, start + at_once))
            stop = wanted.stop + (wanted.stop == count)  # one more than the last: there must be none
            rows = await self._engine.rows(self._some_chunks, sha256=version.sha256, start=wanted.start, stop=stop)
            why = _misfit(rows, wanted, size)
            if why is not None:
                raise CorruptBlob(version.name, why)
            yield rows

    async def put(
        self, write: Write, data: Source, known: Digests | None = None, *, in_transaction: bool = False
    ) -> Received:
        """Chunks of the caller's transaction get a key of their own, and take no lock before that of a record."""
        is_large = known is not None and len(known.chunks) > LARGE_FROM and not in_transaction
        async with self._large_uploads if is_large else nullcontext():
            received = await self._receive(write, data, Hasher(known, in_place=not in_transaction))
        return await self._move(write, received)

    async def _receive(self, write: Write, data: Source, hasher: Hasher) -> Received:
        rows: list[Row] = []
        async with aclosing(prefetch(self._transactions(hasher, data))) as transactions:
            async for rows, is_last in transactions:
                if not is_last:
                    await write(partial(self._put_some, rows=rows, is_in_place=hasher.is_in_place))
        return hasher.received(rows)

    async def _transactions(self, hasher: Hasher, data: Source) -> AsyncGenerator[tuple[list[Row], bool], None]:
        """Yield the rows of one transaction after the other, and whether they are the last ones."""
        rows: list[Row] = []
        async with aclosing(prefetch(in_batches(read_chunks(data, self._threads), HASH_AT_ONCE))) as batches:
            async for chunks in batches:
                if len(rows) >= WRITE_AT_ONCE:
                    yield rows, False
                    rows = []
                rows += await self._threads.run(hasher.rows, chunks)
        yield rows, True

    async def _move(self, write: Write, received: Received) -> Received:
        """Move written chunks to their digest in small transactions where one would lock all other writers out."""
        moved = received.moved
        while self._backend.has_one_writer and moved + MOVE_AT_ONCE <= received.written:
            some = self._chunks.c.position.between(moved, moved + MOVE_AT_ONCE - 1)
            await write(partial(self._replace, received, some))
            moved += MOVE_AT_ONCE
        return replace(received, moved=moved)

    async def _put_some(self, connection: AsyncConnection, rows: list[Row], *, is_in_place: bool) -> None:
        if is_in_place:
            await self._backend.lock_blob(connection, rows[0]["sha256"])
        await self._put_rows(connection, self._put_chunks, rows)

    async def put_files(self, connection: AsyncConnection, files: Iterable[SmallFile]) -> None:
        blobs, chunks = rows_of_files(files)
        await self._put_rows(connection, self._put_blobs, blobs)
        await self._put_rows(connection, self._put_chunks, chunks)

    async def finish(self, connection: AsyncConnection, received: Received) -> None:
        """The row of the blob comes first: a transaction that stores, or purges, the same bytes waits for it."""
        if received.written:
            await self._backend.lock_blob(connection, received.sha256)
        blob = {"sha256": received.sha256, "size": received.size, "chunks": received.chunks}
        await self._put_rows(connection, self._put_blobs, [blob])
        await self._put_rows(connection, self._put_chunks, received.rows)
        await self._replace(received, self._chunks.c.position >= received.moved, connection)

    async def _replace(self, received: Received, some: sa.ColumnElement[bool], connection: AsyncConnection) -> None:
        """Move chunks to their digest, in place of what is there: chunks of the same bytes, damaged ones, too many."""
        sha256 = self._chunks.c.sha256
        await connection.execute(sa.delete(self._chunks).where(sha256 == received.sha256, some))
        if received.key != received.sha256:
            moved = sa.update(self._chunks).where(sha256 == received.key, some).values(sha256=received.sha256)
            try:
                await connection.execute(moved)
            except IntegrityError as error:  # others' chunks, which a stricter level than READ COMMITTED does not see
                raise self._engine.unavailable(error) from error

    async def _put_rows(self, connection: AsyncConnection, upsert: sa.Insert, rows: list[Row]) -> None:
        """Rows that are there are written again: that mends them, and keeps a purge from dropping them."""
        if rows:
            await self._backend.execute_many(connection, upsert, rows)

    def _upsert(self, table: sa.Table, *changed: str) -> sa.Insert:
        insert = self._backend.insert(table)
        values = {column: insert.excluded[column] for column in changed} | {"stored_at": sa.func.now()}
        upsert: sa.Insert = insert.on_conflict_do_update(index_elements=table.primary_key, set_=values)
        return upsert

    async def digest(self, version: Contents) -> str:
        whole = hashlib.sha256()
        async with aclosing(prefetch(self.read(version))) as batches:
            async for chunks in batches:
                await self._threads.run(update_all, whole, chunks)
        return whole.hexdigest()

    async def recorded(self, name: str, sha256: str) -> tuple[int, bytes] | None:
        rows = await self._engine.rows(self._recorded, name=name, sha256=sha256)
        return (rows[0][0], rows[0][1] or b"") if rows else None

    async def keep(self, connection: AsyncConnection, sha256: str) -> bool:
        kept = sa.update(self._blobs).where(self._blobs.c.sha256 == sha256).values(stored_at=sa.func.now())
        return bool((await connection.execute(kept)).rowcount)

    async def drop_unreferenced(
        self, connection: AsyncConnection, referenced: Any, before: datetime
    ) -> tuple[int, int]:
        blobs, chunks = self._blobs.c, self._chunks.c
        dropped = sa.and_(blobs.stored_at < before, blobs.sha256.not_in(referenced))
        sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(blobs.size), 0)).where(dropped)
        count, size = (await connection.execute(sums)).one()
        await connection.execute(sa.delete(self._blobs).where(dropped))
        has_blob = sa.exists().where(blobs.sha256 == chunks.sha256)
        orphaned = sa.and_(chunks.stored_at < before, ~has_blob, chunks.sha256.not_in(referenced))
        await connection.execute(sa.delete(self._chunks).where(orphaned))
        return int(count), int(size)


def _records_with_first_chunks(tables: Tables, backend: Backend) -> ByName:
    record, chunk, blob = tables.records, tables.chunks, tables.blobs
    first = sa.and_(
        chunk.c.sha256 == record.c.sha256, chunk.c.position == sa.literal_column("0"), record.c.deleted_at.is_(None)
    )
    of_record = sa.and_(blob.c.sha256 == record.c.sha256, blob.c.size == record.c.size)
    found = sa.select(*record_columns(record), chunk.c.data, chunk.c.digest, blob.c.chunks).select_from(record)
    return by_name(backend, record.c.name, found.outerjoin(chunk, first).outerjoin(blob, of_record))


def _recorded_blob(tables: Tables) -> sa.Select[Any]:
    record, version, chunk, blob = tables.records.c, tables.history.c, tables.chunks.c, tables.blobs.c
    name, sha256 = sa.bindparam("name", type_=sa.String), sa.bindparam("sha256", type_=sa.String)
    is_record = sa.exists().where(record.name == name, record.sha256 == sha256, record.deleted_at.is_(None))
    is_version = sa.exists().where(version.name == name, version.sha256 == sha256)
    is_first = sa.and_(chunk.sha256 == blob.sha256, chunk.position == sa.literal_column("0"))
    return (
        sa.select(blob.size, chunk.data)
        .select_from(sa.outerjoin(tables.blobs, tables.chunks, is_first))
        .where(blob.sha256 == sha256, sa.or_(is_record, is_version))
    )


def _some_chunks(chunk: sa.Table) -> sa.Select[Any]:
    return (
        sa.select(chunk.c.position, chunk.c.digest, chunk.c.data)
        .where(chunk.c.sha256 == sa.bindparam("sha256", type_=sa.String))
        .where(chunk.c.position >= sa.bindparam("start", type_=sa.BigInteger))
        .where(chunk.c.position < sa.bindparam("stop", type_=sa.BigInteger))
        .order_by(chunk.c.position)
    )


def _misfit(rows: Rows, wanted: range, size: int) -> str | None:
    """Return why these rows are not the wanted chunks of a blob of `size` bytes; None if they can be."""
    chunks = {position: data for position, _, data in rows}
    if len(chunks) > len(wanted):
        return f"there are more chunks than its {size} bytes need"
    for position in wanted:
        if position not in chunks:
            return f"chunk {position} is missing"
        if len(chunks[position]) != min(CHUNK, size - position * CHUNK):
            return f"chunk {position} has {len(chunks[position])} bytes"
    return None


def _damage(rows: Rows) -> str | None:
    """Return which of these chunks does not match its digest; None if all do."""
    wrong = (position for position, digest, data in rows if chunk_digest(position, data) != digest)
    return next((f"chunk {position} does not match its digest" for position in wrong), None)
