"""What is asked of the catalogue, each question made once: a query that stays the same object is compiled once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    ColumnElement,
    DateTime,
    Double,
    Integer,
    Select,
    String,
    Table,
    and_,
    any_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    or_,
    select,
    text,
    true,
)

from .schema import Tables


@dataclass(frozen=True, slots=True)
class ByName:
    """One question, about `one` name and about `many`: a plan for any name can be kept, one for any list cannot."""

    one: Select[Any]
    many: Select[Any]


class Queries:
    """The questions about records, in the words of one dialect. A record's columns come in the table's order."""

    def __init__(self, tables: Tables, dialect: str) -> None:
        self._is_sqlite = dialect == "sqlite"
        record, chunk, blob, version = tables.records, tables.chunks, tables.blobs, tables.history
        among = self._among(record.c.name)
        alive, dead = record.c.deleted_at.is_(None), record.c.deleted_at.is_not(None)
        first = and_(
            chunk.c.sha256 == record.c.sha256, chunk.c.position == literal_column("0"), record.c.deleted_at.is_(None)
        )
        of_record = and_(blob.c.sha256 == record.c.sha256, blob.c.size == record.c.size)
        self.find: Select[Any] = select(record).where(among)
        self.generations = self._by_name(record.c.name, select(record.c.name, record.c.generation))
        self.digests: Select[Any] = select(record.c.name, record.c.sha256).where(among).where(alive)
        found = select(record, chunk.c.data, chunk.c.digest, blob.c.chunks).select_from(record)
        self.fetch = self._by_name(record.c.name, found.outerjoin(chunk, first).outerjoin(blob, of_record))
        self.history: Select[Any] = (
            select(version)
            .where(version.c.name == bindparam("name", type_=String))
            .order_by(version.c.generation.desc())
        )
        after = self._bound("after")
        size = bindparam("size", type_=Integer)
        page = select(record).where(record.c.name > after).order_by(record.c.name).limit(size)
        self.pages: dict[bool | None, Select[Any]] = {
            False: page.where(alive),
            True: page.where(dead),
            None: page.where(true()),
        }
        begun = record.c.name >= self._bound("first")
        self.next_range: Select[Any] = (
            select(record.c.name).where(begun).order_by(record.c.name).limit(literal_column("1")).offset(size)
        )
        in_range = {True: begun, False: and_(begun, record.c.name < self._bound("stop"))}
        names = select(record.c.name, record.c.size).order_by(record.c.name)
        self.names = {
            deleted: {is_last: names.where(which).where(within) for is_last, within in in_range.items()}
            for deleted, which in ((False, alive), (True, dead))
        }
        summary = self._summary(record)
        self.summary = {is_last: summary.where(within) for is_last, within in in_range.items()}
        overlap = text("datetime('now', '-60 seconds')" if self._is_sqlite else "now() - interval '60 seconds'")
        self.moment: Select[Any] = select(overlap)
        self.changes: Select[Any] = (
            select(record.c.name, record.c.generation, overlap)
            .where(record.c.generation > literal_column("1"))
            .where(record.c.changed_at >= bindparam("since", type_=DateTime(timezone=True)))
            .limit(bindparam("size", type_=Integer))
        )
        self.count: Select[Any] = select(func.count()).select_from(record).where(alive)
        self.chunks: Select[Any] = (
            select(chunk.c.position, chunk.c.digest, chunk.c.data)
            .where(chunk.c.sha256 == bindparam("sha256", type_=String))
            .where(chunk.c.position >= bindparam("start", type_=BigInteger))
            .where(chunk.c.position < bindparam("stop", type_=BigInteger))
            .order_by(chunk.c.position)
        )

    def as_list(self, wanted: Iterable[str]) -> Any:
        """Many names as the one value that a question about many takes."""
        return json.dumps(list(wanted)) if self._is_sqlite else list(wanted)

    def bounds(self, **names: Any) -> dict[str, Any]:
        """The values that a query takes for names between which it looks, as the driver gave them."""
        if not self._is_sqlite:
            return names
        bound: dict[str, Any] = {}
        for which, name in names.items():
            is_text = isinstance(name, str)
            bound[f"{which}_is_text"] = is_text
            bound[which] = name.encode(errors="surrogateescape") if is_text else name
        return bound

    def _bound(self, which: str) -> ColumnElement[Any]:
        """SQLite keeps what others write, text that is no UTF-8 among it, which can be bound as bytes only."""
        name = bindparam(which, type_=String)
        if not self._is_sqlite:
            return name
        return case((bindparam(f"{which}_is_text", type_=Boolean), cast(name, String)), else_=name)

    def _summary(self, record: Table) -> Select[Any]:
        """Records as one row, the columns in the order of a `Summary`: many rows cost ten times as much."""
        name, size, alive, count = record.c.name, record.c.size, record.c.deleted_at.is_(None), func.count()
        # what char(10) gives is copied for each name: a fifth of the time
        newline: ColumnElement[str] = literal_column("'\n'")
        if self._is_sqlite:
            lines, total = func.group_concat(name, newline), func.total(size)  # sum() can overflow
            is_unsound = or_(size < 0, func.typeof(size) != literal_column("'integer'"))
        else:
            lines, total, is_unsound = func.string_agg(name, newline), func.sum(size), size < 0
        return select(
            func.coalesce(lines.filter(alive), literal_column("''")),
            count.filter(alive),
            cast(func.coalesce(total.filter(alive), literal_column("0")), Double),
            count.filter(and_(alive, is_unsound)),
            count.filter(record.c.deleted_at.is_not(None)),
        ).select_from(record)

    def _by_name(self, name: ColumnElement[str], query: Select[Any]) -> ByName:
        return ByName(query.where(name == bindparam("name", type_=String)), query.where(self._among(name)))

    def _among(self, name: ColumnElement[str]) -> ColumnElement[bool]:
        """Whether a name is among the `wanted` ones: one parameter, however many they are."""
        if self._is_sqlite:
            each = func.json_each(bindparam("wanted", type_=String)).table_valued("value")
            return name.in_(select(each.c.value))
        return name == any_(bindparam("wanted", type_=ARRAY(String)))
