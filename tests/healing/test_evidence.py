"""A file and its record differ: which of them is newer, by what can be known of a file after its writer is gone."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from tests.support.raw_sql import execute
from tests.support.sample_data import noise
from tests.support.store_requests import hit_and_settle
from tests.support.store_state import in_quarantine, on_disk, on_disk_and_in_database, set_aside
from tests.support.uploads import A_DAY_NS, NAME, NEW, OLD, THIRD, generation_of, history_of, replace_file

AN_HOUR = timedelta(hours=1)


@pytest.fixture
async def recorded(store: UploadStore) -> UploadStore:
    """A store whose only name was saved a day ago."""
    await store.save(NAME, OLD)
    record = await store.database.find(NAME)
    assert record is not None
    a_day_ago = record.modified_ns - A_DAY_NS
    await execute(store, f"UPDATE image_storage SET modified_ns = {a_day_ago}")
    os.utime(store.disk.path_of(NAME), ns=(a_day_ago, a_day_ago))
    return store


@pytest.fixture
async def next_process(recorded: UploadStore) -> AsyncIterator[UploadStore]:
    """Another process on the same disk, which begins when a test first uses it."""
    async with UploadStore(recorded.disk.path, recorded.database.url) as store:
        yield store


def write_live(store: UploadStore, data: bytes) -> Path:
    """Overwrite a name's file as an app does: both of its times are the present one."""
    path = store.disk.path_of(NAME)
    path.write_bytes(data)
    return path


def time_of(store: UploadStore) -> int:
    return store.disk.path_of(NAME).stat().st_mtime_ns


# -- the disk is newer ------------------------------------------------------------------------------------------------


