"""The bytes behind a digest, in chunks: written in short transactions, read a few at a time, each one checked."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib import import_module
from typing import Any, Protocol

from sqlalchemy import ColumnElement, Insert, Select, Table, and_, delete, exists, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..aio.single_flight import Places, ahead
from ..aio.threads import Threads
from ..content.digests import Digests, chunk_digest
from ..content.sources import CHUNK, Source
from ..content.sources import chunks as chunks_of
from ..errors import CorruptBlob
from ..sql.engine import Engine, unavailable
from ..sql.schema import Tables
from ..sql.statements import execute_many
from .chunk_rows import Received, Row, Taken, in_handfuls

_Rows = Sequence[Sequence[Any]]
_SHA256_OF_NOTHING = hashlib.sha256(b"").hexdigest()
READ_AT_ONCE = 8
"""Chunks in one query (2 MiB): what one reader holds in memory."""
WRITE_AT_ONCE = 24
"""Chunks in one transaction (6 MiB) of a large upload: others get their turn in between."""
LARGE_FROM = 16
"""Chunks (4 MiB) up to which any number of uploads may be held in memory at once."""
LARGE_UPLOADS_AT_ONCE = 2
"""How many larger ones may, of those that are on the disk and so come quickly: each holds up to 20 MiB."""
MOVED_AT_ONCE = 256
"""Chunks (64 MiB) that are moved in one transaction where nobody else can write meanwhile."""


class Write(Protocol):
    """Runs work in a transaction: one of its own, or the caller's."""

    async def __call__(self, work: Callable[[AsyncConnection], Awaitable[Any]], /) -> Any:
        """Run `work` and return what it returns."""


