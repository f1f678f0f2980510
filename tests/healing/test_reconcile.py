"""A file and its record differ: the database wins, the other bytes become a version, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from selfheal.events import Event, Kind
from tests.support.faults import BrokenDisk, locked_database
from tests.support.raw_sql import execute
from tests.support.recorded_statements import recorded_statements
from tests.support.sample_data import noise
from tests.support.store_requests import hit, hit_and_settle, restored_bytes
from tests.support.store_state import (
    files_below,
    in_database,
    in_quarantine,
    on_disk,
    on_disk_and_in_database,
    set_aside,
)
from tests.support.uploads import A_DAY_NS, NAME, NEW, OLD, THIRD, generation_of, history_of, replace_file
from tests.support.waiting import eventually

# -- the database wins ------------------------------------------------------------------------------------------------


MTIMES: dict[str, Callable[[int], int]] = {
    "older than the record": lambda recorded: recorded - A_DAY_NS,
    "of the same time": lambda recorded: recorded,
    "at the beginning of time": lambda _: 0,
    "before the beginning of time": lambda _: -A_DAY_NS,
}


@pytest.mark.parametrize("when", MTIMES.values(), ids=MTIMES)
async def test_an_older_file_from_a_deploy_becomes_a_version(
    sqlite_store: UploadStore, directory: Path, when: Callable[[int], int]
) -> None:
    """A file that is not newer than its record is no overwrite: the recorded bytes are restored, its own are kept."""
    recorded = time.time_ns() - A_DAY_NS
    await sqlite_store.database.store_image(NAME, NEW, modified_ns=recorded)
    others = [THIRD, NEW[::-1] + b"!", b""]
    for data in others:
        replace_file(sqlite_store, data, when(recorded))
        async with UploadStore(directory, sqlite_store.database.url) as started_later:
            await hit_and_settle(started_later, NAME)
            assert await on_disk_and_in_database(started_later, NAME) == NEW
            assert started_later.disk.path_of(NAME).stat().st_mtime_ns == recorded
    assert await set_aside(sqlite_store, NAME) == others
    assert in_quarantine(sqlite_store) == []


async def test_the_database_wins_over_an_old_copy(store: UploadStore, other_store: UploadStore) -> None:
    """A node that was away has bytes that another node has overwritten: the newer record is restored to its disk."""
    await store.save(NAME, OLD)
    await other_store.save(NAME, NEW)
    assert on_disk(store, NAME) == OLD
    await hit_and_settle(store, NAME)
    assert await on_disk_and_in_database(store, NAME) == NEW
    assert await history_of(store) == [OLD]
    assert await generation_of(store) == 2


async def test_the_quarantine_is_private_and_keeps_everything(store: UploadStore) -> None:
    """It is outside the uploads directory, has mode 0700, and a second copy of a name does not replace the first."""
    await store.save(NAME, NEW)
    for data in (OLD, THIRD):
        replace_file(store, data, 0)
        await store.restorer.set_aside_unreadable(NAME)
    assert sorted(in_quarantine(store)) == sorted([OLD, THIRD])
    assert await store.restore(NAME)
    assert not store.disk.quarantine_path.is_relative_to(store.disk.path)
    assert store.disk.quarantine_path.stat().st_mode & 0o7777 == 0o700
    assert files_below(store.disk.path) == [NAME]


async def test_a_file_that_is_set_aside_is_reported_once(sqlite_store: UploadStore) -> None:
    """A file goes to quarantine with an event that says where; a file that is missing causes no event."""
    saved = await sqlite_store.save(NAME, OLD)
    events: list[Event] = []
    sqlite_store.events.listeners = (events.append,)
    for _ in range(2):
        await sqlite_store.restorer.set_aside_unreadable(NAME)
    assert on_disk(sqlite_store, NAME) is None
    assert in_quarantine(sqlite_store) == [OLD]
    (event,) = events
    assert (event.kind, event.name) == (Kind.QUARANTINED, NAME)
    assert str(sqlite_store.disk.quarantine_path) in event.detail
    assert await restored_bytes(sqlite_store, NAME) == OLD
    assert saved.path.stat().st_mtime_ns == saved.modified_ns


async def test_a_disk_copy_damaged_in_size_is_restored(store: UploadStore) -> None:
    """A file that was cut short or has grown becomes a version; the whole one is restored with its own mtime."""
    for size in (1000, 11 * CHUNK + 3):
        saved = await store.save(NAME, noise(size))
        for damaged in (noise(size)[:-1], b"", noise(size) + b"x"):
            saved.path.write_bytes(damaged)
            os.utime(saved.path, ns=(saved.modified_ns, saved.modified_ns))
            await hit_and_settle(store, NAME)
            assert await on_disk_and_in_database(store, NAME) == noise(size)
            assert saved.path.stat().st_mtime_ns == saved.modified_ns
            assert damaged in await set_aside(store, NAME)


# -- a copy of an earlier generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("was_hit_before", [False, True])
async def test_a_stale_file_does_not_overwrite_a_newer_record(
    store: UploadStore, engine: AsyncEngine, was_hit_before: bool
) -> None:
    """The older file, still on disk after a save in the app's own transaction, does not overwrite the newer record."""
    await store.save(NAME, OLD)
    if was_hit_before:
        await hit_and_settle(store, NAME)
    async with engine.begin() as connection:
        await store.save(NAME, NEW, connection=connection)
    await hit_and_settle(store, NAME)
    assert await in_database(store, NAME) == NEW
    assert await generation_of(store) == 2
    assert await on_disk_and_in_database(store, NAME) == NEW


