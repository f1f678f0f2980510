"""`UploadStore.delete`: a tombstone, no file, and no way back but a save or an undo."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from selfheal import DatabaseUnavailable, NotStored, UploadStore
from selfheal.content.digests import Digests
from selfheal.sql.models import SmallFile
from tests.support.disk_files import write_file
from tests.support.faults import BrokenDisk
from tests.support.store_requests import hit_and_settle, restored_bytes
from tests.support.store_state import in_quarantine, on_disk, on_disk_and_in_database, set_aside
from tests.support.uploads import NAME, NEW, OLD, replace_file


async def test_delete_leaves_a_tombstone_and_no_file(store: UploadStore) -> None:
    """A deleted name has a tombstone, no file, and its bytes in the history."""
    await store.save(NAME, OLD)
    assert await store.delete(NAME) is True
    assert on_disk(store, NAME) is None
    record = await store.database.find(NAME)
    assert record is not None
    assert record.is_deleted
    assert record.generation == 2
    (version,) = await store.database.history(NAME)
    assert b"".join([chunk async for chunk in store.database.read(version)]) == OLD


async def test_delete_of_an_unknown_name_is_false(store: UploadStore) -> None:
    """A name without record and file is not deleted and gets no tombstone; a second deletion does nothing."""
    assert await store.delete(NAME) is False
    assert await store.database.find(NAME) is None
    await store.save(NAME, OLD)
    assert await store.delete(NAME) is True
    assert await store.delete(NAME) is False
    assert len(await store.database.history(NAME)) == 1


async def test_delete_of_what_is_missing_on_disk(sqlite_store: UploadStore) -> None:
    """A name that only the database has is deleted all the same."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.unlink()
    assert await sqlite_store.delete(NAME) is True
    assert await restored_bytes(sqlite_store, NAME) is None


async def test_delete_of_what_is_only_on_disk_can_be_undone(store: UploadStore) -> None:
    """A file that only the disk has is adopted before it is deleted."""
    path = store.disk.path_of(NAME)
    path.parent.mkdir(parents=True)
    path.write_bytes(OLD)
    assert await store.delete(NAME) is True
    assert not path.exists()
    await store.undo(NAME)
    assert await on_disk_and_in_database(store, NAME) == OLD


async def test_delete_of_what_the_app_overwrote_keeps_its_bytes(store: UploadStore) -> None:
    """Bytes that an app wrote over a file, and that are not adopted yet, become a version of the name."""
    saved = await store.save(NAME, OLD)
    saved.path.write_bytes(NEW)
    assert await store.delete(NAME) is True
    assert on_disk(store, NAME) is None
    assert await set_aside(store, NAME) == [NEW]
    assert in_quarantine(store) == []
    await store.undo(NAME)
    assert await on_disk_and_in_database(store, NAME) == OLD


async def test_delete_of_bytes_that_cannot_be_read_keeps_them(
    sqlite_store: UploadStore, broken_disk: BrokenDisk
) -> None:
    """A file whose bytes cannot be compared with the history goes to quarantine."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.write_bytes(NEW)
    broken_disk.fail("pread", errno.EIO)
    assert await sqlite_store.delete(NAME) is True
    assert on_disk(sqlite_store, NAME) is None
    assert in_quarantine(sqlite_store) == [NEW]


async def test_delete_compares_every_byte_before_it_removes_a_file(store: UploadStore) -> None:
    """A file with the record's mtime and size, but other bytes, is not taken for the recorded one."""
    saved = await store.save(NAME, OLD)
    replace_file(store, OLD.upper(), saved.modified_ns)
    assert await store.delete(NAME) is True
    assert on_disk(store, NAME) is None
    assert await set_aside(store, NAME) == [OLD.upper()]


async def test_an_error_that_passes_leaves_no_file(sqlite_store: UploadStore, broken_disk: BrokenDisk) -> None:
    """A passing error after the commit of a deletion leaves no copy, which the next process would serve once."""
    await sqlite_store.save(NAME, OLD)
    broken_disk.fail("lstat", errno.EIO, once=True)
    assert await sqlite_store.delete(NAME) is True
    assert on_disk(sqlite_store, NAME) is None