class Blobs:
    """The tables `image_blob` and `image_chunk`. Every method raises `DatabaseUnavailable` if there is no answer."""

    def __init__(self, engine: Engine, tables: Tables, read: Select[Any], threads: Threads) -> None:
        self.insert = _insert_of(engine.dialect)
        self._engine = engine
        self._read = read
        self._blobs = tables.blobs
        self._chunks = tables.chunks
        self._threads = threads
        self._places = Places(LARGE_UPLOADS_AT_ONCE)
        self._put_chunks = self._put(tables.chunks, "data", "digest")
        self._put_blobs = self._put(tables.blobs, "size", "chunks")

    async def read(
        self, name: str, sha256: str, size: int, first: int, at_once: int
    ) -> AsyncGenerator[list[bytes], None]:
        """The chunks of a blob of `size` bytes from number `first` on, some `at_once`, each checked by its digest.

        No connection is held between them. Raises `CorruptBlob`, of `name`; the whole digest is the reader's care.
        """
        async with aclosing(self._read_rows(name, sha256, size, first, at_once)) as handfuls:
            async for rows in handfuls:
                why = await self._threads.run(_damage, rows)
                if why is not None:
                    raise CorruptBlob(name, why)
                yield [data for _, _, data in rows]

    async def read_whole(
        self, name: str, sha256: str, size: int, first: bytes | None = None
    ) -> AsyncGenerator[list[bytes], None]:
        """As `read`, for who believes none of it before the whole digest is checked: hashing once is enough then.

        `first` is the first chunk, if it has been read already.
        """
        start = 0
        if isinstance(first, bytes) and len(first) == CHUNK < size:
            yield [first]
            start = 1
        async with aclosing(self._read_rows(name, sha256, size, start, READ_AT_ONCE)) as handfuls:
            async for rows in handfuls:
                yield [data for _, _, data in rows]

    async def _read_rows(
        self, name: str, sha256: str, size: int, first: int, at_once: int
    ) -> AsyncGenerator[_Rows, None]:
        if size < 0 or (size == 0 and sha256 != _SHA256_OF_NOTHING):
            raise CorruptBlob(name, f"its size is {size}")
        count = -(-size // CHUNK)
        for start in range(first, count, at_once):
            wanted = range(start, min(count, start + at_once))
            stop = wanted.stop + (wanted.stop == count)  # one more than the last: there must be none
            rows = await self._engine.rows(self._read, sha256=sha256, start=wanted.start, stop=stop)
            why = _misfit(rows, wanted, size)
            if why is not None:
                raise CorruptBlob(name, why)
            yield rows

    async def receive(
        self, write: Write, data: Source, known: Digests | None = None, *, is_within: bool = False
    ) -> Received:
        """Take bytes in, writing all but the last chunks in transactions of `write`, or `is_within` the caller's.

        If their digests are `known`, each chunk is compared (`Unsettled` if it differs) and goes where it belongs. If
        not, they stand under a key of their own until the digest is known; those of a caller's transaction do, too:
        it takes no lock before that of a record, and waits for no place, for its locks are what others may wait for.
        """
        needs_place = known is not None and len(known.chunks) > LARGE_FROM and not is_within
        async with self._places.one() if needs_place else nullcontext():
            received = await self._receive(write, data, Taken(known, in_place=not is_within))
        return await self._move(write, received)

    async def _receive(self, write: Write, data: Source, taken: Taken) -> Received:
        rows: list[Row] = []
        async with aclosing(ahead(self._batches(taken, data))) as batches:
            async for rows, is_last in batches:
                if not is_last:
                    await write(partial(self._put_some, rows=rows, is_in_place=taken.is_in_place))
        return taken.received(rows)

    async def _batches(self, taken: Taken, data: Source) -> AsyncGenerator[tuple[list[Row], bool], None]:
        """The rows of one transaction after the other, and whether they are the last ones."""
        held: list[Row] = []
        async with aclosing(ahead(in_handfuls(chunks_of(data, self._threads)))) as handfuls:
            async for chunks in handfuls:
                if len(held) >= WRITE_AT_ONCE:
                    yield held, False
                    held = []
                held += await self._threads.run(taken.rows, chunks)
        yield held, True

    async def _move(self, write: Write, received: Received) -> Received:
        """Let written chunks stand where they belong, all but the last of them, which `finish` moves.

        A transaction locks everybody out of SQLite, so there it takes several; elsewhere `finish` does it in one.
        """
        moved = received.moved
        while self._engine.has_one_writer and moved + MOVED_AT_ONCE <= received.written:
            some = self._chunks.c.position.between(moved, moved + MOVED_AT_ONCE - 1)
            await write(partial(self._replace, received, some))
            moved += MOVED_AT_ONCE
        return replace(received, moved=moved)

    async def _put_some(self, connection: AsyncConnection, rows: list[Row], *, is_in_place: bool) -> None:
        if is_in_place:
            await self._lock(connection, rows[0]["sha256"])
        await self.put_chunks(connection, rows)

    async def _lock(self, connection: AsyncConnection, sha256: str) -> None:
        """Let nobody else write chunks of these bytes, in several transactions, for as long as this one lasts.

        Locks of rows are not enough: an UPDATE takes them in no order, and there is none for a row yet to come.
        """
        if not self._engine.has_one_writer:
            key = int(sha256[:16], 16) - (1 << 63)
            await connection.execute(select(func.pg_advisory_xact_lock(key)))

    async def finish(self, connection: AsyncConnection, received: Received) -> None:
        """Make a received blob whole. Its row comes first: who stores, or purges, the same bytes waits there."""
        if received.written:
            await self._lock(connection, received.sha256)
        blob = {"sha256": received.sha256, "size": received.size, "chunks": received.chunks}
        await self.put_blobs(connection, [blob])
        await self.put_chunks(connection, received.rows)
        await self._replace(received, self._chunks.c.position >= received.moved, connection)

    async def _replace(self, received: Received, some: ColumnElement[bool], connection: AsyncConnection) -> None:
        """Let chunks take the places of those that stand there: of the same bytes, or damaged, or too many."""
        sha256 = self._chunks.c.sha256
        await connection.execute(delete(self._chunks).where(sha256 == received.sha256, some))
        if received.key != received.sha256:
            moved = update(self._chunks).where(sha256 == received.key, some).values(sha256=received.sha256)
            try:
                await connection.execute(moved)
            except IntegrityError as error:  # others' chunks, which a stricter level than READ COMMITTED does not see
                raise unavailable(error) from error

    async def put_chunks(self, connection: AsyncConnection, rows: list[Row]) -> None:
        """Write chunks. Those that are there are written again: that mends them, and tells a purge they are wanted."""
        await execute_many(connection, self._put_chunks, rows)

    async def put_blobs(self, connection: AsyncConnection, rows: list[Row]) -> None:
        """Say that the chunks of these blobs are all there."""
        await execute_many(connection, self._put_blobs, rows)

    def _put(self, table: Table, *changed: str) -> Insert:
        """An INSERT that writes these columns of a row that is there already, and the time."""
        put = self.insert(table)
        values = {column: put.excluded[column] for column in changed} | {"stored_at": func.now()}
        upsert: Insert = put.on_conflict_do_update(index_elements=table.primary_key, set_=values)
        return upsert

    async def keep(self, connection: AsyncConnection, sha256: str) -> bool:
        """Tell a purge that a blob is wanted again; False if it is gone."""
        kept = update(self._blobs).where(self._blobs.c.sha256 == sha256).values(stored_at=func.now())
        return bool((await connection.execute(kept)).rowcount)

    async def sweep(self, connection: AsyncConnection, wanted: Any, before: datetime) -> tuple[int, int]:
        """Drop what is older than `before` and not among the digests of the query `wanted`; (blobs, bytes) dropped."""
        blobs, chunks = self._blobs.c, self._chunks.c
        dropped = and_(blobs.stored_at < before, blobs.sha256.not_in(wanted))
        sums = select(func.count(), func.coalesce(func.sum(blobs.size), 0)).where(dropped)
        count, size = (await connection.execute(sums)).one()
        await connection.execute(delete(self._blobs).where(dropped))
        has_blob = exists().where(blobs.sha256 == chunks.sha256)
        orphaned = and_(chunks.stored_at < before, ~has_blob, chunks.sha256.not_in(wanted))
        await connection.execute(delete(self._chunks).where(orphaned))
        return int(count), int(size)


def _insert_of(dialect: str) -> Callable[[Table], Any]:
    """The dialect's own INSERT, which knows ON CONFLICT; only the one that is used is imported: that takes 0.1 s."""
    module = import_module(f"sqlalchemy.dialects.{dialect}")
    insert: Callable[[Table], Any] = module.insert
    return insert


def _misfit(rows: _Rows, wanted: range, size: int) -> str | None:
    """Why these rows are not the wanted chunks of a blob of `size` bytes, in their order; None if they can be."""
    got = {position: data for position, _, data in rows}
    if len(got) > len(wanted):
        return f"there are more chunks than its {size} bytes need"
    for position in wanted:
        if position not in got:
            return f"chunk {position} is missing"
        if not isinstance(got[position], bytes):
            return f"chunk {position} is not bytes"
        if len(got[position]) != min(CHUNK, size - position * CHUNK):
            return f"chunk {position} has {len(got[position])} bytes"
    return None


def _damage(rows: _Rows) -> str | None:
    """Which of these chunks is not what its digest says; None if all are."""
    wrong = (position for position, digest, data in rows if chunk_digest(position, data) != digest)
    return next((f"chunk {position} does not match its digest" for position in wrong), None)