async def test_a_copy_of_any_earlier_generation_is_known(store: UploadStore) -> None:
    """A backup puts back an old version with its mtime: the record stays, and nothing goes to quarantine."""
    first = await store.save(NAME, OLD)
    for data in (THIRD, NEW):
        await store.save(NAME, data)
    replace_file(store, OLD, first.modified_ns)
    await hit_and_settle(store, NAME)
    assert await on_disk_and_in_database(store, NAME) == NEW
    assert await generation_of(store) == 3
    assert in_quarantine(store) == []


async def test_a_copy_saved_after_the_process_began_is_known(store: UploadStore) -> None:
    """An undo goes back to older bytes; the newer file, put back with its mtime, does not win over the undo."""
    await store.save(NAME, OLD)
    second = await store.save(NAME, NEW)
    await store.undo(NAME)
    await asyncio.sleep(0.02)
    replace_file(store, NEW, second.modified_ns)
    await hit_and_settle(store, NAME)
    assert await on_disk_and_in_database(store, NAME) == OLD
    assert await generation_of(store) == 3


# -- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-A_DAY_NS, A_DAY_NS], ids=["earlier", "later"])
async def test_the_same_bytes_get_the_records_mtime(store: UploadStore, offset: int) -> None:
    """A file that differs only in its mtime gets the recorded one, so that its ETag is the same on every node."""
    saved = await store.save(NAME, NEW)
    replace_file(store, NEW, saved.modified_ns + offset)
    await hit_and_settle(store, NAME)
    assert saved.path.stat().st_mtime_ns == saved.modified_ns
    assert await on_disk_and_in_database(store, NAME) == NEW
    assert await generation_of(store) == 1
    assert in_quarantine(store) == []


