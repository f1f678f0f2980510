"""The sequence of changes: nodes follow it, and notice by its epoch when the database went back in time."""

from datetime import datetime
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from .engine import Engine
from .models import Position, to_utc
from .schema import NOT_NUMBERED, SCHEMA_VERSION, Tables, is_changed

NUMBERED_AT_ONCE = 1000  # changes in one transaction


class Changes:
    """Numbers the changes of records, and reads them in order. Every method may raise `DatabaseUnavailable`."""

    def __init__(self, engine: Engine, tables: Tables) -> None:
        self._engine = engine
        self._records, self._schema = record, schema = tables.records, tables.schema
        size = sa.bindparam("size", type_=sa.Integer)
        is_unnumbered = sa.and_(is_changed(record), record.c.sequence == sa.literal_column(str(NOT_NUMBERED)))
        self._is_ours = schema.c.version == sa.literal_column(str(SCHEMA_VERSION))
        self._now: sa.Select[Any] = sa.select(sa.func.now())
        self._position: sa.Select[Any] = sa.select(
            schema.c.epoch, schema.c.sequence, sa.exists().where(is_unnumbered)
        ).where(self._is_ours)
        some = sa.select(record.c.name).where(is_unnumbered).order_by(record.c.name).limit(size)
        self._unnumbered: sa.Select[Any] = some.with_for_update(skip_locked=True)
        later = record.c.sequence > sa.bindparam("since", type_=sa.BigInteger)
        self._after: sa.Select[Any] = (
            sa.select(record.c.name, record.c.sequence)
            .where(is_changed(record), later)
            .order_by(record.c.sequence)
            .limit(size)
        )

    async def now(self) -> datetime:
        """Return the time by the database's clock."""
        return to_utc((await self._engine.rows(self._now))[0][0])

    async def position(self) -> Position:
        """Return how far the sequence is."""
        while not (rows := await self._engine.rows(self._position)):
            await self._engine.write(self._begin)  # a migration of the app's made the tables
        epoch, sequence, has_unnumbered = rows[0]
        return Position(epoch, sequence, bool(has_unnumbered))

    async def after(self, sequence: int, size: int) -> list[tuple[str, int]]:
        """Return up to `size` names that were changed after a sequence number, in order, with their own numbers."""
        return [(row[0], row[1]) for row in await self._engine.rows(self._after, since=sequence, size=size)]

    async def number(self) -> int:
        """Give sequence numbers to changes that were committed: the order of numbers is the order of commits.

        A writer does not know when it will be committed, so that it cannot take a number that others have not passed.
        Returns how many changes it numbered; those that a transaction of now changes again wait for its end.
        """
        return await self._engine.write(self._number_some)

    async def begin_epoch(self, before: str) -> None:
        """Tell all nodes that the database went back in time; once, if many notice it."""
        begin = sa.update(self._schema).where(self._schema.c.epoch == before).values(epoch=uuid4().hex)
        await self._engine.write(lambda connection: connection.execute(begin))

    async def _begin(self, connection: AsyncConnection) -> None:
        row = self._engine.backend.insert(self._schema).values(version=SCHEMA_VERSION, epoch=uuid4().hex)
        await connection.execute(row.on_conflict_do_nothing())

    async def _number_some(self, connection: AsyncConnection) -> int:
        names = (await connection.execute(self._unnumbered, {"size": NUMBERED_AT_ONCE})).scalars().all()
        if not names:
            return 0
        schema, record = self._schema, self._records.c
        # this lock is held until the commit: the next process waits, and its numbers are committed later
        taken = sa.update(schema).where(self._is_ours).values(sequence=schema.c.sequence + len(names))
        await connection.execute(taken)
        last = (await connection.execute(sa.select(schema.c.sequence).where(self._is_ours))).scalar_one()
        number = sa.update(self._records).where(record.name == sa.bindparam("key"))
        rows = [{"key": name, "number": last - len(names) + 1 + at} for at, name in enumerate(names)]
        await connection.execute(number.values(sequence=sa.bindparam("number")), rows)
        return len(names)
