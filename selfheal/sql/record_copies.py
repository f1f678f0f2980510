"""Copies of records from another catalogue: each keeps its generation, its times and its history."""

from collections.abc import Sequence
from dataclasses import asdict

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from .backend import Backend
from .models import Record, Version
from .record_writer import RecordWriter
from .schema import NOT_NUMBERED, Tables


class RecordCopies:
    """Writes the tables `image_storage` and `image_history` as another catalogue has them."""

    def __init__(self, tables: Tables, backend: Backend, records: RecordWriter) -> None:
        self._table = tables.records
        self._records = records
        self._put_new = backend.insert(tables.records).on_conflict_do_nothing()
        self._put_version = backend.insert(tables.history).on_conflict_do_nothing()

    async def put(
        self, connection: AsyncConnection, record: Record, versions: Sequence[Version], over: Record | None
    ) -> bool:
        """Write a record or tombstone, and the versions that are missing; False if the name is not `over` any more.

        Every node is told of the change. Raises `NotAFile` if the name is a directory of another one.
        """
        if await self._records.lock(connection, record.name) != over:
            return False
        if not record.is_deleted and (over is None or over.is_deleted):
            await self._records.refuse_conflict(connection, record.name)
        values = asdict(record) | {"sequence": NOT_NUMBERED}
        if over is not None:
            await connection.execute(update(self._table).where(self._table.c.name == record.name).values(values))
        elif not (await connection.execute(self._put_new.values(values))).rowcount:
            return False
        for version in versions:
            await connection.execute(self._put_version.values(asdict(version)))
        return True
