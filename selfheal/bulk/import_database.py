"""Import from another selfheal database: records, tombstones, history and bytes."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from ..db import ImageStorage
from ..errors import CorruptBlob, NotStored, SchemaError, SettingsError
from ..sql.models import Contents
from .importer import Incoming, Items


class DatabaseSource:
    """Everything that another catalogue has."""

    at_once = 4

    def __init__(self, database: ImageStorage) -> None:
        self._database = database

    async def items(self) -> AsyncGenerator[Items, None]:
        """Yield every record with its history as it was then; the next run takes what changes meanwhile.

        Raises `SettingsError` if there are no tables.
        """
        self._database.home.settle()
        try:
            async with aclosing(self._records()) as records:
                async for record in records:
                    yield record
        except SchemaError as error:
            if error.__cause__ is None:  # the version of the tables, or the file: the error says so
                raise
            detail = "check --from, --from-table-prefix and --from-schema; for a table of another app, use --table"
            raise SettingsError(f"{self._database.where} has no tables of selfheal to import from; {detail}") from error

    async def _records(self) -> AsyncGenerator[Items, None]:
        async with aclosing(self._database.pages(deleted=None)) as pages:
            async for page in pages:
                for record in page:
                    versions = await self._database.history(record.name)
                    before = [one for one in versions if one.generation < record.generation]
                    yield [Incoming(record, before, self._read)]

    async def _read(self, one: Contents) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a record or a version. Raises `NotStored` if it is not in the source any more."""
        try:
            async with aclosing(self._database.read(one)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except CorruptBlob as error:
            now = [await self._database.find(one.name), *await self._database.history(one.name)]
            if one in now:
                raise
            raise NotStored(f"{one.name!r} was changed or purged in the source meanwhile; run again") from error
