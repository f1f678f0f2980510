"""In the background of hits, each file is compared with its record once, in few queries and little memory."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from selfheal import UploadStore
from selfheal.disk.open_file import identity_of
from tests.support.faults import BrokenDisk
from tests.support.raw_sql import execute
from tests.support.recorded_statements import recorded_statements
from tests.support.store_requests import hit, hit_and_settle
from tests.support.store_state import in_database, on_disk, on_disk_and_in_database
from tests.support.uploads import A_DAY_NS, NAME, NEW, OLD, THIRD, replace_file
from tests.support.waiting import eventually


async def test_a_file_that_agrees_is_compared_once(store: UploadStore) -> None:
    """A file that this process has compared causes no further query, however often it is hit."""
    await store.save(NAME, NEW)
    await hit_and_settle(store, NAME)
    with recorded_statements() as seen:
        for _ in range(50):
            await hit_and_settle(store, NAME)
    assert seen == []
    assert await on_disk_and_in_database(store, NAME) == NEW


async def test_many_files_share_queries(store: UploadStore) -> None:
    """The first hits of many files share a few queries."""
    for number in range(40):
        await store.save(f"{number}.jpg", b"%d" % number)
    with recorded_statements() as seen:
        for number in range(40):
            hit(store, f"{number}.jpg")
        await store.tasks.drain(30)
    assert len(seen) < 20


async def test_a_limited_number_of_files_is_compared_at_once(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many first hits start a limited number of tasks; the other files are compared after a later hit."""
    monkeypatch.setattr("selfheal.healing.background.CHECKS_AT_ONCE", 3)
    names = [f"{number}.jpg" for number in range(5)]
    for name in names:
        await sqlite_store.save(name, NEW)
    for known in (3, 5):
        with recorded_statements() as seen:
            for name in names * 3:
                hit(sqlite_store, name)
            await sqlite_store.tasks.drain(30)
        assert sum(statement.count(".jpg") for statement in seen) == (3 if known == 3 else 2)
    with recorded_statements() as seen:
        for name in names:
            hit(sqlite_store, name)
        await sqlite_store.tasks.drain(30)
    assert seen == []


async def test_a_file_that_cannot_be_compared_is_not_tried_at_every_hit(
    sqlite_store: UploadStore, broken_disk: BrokenDisk
) -> None:
    """A file that differs from a damaged record, or cannot be read, is compared again only after a while."""
    saved = await sqlite_store.save(NAME, NEW)
    await execute(sqlite_store, "UPDATE image_chunk SET data = digest")
    replace_file(sqlite_store, OLD, saved.modified_ns - A_DAY_NS)
    await hit_and_settle(sqlite_store, NAME)
    with recorded_statements() as seen:
        await hit_and_settle(sqlite_store, NAME)
    assert seen == []
    await asyncio.sleep(1.0)
    replace_file(sqlite_store, THIRD, saved.modified_ns - A_DAY_NS)
    broken_disk.fail("pread", errno.EIO)
    for causes_a_query in (True, False):
        with recorded_statements() as seen:
            await hit_and_settle(sqlite_store, NAME)
        assert bool(seen) == causes_a_query
    assert on_disk(sqlite_store, NAME) == THIRD


