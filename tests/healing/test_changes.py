"""Nodes follow what other nodes changed in the database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from selfheal import UploadStore
from tests.support.constants import set_constants
from tests.support.faults import BrokenDisk
from tests.support.raw_sql import execute
from tests.support.records import small_file
from tests.support.store_requests import hit, hit_and_settle
from tests.support.store_state import in_quarantine, on_disk
from tests.support.uploads import NAME, NEW, OLD, OTHER_NAME, THIRD
from tests.support.waiting import eventually


async def follow_until(store: UploadStore, holds: Callable[[], bool]) -> None:
    """Let requests arrive until something holds; each of them lets the store follow the changes."""

    async def request_came() -> bool:
        store.background.follow()
        await store.tasks.drain(30)
        return holds()

    await eventually(request_came)


@pytest.fixture
async def on_both_nodes(store: UploadStore, other_store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names that both nodes have on disk and have compared with their records."""
    set_constants(monkeypatch, FOLLOW_EVERY=0.05, PAUSE=0.2)
    for name in (NAME, OTHER_NAME):
        await store.save(name, OLD)
        await other_store.restore(name)
        for node in (store, other_store):
            await hit_and_settle(node, name)


@pytest.mark.usefixtures("on_both_nodes")
async def test_a_deletion_reaches_other_disks_without_a_request(store: UploadStore, other_store: UploadStore) -> None:
    """A name that one node deletes is removed from the disk of another node, though no client requests it there."""
    await other_store.delete(NAME)
    assert on_disk(store, NAME) == OLD
    await follow_until(store, lambda: on_disk(store, NAME) is None)
    assert on_disk(store, OTHER_NAME) == OLD


@pytest.mark.usefixtures("on_both_nodes")
async def test_changes_reach_other_disks_one_after_the_other(store: UploadStore, other_store: UploadStore) -> None:
    """Every later change of the same name is followed as well: an overwrite, an undo and a deletion."""
    await other_store.save(NAME, NEW)
    await follow_until(store, lambda: on_disk(store, NAME) == NEW)
    await other_store.undo(NAME)
    await follow_until(store, lambda: on_disk(store, NAME) == OLD)
    await other_store.delete(NAME)
    await follow_until(store, lambda: on_disk(store, NAME) is None)
    assert in_quarantine(store) == []


@pytest.mark.usefixtures("on_both_nodes")
async def test_a_change_in_a_long_transaction_is_followed(
    store: UploadStore, engine: AsyncEngine, other_store: UploadStore
) -> None:
    """A change is found however long before its commit its transaction began, whatever was followed in between."""
    if store.database.url.get_backend_name() == "sqlite":
        pytest.skip("SQLite has one writer at a time: no other change can be committed first")
    async with engine.begin() as connection:
        await other_store.save(NAME, NEW, connection=connection)
        await other_store.save(OTHER_NAME, THIRD)
        await follow_until(store, lambda: on_disk(store, OTHER_NAME) == THIRD)
        assert on_disk(store, NAME) == OLD
    await follow_until(store, lambda: on_disk(store, NAME) == NEW)


