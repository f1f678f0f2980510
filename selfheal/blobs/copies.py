"""Copies of records, versions and bytes from another catalogue: bytes first, and checked before they count."""

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from ..content.sources import Source
from ..errors import CorruptBlob
from ..sql.engine import Engine
from ..sql.models import Contents, Record, Version
from ..sql.record_copies import RecordCopies
from .blob_store import BlobStore
from .chunk_rows import Received


class Copies:
    """Writes what another catalogue has, with the same generations, times and history."""

    def __init__(self, engine: Engine, records: RecordCopies, blobs: BlobStore) -> None:
        self._engine = engine
        self._records = records
        self._blobs = blobs

    async def put_bytes(self, contents: Contents, data: Source) -> None:
        """Store the bytes of a version. Raises `CorruptBlob`, and stores nothing, if `data` are other bytes."""
        received = await self._receive(contents, data)
        if received is not None:
            await self._engine.write(lambda connection: self._blobs.finish(connection, received))

    async def put(self, record: Record, data: Source, versions: Sequence[Version], *, over: Record | None) -> bool:
        """Store a record, its bytes, and its versions, whose bytes are stored; False if the name is not `over` now."""
        received = None if record.is_deleted else await self._receive(record, data)

        async def work(connection: AsyncConnection) -> bool:
            is_put = await self._records.put(connection, record, versions, over)
            if is_put and received is not None:
                await self._engine.backend.limit_lock_waits(connection)
                await self._blobs.finish(connection, received)
            return is_put

        return await self._engine.write(work)

    async def _receive(self, contents: Contents, data: Source) -> Received | None:
        """Return bytes that are new, checked; None if the database has them."""
        sha256 = contents.sha256
        if await self._is_whole(contents) and await self._engine.write(lambda one: self._blobs.keep(one, sha256)):
            return None
        received = await self._blobs.put(self._engine.write, data)
        if (received.sha256, received.size) != (sha256, contents.size):
            raise CorruptBlob(contents.name, "the bytes in the source are not the recorded ones")
        return received

    async def _is_whole(self, contents: Contents) -> bool:
        try:
            return await self._blobs.digest(contents) == contents.sha256
        except CorruptBlob:
            return False
