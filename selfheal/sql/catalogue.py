"""The catalogue: reads of records and their history, one name or many at a time."""

import os
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

from sqlalchemy import Select

from .backend import Rows
from .engine import Engine
from .models import (
    KeyRange,
    Record,
    Summary,
    Total,
    Version,
    to_integer,
    to_record,
    to_text,
    to_version,
)
from .queries import Queries
from .schema import Tables

_LAST = "\U0010ffff"
"""No character comes after it."""


class Catalogue:
    """Reads `image_storage` and `image_history`. Every method may raise `DatabaseUnavailable`."""

    def __init__(self, engine: Engine, tables: Tables) -> None:
        self._engine = engine
        self._queries = Queries(tables, engine.backend)

    async def find(self, wanted: Iterable[str]) -> dict[str, Record]:
        """Return the records, tombstones among them, of the names that have one."""
        return {row[0]: to_record(row) for row in await self._engine.rows_by_name(self._queries.records, wanted)}

    async def generations(self, wanted: Iterable[str]) -> dict[str, int]:
        """Return the generations of the names that have a record: they show whether a name was changed meanwhile."""
        return {row[0]: row[1] for row in await self._engine.rows_by_name(self._queries.generations, wanted)}

    def generation_in_thread(self, name: str) -> int | None:
        """As `generations`, for one name in the calling thread; see `Engine.rows_in_thread`."""
        rows = self._engine.rows_in_thread(self._queries.generations.one, name=name)
        return rows[0][1] if rows else None

    async def digests(self, wanted: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 of the living records of names."""
        return {row[0]: row[1] for row in await self._engine.rows_by_name(self._queries.digests, wanted)}

    async def history(self, name: str) -> list[Version]:
        """Return the versions of a name, newest first."""
        return [to_version(row) for row in await self._engine.rows_by_name(self._queries.history, [name])]

    async def count(self) -> int:
        """Return the number of living records."""
        return int((await self._engine.rows(self._queries.count))[0][0])

    async def total(self) -> Total:
        """Return the number and the bytes of the living records."""
        return Total(*(await self._engine.rows(self._queries.total))[0])

    async def pages(self, *, deleted: bool | None, size: int) -> AsyncGenerator[list[Record], None]:
        """Yield records in the order of names, `size` at a time: the living, the deleted, or (None) all."""
        after = ""
        while rows := await self._engine.rows(self._queries.pages[deleted], after=self._bound(after), size=size):
            yield [to_record(row) for row in rows]
            if not _is_text(rows):
                return
            after = rows[-1][0]

    async def children(self, below: str, size: int = 1000) -> tuple[set[str], set[str]]:
        """Return the folders and the files right below `below`, which is empty or ends with a slash.

        Names are read in pages; after each one, the rest of the folder in which it ends is skipped.
        """
        folders: set[str] = set()
        files: set[str] = set()
        after = below
        while rows := await self._engine.rows(self._queries.pages[False], after=self._bound(after), size=size):
            found = [row[0].removeprefix(below) for row in rows if isinstance(row[0], str) and row[0].startswith(below)]
            folders.update(name.partition("/")[0] for name in found if "/" in name)
            files.update(name for name in found if "/" not in name)
            if len(found) < size:
                break
            folder, slash, _ = found[-1].partition("/")
            after = max(below + found[-1], f"{below}{folder}/{_LAST}" if slash else "", key=os.fsencode)
        return folders, files

    async def key_ranges(self, size: int) -> AsyncGenerator[KeyRange, None]:
        """Yield ranges that cover all names; each has at most `size` records, and those that are saved meanwhile."""
        first = ""
        query = self._queries.next_range
        while (rows := await self._engine.rows(query, first=self._bound(first), size=size)) and _is_text(rows):
            yield KeyRange(first, rows[-1][0])
            first = rows[-1][0]
        yield KeyRange(first, None)

    async def summary(self, key_range: KeyRange) -> Summary:
        """Return a range of names as one row."""
        return Summary(*(await self._rows_in(self._queries.summary, key_range))[0])

    async def names_in(self, key_range: KeyRange, *, deleted: bool = False) -> list[tuple[str, int]]:
        """Return the names in a range, in order, with the sizes of their records: the living ones, or the deleted."""
        rows = await self._rows_in(self._queries.names[deleted], key_range)
        return [(to_text(row[0]), to_integer(row[1])) for row in rows]

    async def _rows_in(self, query: Mapping[bool, Select[Any]], key_range: KeyRange) -> Rows:
        bounds = {"first": self._bound(key_range.first)}
        if key_range.stop is not None:
            bounds["stop"] = self._bound(key_range.stop)
        return await self._engine.rows(query[key_range.stop is None], **bounds)

    def _bound(self, name: str) -> Any:
        return self._engine.backend.bound_value(name)


def _is_text(rows: Rows) -> bool:
    """Whether the last name is a text: SQLite sorts bytes, which another program can have written, after all texts."""
    return isinstance(rows[-1][0], str)
