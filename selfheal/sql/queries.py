"""The questions to the catalogue. Each is made once: a query that stays the same object is compiled once."""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from .backend import Backend
from .schema import Tables, record_columns


@dataclass(frozen=True, slots=True)
class ByName:
    """A question about `one` name and about `many`: the database keeps the plan for one name, not for a list."""

    one: sa.Select[Any]
    many: sa.Select[Any]


def by_name(backend: Backend, name: sa.ColumnElement[str], query: sa.Select[Any]) -> ByName:
    """Ask a query about one `name`, and about the names in the list `wanted`."""
    return ByName(query.where(name == sa.bindparam("name", type_=sa.String)), query.where(backend.is_wanted(name)))


class Queries:
    """The questions about records and their history. The columns of a record come in the table's order."""

    def __init__(self, tables: Tables, backend: Backend) -> None:
        record, version = tables.records, tables.history
        is_alive, is_deleted = record.c.deleted_at.is_(None), record.c.deleted_at.is_not(None)
        size = sa.bindparam("size", type_=sa.Integer)
        columns = record_columns(record)
        self.records = by_name(backend, record.c.name, sa.select(*columns))
        self.generations = by_name(backend, record.c.name, sa.select(record.c.name, record.c.generation))
        digests = sa.select(record.c.name, record.c.sha256).where(is_alive)
        self.digests = by_name(backend, record.c.name, digests)
        self.count: sa.Select[Any] = sa.select(sa.func.count()).select_from(record).where(is_alive)
        total = sa.cast(sa.func.coalesce(backend.total(record.c.size), sa.literal_column("0")), sa.Double)
        self.total: sa.Select[Any] = sa.select(sa.func.count(), total).select_from(record).where(is_alive)
        self.history = by_name(backend, version.c.name, sa.select(version).order_by(version.c.generation.desc()))
        page = sa.select(*columns).where(record.c.name > backend.bound("after")).order_by(record.c.name).limit(size)
        self.pages: dict[bool | None, sa.Select[Any]] = {
            False: page.where(is_alive),
            True: page.where(is_deleted),
            None: page.where(sa.true()),
        }
        starts = record.c.name >= backend.bound("first")
        self.next_range: sa.Select[Any] = (
            sa.select(record.c.name).where(starts).order_by(record.c.name).limit(sa.literal_column("1")).offset(size)
        )
        in_range = {True: starts, False: sa.and_(starts, record.c.name < backend.bound("stop"))}
        names = sa.select(record.c.name, record.c.size).order_by(record.c.name)
        self.names = {
            deleted: {is_last: names.where(which, within) for is_last, within in in_range.items()}
            for deleted, which in ((False, is_alive), (True, is_deleted))
        }
        summary = _summary(record, backend)
        self.summary = {is_last: summary.where(within) for is_last, within in in_range.items()}


def _summary(record: sa.Table, backend: Backend) -> sa.Select[Any]:
    """All records as one row, the columns in the order of a `Summary`; many rows cost ten times as much."""
    is_alive, count = record.c.deleted_at.is_(None), sa.func.count()
    return sa.select(
        sa.func.coalesce(backend.joined(record.c.name).filter(is_alive), sa.literal_column("''")),
        count.filter(is_alive),
        sa.cast(sa.func.coalesce(backend.total(record.c.size).filter(is_alive), sa.literal_column("0")), sa.Double),
        count.filter(sa.and_(is_alive, record.c.size < 0)),
        count.filter(record.c.deleted_at.is_not(None)),
    ).select_from(record)
