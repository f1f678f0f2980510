"""A name that is deleted, overwritten or removed while it is restored."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from typing import Any

import pytest

from selfheal import DatabaseUnavailable, UploadStore
from selfheal.content.sources import CHUNK
from selfheal.healing.bodies import Restoring
from selfheal.sql.backends import backend_of
from tests.support.faults import BrokenDisk
from tests.support.open_files import assert_nothing_open_below
from tests.support.raw_sql import execute
from tests.support.store_requests import restored_bytes
from tests.support.store_state import files_below, in_database, on_disk, on_disk_and_in_database
from tests.support.uploads import NAME, NEW, STREAMED, save_and_lose
from tests.support.waiting import eventually

# -- changed in the database ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 3 * CHUNK])
@pytest.mark.parametrize(("call", "done_first"), [("fsync", False), ("link", True)], ids=["unnamed", "named"])
async def test_deleted_while_being_restored(
    store: UploadStore, other_store: UploadStore, broken_disk: BrokenDisk, size: int, call: str, done_first: bool
) -> None:
    """A name that another node deletes just before or after its file appears is absent, and no file stays."""
    await save_and_lose(store, size)
    held = broken_disk.hold(call, done_first=done_first)
    caller = asyncio.create_task(restored_bytes(store, NAME))
    await held.met()
    await other_store.database.bury(NAME)
    held.release()
    assert await caller is None
    assert files_below(store.disk.path) == []


@pytest.mark.parametrize(("call", "done_first"), [("fsync", False), ("link", True)], ids=["unnamed", "named"])
async def test_overwritten_while_being_restored(
    store: UploadStore, other_store: UploadStore, broken_disk: BrokenDisk, call: str, done_first: bool
) -> None:
    """A name that another node overwrites during its restore is answered with the new bytes, and they are on disk."""
    await save_and_lose(store, 1000)
    held = broken_disk.hold(call, done_first=done_first)
    caller = asyncio.create_task(restored_bytes(store, NAME))
    await held.met()
    await other_store.database.store_image(NAME, NEW)
    held.release()
    assert await caller == NEW
    assert await on_disk_and_in_database(store, NAME) == NEW


@pytest.mark.parametrize("size", [1000, 3 * CHUNK])
async def test_a_newer_file_stays(store: UploadStore, broken_disk: BrokenDisk, size: int) -> None:
    """A restore of an outdated version removes no file that it did not put on disk itself."""
    await save_and_lose(store, size)
    held = broken_disk.hold("fsync")
    caller = asyncio.create_task(restored_bytes(store, NAME))
    await held.met()
    broken_disk.mend()
    saved = await store.save(NAME, NEW)
    inode = saved.path.stat().st_ino
    held.release()
    assert await caller == NEW
    assert saved.path.stat().st_ino == inode
    assert await on_disk_and_in_database(store, NAME) == NEW


async def test_saved_on_this_node_while_being_restored(store: UploadStore, broken_disk: BrokenDisk) -> None:
    """A save that overtakes a restore wins, on disk and in the database."""
    await save_and_lose(store, 1000)
    held = broken_disk.hold("fsync")
    caller = asyncio.create_task(restored_bytes(store, NAME))
    await held.met()
    saving = asyncio.create_task(store.save(NAME, NEW))

    async def is_saved() -> bool:
        return await in_database(store, NAME) == NEW

    await eventually(is_saved)
    held.release()
    await saving
    assert await caller == NEW
    assert await on_disk_and_in_database(store, NAME) == NEW


@pytest.mark.parametrize("change", ["deleted", "overwritten"])
async def test_changed_while_a_large_file_is_being_sent(
    store: UploadStore, other_store: UploadStore, broken_disk: BrokenDisk, change: str
) -> None:
    """A client that is being sent a file gets the whole old version; the disk ends as the database says."""
    data = await save_and_lose(store, STREAMED)
    held = broken_disk.hold("pwrite", after=8)
    body = await store.restorer.restore(NAME)
    assert isinstance(body, Restoring)
    if change == "deleted":
        await other_store.database.bury(NAME)
    else:
        await other_store.database.store_image(NAME, NEW)
    held.release()
    assert b"".join([piece async for piece in body.pieces(0, body.size)]) == data
    body.close()
    await store.tasks.drain(30)
    assert await restored_bytes(store, NAME) == (None if change == "deleted" else NEW)
    assert on_disk(store, NAME) == (None if change == "deleted" else NEW)
    await assert_nothing_open_below(store.disk.path)


@pytest.mark.parametrize("size", [1000, 3 * CHUNK])
async def test_a_database_that_is_lost_before_the_last_check(
    store: UploadStore, broken_disk: BrokenDisk, size: int
) -> None:
    """Bytes that were checked are served and stay on disk, though the database cannot confirm the record any more."""
    data = await save_and_lose(store, size)
    held = broken_disk.hold("fsync")
    caller = asyncio.create_task(restored_bytes(store, NAME))
    await held.met()
    await execute(store, "ALTER TABLE image_storage RENAME TO image_storage_away")
    held.release()
    assert await caller == data
    assert on_disk(store, NAME) == data
    await execute(store, "ALTER TABLE image_storage_away RENAME TO image_storage")


# -- changed at every try ---------------------------------------------------------------------------------------------


def after_each_link(monkeypatch: pytest.MonkeyPatch, do: Any, times: int) -> None:
    """Call `do` just after each of the first `times` files gets its name, in the same thread."""
    real, left = os.link, times

    def link(source: str, target: str, **named: Any) -> None:
        nonlocal left
        real(source, target, **named)
        left -= 1
        if left >= 0:
            do(target, named["dst_dir_fd"])

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("size", [1000, 3 * CHUNK])
@pytest.mark.parametrize("times", [2, 3])
async def test_a_record_that_changes_at_every_try_is_unknown(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch, size: int, times: int
) -> None:
    """A name that has a record all the time is never absent; after three tries it is unknown."""
    data = await save_and_lose(sqlite_store, size)

    def change(*_: Any) -> None:
        with contextlib.closing(
            sqlite3.connect(str(backend_of(sqlite_store.database.url).file(sqlite_store.database.url)))
        ) as connection:
            connection.execute("UPDATE image_storage SET generation = generation + 1")
            connection.commit()

    after_each_link(monkeypatch, change, times)
    if times < 3:
        assert await restored_bytes(sqlite_store, NAME) == data
        return
    with pytest.raises(DatabaseUnavailable):
        await restored_bytes(sqlite_store, NAME)
    assert files_below(sqlite_store.disk.path) == []
    assert await restored_bytes(sqlite_store, NAME) == data


@pytest.mark.parametrize("size", [1000, 3 * CHUNK, STREAMED])
async def test_a_file_that_vanishes_at_once(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A program that removes every file as soon as it has its name makes no name absent: no answer needs it."""
    data = await save_and_lose(sqlite_store, size)
    after_each_link(monkeypatch, lambda name, directory: os.unlink(name, dir_fd=directory), 1)
    assert await restored_bytes(sqlite_store, NAME) == data
    assert files_below(sqlite_store.disk.path) == []
    assert await restored_bytes(sqlite_store, NAME) == data
