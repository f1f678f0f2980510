"""Uploads that many tests use: names and bytes; files that are lost, or replaced by another program; their versions."""

from __future__ import annotations

import io
import os
from pathlib import Path

import httpx
from PIL import Image
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.types import ASGIApp

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from selfheal.healing.restore_file import WHOLE_FIRST
from tests.support.sample_data import noise

NAME = "cats/tom.jpg"
OTHER_NAME = "dogs/rex.jpg"
OLD, NEW, THIRD = b"the old bytes", b"the new bytes, which are others", b"yet another picture"

SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 17 * CHUNK + 3)
"""Sizes in bytes around the limits of a chunk."""
STREAMED = WHOLE_FIRST + 9 * CHUNK + 77
"""Size in bytes of a file that is sent while it is restored."""
RESTORED_SIZES = {"empty": 0, "one-chunk": 1000, "some-chunks": 11 * CHUNK + 3, "streamed": STREAMED}
"""One size in bytes for each way of restoring a file."""

A_DAY_NS = 86_400 * 10**9


def small_png() -> bytes:
    """Return a complete PNG file of 8 by 8 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(file, "PNG")
    return file.getvalue()


async def save_and_lose(store: UploadStore, size: int, name: str = NAME) -> bytes:
    """Save `size` bytes and remove the file, so that only the database has them; return the bytes."""
    saved = await store.save(name, noise(size))
    saved.path.unlink()
    return noise(size)


def replace_file(store: UploadStore, data: bytes, modified_ns: int, name: str = NAME) -> Path:
    """Replace a name's file as other programs do: with a rename, and with an mtime in ns of its own."""
    path = store.disk.path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name("new-file")
    new.write_bytes(data)
    os.utime(new, ns=(modified_ns, modified_ns))
    new.rename(path)
    return path


async def get(app: ASGIApp, name: str = NAME, **headers: str) -> httpx.Response:
    """Request an upload from an app over HTTP."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.get(f"/static/uploads/{name}", headers=headers)


# -- what the database has --------------------------------------------------------------------------------------------


async def history_of(store: UploadStore, name: str = NAME) -> list[bytes]:
    """Return the bytes of a name's earlier versions, newest first."""
    versions = await store.database.history(name)
    return [b"".join([chunk async for chunk in store.database.read(version)]) for version in versions]


async def generation_of(store: UploadStore, name: str = NAME) -> int:
    """Return how often a name was changed; 0 if it has no record."""
    record = await store.database.find(name)
    return 0 if record is None else record.generation


async def row_counts(engine: AsyncEngine) -> dict[str, int]:
    """Return the number of rows of each table that holds records or bytes."""
    async with engine.connect() as connection:
        return {
            table: (await connection.execute(text(f"SELECT count(*) FROM {table}"))).scalar_one()
            for table in ("image_storage", "image_blob", "image_chunk", "image_history")
        }
