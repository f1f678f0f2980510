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
from tests.support.raw_sql import execute
from tests.support.store_requests import hit_and_settle
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
async def test_too_many_changes_to_follow(
    store: UploadStore, other_store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more changes than a node keeps in memory, it forgets what it has compared; the next hit compares again."""
    set_constants(monkeypatch, CHANGES_AT_MOST=2)
    for name in ("x.jpg", "y.jpg", NAME):
        await other_store.save(name, THIRD)
        await other_store.delete(name)

    async def is_gone() -> bool:
        store.background.follow()
        await hit_and_settle(store, NAME)
        return on_disk(store, NAME) is None

    await eventually(is_gone)


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
    store: UploadStore, other_store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes that were not compared before the task was stopped are compared at the next hit."""
    set_constants(monkeypatch, SETTLED_AFTER=1e9)  # the first comparison never ends
    for name in (NAME, OTHER_NAME):
        await other_store.delete(name)
    for _ in range(30):
        store.background.follow()
        await asyncio.sleep(0.06)
    await store.tasks.drain(0)
    set_constants(monkeypatch, SETTLED_AFTER=0.0)
    for name in (NAME, OTHER_NAME):
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
    await execute(store, "DROP INDEX ix_image_storage_changed_at")
    await store.database.create_tables()
    question = "SELECT name FROM image_storage WHERE generation > 1 AND changed_at >= '2026-01-01 00:00:00'"
    async with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            question = f"QUERY PLAN {question}"
        else:
            await connection.execute(text("SET enable_seqscan = off"))  # it would read a small table as a whole
        plan = (await connection.execute(text(f"EXPLAIN {question}"))).all()
    assert "ix_image_storage_changed_at" in str(plan)
