"""`UploadStore.restore` and `UploadStore.adopt`: one name, from the database to the disk and back."""

from __future__ import annotations

import os

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from selfheal import CorruptBlob, DiskUnwritable, NotStored, UploadStore
from selfheal.content.sources import CHUNK
from tests.support.faults import BrokenDisk
from tests.support.sample_data import noise
from tests.support.store_requests import hit, restored_bytes
from tests.support.store_state import files_below, in_database, on_disk, on_disk_and_in_database
from tests.support.uploads import NAME, NEW, OLD, SIZES
from tests.support.waiting import eventually

# -- restore ----------------------------------------------------------------------------------------------------------


async def test_a_missing_file_is_restored(store: UploadStore) -> None:
    """`restore` writes the file, byte for byte, with its old mtime and mode."""
    for size in SIZES:
        saved = await store.save(f"{size}.jpg", noise(size))
        before = saved.path.stat()
        saved.path.unlink()
        restored = await store.restore(f"{size}.jpg")
        after = restored.path.stat()
        assert await on_disk_and_in_database(store, f"{size}.jpg") == noise(size)
        assert (after.st_mtime_ns, after.st_mode, after.st_size) == (before.st_mtime_ns, before.st_mode, size)


async def test_restore_of_a_file_that_is_on_disk(sqlite_store: UploadStore) -> None:
    """A file that is on disk stays untouched."""
    saved = await sqlite_store.save(NAME, OLD)
    before = saved.path.stat()
    restored = await sqlite_store.restore(NAME)
    assert restored.sha256 == saved.sha256
    assert saved.path.stat() == before


async def test_restore_of_an_unknown_name(sqlite_store: UploadStore) -> None:
    """A name that the database does not know raises `NotStored`."""
    with pytest.raises(NotStored):
        await sqlite_store.restore(NAME)


async def test_restore_of_a_file_that_only_the_disk_has(sqlite_store: UploadStore) -> None:
    """A name without a live record raises `NotStored`; its file is neither adopted nor removed."""
    path = sqlite_store.disk.path_of(NAME)
    path.parent.mkdir(parents=True)
    path.write_bytes(OLD)
    with pytest.raises(NotStored):
        await sqlite_store.restore(NAME)
    await sqlite_store.save(NAME, NEW)
    await sqlite_store.database.bury(NAME)
    with pytest.raises(NotStored):
        await sqlite_store.restore(NAME)
    assert on_disk(sqlite_store, NAME) == NEW


async def test_restore_of_a_name_in_the_negative_cache(store: UploadStore, other_store: UploadStore) -> None:
    """A name in the negative cache that another node has just saved is not reported as restored."""
    assert await restored_bytes(store, NAME) is None
    await other_store.save(NAME, NEW)
    with pytest.raises(NotStored):
        await store.restore(NAME)
    assert on_disk(store, NAME) is None


async def test_mending_from_a_missing_file(sqlite_store: UploadStore) -> None:
    """Without a file there are no bytes to mend a record from: `NotStored`."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.unlink()
    with pytest.raises(NotStored):
        await sqlite_store.reconciler.mend(saved)


@pytest.mark.parametrize("size", [10, 3 * CHUNK, 65 * CHUNK])
async def test_restore_of_damaged_bytes_writes_nothing(store: UploadStore, engine: AsyncEngine, size: int) -> None:
    """Bytes that are not the recorded ones raise `CorruptBlob`: no file appears, and the record is kept."""
    saved = await store.save(NAME, noise(size))
    saved.path.unlink()
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE image_chunk SET data = :data"), {"data": b"x" * min(size, CHUNK)})
    with pytest.raises(CorruptBlob):
        await store.restore(NAME)
    assert files_below(store.disk.path) == []
    assert await store.database.find(NAME) is not None


async def test_restore_to_a_disk_that_takes_no_file(sqlite_store: UploadStore, broken_disk: BrokenDisk) -> None:
    """A caller that wants the file on disk gets `DiskUnwritable` if the disk takes none."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.unlink()
    broken_disk.fill_after(0)
    with pytest.raises(DiskUnwritable):
        await sqlite_store.restore(NAME)
    assert files_below(sqlite_store.disk.path) == []


# -- adopt ------------------------------------------------------------------------------------------------------------


async def test_a_file_that_is_only_on_disk_is_adopted(store: UploadStore) -> None:
    """The record has its bytes and its mtime; the file itself is left as it is."""
    store.disk.path.mkdir(parents=True, exist_ok=True)
    for size in SIZES:
        path = store.disk.path_of(f"{size}.jpg")
        path.write_bytes(noise(size))
        os.utime(path, ns=(10**18 + 7, 10**18 + 7))
        before = path.stat()
        adopted = await store.adopt(f"{size}.jpg")
        assert await on_disk_and_in_database(store, f"{size}.jpg") == noise(size)
        assert (adopted.modified_ns, adopted.generation, adopted.content_type) == (10**18 + 7, 1, "image/jpeg")
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


async def test_adopt_leaves_a_name_with_a_record_as_it_is(sqlite_store: UploadStore) -> None:
    """An adoption does not overwrite a record."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.write_bytes(NEW)
    adopted = await sqlite_store.adopt(NAME)
    assert (adopted.sha256, adopted.generation) == (saved.sha256, 1)
    assert await in_database(sqlite_store, NAME) == OLD


async def test_adopt_of_a_missing_file(sqlite_store: UploadStore) -> None:
    """Without a file there is nothing to adopt: `NotStored`, and no record."""
    with pytest.raises(NotStored):
        await sqlite_store.adopt(NAME)
    assert await sqlite_store.database.find(NAME) is None


async def test_a_new_file_is_adopted_after_its_first_hit(sqlite_store: UploadStore) -> None:
    """A file that an app wrote itself is in the database soon after it was first served."""
    path = sqlite_store.disk.path_of(NAME)
    path.parent.mkdir(parents=True)
    path.write_bytes(OLD)
    hit(sqlite_store, NAME)

    async def is_adopted() -> bool:
        return await in_database(sqlite_store, NAME) == OLD

    await eventually(is_adopted)
