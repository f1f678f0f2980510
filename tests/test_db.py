"""The contract of the database half, over every database."""

from __future__ import annotations

from selfheal import UploadStore


async def test_bytes_come_back(store: UploadStore) -> None:
    """What was stored is read back, byte for byte, over several chunks."""
    data = bytes(range(256)) * 4096
    record = await store.database.store_image("a/b.png", data)
    assert b"".join([chunk async for chunk in store.database.read(record)]) == data
