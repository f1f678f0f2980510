"""Import from a table of another app: every row is an upload, saved as a new name."""

import hashlib
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from .. import names
from ..aio.threads import Threads
from ..content.content_types import content_type
from ..content.sources import Source, read_chunks
from ..db import ImageStorage
from ..errors import SchemaError, SelfHealError
from ..sql.foreign_table import ForeignRow, ForeignTable
from ..sql.models import Contents
from .foreign_names import to_name, with_digest
from .importer import Incoming
from .outcomes import Outcome, Result, of_error, problem

_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+(?:; ?[\w-]+=[\w.+-]+)*", re.ASCII)


async def hashed(name: str, data: Source, threads: Threads, modified_ns: int, kind: str = "") -> Contents:
    """Return what bytes without a record are: they are read once for that, and again when they are stored."""
    whole, size = hashlib.sha256(), 0
    async with aclosing(read_chunks(data, threads)) as chunks:
        async for chunk in chunks:
            await threads.run(whole.update, chunk)
            size += len(chunk)
    return Contents(name, whole.hexdigest(), size, kind or content_type(name), modified_ns)


class TableSource:
    """The rows of a table: first those whose names are valid, then those whose names must be changed.

    A changed name that has other bytes already gets a part of its digest.
    """

    at_once = 1  # two rows may have the same name

    def __init__(self, table: ForeignTable, into: ImageStorage, threads: Threads) -> None:
        self._table = table
        self._into = into
        self._threads = threads

    async def items(self) -> AsyncGenerator[Incoming | Result, None]:
        """Yield every row, in the order of the table's key, in two passes."""
        async for row in self._rows(lambda row: to_name(row.name) == str(row.name)):
            yield await self._item(row, str(row.name), "")
        async for row in self._rows(lambda row: to_name(row.name) != str(row.name)):
            yield await self._item(row, to_name(row.name), str(row.name))

    async def _rows(self, is_wanted: Callable[[ForeignRow], bool]) -> AsyncGenerator[ForeignRow, None]:
        async with aclosing(self._table.rows()) as rows:
            async for row in rows:
                if is_wanted(row):
                    yield row

    async def _item(self, row: ForeignRow, name: str, origin: str) -> Incoming | Result:
        if not names.is_valid(name):
            return problem(str(row.name), Outcome.INVALID_NAME, f"no name can be made of it: {names.fault(name)}")
        if row.size is None:
            return problem(name, Outcome.FAILED, "its row has no bytes (NULL)")
        kind = row.type if isinstance(row.type, str) and len(row.type) < 256 and _TYPE.fullmatch(row.type) else ""
        try:
            contents = await hashed(name, self._table.read(row), self._threads, time.time_ns(), kind)
        except SelfHealError as error:
            return of_error(name, error)
        if origin and await self._is_taken(contents):
            name = with_digest(name, contents.sha256)
            contents = Contents(name, contents.sha256, contents.size, contents.content_type, contents.modified_ns)
        return Incoming(contents, (), lambda _contents: self._table.read(row), origin)

    async def _is_taken(self, contents: Contents) -> bool:
        """Whether a name has a record, or a tombstone, and never had these bytes."""
        try:
            if await self._into.find(contents.name) is None:
                return False
        except SchemaError:  # a dry run, without tables
            return False
        return not await self._into.versions.has_bytes(contents.name, contents.sha256)
