"""Bytes count as recorded only if the database can give them back: before that, no copy on disk is removed."""

from __future__ import annotations

import asyncio
import errno
from datetime import timedelta

import pytest

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from tests.support.faults import BrokenDisk
from tests.support.raw_sql import execute
from tests.support.sample_data import noise
from tests.support.store_requests import hit_and_settle, restored_bytes
from tests.support.store_state import in_database, in_quarantine, on_disk, on_disk_and_in_database, set_aside
from tests.support.uploads import NAME, NEW, OLD, THIRD, replace_file

DAMAGES = {
    "other bytes": "UPDATE image_chunk SET data = digest",
    "no chunks": "DELETE FROM image_chunk",
    "no blob": "DELETE FROM image_blob",
}


async def test_bytes_of_a_purged_tombstone_are_not_recorded(store: UploadStore) -> None:
    """Deleted, purged, and the same bytes come to that name again: they become a version, and can be undone."""
    await store.save(NAME, OLD)
    await store.delete(NAME)
    await store.database.purge(timedelta(0), grace=timedelta(0))
    await store.database.purge(timedelta(0), grace=timedelta(0))
    await execute(store, "DELETE FROM image_chunk")
    replace_file(store, OLD, 5)
    await hit_and_settle(store, NAME)
    assert on_disk(store, NAME) is None
    assert await set_aside(store, NAME) == [OLD]
    await store.undo(NAME)
    assert await on_disk_and_in_database(store, NAME) == OLD


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("size", [1000, 3 * CHUNK + 5])
@pytest.mark.parametrize("change", ["delete", "save", "undo"])
async def test_the_disks_good_copy_mends_the_database(store: UploadStore, change: str, size: int, damage: str) -> None:
    """The database's bytes are damaged, the disk's are good: a change of the name stores them before they go."""
    await store.save(NAME, OLD)
    await store.save(NAME, noise(size))
    generation = 2
    old = await store.database.history(NAME)
    await execute(store, f"{damage} WHERE sha256 <> :old", old=old[0].sha256)
    if change == "undo":
        await store.undo(NAME)
    else:
        await (store.delete(NAME) if change == "delete" else store.save(NAME, NEW))
    assert in_quarantine(store) == []
    await store.undo(NAME, generation)
    assert await on_disk_and_in_database(store, NAME) == noise(size)


@pytest.mark.parametrize("change", ["delete", "save"])
async def test_a_file_that_the_app_replaces_while_it_is_hashed(
    store: UploadStore, broken_disk: BrokenDisk, change: str
) -> None:
    """The copy that must go is moved away before it is hashed: what the app puts in its place meanwhile stays."""
    await store.save(NAME, OLD)
    replace_file(store, THIRD, 5)
    held = broken_disk.hold("pread")
    changing = asyncio.create_task(store.delete(NAME) if change == "delete" else store.save(NAME, NEW))
    await held.met()
    if change == "delete":
        replace_file(store, b"from the app", 7)
    held.release()
    await changing
    await store.tasks.drain(30)
    assert await set_aside(store, NAME) == [THIRD]
    if change == "delete":
        assert on_disk(store, NAME) == b"from the app"


async def test_a_copy_that_cannot_be_moved_away_is_served_by_nobody(
    store: UploadStore, broken_disk: BrokenDisk
) -> None:
    """A delete or an overwrite is committed; the copy that stays on disk is not served, whatever its name says."""
    await store.save(NAME, OLD)
    broken_disk.fail("rename", errno.EACCES)
    await store.save(NAME, NEW)
    assert await in_database(store, NAME) == NEW
    assert on_disk(store, NAME) == OLD
    assert store.disk.open(NAME) is None
    assert await restored_bytes(store, NAME) == NEW
    assert await store.delete(NAME) is True
    assert on_disk(store, NAME) == OLD
    assert store.disk.open(NAME) is None
    assert await restored_bytes(store, NAME) is None


async def test_a_copy_that_could_not_be_moved_is_tried_again(
    store: UploadStore, broken_disk: BrokenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the disk takes changes again, the copy goes without a request for it."""
    await store.save(NAME, OLD)
    broken_disk.fail("rename", errno.EACCES)
    assert await store.delete(NAME) is True
    broken_disk.mend()
    monkeypatch.setattr("selfheal.healing.background.FOLLOW_EVERY", 0.0)
    await asyncio.sleep(1.1)
    store.background.follow()
    await store.tasks.drain(30)
    assert on_disk(store, NAME) is None
    assert in_quarantine(store) == []


async def test_a_copy_on_a_mount_without_a_quarantine(store: UploadStore, broken_disk: BrokenDisk) -> None:
    """Where nothing can be moved to the quarantine (EXDEV), a copy is stored first, and then removed."""
    await store.save(NAME, OLD)
    replace_file(store, THIRD, 5)
    broken_disk.fail("rename", errno.EXDEV)
    assert await store.delete(NAME) is True
    assert on_disk(store, NAME) is None
    assert await set_aside(store, NAME) == [THIRD]
    await store.save(NAME, OLD)
    await store.save(NAME, NEW)
    assert await on_disk_and_in_database(store, NAME) == NEW
