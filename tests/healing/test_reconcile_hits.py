"""In the background of hits, each file is compared with its record once, in few queries and little memory."""

from __future__ import annotations

import errno

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from selfheal import UploadStore
from tests.support.faults import BrokenDisk
from tests.support.raw_sql import execute
from tests.support.recorded_statements import recorded_statements
from tests.support.store_requests import hit, hit_and_settle
from tests.support.store_state import on_disk, on_disk_and_in_database
from tests.support.uploads import A_DAY_NS, NAME, NEW, OLD, THIRD, replace_file


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
    """A file that differs from a damaged record, or cannot be read, is compared once, until it changes."""
    saved = await sqlite_store.save(NAME, NEW)
    await execute(sqlite_store, "UPDATE image_chunk SET data = digest")
    replace_file(sqlite_store, OLD, saved.modified_ns - A_DAY_NS)
    await hit_and_settle(sqlite_store, NAME)
    with recorded_statements() as seen:
        await hit_and_settle(sqlite_store, NAME)
    assert seen == []
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
