"""Versions of names: what a name was, and copies that were set aside. Each can be restored."""

import hashlib
from dataclasses import replace
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from ..content.sources import CHUNK, Source
from ..errors import CorruptBlob, DatabaseUnavailable, NotStored
from ..sql.engine import Engine
from ..sql.models import Contents, Purged, Record, record_values, to_utc
from ..sql.record_writer import RecordWriter
from .blob_store import BlobStore

KEEP = timedelta(days=30)  # how long versions are kept, if nothing else is said
GRACE = timedelta(hours=24)  # how long blobs without a record are kept: longer than any upload


class Versions:
    """Stores, mends, restores and purges versions, with the bytes behind them."""

    def __init__(self, engine: Engine, records: RecordWriter, blobs: BlobStore) -> None:
        self._engine = engine
        self._records = records
        self._blobs = blobs

    async def has_bytes(self, name: str, sha256: str) -> bool:
        """Whether a name's record or one of its versions has these bytes, and they can be read back unharmed."""
        blob = await self._blobs.recorded(name, sha256)
        if blob is None:
            return False
        size, first = blob
        if size <= CHUNK:
            return hashlib.sha256(first).hexdigest() == sha256
        try:
            return await self._blobs.digest(Contents(name, sha256, size, "", 0)) == sha256
        except CorruptBlob:
            return False

    async def set_aside(self, name: str, data: Source, *, modified_ns: int, reason: str) -> None:
        """Store a copy that must not be served as a version of its name; damaged bytes of a version are mended.

        A name without a record gets a tombstone.
        """
        received = await self._blobs.put(self._engine.write, data)
        values = record_values(name, received.sha256, received.size, modified_ns)

        async def work(connection: AsyncConnection) -> None:
            await self._records.put_tombstone(connection, values)
            record = await self._records.lock(connection, name)
            if record is None:
                raise DatabaseUnavailable(f"the record of {name!r} vanished while it was written; try again")
            await self._records.set_aside(connection, record, Contents(**values), reason)
            await self._engine.backend.limit_lock_waits(connection)
            await self._blobs.finish(connection, received)

        await self._engine.write(work)

    async def mend(self, record: Record, data: Source) -> None:
        """Write the bytes of a record again. Raises `CorruptBlob`, and changes nothing, if `data` are other bytes."""
        received = await self._blobs.put(self._engine.write, data)
        if received.sha256 != record.sha256:
            raise CorruptBlob(record.name, "the given bytes are not the recorded ones")
        await self._engine.write(lambda connection: self._blobs.finish(connection, received))

    async def undo(self, name: str, generation: int | None = None) -> Record:
        """Undo the last overwrite or deletion, or go back to `generation`. Raises `NotStored` if it is not there."""

        async def work(connection: AsyncConnection) -> Record:
            record = await self._records.lock(connection, name)
            if record is None:
                raise NotStored(f"{name!r} is not in the database; there is nothing to undo")
            await self._engine.backend.limit_lock_waits(connection)
            version = await self._records.earlier(connection, record, generation)
            if version is None:
                raise NotStored(f"{name!r} has no such earlier version; `selfheal history` lists them")
            if not await self._blobs.keep(connection, version.sha256):
                raise NotStored(f"the bytes of {name!r}, generation {version.generation}, were purged")
            return await self._records.change(connection, record, version)

        return await self._engine.write(work)

    async def purge(self, keep: timedelta, grace: timedelta = GRACE, *, dry_run: bool = False) -> Purged:
        """Drop history older than `keep`, then the blobs that nothing refers to and that are older than `grace`."""

        async def work(connection: AsyncConnection) -> Purged:
            now = to_utc((await connection.execute(select(func.now()))).scalar_one())
            versions = await self._records.drop_history(connection, now - keep)
            await self._engine.backend.limit_lock_waits(connection)
            blobs, size = await self._blobs.drop_unreferenced(connection, self._records.referenced(), now - grace)
            if dry_run:
                await connection.rollback()
            return Purged(versions, blobs, size)

        purged = await self._engine.write(work)
        return purged if dry_run else replace(purged, freed=await self._free_space())

    async def _free_space(self) -> int:
        backend, freed = self._engine.backend, 0
        while some := await self._engine.write(backend.free_some):
            freed += some
        if freed:
            await self._engine.read(backend.shrink)
        return freed
