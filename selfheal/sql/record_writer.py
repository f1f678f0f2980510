"""Changes of records and their history, inside a transaction: every change of a name locks its record first."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import CompoundSelect, Select, and_, delete, exists, func, or_, select, union, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ..content.times import clamp_ns
from ..errors import DatabaseUnavailable, NameTaken, NotAFile
from .backend import Backend
from .models import Contents, Record, Version, contents, earlier, to_record, to_version
from .schema import NOT_NUMBERED, Tables, record_columns

VERSIONS_AT_MOST = 100
"""Versions of one name; then the oldest is dropped: an app that rewrites a file for ever does not fill the database."""
NS = 10**9


class RecordWriter:
    """Writes the tables `image_storage` and `image_history`."""

    def __init__(self, tables: Tables, backend: Backend) -> None:
        self._records = tables.records
        self._history = tables.history
        self._backend = backend
        self._put_new = backend.insert(tables.records).on_conflict_do_nothing()

    async def lock(self, connection: AsyncConnection, name: str) -> Record | None:
        """Return the record of a name, locked until the transaction ends; None if there is none."""
        row = (await connection.execute(self._select(name).with_for_update())).first()
        return None if row is None else to_record(row)

    async def put(self, connection: AsyncConnection, values: dict[str, Any], *, over: int | None = None) -> Record:
        """Write the record of a name; a record or a tombstone of another generation than `over` (None: any) stays."""
        if await self._insert(connection, values):
            return await self._get(connection, values["name"])
        record = await self._lock_existing(connection, values["name"])
        is_other = over is not None and record.generation != over
        if is_other or (not record.is_deleted and record.sha256 == values["sha256"]):
            return record
        return await self.change(connection, record, _as_version(values, record))

    async def put_free(self, connection: AsyncConnection, values: dict[str, Any]) -> Record:
        """Write the record of a name that has none, or a tombstone. Raises `NameTaken`, also for the same bytes."""
        if await self._insert(connection, values):
            return await self._get(connection, values["name"])
        record = await self._lock_existing(connection, values["name"])
        if not record.is_deleted:
            raise NameTaken(f"{record.name!r} is stored already; save under another name")
        return await self.change(connection, record, _as_version(values, record))

    async def _insert(self, connection: AsyncConnection, values: dict[str, Any]) -> bool:
        """Write the record of a new name; False if it has a record or a tombstone. Raises `NotAFile`."""
        insert = self._backend.insert(self._records).values(values)
        if not (await connection.execute(insert.on_conflict_do_nothing())).rowcount:
            return False
        try:
            await self.refuse_conflict(connection, values["name"])
        except NotAFile:  # the caller may go on and commit
            await connection.execute(delete(self._records).where(self._records.c.name == values["name"]))
            raise
        return True

    async def _lock_existing(self, connection: AsyncConnection, name: str) -> Record:
        record = await self.lock(connection, name)
        if record is None:
            raise DatabaseUnavailable(f"the record of {name!r} vanished while it was written; try again")
        return record

    async def refuse_conflict(self, connection: AsyncConnection, name: str) -> None:
        """Raise `NotAFile` if a name is the directory of a living one, or has a living one for a directory."""
        records, parts = self._records, name.split("/")
        above = ["/".join(parts[:count]) for count in range(1, len(parts))]
        below = and_(records.c.name > f"{name}/", records.c.name < f"{name}0")  # 0 is the character after /
        other = select(records.c.name).where(records.c.deleted_at.is_(None), or_(records.c.name.in_(above), below))
        taken = (await connection.execute(other.limit(1))).scalar()
        if taken is not None:
            raise NotAFile(f"{name!r} cannot be saved: {taken!r} is, and a name cannot be a file and a directory")

    async def refuse_conflicts(self, connection: AsyncConnection, names: Sequence[str]) -> None:
        """As `refuse_conflict`, for many names that were just written: the caller rolls all of them back."""
        record, other = self._records.c, self._records.alias().c
        above = {name[:end] for name in names for end, character in enumerate(name) if character == "/"}
        is_below = exists().where(
            other.deleted_at.is_(None), other.name > record.name + "/", other.name < record.name + "0"
        )
        for wanted, condition in ((above, record.deleted_at.is_(None)), (names, is_below)):
            found = select(record.name).where(self._backend.is_wanted(record.name), condition).limit(1)
            taken = (await connection.execute(found, {"wanted": self._backend.name_list(wanted)})).scalar()
            if taken is not None:
                raise NotAFile(f"{taken!r} is stored, or new, and a name cannot be a file and a directory")

    async def put_tombstone(self, connection: AsyncConnection, values: dict[str, Any]) -> None:
        """Write a tombstone for a name that has no record."""
        tombstone = values | {"deleted_at": func.now(), "sequence": NOT_NUMBERED}
        insert = self._backend.insert(self._records).values(tombstone)
        await connection.execute(insert.on_conflict_do_nothing())

    async def put_new(self, connection: AsyncConnection, values: Sequence[dict[str, Any]]) -> None:
        """Write records; names that have one already keep it."""
        await self._backend.execute_many(connection, self._put_new, values)

    async def change(self, connection: AsyncConnection, record: Record, to: Version) -> Record:
        """Overwrite a locked record with a version; the old one goes to the history.

        With other bytes the time moves to a later second: clients that know only the time ask for newer bytes than
        theirs (RFC 9110, section 13.1.3), and get them after an undo too. Raises `NotAFile`, and changes nothing.
        """
        if record.is_deleted:
            await self.refuse_conflict(connection, record.name)
        else:
            await self._add_version(connection, record, record.generation)
        values = contents(to) | {"deleted_at": None}
        if to.sha256 != record.sha256:
            values["modified_ns"] = clamp_ns(max(to.modified_ns, (record.modified_ns // NS + 1) * NS))
        return await self._update(connection, record, values)

    async def set_aside(self, connection: AsyncConnection, record: Record, copy: Contents, reason: str) -> None:
        """Add a copy that was set aside to the versions of a locked record, unless one of them has its bytes.

        It gets a generation of its own, and so does the record after it: each number means one thing for ever.
        """
        table = self._history
        known = select(table.c.generation).where(table.c.name == record.name, table.c.sha256 == copy.sha256).limit(1)
        if (record.sha256 == copy.sha256 and not record.is_deleted) or (await connection.execute(known)).first():
            return
        await self._add_version(connection, copy, record.generation + 1, reason)
        await self._update(connection, record, {"generation": record.generation + 2})

    async def bury(self, connection: AsyncConnection, name: str) -> Record | None:
        """Make the record of a name a tombstone; None if there is none."""
        record = await self.lock(connection, name)
        if record is None or record.is_deleted:
            return record
        await self._add_version(connection, record, record.generation)
        return await self._update(connection, record, {"deleted_at": func.now()})

    async def earlier(self, connection: AsyncConnection, record: Record, generation: int | None) -> Version | None:
        """Return the version that a locked record goes back to (see `models.earlier`), locked as well."""
        table = self._history
        query = select(table).where(table.c.name == record.name).order_by(table.c.generation.desc())
        rows = (await connection.execute(query.with_for_update())).all()
        return earlier(record, map(to_version, rows), generation)

    async def drop_history(self, connection: AsyncConnection, before: datetime) -> int:
        """Drop the versions that were replaced before a moment; return their number."""
        dropped = delete(self._history).where(self._history.c.replaced_at < before)
        return int((await connection.execute(dropped)).rowcount)

    def referenced(self) -> CompoundSelect[Any]:
        """Return the query for all digests that a living record or a version refers to."""
        living = select(self._records.c.sha256).where(self._records.c.deleted_at.is_(None))
        return union(living, select(self._history.c.sha256))

    async def _update(self, connection: AsyncConnection, record: Record, values: dict[str, Any]) -> Record:
        table = self._records
        values = {"generation": record.generation + 1} | values
        values |= {"changed_at": func.now(), "sequence": NOT_NUMBERED}
        await connection.execute(update(table).where(table.c.name == record.name).values(values))
        return await self._get(connection, record.name)

    async def _add_version(
        self, connection: AsyncConnection, version: Contents, generation: int, reason: str = ""
    ) -> None:
        values = contents(version) | {"name": version.name, "generation": generation, "reason": reason}
        await connection.execute(self._backend.insert(self._history).values(values).on_conflict_do_nothing())
        table = self._history
        newest = select(table.c.generation).where(table.c.name == version.name).order_by(table.c.generation.desc())
        oldest = newest.limit(1).offset(VERSIONS_AT_MOST - 1).scalar_subquery()
        await connection.execute(delete(table).where(table.c.name == version.name, table.c.generation < oldest))

    async def _get(self, connection: AsyncConnection, name: str) -> Record:
        return to_record((await connection.execute(self._select(name))).one())

    def _select(self, name: str) -> Select[Any]:
        return select(*record_columns(self._records)).where(self._records.c.name == name)


def _as_version(values: dict[str, Any], over: Record) -> Version:
    return Version(generation=0, replaced_at=over.changed_at, **values)
