"""Changes of records and their history, inside a transaction: every change of a name locks its record first."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import CompoundSelect, Select, delete, func, select, union, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ..errors import DatabaseUnavailable
from .backend import Backend
from .models import Record, Version, contents, earlier, to_record, to_version
from .schema import Tables


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

    async def put(self, connection: AsyncConnection, values: dict[str, Any], *, only_new: bool) -> Record:
        """Write the record of a name. With `only_new`, a name that has a record or a tombstone keeps it."""
        name = values["name"]
        insert = self._backend.insert(self._records).values(values)
        if (await connection.execute(insert.on_conflict_do_nothing())).rowcount:
            return await self._get(connection, name)
        record = await self.lock(connection, name)
        if record is None:
            raise DatabaseUnavailable(f"the record of {name!r} vanished while it was written; try again")
        if only_new or (not record.is_deleted and record.sha256 == values["sha256"]):
            return record
        return await self.change(connection, record, Version(generation=0, replaced_at=record.changed_at, **values))

    async def put_new(self, connection: AsyncConnection, values: Sequence[dict[str, Any]]) -> None:
        """Write records; names that have one already keep it."""
        await self._backend.execute_many(connection, self._put_new, values)

    async def change(self, connection: AsyncConnection, record: Record, to: Version) -> Record:
        """Overwrite a locked record with a version; the old one goes to the history."""
        if not record.is_deleted:
            await self._add_version(connection, record)
        return await self._update(connection, record, contents(to) | {"deleted_at": None})

    async def bury(self, connection: AsyncConnection, name: str) -> Record | None:
        """Make the record of a name a tombstone; None if there is none."""
        record = await self.lock(connection, name)
        if record is None or record.is_deleted:
            return record
        await self._add_version(connection, record)
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
        values |= {"generation": record.generation + 1, "changed_at": func.now()}
        await connection.execute(update(table).where(table.c.name == record.name).values(values))
        return await self._get(connection, record.name)

    async def _add_version(self, connection: AsyncConnection, record: Record) -> None:
        values = contents(record) | {"name": record.name, "generation": record.generation}
        await connection.execute(self._backend.insert(self._history).values(values).on_conflict_do_nothing())

    async def _get(self, connection: AsyncConnection, name: str) -> Record:
        return to_record((await connection.execute(self._select(name))).one())

    def _select(self, name: str) -> Select[Any]:
        return select(self._records).where(self._records.c.name == name)
