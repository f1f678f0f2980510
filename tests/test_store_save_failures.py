"""`UploadStore.save` when the database, the source or the disk fails, or when it is cancelled."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from selfheal import DatabaseUnavailable, UploadStore
from selfheal.content.sources import CHUNK
from tests.support.faults import BrokenDisk
from tests.support.open_files import assert_nothing_open_below
from tests.support.sample_data import noise, pieces_of
from tests.support.store_requests import hit_and_settle, restored_bytes
from tests.support.store_state import (
    files_below,
    in_database,
    in_quarantine,
    on_disk,
    on_disk_and_in_database,
    set_aside,
)
from tests.support.uploads import NAME, NEW, OLD

# -- no database ------------------------------------------------------------------------------------------------------


async def test_no_tables_no_file(directory: Path, database_url: str) -> None:
    """A database without the tables raises an error that says which command to run, and no file appears."""
    async with UploadStore(directory, database_url) as store:
        with pytest.raises(DatabaseUnavailable, match="selfheal migrate"):
            await store.save(NAME, OLD)
        assert files_below(directory) == []


async def test_no_server_no_file(directory: Path, dead_port: int) -> None:
    """A database that refuses connections raises an error, and no file appears."""
    async with UploadStore(directory, f"postgresql://nobody@127.0.0.1:{dead_port}/none", deadline=2) as store:
        for size in (10, 17 * CHUNK):
            with pytest.raises(DatabaseUnavailable):
                await store.save(NAME, pieces_of(noise(size)))
        assert files_below(directory) == []
    await assert_nothing_open_below(directory)


async def test_a_failing_overwrite_leaves_the_old_file(store: UploadStore, engine: AsyncEngine) -> None:
    """When the database fails, the old file stays on disk."""
    await store.save(NAME, OLD)
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE image_chunk RENAME TO image_chunk_away"))
    with pytest.raises(DatabaseUnavailable):
        await store.save(NAME, NEW)
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE image_chunk_away RENAME TO image_chunk"))
    assert await on_disk_and_in_database(store, NAME) == OLD
    assert files_below(store.disk.path) == [NAME]


# -- no source --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 17 * CHUNK])
async def test_a_source_that_fails_leaves_nothing(sqlite_store: UploadStore, size: int) -> None:
    """The error of the source reaches the caller; nothing is stored, and an older version stays."""

    async def source() -> AsyncIterator[bytes]:
        yield noise(size)
        raise ConnectionResetError("the client is gone")

    with pytest.raises(ConnectionResetError):
        await sqlite_store.save(NAME, source())
    assert await on_disk_and_in_database(sqlite_store, NAME) is None
    await sqlite_store.save(NAME, OLD)
    with pytest.raises(ConnectionResetError):
        await sqlite_store.save(NAME, source())
    assert await on_disk_and_in_database(sqlite_store, NAME) == OLD
    assert files_below(sqlite_store.disk.path) == [NAME]
    await assert_nothing_open_below(sqlite_store.disk.path)


@pytest.mark.parametrize("size", [10, 19 * CHUNK])
async def test_cancelled_uploads_leave_nothing_and_damage_nothing(store: UploadStore, size: int) -> None:
    """A save that is cancelled at any moment has stored the upload twice or not at all."""
    data = noise(size)
    await store.save("old.jpg", OLD)
    chance = random.Random(7)
    for number in range(12):
        tasks = [
            asyncio.create_task(store.save(name, pieces_of(data, 64 * 1024))) for name in (f"{number}.jpg", "old.jpg")
        ]
        await anyio.sleep(chance.uniform(0, 0.06))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.tasks.drain(30)
        assert await on_disk_and_in_database(store, f"{number}.jpg") in (None, data)
        assert await on_disk_and_in_database(store, "old.jpg") in (OLD, data)
        await store.save("old.jpg", OLD)
    whole = [name for name in files_below(store.disk.path) if name != "old.jpg"]
    assert await store.database.count() == len(whole) + 1
    await assert_nothing_open_below(store.disk.path)


# -- no space on disk -------------------------------------------------------------------------------------------------


FULL_AFTER = {"at-once": 0, "in-the-first-chunk": 1000, "in-the-middle": 3 * CHUNK + 1234, "in-the-last": 19 * CHUNK}


@pytest.mark.parametrize("space", FULL_AFTER.values(), ids=FULL_AFTER)
async def test_disk_full_in_the_middle_of_an_upload(store: UploadStore, broken_disk: BrokenDisk, space: int) -> None:
    """An upload from a one-shot iterator is saved all the same, leaves no temporary file, and is healed later."""
    data = noise(19 * CHUNK + 77)
    broken_disk.fill_after(space)
    saved = await store.save(NAME, pieces_of(data))
    assert saved.sha256 == sha256(data).hexdigest()
    assert files_below(store.disk.path) == []
    assert await in_database(store, NAME) == data
    broken_disk.mend()
    assert await restored_bytes(store, NAME) == data
    assert await on_disk_and_in_database(store, NAME) == data
    await assert_nothing_open_below(store.disk.path)


FAILING = {
    "no file can be made": ("open", errno.EROFS),
    "no directory can be made": ("mkdir", errno.ENOSPC),
    "nothing can be written": ("pwrite", errno.EDQUOT),
    "the file is too large": ("pwrite", errno.EFBIG),
    "it does not reach the disk": ("fsync", errno.EIO),
    "it cannot be named": ("link", errno.ENOSPC),
}


@pytest.mark.parametrize(("call", "number"), FAILING.values(), ids=FAILING)
async def test_a_disk_that_fails_does_not_fail_the_save(
    sqlite_store: UploadStore, broken_disk: BrokenDisk, call: str, number: int
) -> None:
    """If the disk refuses a call, the upload is saved in the database, no temporary file stays, and it heals later."""
    sqlite_store.disk.path.mkdir(parents=True, exist_ok=True)
    broken_disk.fail(call, number)
    for size in (10, 17 * CHUNK):
        await sqlite_store.save(f"cats/{size}.jpg", pieces_of(noise(size)))
    assert files_below(sqlite_store.disk.path) == []
    broken_disk.mend()
    for size in (10, 17 * CHUNK):
        assert await restored_bytes(sqlite_store, f"cats/{size}.jpg") == noise(size)
        assert await on_disk_and_in_database(sqlite_store, f"cats/{size}.jpg") == noise(size)


@pytest.mark.parametrize("was_hit_before", [False, True])
async def test_an_overwrite_on_a_full_disk_is_healed_later(
    store: UploadStore, broken_disk: BrokenDisk, was_hit_before: bool
) -> None:
    """The old file on the full disk is replaced as soon as there is space."""
    await store.save(NAME, OLD)
    if was_hit_before:
        await hit_and_settle(store, NAME)
    broken_disk.fill_after(0)
    await store.save(NAME, NEW)
    broken_disk.mend()
    assert await in_database(store, NAME) == NEW
    if on_disk(store, NAME) is None:
        assert await restored_bytes(store, NAME) == NEW
    else:
        await hit_and_settle(store, NAME)
    assert await on_disk_and_in_database(store, NAME) == NEW


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("is_known", [True, False], ids=["saved once", "unknown"])
async def test_a_full_disk_serves_no_older_file(
    store: UploadStore, broken_disk: BrokenDisk, is_known: bool, call: str
) -> None:
    """The old file is removed, because it would be served; bytes that only the disk has become a version."""
    path = store.disk.path_of(NAME)
    if is_known:
        await store.save(NAME, OLD)
    else:
        path.parent.mkdir(parents=True)
        path.write_bytes(OLD)
    broken_disk.fail(call, errno.ENOSPC)
    await store.save(NAME, NEW)
    assert on_disk(store, NAME) is None
    assert await set_aside(store, NAME) == ([] if is_known else [OLD])
    assert in_quarantine(store) == []
    assert await restored_bytes(store, NAME) == NEW
    broken_disk.fail("unlink", errno.EROFS)
    await store.save(NAME, OLD)  # though no file can be removed
    assert await in_database(store, NAME) == OLD


async def test_an_old_file_that_could_not_be_removed_is_replaced_later(
    sqlite_store: UploadStore, broken_disk: BrokenDisk
) -> None:
    """If the disk refuses the new file and the removal of the old one, nobody is served the old one meanwhile."""
    saved = await sqlite_store.save(NAME, OLD)
    await hit_and_settle(sqlite_store, NAME)
    broken_disk.fail("pwrite", errno.ENOSPC)
    broken_disk.fail("rename", errno.EIO)
    await sqlite_store.save(NAME, NEW)
    assert saved.path.read_bytes() == OLD
    assert await restored_bytes(sqlite_store, NAME) == NEW
    broken_disk.mend()
    await sqlite_store.reconciler.check(NAME)
    assert await on_disk_and_in_database(sqlite_store, NAME) == NEW
    broken_disk.fail("rename", errno.EIO)
    assert await sqlite_store.delete(NAME) is True
    assert on_disk(sqlite_store, NAME) == NEW
    assert sqlite_store.disk.open(NAME) is None
    assert await restored_bytes(sqlite_store, NAME) is None
    broken_disk.mend()
    await sqlite_store.reconciler.check(NAME)
    assert on_disk(sqlite_store, NAME) is None


async def test_out_of_descriptors_is_not_a_full_disk(sqlite_store: UploadStore, broken_disk: BrokenDisk) -> None:
    """Too many open files is an error for the caller, and no reason to store without a file; nothing is left."""
    sqlite_store.disk.path.mkdir(parents=True, exist_ok=True)
    broken_disk.fail("open", errno.EMFILE)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        await sqlite_store.save(NAME, OLD)
    broken_disk.mend()
    assert await on_disk_and_in_database(sqlite_store, NAME) is None
    await sqlite_store.save(NAME, OLD)
    assert await on_disk_and_in_database(sqlite_store, NAME) == OLD
