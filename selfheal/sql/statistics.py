"""Statistics: how much the database holds, what it saves, and what a purge would drop."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from .backend import Backend
from .models import to_utc
from .schema import Tables


@dataclass(frozen=True, slots=True)
class Statistics:
    """Numbers of names, versions and blobs, and their bytes."""

    names: int
    size: int  # of the names, as if each had its bytes for itself
    deleted: int
    versions: int
    version_size: int
    blobs: int
    stored: int  # bytes of the blobs
    saved: int  # bytes that equal bytes would take if they were stored more than once
    purgeable_versions: int
    purgeable: int  # blobs
    purgeable_size: int
    file_bytes: int  # of the file, or of the tables
    free_bytes: int  # in the file, for later use


async def read_statistics(
    connection: AsyncConnection, tables: Tables, backend: Backend, keep: timedelta, grace: timedelta
) -> Statistics:
    """Count everything; `keep` and `grace` are those of a purge."""
    record, version, blob = tables.records, tables.history, tables.blobs
    now = to_utc((await connection.execute(sa.select(sa.func.now()))).scalar_one())
    is_alive, is_kept = record.c.deleted_at.is_(None), version.c.replaced_at >= now - keep
    living = sa.select(record.c.sha256).where(is_alive)

    async def count(table: sa.Table, *which: sa.ColumnElement[bool]) -> tuple[int, int]:
        size: Any = sa.func.coalesce(sa.func.sum(table.c.size), 0)
        row = (await connection.execute(sa.select(sa.func.count(), size).select_from(table).where(*which))).one()
        return int(row[0]), int(row[1])

    async def count_unreferenced(versions: sa.Select[Any], *which: sa.ColumnElement[bool]) -> tuple[int, int]:
        return await count(blob, blob.c.sha256.not_in(sa.union(living, versions)), *which)

    names, size = await count(record, is_alive)
    versions, version_size = await count(version)
    blobs, stored = await count(blob)
    _, unreferenced = await count_unreferenced(sa.select(version.c.sha256))
    is_old = blob.c.stored_at < now - grace
    file_bytes, free_bytes = await backend.space(connection, tables.all())
    return Statistics(
        names,
        size,
        (await count(record, sa.not_(is_alive)))[0],
        versions,
        version_size,
        blobs,
        stored,
        max(0, size + version_size - (stored - unreferenced)),
        (await count(version, sa.not_(is_kept)))[0],
        *await count_unreferenced(sa.select(version.c.sha256).where(is_kept), is_old),
        file_bytes,
        free_bytes,
    )
