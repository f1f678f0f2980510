"""Import from another selfheal database: records, tombstones, history and bytes."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from ..db import ImageStorage
from .importer import Incoming, Items


class DatabaseSource:
    """Everything that another catalogue has."""

    at_once = 4

    def __init__(self, database: ImageStorage) -> None:
        self._database = database

    async def items(self) -> AsyncGenerator[Items, None]:
        """Yield every record with its history as it was then; the next run takes what changes meanwhile."""
        self._database.home.settle()
        async with aclosing(self._database.pages(deleted=None)) as pages:
            async for page in pages:
                for record in page:
                    versions = await self._database.history(record.name)
                    before = [one for one in versions if one.generation < record.generation]
                    yield [Incoming(record, before, self._database.read)]