async def test_delete_of_a_file_that_vanishes(sqlite_store: UploadStore, broken_disk: BrokenDisk) -> None:
    """A file that another program removes during the deletion is no error; the name is deleted."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.write_bytes(NEW)
    held = broken_disk.hold("lstat", done_first=True)
    deleting = asyncio.create_task(sqlite_store.delete(NAME))
    await held.met()
    saved.path.unlink()
    held.release()
    assert await deleting is True
    assert in_quarantine(sqlite_store) == []
    record = await sqlite_store.database.find(NAME)
    assert record is not None
    assert record.is_deleted


async def test_delete_without_a_database_leaves_the_file(directory: Path, dead_port: int) -> None:
    """If the tombstone cannot be written, the caller gets the error and the file stays."""
    async with UploadStore(directory, f"postgresql://nobody@127.0.0.1:{dead_port}/none", deadline=2) as store:
        path = store.disk.path_of(NAME)
        path.parent.mkdir(parents=True)
        path.write_bytes(OLD)
        with pytest.raises(DatabaseUnavailable):
            await store.delete(NAME)
        assert path.read_bytes() == OLD


# -- deleted stays deleted --------------------------------------------------------------------------------------------


async def _restore(store: UploadStore) -> None:
    with pytest.raises(NotStored):
        await store.restore(NAME)


async def _adopt(store: UploadStore) -> None:
    store.disk.path_of(NAME).write_bytes(NEW)
    with pytest.raises(NotStored):
        await store.adopt(NAME)
    store.disk.path_of(NAME).unlink()


async def _request(store: UploadStore) -> None:
    assert await restored_bytes(store, NAME) is None
    assert await store.restorer.restore_to_disk(NAME) is False


async def _store_only_new(store: UploadStore) -> None:
    record = await store.database.store_image(NAME, NEW, only_new=True)
    assert record.is_deleted


async def _migrate(store: UploadStore) -> None:
    file = SmallFile(NAME, len(NEW), 1, [NEW], Digests.of([NEW]))
    assert await store.database.store_many([file]) == set()


async def _check(store: UploadStore) -> None:
    store.disk.path_of(NAME).write_bytes(OLD)
    await store.reconciler.check(NAME)


RESURRECTIONS = [_restore, _adopt, _request, _store_only_new, _migrate, _check]


@pytest.mark.parametrize("attempt", RESURRECTIONS, ids=lambda attempt: attempt.__name__.strip("_"))
async def test_deleted_stays_deleted(
    store: UploadStore, other_store: UploadStore, attempt: Callable[[UploadStore], Any]
) -> None:
    """No restore, adoption, migration or check, on any node, brings a deleted name back."""
    await store.save(NAME, OLD)
    await store.delete(NAME)
    for node in (store, other_store):
        node.disk.path_of(NAME).parent.mkdir(parents=True, exist_ok=True)
        await attempt(node)
        record = await store.database.find(NAME)
        assert record is not None
        assert record.is_deleted
        assert on_disk(node, NAME) is None
    assert await restored_bytes(store, NAME) is None
    assert await restored_bytes(other_store, NAME) is None


async def test_a_save_makes_a_deleted_name_live_again(store: UploadStore) -> None:
    """A save makes a deleted name live again, with the same bytes or with others."""
    for data in (OLD, NEW):
        await store.save(NAME, OLD)
        await store.delete(NAME)
        await store.save(NAME, data)
        assert await on_disk_and_in_database(store, NAME) == data
        record = await store.database.find(NAME)
        assert record is not None
        assert not record.is_deleted


# -- a file of a deleted name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_time", [True, False], ids=["with its mtime", "with a new mtime"])
async def test_a_copy_of_a_deleted_file_is_removed_after_its_first_hit(store: UploadStore, keeps_time: bool) -> None:
    """A deploy puts back a deleted file: its first hit removes it, without quarantine, as the history has the bytes."""
    saved = await store.save(NAME, OLD)
    await store.delete(NAME)
    write_file(saved.path, OLD)
    if keeps_time:
        os.utime(saved.path, ns=(saved.modified_ns, saved.modified_ns))
    await hit_and_settle(store, NAME)
    assert on_disk(store, NAME) is None
    assert in_quarantine(store) == []


async def test_a_copy_on_another_node_is_removed_after_its_first_hit(
    store: UploadStore, other_store: UploadStore
) -> None:
    """A node whose disk still has a file that was deleted elsewhere removes it after its first hit."""
    await store.save(NAME, OLD)
    assert await restored_bytes(other_store, NAME) == OLD
    await store.delete(NAME)
    assert on_disk(other_store, NAME) == OLD
    await hit_and_settle(other_store, NAME)
    assert on_disk(other_store, NAME) is None


async def test_the_very_same_file_is_removed_every_time(sqlite_store: UploadStore, tmp_path: Path) -> None:
    """A file with the inode, mtime and size of one that was served before is deleted all the same."""
    saved = await sqlite_store.save(NAME, OLD)
    kept = tmp_path / "kept.jpg"
    os.link(saved.path, kept)
    await hit_and_settle(sqlite_store, NAME)
    await sqlite_store.delete(NAME)
    for _ in range(2):
        saved.path.parent.mkdir(exist_ok=True)
        os.link(kept, saved.path)
        await hit_and_settle(sqlite_store, NAME)
        assert on_disk(sqlite_store, NAME) is None


async def test_bytes_unknown_to_the_history_are_set_aside(sqlite_store: UploadStore) -> None:
    """At a deleted name, bytes that the history does not have become a version."""
    saved = await sqlite_store.save(NAME, OLD)
    await sqlite_store.delete(NAME)
    write_file(saved.path, NEW)
    await hit_and_settle(sqlite_store, NAME)
    assert on_disk(sqlite_store, NAME) is None
    assert await set_aside(sqlite_store, NAME) == [NEW]
    assert in_quarantine(sqlite_store) == []
    record = await sqlite_store.database.find(NAME)
    assert record is not None
    assert record.is_deleted


async def test_bytes_are_set_aside_if_the_history_cannot_be_read(store: UploadStore, engine: AsyncEngine) -> None:
    """At a deleted name, bytes go to quarantine if the history cannot be read."""
    saved = await store.save(NAME, OLD)
    await store.save(NAME, NEW)
    await store.delete(NAME)
    write_file(saved.path, OLD)
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE image_history RENAME TO image_history_away"))
    await store.reconciler.check(NAME)
    assert on_disk(store, NAME) is None
    assert in_quarantine(store) == [OLD]
