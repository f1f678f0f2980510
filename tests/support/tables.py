"""The tables: their columns, their rows, the number and the age of those."""

from __future__ import annotations

from typing import Any

from sqlalchemy import inspect
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tests.support.raw_sql import sql

TABLES = ("image_storage", "image_blob", "image_chunk", "image_history", "image_schema")
AGO = {
    "sqlite": "datetime('now', '-' || :days || ' days')",
    "postgresql": "now() - CAST(:days AS text)::interval * 86400",
}


async def contents(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row of every table."""
    return {table: sorted(await sql(url, f"SELECT * FROM {table}"), key=repr) for table in TABLES}


async def age(url: str, days: int, where: str = "1 = 1") -> None:
    """Make history, blobs and chunks older by days."""
    ago = AGO[url.partition("+")[0]]
    for table, column in (("image_history", "replaced_at"), ("image_blob", "stored_at"), ("image_chunk", "stored_at")):
        await sql(url, f"UPDATE {table} SET {column} = {ago} WHERE {where}", days=str(days))


async def stored_bytes(url: str) -> list[bytes]:
    """Return the data of all chunks."""
    return sorted(bytes(row[0]) for row in await sql(url, "SELECT data FROM image_chunk"))


async def stored_sizes(url: str) -> tuple[int, int, int]:
    """Return the number of blobs, of chunks, and of bytes in the chunks."""
    (blobs,) = await sql(url, "SELECT count(*) FROM image_blob")
    (chunks,) = await sql(url, "SELECT count(*), coalesce(sum(length(data)), 0) FROM image_chunk")
    return int(blobs[0]), int(chunks[0]), int(chunks[1])


async def described(url: str, schema: str | None = None) -> dict[str, tuple[set[str], list[str]]]:
    """Return the column names and the primary key of each table in a database."""
    engine = create_async_engine(url, poolclass=NullPool)

    def look(connection: Any) -> dict[str, tuple[set[str], list[str]]]:
        looking = inspect(connection)
        return {
            table: (
                {column["name"] for column in looking.get_columns(table, schema=schema)},
                list(looking.get_pk_constraint(table, schema=schema)["constrained_columns"]),
            )
            for table in looking.get_table_names(schema=schema)
        }

    async with engine.connect() as connection:
        tables = await connection.run_sync(look)
    await engine.dispose()
    return tables
