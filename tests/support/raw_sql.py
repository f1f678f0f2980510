"""SQL on a connection of its own, as another program that uses the same database."""

from __future__ import annotations

from typing import Any

import anyio
from sqlalchemy import text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from selfheal import UploadStore


async def sql(url: str | URL, statement: str, **values: Any) -> list[tuple[Any, ...]]:
    """Run one statement in the database of a URL, and return its rows."""
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            result = await connection.execute(text(statement), values)
            return [tuple(row) for row in result] if result.returns_rows else []
    finally:
        await engine.dispose()


async def execute(store: UploadStore, statement: str, **values: Any) -> None:
    """Run one statement in the database of a store, without the store."""
    await sql(store.database.url, statement, **values)


async def wait_for_lock_waiters(url: str, count: int = 1) -> None:
    """Return as soon as `count` transactions wait for a lock in this PostgreSQL database."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    while len(await sql(url, waiting)) < count:
        await anyio.sleep(0.01)
