"""Background checks: nothing is missed that changes, fails or stops while files are compared with their records."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from selfheal import UploadStore
from selfheal.healing.pace import Pace
from tests.support.constants import set_constants
from tests.support.faults import BrokenDisk
from tests.support.store_requests import hit, hit_and_settle
from tests.support.store_state import in_database, in_quarantine, on_disk, set_aside
from tests.support.uploads import A_DAY_NS, NAME, NEW, OLD, OTHER_NAME, replace_file
from tests.support.waiting import eventually

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes follow at every request, and what failed is tried again at once."""
    set_constants(monkeypatch, FOLLOW_EVERY=0.0, PAUSE=0.1)
    monkeypatch.setattr("selfheal.healing.pace.FIRST", 0.05)
    monkeypatch.setattr("selfheal.healing.pace.LONGEST", 0.05)


async def follow_until(store: UploadStore, holds: Callable[[], bool]) -> None:
    """Let requests arrive until something holds; each of them lets the store follow the changes."""

    async def request_came() -> bool:
        store.background.follow()
        await store.tasks.drain(30)
        return holds()

    await eventually(request_came)


# -- changes while a file is compared ---------------------------------------------------------------------------------


async def test_a_deletion_while_the_file_is_compared(
    store: UploadStore, other_store: UploadStore, broken_disk: BrokenDisk
) -> None:
    """A name that another node deletes while its file is compared with the old record is removed all the same."""
    await store.save(NAME, OLD)
    await follow_until(store, lambda: True)
    replace_file(store, OLD, time.time_ns() - A_DAY_NS)
    held = broken_disk.hold("utime")
    hit(store, NAME)
    await held.met()
    await other_store.delete(NAME)
    store.background.follow()
    await asyncio.sleep(0.5)
    held.release()
    await store.tasks.drain(30)
    await follow_until(store, lambda: on_disk(store, NAME) is None)


async def test_a_file_that_is_replaced_while_it_is_compared(store: UploadStore, broken_disk: BrokenDisk) -> None:
    """A file of the same size that takes the name before the time is set is not taken for the recorded one."""
    other = bytes(reversed(OLD))
    await store.save(NAME, OLD)
    replace_file(store, OLD, time.time_ns() - A_DAY_NS)
    new = replace_file(store, other, time.time_ns() + A_DAY_NS, OTHER_NAME)
    held = broken_disk.hold("utime")
    hit(store, NAME)
    await held.met()
    new.rename(store.disk.path_of(NAME))
    held.release()
    await store.tasks.drain(30)
    await hit_and_settle(store, NAME)
    assert await in_database(store, NAME) == other


async def test_a_deletion_while_an_overwrite_holds_still(store: UploadStore, other_store: UploadStore) -> None:
    """A name that is deleted while its newer file has to hold still stays deleted; the file becomes a version."""
    await store.save(NAME, OLD)
    replace_file(store, NEW, time.time_ns() + 10**9)
    store.reconciler.settled_after = 1.0
    hit(store, NAME)
    await asyncio.sleep(0.5)
    await other_store.delete(NAME)
    await store.tasks.drain(30)
    await follow_until(store, lambda: on_disk(store, NAME) is None)
    record = await store.database.find(NAME)
    assert record is not None
    assert record.is_deleted
    assert await set_aside(store, NAME) == [NEW]


async def test_a_copy_is_set_aside_while_its_name_is_saved(store: UploadStore, other_store: UploadStore) -> None:
    """A copy of a name without a record never deletes the record that another process saves at this moment."""
    for number in range(20):
        name, versions = f"{number}.jpg", store.database.versions
        setting_aside = versions.set_aside(name, NEW, modified_ns=1, reason="it waited")
        await asyncio.gather(setting_aside, other_store.save(name, OLD))
        assert await in_database(store, name) == OLD


# -- what fails -------------------------------------------------------------------------------------------------------


