"""Images: a record with the bytes behind it, written in one transaction, or in several with the record last."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from .. import names
from ..content.digests import Digests
from ..content.sources import Source
from ..errors import UnstorableName
from ..sql.catalogue import Catalogue
from ..sql.engine import Engine
from ..sql.models import Record, SmallFile, record_values
from ..sql.record_writer import RecordWriter
from ..sql.transactions import Write
from .blob_store import BlobStore

Put = Callable[[AsyncConnection, dict[str, Any]], Awaitable[Record]]


class ImageWriter:
    """Stores images. Every transaction locks in one order (record, history, blob, chunks): none wait in a circle."""

    def __init__(self, engine: Engine, records: RecordWriter, blobs: BlobStore, catalogue: Catalogue) -> None:
        self._engine = engine
        self._records = records
        self._blobs = blobs
        self._catalogue = catalogue

    async def store(
        self,
        name: str,
        data: Source,
        write: Write | None = None,
        *,
        content_type: str | None,
        modified_ns: int,
        known: Digests | None,
        put: Put,
    ) -> Record:
        """Store bytes under a name, with `write` in the caller's transaction; see `ImageStorage.store_image`.

        `put` writes the record.
        """
        received = await self._blobs.put(write or self._engine.write, data, known, in_transaction=write is not None)
        values = record_values(name, received.sha256, received.size, modified_ns)
        if content_type is not None:
            values["content_type"] = content_type

        async def work(connection: AsyncConnection) -> Record:
            record = await put(connection, values)
            if write is None:
                await self._engine.backend.limit_lock_waits(connection)
            await self._blobs.finish(connection, received)
            return record

        record: Record = await (write or self._engine.write)(work)
        return record

    async def store_many(self, files: Sequence[SmallFile]) -> set[str]:
        """Store files under new names; see `ImageStorage.store_many`."""
        if not files:
            return set()
        by_name = {names.check(file.name): file for file in files}
        values = [_values(file) for _, file in sorted(by_name.items())]

        async def work(connection: AsyncConnection) -> None:
            await self._records.put_new(connection, values)
            await self._records.refuse_conflicts(connection, list(by_name))
            await self._engine.backend.limit_lock_waits(connection)
            await self._blobs.put_files(connection, files)

        try:
            await self._engine.write(work)
        except UnstorableName:
            half = len(files) // 2  # the others are stored without the name that does not fit
            return await self.store_many(files[:half]) | await self.store_many(files[half:]) if half else set()
        stored = await self._catalogue.digests(by_name)
        return {name for name, file in by_name.items() if stored.get(name) == file.digests.whole}


def _values(file: SmallFile) -> dict[str, Any]:
    values = record_values(file.name, file.digests.whole, file.size, file.modified_ns)
    return values | ({"content_type": file.content_type} if file.content_type else {})
