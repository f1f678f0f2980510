"""For tests of import and export: a database with a history, and all that a database has of every name."""

from __future__ import annotations

from contextlib import aclosing

from selfheal import ImageStorage
from selfheal.content.sources import CHUNK
from selfheal.sql.models import Record, Version
from tests.support.files import noise
from tests.support.raw_sql import sql

LARGE = noise(3 * CHUNK + 7)
NAMES = 7
"""How many names `fill` makes."""


async def state_of(database: ImageStorage) -> dict[str, tuple[Record, list[Version], bytes | None, list[bytes]]]:
    """Return each record, its history, its bytes (None if it is deleted), and the bytes of its versions."""
    state = {}
    async with aclosing(database.pages(deleted=None)) as pages:
        async for page in pages:
            for record in page:
                versions = await database.history(record.name)
                now = None if record.is_deleted else await bytes_of(database, record)
                state[record.name] = record, versions, now, [await bytes_of(database, one) for one in versions]
    return state


async def bytes_of(database: ImageStorage, one: Record | Version) -> bytes:
    """Return the bytes of a record or a version."""
    return b"".join([chunk async for chunk in database.read(one)])


async def fill(database: ImageStorage) -> None:
    """Save, overwrite, delete and set aside."""
    await database.store_image("a.png", b"one", content_type="image/x-odd", modified_ns=1_600_000_000_123_456_789)
    await database.store_image("a.png", b"two")
    await database.store_image("cats/tom.jpg", LARGE, modified_ns=-5)
    await database.store_image("same.jpg", LARGE)
    await database.store_image("empty.gif", b"")
    await database.store_image("gone.png", b"gone")
    await database.bury("gone.png")
    await database.store_image("back.png", b"back 1")
    await database.bury("back.png")
    await database.undo("back.png")
    await database.versions.set_aside("aside.png", b"aside", modified_ns=7, reason="laid by a deploy")


async def damage(database: ImageStorage, table: str, data: bytes) -> None:
    """Flip a bit of the first chunk of some bytes."""
    chunk = bytes([data[0] ^ 1]) + data[1:CHUNK]
    await sql(database.url, f"UPDATE {table} SET data = :new WHERE data = :old", new=chunk, old=data[:CHUNK])
