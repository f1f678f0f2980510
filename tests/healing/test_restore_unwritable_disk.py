"""A disk that takes no file: the client is served from the database, and the disk is tried again later."""

from __future__ import annotations

import errno
from pathlib import Path

import anyio
import pytest

from selfheal import DiskUnwritable, UploadStore
from tests.support.faults import BrokenDisk
from tests.support.open_files import assert_nothing_open_below
from tests.support.sample_data import noise
from tests.support.store_requests import restored_bytes
from tests.support.store_state import files_below, in_database, on_disk
from tests.support.uploads import NAME, RESTORED_SIZES, save_and_lose


@pytest.mark.parametrize("size", RESTORED_SIZES.values(), ids=RESTORED_SIZES)
async def test_an_unwritable_disk_is_left_alone_for_30_seconds(
    directory: Path, sqlite_url: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and ranges come from the database and nothing is written; after the 30 s (here 10 ms) the disk heals."""
    async with UploadStore(directory, sqlite_url, require_marker=True) as store:
        await store.database.create_tables()
        data = noise(size)
        await store.database.store_image(NAME, data)
        directory.mkdir(parents=True, exist_ok=True)  # the mount point that a lost mount leaves
        assert await restored_bytes(store, NAME) == data
        store.disk.mark()
        assert await restored_bytes(store, NAME) == data
        assert await restored_bytes(store, NAME, size // 3, size // 2) == data[size // 3 : size // 2]
        assert [name for name in files_below(directory) if not name.startswith(".")] == []
        monkeypatch.setattr("selfheal.disk.refusals.REFUSED_FOR", 0.01)
        await anyio.sleep(0.02)
        assert await restored_bytes(store, NAME) == data
        await store.tasks.drain(30)
        assert on_disk(store, NAME) == data


REFUSALS = {
    "ENOSPC": "pwrite",
    "EDQUOT": "pwrite",
    "EFBIG": "pwrite",
    "EIO": "fsync",
    "EROFS": "open",
    "EACCES": "open",
}


@pytest.mark.parametrize(("error", "call"), REFUSALS.items(), ids=REFUSALS)
async def test_every_refusal_of_the_disk_is_served_from_the_database(
    sqlite_store: UploadStore, broken_disk: BrokenDisk, error: str, call: str
) -> None:
    """The bytes come from the database, none of them are on disk, and a caller that wants a file gets an error."""
    for size in RESTORED_SIZES.values():
        name = f"{size}.jpg"
        data = await save_and_lose(sqlite_store, size, name)
        if not size and call == "pwrite":
            continue  # nothing is written
        broken_disk.fail(call, getattr(errno, error))
        assert await restored_bytes(sqlite_store, name) == data
        with pytest.raises(DiskUnwritable):
            await sqlite_store.restorer.restore_to_disk(name)
        assert files_below(sqlite_store.disk.path) == []
        broken_disk.mend()
    assert await in_database(sqlite_store, "1000.jpg") == noise(1000)
    await assert_nothing_open_below(sqlite_store.disk.path)
