"""The bytes behind a digest, in chunks: written in short transactions, read a few at a time, each one checked."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from uuid import uuid4

from sqlalchemy import Select, Table, and_, delete, exists, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from .engine import Engine
from .errors import CorruptBlob
from .sources import CHUNK, Source
from .sources import chunks as chunks_of
from .tables import Tables
from .threads import Threads

_SHA256_OF_NOTHING = hashlib.sha256(b"").hexdigest()
READ_AT_ONCE = 8
"""Chunks in one query (2 MiB): what one reader holds in memory."""
WRITE_AT_ONCE = 16
"""Chunks in one transaction (4 MiB) of a large upload: others get their turn in between."""


class Write(Protocol):
    """Runs work in a transaction: one of its own, or the caller's."""

    async def __call__(self, work: Callable[[AsyncConnection], Awaitable[Any]], /) -> Any:
        """Run `work` and return what it returns."""


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes that came: the last chunks are still `rows` in memory, those before them stand under `key`."""

    key: str
    sha256: str
    size: int
    chunks: int
    rows: list[dict[str, Any]]


def chunk_digest(position: int, data: bytes) -> bytes:
    """The digest by which a chunk is trusted before the last one has come; it binds the chunk to its position."""
    digest = hashlib.sha256(position.to_bytes(8, "big"))
    digest.update(data)
    return digest.digest()


def chunk_rows(key: str, position: int, chunks: Sequence[bytes]) -> list[dict[str, Any]]:
    """Rows for consecutive chunks, the first of them at `position`."""
    return [
        {"sha256": key, "position": index, "digest": chunk_digest(index, data), "data": data}
        for index, data in enumerate(chunks, position)
    ]


class Blobs:
    """The tables `image_blob` and `image_chunk`. Every method raises `DatabaseUnavailable` if there is no answer."""

    def __init__(self, engine: Engine, tables: Tables, read: Select[Any], threads: Threads) -> None:
        self._engine = engine
        self._read = read
        self._blobs = tables.blobs
        self._chunks = tables.chunks
        self._threads = threads

    async def read(self, name: str, sha256: str, size: int, first: int = 0) -> AsyncGenerator[bytes, None]:
        """The chunks of a blob of `size` bytes from number `first` on, each checked against its own digest.

        No connection is held between chunks. Raises `CorruptBlob`, of `name`; the whole digest is the reader's care.
        """
        if size < 0 or (size == 0 and sha256 != _SHA256_OF_NOTHING):
            raise CorruptBlob(name, f"its size is {size}")
        count = -(-size // CHUNK)
        for start in range(first, count, READ_AT_ONCE):
            wanted = range(start, min(count, start + READ_AT_ONCE))
            stop = wanted.stop + (wanted.stop == count)  # one more than the last: there must be none
            rows = await self._engine.rows(self._read, sha256=sha256, start=wanted.start, stop=stop)
            why = await self._threads.run(_fault, rows, wanted, size)
            if why is not None:
                raise CorruptBlob(name, why)
            for _, _, data in rows:
                yield data

    async def receive(self, write: Write, data: Source) -> Received:
        """Take bytes in, writing all but the last chunks in transactions of `write`.

        Until `finish` they stand under a key of their own: nobody knows yet whether they are what was promised.
        """
        key = f"upload-{uuid4().hex}"
        whole, size, position = hashlib.sha256(), 0, 0
        held: list[bytes] = []
        async with aclosing(chunks_of(data, self._threads)) as source:
            async for chunk in source:
                if len(held) == WRITE_AT_ONCE:
                    rows = await self._threads.run(chunk_rows, key, position, held)
                    await write(lambda connection, rows=rows: self.put_chunks(connection, rows))  # type: ignore[misc]
                    position, held = position + len(held), []
                await self._threads.run(whole.update, chunk)
                size += len(chunk)
                held.append(chunk)
        digest = whole.hexdigest()
        key = key if position else digest
        rows = await self._threads.run(chunk_rows, key, position, held)
        return Received(key, digest, size, position + len(rows), rows)

    async def finish(self, connection: AsyncConnection, received: Received) -> None:
        """Make a received blob whole. Its row comes first: who stores, or purges, the same bytes waits there."""
        chunks = self._chunks.c
        blob = {"sha256": received.sha256, "size": received.size, "chunks": received.chunks}
        await self.put_blobs(connection, [blob])
        await self.put_chunks(connection, received.rows)
        moves = received.key != received.sha256
        stale = and_(chunks.sha256 == received.sha256, chunks.position >= (0 if moves else received.chunks))
        await connection.execute(delete(self._chunks).where(stale))
        if moves:
            moved = update(self._chunks).where(chunks.sha256 == received.key).values(sha256=received.sha256)
            await connection.execute(moved)

    async def put_chunks(self, connection: AsyncConnection, rows: list[dict[str, Any]]) -> None:
        """Write chunks. Those that are there are written again: that mends them, and tells a purge they are wanted."""
        if rows:
            put = self.insert(self._chunks)
            changed = {"data": put.excluded.data, "digest": put.excluded.digest, "stored_at": func.now()}
            await connection.execute(
                put.on_conflict_do_update(index_elements=["sha256", "position"], set_=changed), rows
            )

    async def put_blobs(self, connection: AsyncConnection, rows: list[dict[str, Any]]) -> None:
        """Say that the chunks of these blobs are all there."""
        put = self.insert(self._blobs)
        changed = {"size": put.excluded.size, "chunks": put.excluded.chunks, "stored_at": func.now()}
        await connection.execute(put.on_conflict_do_update(index_elements=["sha256"], set_=changed), rows)

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

    def insert(self, table: Table) -> Any:
        """The dialect's own INSERT, which knows ON CONFLICT."""
        return sqlite.insert(table) if self._engine.dialect == "sqlite" else postgresql.insert(table)


def _fault(rows: Sequence[Sequence[Any]], wanted: range, size: int) -> str | None:
    """Why these rows are not the wanted chunks of a blob of `size` bytes; None if they are."""
    got = {position: (digest, data) for position, digest, data in rows}
    if len(got) > len(wanted):
        return f"there are more chunks than its {size} bytes need"
    for position in wanted:
        if position not in got:
            return f"chunk {position} is missing"
        digest, data = got[position]
        if not isinstance(data, bytes):
            return f"chunk {position} is not bytes"
        if len(data) != min(CHUNK, size - position * CHUNK):
            return f"chunk {position} has {len(data)} bytes"
        if chunk_digest(position, data) != digest:
            return f"chunk {position} does not match its digest"
    return None
