"""Closing a store while others call it: what they began ends first, and nothing of it stays open."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from selfheal import Saved, UploadStore
from selfheal.content.sources import CHUNK
from tests.support.files import noise
from tests.support.open_files import open_now, opened_since
from tests.support.waiting import eventually, wait_until

DATA = noise(12 * CHUNK)
NAME = "cats/tom.jpg"


@pytest.fixture
async def saved(directory: Path, database_tables: str) -> UploadStore:
    """A closed store that has a large upload, whose connections to the database are gone."""
    store = UploadStore(directory, database_tables)
    async with store:
        await store.save(NAME, DATA)
    return store


@pytest.mark.parametrize("call", ["digest", "save", "restore"])
async def test_a_call_that_has_begun(saved: UploadStore, call: str) -> None:
    """A call of another task ends as if nobody closed the store, and leaves no connection."""
    before = open_now()
    calls = {
        "digest": lambda: saved.database.digest(record),
        "save": lambda: saved.save("b.jpg", DATA),
        "restore": lambda: saved.restore(NAME),
    }
    async with saved:
        record = await saved.database.find(NAME)
        assert record is not None
        saved.disk.path_of(NAME).unlink()
        began = asyncio.create_task(calls[call]())  # type: ignore[arg-type]
        for _ in range(20):
            await asyncio.sleep(0)
    assert began.done()
    await began
    await eventually(lambda: opened_since(before) == [])


def test_calls_of_other_threads(directory: Path, database_tables: str) -> None:
    """A store in a thread of its own ends with the last call that has begun, and none of them fails."""
    store = UploadStore(directory, database_tables)
    saved: list[Saved] = []
    errors: list[Exception] = []
    store.sync.save(NAME, DATA)

    def save(number: int) -> None:
        try:
            saved.append(store.sync.save(f"{number}.jpg", DATA))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(store.home._calling) == 4)
    store.sync.close()
    for thread in threads:
        thread.join()
    assert (len(saved), errors) == (4, [])


async def test_two_that_close_at_once(saved: UploadStore) -> None:
    """Two that close a store at once do not wait for each other."""
    await saved.open()
    await saved.restore(NAME)
    began = time.monotonic()
    await asyncio.gather(saved.close(), saved.close())
    assert time.monotonic() - began < 10