def test_names_that_fail_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that failed first are tried first, however often the others fail."""
    monkeypatch.setattr("selfheal.healing.pace.FIRST", 0.0)
    pace = Pace()
    for name in ("a", "b", "c", "a"):
        pace.slow_down(name)
    assert pace.due() == ["b", "c", "a"]


async def test_names_that_are_gone_hold_nobody_up(sqlite_store: UploadStore) -> None:
    """Many failed names whose files are gone by now do not keep another one from being tried again."""
    await sqlite_store.save(NAME, OLD)
    await sqlite_store.delete(NAME)
    await follow_until(sqlite_store, lambda: True)
    replace_file(sqlite_store, OLD, time.time_ns())
    for number in range(600):
        sqlite_store.background.retry(f"gone/{number}.jpg")
    sqlite_store.background.retry(NAME)
    await follow_until(sqlite_store, lambda: on_disk(sqlite_store, NAME) is None)


async def test_a_sweep_that_the_database_stops_begins_again(
    directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the database went back every file is stored, though it took no writes meanwhile and few are remembered."""
    set_constants(monkeypatch, CHECKS_AT_ONCE=8)
    monkeypatch.setattr("selfheal.healing.pace.NAMES_AT_MOST", 8)
    async with UploadStore(directory, sqlite_url, deadline=2.0) as store:
        await store.database.create_tables()
        await follow_until(store, lambda: True)
        changes = store.database.changes
        await changes.begin_epoch((await changes.position()).epoch)
        for number in range(40):
            replace_file(store, b"%d" % number, time.time_ns(), f"{number}.jpg")
        lock = sqlite3.connect(str(store.database.url.database), isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        store.background.follow()
        await store.tasks.drain(60)
        lock.close()

        async def are_stored() -> bool:
            store.background.follow()
            await store.tasks.drain(30)
            return await store.database.count() == 40

        await eventually(are_stored)


async def test_a_sweep_of_a_process_that_died_is_done_by_another(sqlite_store: UploadStore) -> None:
    """A process that finds another one at work does not take the files for compared before that one is done."""
    await sqlite_store.database.create_tables()
    await sqlite_store.save(OTHER_NAME, OLD)
    await follow_until(sqlite_store, lambda: True)
    changes = sqlite_store.database.changes
    await changes.begin_epoch((await changes.position()).epoch)
    replace_file(sqlite_store, NEW, time.time_ns())
    with sqlite_store.disk.only_process() as is_alone:
        assert is_alone
        await follow_until(sqlite_store, lambda: True)
        assert await in_database(sqlite_store, NAME) is None
    await follow_until(sqlite_store, lambda: True)
    assert await in_database(sqlite_store, NAME) == NEW


async def test_a_copy_that_a_killed_process_moved_away_is_stored(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that was moved away moments before is left to the process that did it, and stored a while later."""
    await sqlite_store.save(NAME, OLD)
    replace_file(sqlite_store, NEW, time.time_ns())
    assert sqlite_store.disk.quarantine(NAME) is not None
    set_constants(monkeypatch, DRAIN_EVERY=0.0)
    await follow_until(sqlite_store, lambda: True)
    assert in_quarantine(sqlite_store) == [NEW]
    set_constants(monkeypatch, DRAINED_AFTER=0.0)
    await follow_until(sqlite_store, lambda: in_quarantine(sqlite_store) == [])
    assert await set_aside(sqlite_store, NAME) == [NEW]


# -- changes without end ----------------------------------------------------------------------------------------------


async def test_a_node_follows_an_app_that_writes_all_the_time(
    store: UploadStore, other_store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion is followed although there is a new change whenever the last ones were numbered."""
    for name in (NAME, OTHER_NAME):
        await store.save(name, OLD)
    await follow_until(store, lambda: True)
    await other_store.delete(NAME)
    number = store.database.changes.number
    turns = iter(range(1_000_000))

    async def number_and_write() -> int:
        numbered = await number()
        await other_store.database.store_image(OTHER_NAME, b"%d" % next(turns))
        return numbered

    monkeypatch.setattr(store.database.changes, "number", number_and_write)
    store.background.follow()
    await asyncio.wait_for(store.tasks.drain(10), 15)
    assert on_disk(store, NAME) is None


def test_a_name_that_was_quiet_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals double up to the longest; after a long time without a try, the first interval counts again."""
    now = 1000.0
    monkeypatch.setattr("selfheal.healing.pace.time.monotonic", lambda: now)
    pace = Pace(5.0, 60.0)
    waited = []
    for _ in range(6):
        pace.slow_down("a.jpg")
        begun = now
        while not pace.is_due("a.jpg"):
            now += 1.0
        waited.append(now - begun)
    assert waited == [5, 10, 20, 40, 60, 60]
    now += 241.0
    pace.slow_down("a.jpg")
    now += 5.0
    assert pace.is_due("a.jpg")
