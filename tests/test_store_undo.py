"""`UploadStore.undo`: overwrites and deletions are taken back."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from selfheal import CorruptBlob, NotStored, UploadStore
from selfheal.content.digests import chunk_digest
from selfheal.content.sources import CHUNK
from tests.support.faults import BrokenDisk
from tests.support.sample_data import noise
from tests.support.store_requests import restored_bytes
from tests.support.store_state import files_below, in_quarantine, on_disk, on_disk_and_in_database
from tests.support.uploads import NAME, NEW, OLD


@pytest.mark.parametrize("size", [10, 17 * CHUNK + 3])
async def test_an_overwrite_is_undone(store: UploadStore, size: int) -> None:
    """Disk and database have the old bytes as the next generation, with a time in a later second than the new ones."""
    await store.save(NAME, noise(size))
    overwritten = await store.save(NAME, NEW)
    undone = await store.undo(NAME)
    assert await on_disk_and_in_database(store, NAME) == noise(size)
    assert undone.generation == 3
    assert undone.modified_ns // 10**9 > overwritten.modified_ns // 10**9
    assert undone.path.stat().st_mtime_ns == undone.modified_ns
    assert in_quarantine(store) == []


async def test_a_deletion_is_undone(store: UploadStore) -> None:
    """Disk and database have the file again, with the mtime that caches know."""
    before = await store.save(NAME, OLD)
    await store.delete(NAME)
    undone = await store.undo(NAME)
    assert await on_disk_and_in_database(store, NAME) == OLD
    assert undone.path.stat().st_mtime_ns == before.modified_ns
    assert await restored_bytes(store, NAME) == OLD


async def test_undo_to_any_generation(store: UploadStore) -> None:
    """With a generation, `undo` goes back as far as the history reaches; an undo can itself be undone."""
    for number in range(4):
        await store.save(NAME, noise(100 + number))
    await store.undo(NAME, 2)
    assert await on_disk_and_in_database(store, NAME) == noise(101)
    await store.undo(NAME)
    assert await on_disk_and_in_database(store, NAME) == noise(103)


async def test_there_must_be_something_to_undo(store: UploadStore) -> None:
    """An unknown name, a name without history and an unknown generation raise `NotStored`; nothing changes."""
    with pytest.raises(NotStored):
        await store.undo(NAME)
    await store.save(NAME, OLD)
    with pytest.raises(NotStored):
        await store.undo(NAME)
    await store.save(NAME, NEW)
    with pytest.raises(NotStored):
        await store.undo(NAME, 7)
    assert await on_disk_and_in_database(store, NAME) == NEW


async def test_undo_to_damaged_bytes_changes_nothing(store: UploadStore, engine: AsyncEngine) -> None:
    """Chunks that match their own digests but not the file's are found before a name goes back to them."""
    first = await store.save(NAME, noise(2 * CHUNK))
    await store.save(NAME, NEW)
    data = b"x" * CHUNK
    async with engine.begin() as connection:
        await connection.execute(
            text("UPDATE image_chunk SET data = :data, digest = :digest WHERE sha256 = :sha256 AND position = 1"),
            {"data": data, "digest": chunk_digest(1, data), "sha256": first.sha256},
        )
    with pytest.raises(CorruptBlob):
        await store.undo(NAME)
    assert await on_disk_and_in_database(store, NAME) == NEW
    record = await store.database.find(NAME)
    assert record is not None
    assert record.generation == 2


async def test_undo_on_a_full_disk_is_healed_later(sqlite_store: UploadStore, broken_disk: BrokenDisk) -> None:
    """Without space on disk an undo changes the database; the file is written at the first request with space."""
    await sqlite_store.save(NAME, OLD)
    await sqlite_store.delete(NAME)
    broken_disk.fill_after(0)
    await sqlite_store.undo(NAME)
    assert files_below(sqlite_store.disk.path) == []
    broken_disk.mend()
    assert await restored_bytes(sqlite_store, NAME) == OLD
    assert await on_disk_and_in_database(sqlite_store, NAME) == OLD
    await sqlite_store.save(NAME, NEW)
    broken_disk.fill_after(0)
    await sqlite_store.undo(NAME)
    assert on_disk(sqlite_store, NAME) is None
    assert await restored_bytes(sqlite_store, NAME) == OLD