@pytest.mark.usefixtures("on_both_nodes")
async def test_many_changes_are_followed_in_pages(
    store: UploadStore, other_store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More changes than one query returns, or one transaction numbers, are followed to the last one."""
    set_constants(monkeypatch, CHANGES_AT_ONCE=3, NUMBERED_AT_ONCE=2)
    names = [f"{number}.jpg" for number in range(10)]
    for name in names:
        await other_store.save(name, THIRD)
        await store.restore(name)
        await other_store.delete(name)
    await follow_until(store, lambda: not any(on_disk(store, name) for name in names))


@pytest.mark.usefixtures("on_both_nodes")
async def test_followed_again_after_an_outage(store: UploadStore, other_store: UploadStore) -> None:
    """A database that gave no answer is left alone for a while; then the changes of that time are followed."""
    await other_store.delete(NAME)
    await execute(store, "ALTER TABLE image_storage RENAME TO away")
    await follow_until(store, lambda: True)
    await execute(store, "ALTER TABLE away RENAME TO image_storage")
    await follow_until(store, lambda: on_disk(store, NAME) is None)


@pytest.mark.usefixtures("on_both_nodes")
async def test_following_that_is_broken_off(
    store: UploadStore, other_store: UploadStore, broken_disk: BrokenDisk
) -> None:
    """Changes that were not compared before the task was stopped are compared at the next hit."""
    for name in (NAME, OTHER_NAME):
        await other_store.delete(name)
    held = broken_disk.hold("rename")
    store.background.follow()
    await held.met()
    await asyncio.wait([asyncio.create_task(store.tasks.drain(0))], timeout=0.2)
    held.release()
    await store.tasks.drain(30)
    for name in (NAME, OTHER_NAME):
        if on_disk(store, name) is None:
            continue
        await hit_and_settle(store, name)
        assert on_disk(store, name) is None


@pytest.mark.usefixtures("on_both_nodes")
async def test_a_name_outside_the_grammar_is_not_followed(
    store: UploadStore, other_store: UploadStore, directory: Path
) -> None:
    """A record that another program wrote touches no file outside the uploads directory, and hides no other change."""
    outside = directory.parent / "outside.jpg"
    outside.write_bytes(THIRD)
    await other_store.save("z.jpg", THIRD)
    await other_store.delete("z.jpg")
    await execute(store, "UPDATE image_storage SET name = '../outside.jpg' WHERE name = 'z.jpg'")
    await other_store.delete(NAME)
    await follow_until(store, lambda: on_disk(store, NAME) is None)
    assert outside.read_bytes() == THIRD


async def test_following_reads_no_more_than_the_changes(store: UploadStore, engine: AsyncEngine) -> None:
    """An index holds only the changed names; `create_tables` adds it to a table of an earlier version of selfheal."""
    await execute(store, "DROP INDEX ix_image_storage_sequence")
    await store.database.create_tables()
    question = "SELECT name FROM image_storage WHERE sequence <> 0 AND sequence > 7 ORDER BY sequence"
    async with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            question = f"QUERY PLAN {question}"
        else:
            await connection.execute(text("SET enable_seqscan = off"))  # it would read a small table as a whole
        plan = (await connection.execute(text(f"EXPLAIN {question}"))).all()
    assert "ix_image_storage_sequence" in str(plan)


# -- changes that a clock, a page or a pause would hide ---------------------------------------------------------------


@pytest.mark.usefixtures("on_both_nodes")
async def test_a_change_whose_clock_stepped_back_is_followed(store: UploadStore, other_store: UploadStore) -> None:
    """A change that the database's clock dates years before the last one that was followed is followed as well."""
    await other_store.delete(OTHER_NAME)
    await follow_until(store, lambda: on_disk(store, OTHER_NAME) is None)
    await other_store.delete(NAME)
    await execute(store, "UPDATE image_storage SET changed_at = '2001-01-01 00:00:00'")
    await follow_until(store, lambda: on_disk(store, NAME) is None)


@pytest.mark.usefixtures("on_both_nodes")
async def test_a_transaction_that_outlives_every_patience(
    store: UploadStore, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction of the app's that commits minutes after its save is followed by the node that it began on, too."""
    set_constants(monkeypatch, CHANGING_FOR=0.0)
    async with engine.begin() as connection:
        await store.save(NAME, NEW, connection=connection)
        if engine.dialect.name != "sqlite":
            await follow_until(store, lambda: True)
            await hit_and_settle(store, NAME)
    await follow_until(store, lambda: on_disk(store, NAME) == NEW)


@pytest.mark.usefixtures("on_both_nodes")
async def test_a_node_that_was_away_catches_up(store: UploadStore, other_store: UploadStore) -> None:
    """A node that was stopped while others changed names clears its disk at its first request, for whatever name."""
    await follow_until(store, lambda: True)
    await store.close()
    await other_store.delete(NAME)
    await other_store.save(OTHER_NAME, NEW)
    async with UploadStore(store.disk.path, store.database.url) as back:
        await follow_until(back, lambda: on_disk(back, NAME) is None and on_disk(back, OTHER_NAME) == NEW)


@pytest.mark.usefixtures("on_both_nodes")
async def test_hundreds_of_deletions_are_followed(store: UploadStore, other_store: UploadStore) -> None:
    """Every file goes, however many names another node deletes between two questions."""
    names = [f"many/{number}.jpg" for number in range(400)]
    await store.database.store_many([small_file(name, b"x", modified_ns=7) for name in names])
    (store.disk.path / "many").mkdir()
    for name in names:
        store.disk.path_of(name).write_bytes(b"x")
    gone = "deleted_at = changed_at, generation = 2, sequence = -1"
    await execute(other_store, f"UPDATE image_storage SET {gone} WHERE name LIKE 'many/%'")

    async def are_gone() -> bool:
        store.background.follow()
        await store.tasks.drain(30)
        return not any(on_disk(store, name) for name in names)

    await eventually(are_gone, seconds=60)


@pytest.mark.usefixtures("on_both_nodes")
async def test_a_file_that_never_holds_still_delays_no_other(
    store: UploadStore, other_store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be adopted because it is written all the time delays nothing that is followed."""
    monkeypatch.setattr(store.reconciler, "settled_after", 1e9)
    await asyncio.sleep(0.02)
    store.disk.path_of(NAME).write_bytes(THIRD)
    hit(store, NAME)
    await other_store.delete(OTHER_NAME)
    await other_store.save(NAME, NEW)

    async def is_gone() -> bool:
        store.background.follow()
        await asyncio.sleep(0.05)
        return on_disk(store, OTHER_NAME) is None

    await eventually(is_gone, seconds=5)
    await store.tasks.drain(0)
