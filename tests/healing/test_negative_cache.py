"""Names that the database said do not exist: remembered for 2 s, never longer, and never by mistake."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from selfheal import DatabaseUnavailable, UploadStore
from selfheal.healing.negative_cache import FORGET_AFTER, NegativeCache
from tests.support.faults import locked_database
from tests.support.recorded_statements import recorded_statements
from tests.support.store_requests import restored_bytes
from tests.support.uploads import NAME, NEW, OLD, save_and_lose


async def test_an_absent_name_is_remembered_for_a_moment(store: UploadStore, other_store: UploadStore) -> None:
    """A second request does not ask the database; a name that another node saves is present within 2 s."""
    assert await restored_bytes(store, NAME) is None
    with recorded_statements() as seen:
        assert await asyncio.gather(*(restored_bytes(store, NAME) for _ in range(100))) == [None] * 100
    assert seen == []
    await other_store.save(NAME, NEW)
    end = time.monotonic() + FORGET_AFTER + 10
    while (data := await restored_bytes(store, NAME)) is None:
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    assert data == NEW
    assert FORGET_AFTER <= 2


async def test_a_save_makes_a_name_present_at_once(store: UploadStore, engine: AsyncEngine) -> None:
    """A name that was absent is present as soon as this node saves it, also in the app's own transaction."""
    assert await restored_bytes(store, "own.jpg") is None
    assert await restored_bytes(store, "within.jpg") is None
    await store.save("own.jpg", OLD)
    store.disk.path_of("own.jpg").unlink()
    async with engine.begin() as connection:
        await store.save("within.jpg", NEW, connection=connection)
    assert await restored_bytes(store, "own.jpg") == OLD
    assert await restored_bytes(store, "within.jpg") == NEW


async def test_an_undone_deletion_is_present_at_once(store: UploadStore) -> None:
    """A deleted name that was requested is present as soon as its deletion is undone."""
    saved = await store.save(NAME, OLD)
    await store.delete(NAME)
    assert await restored_bytes(store, NAME) is None
    await store.undo(NAME)
    saved.path.unlink()
    assert await restored_bytes(store, NAME) == OLD


def test_absent_names_take_bounded_memory() -> None:
    """The cache holds a limited number of names, however many absent ones are requested; the last one is in it."""
    cache, names = NegativeCache(limit=50), [f"{number}.jpg" for number in range(300)]
    for name in names:
        cache.add(name)
        assert name in cache
        assert sum(other in cache for other in names) <= 50


async def test_a_flood_of_absent_names_leaves_turns_of_the_loop_to_others(sqlite_store: UploadStore) -> None:
    """With many callers of absent names, every other turn of the event loop answers one of them."""
    names = [f"absent-{index}.jpg" for index in range(20)]
    for name in names:
        assert await sqlite_store.restorer.restore(name) is None
    answered: Counter[int] = Counter()  # by turn of the event loop

    async def call(name: str) -> None:
        assert await sqlite_store.restorer.restore(name) is None
        answered[turn] += 1

    callers = [asyncio.create_task(call(name)) for name in names]
    turn = 0
    while not all(task.done() for task in callers):
        turn += 1
        await asyncio.sleep(0)
        if turn == 1:  # a cancelled caller delays no other, whether it was its turn or not
            callers[0].cancel()
            callers[10].cancel()
    assert answered.total() == 18
    assert max(answered.values()) == 1
    assert turn >= 18 * 2


async def test_an_unanswered_question_is_not_remembered_as_absent(store: UploadStore) -> None:
    """A question without an answer is not cached: as soon as the database answers again, so does the store."""
    data = await save_and_lose(store, 1000)
    async with UploadStore(store.disk.path, store.database.url, deadline=0.5) as hurried:
        async with locked_database(store):
            with pytest.raises(DatabaseUnavailable):
                await hurried.restorer.restore(NAME)
        end = time.monotonic() + 10
        while True:
            try:
                assert await restored_bytes(hurried, NAME) == data
            except DatabaseUnavailable:  # a slow machine
                assert time.monotonic() < end
            else:
                break