async def test_compared_files_take_bounded_memory(sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limited number of compared files is remembered; for the others the database is asked again."""
    monkeypatch.setattr("selfheal.healing.background.SEEN_AT_MOST", 3)
    names = [f"{number}.jpg" for number in range(4)]

    async def causes_a_query(name: str) -> bool:
        with recorded_statements() as seen:
            await hit_and_settle(sqlite_store, name)
        return bool(seen)

    for name in names:
        await sqlite_store.save(name, NEW)
    assert [await causes_a_query(name) for name in names[:3] * 2] == [True] * 3 + [False] * 3
    assert [await causes_a_query(name) for name in (names[3], names[3], names[0])] == [True, False, True]


async def test_expected_changes_take_bounded_memory(
    store: UploadStore, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many expected changes, only those whose time is over are forgotten."""
    monkeypatch.setattr("selfheal.healing.background.CHANGING_AT_MOST", 2)

    async def expect(name: str, seconds: float) -> None:
        monkeypatch.setattr("selfheal.healing.background.CHANGING_FOR", seconds)
        async with engine.begin() as connection:
            await store.save(name, NEW, connection=connection)

    await expect("short.jpg", 0.0)
    for name in ("long.jpg", "last.jpg"):
        await expect(name, 60.0)
    assert len(store.background._changing) == 2
    for name, causes_a_query in (("short.jpg", False), ("long.jpg", True), ("last.jpg", True)):
        await store.restore(name)
        await hit_and_settle(store, name)
        with recorded_statements() as seen:
            await hit_and_settle(store, name)
        assert bool(seen) == causes_a_query, name


# -- a comparison that fails is no comparison -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EROFS, errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
async def test_a_comparison_that_fails_for_a_while_is_tried_again(
    store: UploadStore, other_store: UploadStore, broken_disk: BrokenDisk, number: int
) -> None:
    """Deleted elsewhere while this disk takes no change: soon after it does, the file is gone, hit or not."""
    await store.save(NAME, OLD)
    await hit_and_settle(store, NAME)
    await other_store.delete(NAME)
    for call in ("rename", "mkdir"):
        broken_disk.fail(call, number)
    store.background.forget(NAME)
    await hit_and_settle(store, NAME)
    assert on_disk(store, NAME) == OLD
    broken_disk.mend()

    async def is_gone() -> bool:
        store.background._follow_from = 0.0
        store.background.follow()
        await store.tasks.drain(30)
        return on_disk(store, NAME) is None

    await eventually(is_gone, seconds=5)


async def test_a_file_that_could_not_be_adopted_is_adopted_later(store: UploadStore, broken_disk: BrokenDisk) -> None:
    """Without descriptors a new file is not backed up; once there are some, its next hits are enough."""
    replace_file(store, NEW, A_DAY_NS)
    file = store.disk.stat(NAME)
    assert file is not None
    broken_disk.fail("open", errno.EMFILE)
    broken_disk.fail("pread", errno.EMFILE)
    store.background.hit(NAME, identity_of(file), adopt=True)
    await store.tasks.drain(30)
    broken_disk.mend()

    async def is_stored() -> bool:
        await hit_and_settle(store, NAME)
        return await in_database(store, NAME) == NEW

    await eventually(is_stored, seconds=5)


async def test_a_comparison_does_not_count_for_ever(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a quarter of an hour a file that was compared is compared again at its next hit."""
    saved = await store.save(NAME, NEW)
    await hit_and_settle(store, NAME)
    file = store.disk.stat(NAME)
    assert file is not None
    assert store.background.judged(NAME, identity_of(file)) is not None
    assert store.background.judged(NAME, (saved.modified_ns, 1, 2, 3)) is None
    monkeypatch.setattr(store.background, "_seen_until", 0.0)
    store.background.follow()
    assert store.background.judged(NAME, identity_of(file)) is None
    with recorded_statements() as seen:
        await hit_and_settle(store, NAME)
    assert seen


async def test_a_coarse_time_is_judged_once(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that keeps times to 2 s, a file is hashed once in each process, however often it is hit."""
    real = os.utime

    def coarse(path: int | str, *, ns: tuple[int, int], **more: Any) -> None:
        rounded = ns[1] // 2_000_000_000 * 2_000_000_000
        real(path, ns=(rounded, rounded), **more)

    monkeypatch.setattr(os, "utime", coarse)
    saved = await store.save(NAME, NEW)
    assert saved.path.stat().st_mtime_ns % 2_000_000_000 == 0
    async with UploadStore(store.disk.path, store.database.url) as next_process:
        await hit_and_settle(next_process, NAME)
        monkeypatch.setattr("selfheal.disk.open_file.OpenFile.sha256", lambda _: pytest.fail("it is hashed again"))
        with recorded_statements() as seen:
            for _ in range(20):
                await hit_and_settle(next_process, NAME)
        assert seen == []
        next_process.background.forget(NAME)
        await hit_and_settle(next_process, NAME)
    assert await on_disk_and_in_database(store, NAME) == NEW


@pytest.mark.parametrize("name", ["cats/tom.jpg.part", "Thumbs.db", "left/alone.jpg"])
async def test_litter_is_served_and_not_adopted(directory: Path, sqlite_url: str, name: str) -> None:
    """A hit of another program's litter, or of a name that the app excludes, stores nothing."""
    async with UploadStore(directory, sqlite_url, exclude=["left/*"]) as store:
        await store.database.create_tables()
        replace_file(store, NEW, A_DAY_NS, name)
        await hit_and_settle(store, name)
        assert await store.database.find(name) is None
        assert on_disk(store, name) == NEW