# -- a disk or a database that is no help -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 11 * CHUNK + 3])
@pytest.mark.parametrize(
    "damage",
    ["UPDATE image_chunk SET digest = data, data = digest", "DELETE FROM image_chunk"],
    ids=["other bytes", "no bytes"],
)
async def test_a_disk_copy_is_left_alone_if_the_database_copy_is_damaged(
    store: UploadStore, size: int, damage: str
) -> None:
    """If the recorded bytes are damaged, the file that differs stays as it is, and so does the record."""
    saved = await store.save(NAME, noise(size))
    await execute(store, damage)
    for data in (OLD, noise(size)[:-1]):
        before = replace_file(store, data, saved.modified_ns - A_DAY_NS).stat()
        await hit_and_settle(store, NAME)
        assert on_disk(store, NAME) == data
        assert (saved.path.stat().st_ino, saved.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert in_quarantine(store) == []
    assert files_below(store.disk.path) == [NAME]
    assert await generation_of(store) == 1


async def test_no_healing_on_a_disk_that_takes_no_file(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the recorded bytes cannot be written, the file that differs is not lost, and it is not adopted."""
    saved = await store.save(NAME, NEW)
    replace_file(store, OLD, saved.modified_ns - A_DAY_NS)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        await hit_and_settle(store, NAME)
    assert await in_database(store, NAME) == NEW
    assert OLD in [on_disk(store, NAME), *await set_aside(store, NAME)]


async def test_nothing_changes_without_an_answer(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that gives no answer changes nothing on disk; once it answers, disk and database agree."""
    monkeypatch.setattr("selfheal.healing.background.PAUSE", 0.1)
    saved = await store.save(NAME, NEW)
    async with UploadStore(store.disk.path, store.database.url, deadline=0.5) as hurried:
        replace_file(hurried, OLD, saved.modified_ns - A_DAY_NS)
        async with locked_database(store):
            await hit_and_settle(hurried, NAME)
            assert on_disk(hurried, NAME) == OLD

        def agrees() -> bool:
            if on_disk(hurried, NAME) is None:
                return False  # the old copy was set aside, and the new one has no name yet
            hit(hurried, NAME)
            return on_disk(hurried, NAME) == NEW

        await eventually(agrees)
        await hurried.tasks.drain(30)
    assert await set_aside(store, NAME) == [OLD]


async def test_a_quiet_database_is_left_alone(store: UploadStore) -> None:
    """After the database gave no answer, hits do not ask it for a while."""
    await store.save(NAME, NEW)
    async with UploadStore(store.disk.path, store.database.url, deadline=0.5) as hurried:
        async with locked_database(store):
            await hit_and_settle(hurried, NAME)
        with recorded_statements() as seen:
            for _ in range(20):
                await hit_and_settle(hurried, NAME)
        assert seen == []


# -- changed during the comparison ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_known", [True, False], ids=["saved", "forgotten"])
async def test_a_save_that_is_committed_during_the_comparison(
    store: UploadStore, other_store: UploadStore, broken_disk: BrokenDisk, is_known: bool
) -> None:
    """Bytes are compared with the current record: those of a faster save are neither an overwrite nor damage."""
    await store.save(NAME, OLD)
    written = replace_file(store, NEW, time.time_ns() - A_DAY_NS).stat().st_mtime_ns
    held = broken_disk.hold("pread")
    checking = asyncio.create_task(store.reconciler.check(NAME))
    await held.met()
    if is_known:
        record = await other_store.database.store_image(NAME, NEW, modified_ns=written)
        written = record.modified_ns
    else:
        await execute(store, "DELETE FROM image_storage")
    held.release()
    await checking
    assert await on_disk_and_in_database(store, NAME) == NEW
    assert store.disk.path_of(NAME).stat().st_mtime_ns == written
    assert await generation_of(store) == (2 if is_known else 1)
    assert in_quarantine(store) == []


async def test_a_file_that_vanishes_during_the_comparison(sqlite_store: UploadStore, broken_disk: BrokenDisk) -> None:
    """A file that differs and is gone a moment later changes nothing, neither in the database nor in quarantine."""
    saved = await sqlite_store.save(NAME, OLD)
    replace_file(sqlite_store, NEW, saved.modified_ns - A_DAY_NS)
    held = broken_disk.hold("lstat", done_first=True)
    checking = asyncio.create_task(sqlite_store.reconciler.check(NAME))
    await held.met()
    saved.path.unlink()
    held.release()
    await checking
    assert on_disk(sqlite_store, NAME) is None
    assert await in_database(sqlite_store, NAME) == OLD
    assert in_quarantine(sqlite_store) == []


async def test_a_file_that_vanishes_before_the_comparison(store: UploadStore) -> None:
    """A hit whose file is gone before it is compared changes nothing in the database."""
    saved = await store.save(NAME, NEW)
    hit(store, NAME)
    saved.path.unlink()
    await store.tasks.drain(30)
    await store.reconciler.check(NAME)
    assert await in_database(store, NAME) == NEW
    assert await generation_of(store) == 1