OVERWRITES: dict[str, Callable[[UploadStore], object]] = {
    "the app, or a cron job, wrote into the file": lambda store: write_live(store, NEW),
    "it was renamed over the file": lambda store: replace_file(store, NEW, time.time_ns()),
    "rsync -t brought a newer file": lambda store: replace_file(store, NEW, time_of(store) + A_DAY_NS // 2),
    "a clock is ahead": lambda store: replace_file(store, NEW, time.time_ns() + A_DAY_NS),
    "shorter": lambda store: write_live(store, b"x"),
}


@pytest.mark.parametrize("overwrite", OVERWRITES.values(), ids=OVERWRITES)
async def test_a_newer_file_is_adopted_by_a_later_process(
    recorded: UploadStore, next_process: UploadStore, overwrite: Callable[[UploadStore], object]
) -> None:
    """What the app wrote while another process served, or none, is the next generation; nothing is thrown away."""
    overwrite(recorded)
    written = on_disk(recorded, NAME)
    await hit_and_settle(next_process, NAME)
    assert await on_disk_and_in_database(next_process, NAME) == written
    assert await generation_of(recorded) == 2
    assert await history_of(recorded) == [OLD]


async def test_a_node_whose_clock_is_behind(recorded: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of a node whose clock is an hour behind the database's are compared by the database's clock."""
    await execute(
        recorded,
        "UPDATE image_storage SET modified_ns = :modified, changed_at = :changed",
        modified=time.time_ns() + 3000 * 10**9,
        changed=datetime.now(UTC) + timedelta(seconds=3000),
    )

    async def ahead() -> datetime:
        return datetime.now(UTC) + AN_HOUR

    monkeypatch.setattr(recorded.database.changes, "now", ahead)
    write_live(recorded, NEW)
    await hit_and_settle(recorded, NAME)
    assert await on_disk_and_in_database(recorded, NAME) == NEW


async def test_a_mark_that_was_made_while_the_clock_was_ahead(recorded: UploadStore) -> None:
    """A clock that was ahead when the disk's mark was made, and is right since, makes no overwrite an old file."""
    mark = recorded.disk.path / ".selfheal-disk"
    mark.unlink()
    with pytest.MonkeyPatch.context() as ahead:
        wrong = time.time_ns() + A_DAY_NS
        ahead.setattr("selfheal.disk.mark.time.time_ns", lambda: wrong)
        recorded.disk.marked_ns()
    os.utime(mark, ns=(wrong, wrong))
    async with UploadStore(recorded.disk.path, recorded.database.url) as next_process:
        await asyncio.sleep(0.05)
        write_live(recorded, NEW)
        await hit_and_settle(next_process, NAME)
        assert await on_disk_and_in_database(next_process, NAME) == NEW


async def test_a_mark_of_a_disk_with_another_clock(recorded: UploadStore) -> None:
    """A mark is kept whose disk has a clock that is ahead of this machine's, as a server of files can have."""
    mark = recorded.disk.path / ".selfheal-disk"
    ahead = time.time_ns() + A_DAY_NS
    os.utime(mark, ns=(ahead, ahead))
    before = mark.stat().st_ino
    assert recorded.disk.marked_ns() == ahead
    assert mark.stat().st_ino == before


# -- the database is right --------------------------------------------------------------------------------------------


async def test_a_placeholder_of_the_image_is_no_overwrite(recorded: UploadStore) -> None:
    """A new container starts with files that came with its image: they are older than the mark of its disk."""
    write_live(recorded, THIRD)
    for file in (".selfheal-disk", ".selfheal-followed"):
        (recorded.disk.path / file).unlink(missing_ok=True)
    async with UploadStore(recorded.disk.path, recorded.database.url) as first_start:
        await hit_and_settle(first_start, NAME)
        assert await on_disk_and_in_database(first_start, NAME) == OLD
    assert await set_aside(recorded, NAME) == [THIRD]


async def test_a_mark_that_came_with_the_disk_is_made_anew(recorded: UploadStore, tmp_path: Path) -> None:
    """An image that was built of a directory in use holds its mark, too: it counts for the disk it was made on."""
    mark = recorded.disk.path / ".selfheal-disk"
    copy = tmp_path / "copy"
    copy.write_bytes(mark.read_bytes())
    os.utime(copy, ns=(mark.stat().st_mtime_ns, mark.stat().st_mtime_ns))
    write_live(recorded, THIRD)
    copy.rename(mark)
    async with UploadStore(recorded.disk.path, recorded.database.url) as first_start:
        await hit_and_settle(first_start, NAME)
        assert await on_disk_and_in_database(first_start, NAME) == OLD


async def test_old_bytes_that_git_lays_are_known(store: UploadStore) -> None:
    """`git pull` writes an old version with a new mtime: the record stays, and there is no further version."""
    await store.save(NAME, OLD)
    await store.save(NAME, NEW)
    write_live(store, OLD)
    async with UploadStore(store.disk.path, store.database.url) as next_process:
        await hit_and_settle(next_process, NAME)
        assert await on_disk_and_in_database(next_process, NAME) == NEW
    assert await history_of(store) == [OLD]
    assert await generation_of(store) == 2


async def test_a_file_restored_from_a_tar_is_older(recorded: UploadStore, next_process: UploadStore) -> None:
    """A backup lays unknown bytes with their old mtime now: the database wins, and the bytes become a version."""
    replace_file(recorded, THIRD, time_of(recorded) - A_DAY_NS)
    await hit_and_settle(next_process, NAME)
    assert await on_disk_and_in_database(next_process, NAME) == OLD
    assert await set_aside(next_process, NAME) == [THIRD]
    assert in_quarantine(next_process) == []


TORN = {
    "empty": lambda size: b"",
    "cut off": lambda size: noise(size)[: size // 2],
    "cut off by one byte": lambda size: noise(size)[:-1],
    "only zeros": bytes,
}


@pytest.mark.parametrize("torn", TORN.values(), ids=TORN)
@pytest.mark.parametrize("size", [1000, 3 * CHUNK + 5])
async def test_a_torn_file_is_no_overwrite(store: UploadStore, torn: Callable[[int], bytes], size: int) -> None:
    """What a crash leaves of the recorded bytes, however new it is, does not win over the whole."""
    await store.save(NAME, noise(size))
    time.sleep(0.02)
    write_live(store, torn(size))
    async with UploadStore(store.disk.path, store.database.url) as next_process:
        await hit_and_settle(next_process, NAME)
        assert await on_disk_and_in_database(next_process, NAME) == noise(size)
    assert await set_aside(store, NAME) == [torn(size)]


async def test_an_overwrite_that_has_just_begun(recorded: UploadStore, next_process: UploadStore) -> None:
    """A file that the app has emptied, and is about to write, is not taken for torn: the app's bytes win."""
    next_process.reconciler.settled_after = 0.5
    with recorded.disk.path_of(NAME).open("wb", buffering=0) as file:
        hit = asyncio.create_task(hit_and_settle(next_process, NAME))
        await asyncio.sleep(0.2)
        file.write(NEW)
        await hit
    assert on_disk(recorded, NAME) == NEW
    await asyncio.sleep(1.2)  # it failed, and is due again
    await hit_and_settle(next_process, NAME)
    assert await on_disk_and_in_database(next_process, NAME) == NEW


# -- what loses is not lost -------------------------------------------------------------------------------------------


async def test_what_was_set_aside_outlives_the_disk(recorded: UploadStore, other_store: UploadStore) -> None:
    """A copy that lost is a version of its name with a reason: any node can bring it back, and its disk may be lost."""
    replace_file(recorded, THIRD, 0)
    await hit_and_settle(recorded, NAME)
    recorded.disk.path_of(NAME).unlink()
    (version,) = [version for version in await other_store.database.history(NAME) if version.reason]
    await other_store.undo(NAME, version.generation)
    assert await on_disk_and_in_database(other_store, NAME) == THIRD
    await other_store.undo(NAME)
    assert await on_disk_and_in_database(other_store, NAME) == OLD


async def test_undo_prefers_what_the_name_once_had(store: UploadStore) -> None:
    """Without a generation, `undo` undoes the last overwrite, not a copy that was set aside since."""
    await store.save(NAME, OLD)
    await store.save(NAME, NEW)
    replace_file(store, THIRD, 0)
    await hit_and_settle(store, NAME)
    await store.undo(NAME)
    assert await on_disk_and_in_database(store, NAME) == OLD


async def test_a_copy_is_set_aside_once(recorded: UploadStore) -> None:
    """The same bytes, laid again and again, are one version."""
    for _ in range(3):
        replace_file(recorded, THIRD, 0)
        await hit_and_settle(recorded, NAME)
    assert await set_aside(recorded, NAME) == [THIRD]
    assert in_quarantine(recorded) == []


async def test_the_quarantine_is_drained(
    recorded: UploadStore, next_process: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was moved away while the database did not answer is stored by a later process; then it leaves the disk."""
    replace_file(recorded, THIRD, 0)
    await recorded.restorer.set_aside_unreadable(NAME)
    assert in_quarantine(recorded) == [THIRD]
    monkeypatch.setattr("selfheal.healing.disk_copies.DRAINED_AFTER", 0.0)
    next_process.background.follow()
    await next_process.tasks.drain(30)
    assert await set_aside(next_process, NAME) == [THIRD]
    assert in_quarantine(recorded) == []
    assert not recorded.disk.quarantine_path.exists()


async def test_an_app_that_rewrites_a_file_for_ever(recorded: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adoptions of one name are some time apart, and a name has a limited number of versions."""
    for number in range(4):
        write_live(recorded, b"%d of many" % number)
        await hit_and_settle(recorded, NAME)
    assert await generation_of(recorded) == 2
    monkeypatch.setattr("selfheal.sql.record_writer.VERSIONS_AT_MOST", 3)
    for number in range(6):
        await recorded.save(NAME, b"saved %d" % number)
    assert await history_of(recorded) == [b"saved 4", b"saved 3", b"saved 2"]
