"""Import from a table of another app: every row is an upload, saved as a new name."""

import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from .. import names
from ..aio.threads import Threads
from ..db import ImageStorage
from ..errors import SchemaError
from ..sql.foreign_table import ForeignRow, ForeignTable
from ..sql.models import Contents
from .foreign_names import to_name, with_digest
from .importer import Incoming, Items
from .new_uploads import in_groups, new_upload
from .one_by_one import FAILURES
from .outcomes import Outcome, Result, of_error, problem

_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+(?:; ?[\w-]+=[\w.+-]+)*", re.ASCII)


class TableSource:
    """The rows of a table: first those whose names are valid, then those whose names must be changed.

    A changed name that has other bytes already gets a part of its digest.
    """

    at_once = 1  # two rows may have the same name

    def __init__(self, table: ForeignTable, into: ImageStorage, threads: Threads) -> None:
        self._table = table
        self._into = into
        self._threads = threads
        self._has_others = False

    async def items(self) -> AsyncGenerator[Items, None]:
        """Yield every row, in the order of the table's key, in two passes."""
        async with aclosing(in_groups(self._valid())) as groups:
            async for group in groups:
                yield group
        if self._has_others:
            async for row in self._rows(lambda row: not _is_kept(row)):  # one by one: each may need another name
                item = await self._item(row, to_name(row.name))
                yield item if isinstance(item, Result) else [await self._renamed(item, str(row.name))]

    async def _valid(self) -> AsyncGenerator[Incoming | Result, None]:
        async for row in self._rows(_is_kept):
            yield await self._item(row, str(row.name))

    async def _rows(self, is_wanted: Callable[[ForeignRow], bool]) -> AsyncGenerator[ForeignRow, None]:
        async with aclosing(self._table.rows()) as rows:
            async for row in rows:
                if is_wanted(row):
                    yield row
                else:
                    self._has_others = True

    async def _item(self, row: ForeignRow, name: str) -> Incoming | Result:
        if not names.is_valid(name):
            return problem(str(row.name), Outcome.INVALID_NAME, f"no name can be made of it: {names.fault(name)}")
        if row.size is None:
            return problem(name, Outcome.FAILED, "its row has no bytes (NULL)")
        kind = row.type if isinstance(row.type, str) and len(row.type) < 256 and _TYPE.fullmatch(row.type) else ""
        try:
            return await new_upload(name, partial(self._table.read, row), self._threads, time.time_ns(), kind)
        except FAILURES as error:
            return of_error(name, error)

    async def _renamed(self, item: Incoming, origin: str) -> Incoming:
        record = item.record
        if await self._is_taken(record):
            record = replace(record, name=with_digest(record.name, record.sha256))
        return replace(item, record=record, small=None, origin=origin)

    async def _is_taken(self, contents: Contents) -> bool:
        """Whether a name has a record, or a tombstone, and never had these bytes."""
        try:
            if await self._into.find(contents.name) is None:
                return False
        except SchemaError:  # a dry run, without tables
            return False
        return not await self._into.versions.has_bytes(contents.name, contents.sha256)


def _is_kept(row: ForeignRow) -> bool:
    return to_name(row.name) == str(row.name)
