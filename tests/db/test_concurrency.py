"""Parallel and cancelled changes, in one process and in several. Over every database."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable
from typing import Any

import pytest

from selfheal import ImageStorage, UploadStore
from selfheal.blobs.database import WRITE_AT_ONCE
from selfheal.content.sources import CHUNK
from tests.support.records import bytes_of, existing_record, read_record, sha256_of
from tests.support.storage_processes import PROCESSES, TURNS, in_processes
from tests.support.tables import contents

LARGE = WRITE_AT_ONCE * CHUNK + 12345
"""Bytes that are stored in more than one transaction."""


async def test_parallel_saves_of_one_name(images: ImageStorage) -> None:
    """Parallel saves of one name all succeed, as generations that follow each other."""
    pictures = [b"picture %d" % number for number in range(20)]
    records = await asyncio.gather(*(images.store_image("a.png", data) for data in pictures))
    assert sorted(record.generation for record in records) == list(range(1, 21))
    last = await existing_record(images)
    assert last.generation == 20
    assert last in records
    versions = await images.history("a.png")
    assert [version.generation for version in versions] == list(range(19, 0, -1))
    by_generation = {record.generation: record.sha256 for record in records}
    assert [version.sha256 for version in versions] == [by_generation[generation] for generation in range(19, 0, -1)]
    assert sorted([last.sha256, *(version.sha256 for version in versions)]) == sorted(map(sha256_of, pictures))


async def test_parallel_changes_of_one_name(images: ImageStorage) -> None:
    """Parallel saves, deletions and undos of one name all succeed, each as a generation of its own."""
    one, two = b"one" * 1000, b"two" * 1000
    await images.store_image("a.png", one)
    await images.store_image("a.png", two)
    work: list[Awaitable[Any]] = []
    for _ in range(8):
        work += [images.store_image("a.png", one), images.undo("a.png"), images.store_image("a.png", two)]
        work += [images.bury("a.png"), images.undo("a.png")]
    await asyncio.gather(*work)
    record = await existing_record(images)
    generations = [version.generation for version in await images.history("a.png")]
    assert len(generations) == len(set(generations))
    assert all(generation < record.generation for generation in generations)
    if not record.is_deleted:
        assert await read_record(images, record) in (one, two)


async def test_many_names_at_the_same_time(images: ImageStorage) -> None:
    """More parallel saves than there are connections all succeed."""
    records = await asyncio.gather(*(images.store_image(f"{n}.png", b"%d" % (n // 2)) for n in range(40)))
    assert [record.name for record in records] == [f"{n}.png" for n in range(40)]
    assert await images.count() == 40
    for number in (0, 1, 39):
        assert await bytes_of(images, f"{number}.png") == b"%d" % (number // 2)


@pytest.mark.parametrize(("size", "times"), [(4000, 90), (LARGE, 10)], ids=["small", "large"])
async def test_cancelled_saves(store: UploadStore, size: int, times: int) -> None:
    """A save that is cancelled at any moment is stored whole or not at all, and a repetition is harmless."""
    images = store.database
    seconds = 0.0
    for name in ("cold.png", "warm.png"):
        start = time.monotonic()
        await images.store_image(name, random.randbytes(size))
        seconds = time.monotonic() - start
    for number in range(times):
        name, data = f"{number}.png", random.randbytes(size)
        task = asyncio.create_task(images.store_image(name, data))
        await asyncio.sleep(random.uniform(0, 1.3) * seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.tasks.drain(20)
        found = await images.find(name)
        assert await bytes_of(images, name) in ((None,) if found is None else (data,))
        again = await images.store_image(name, data)
        assert again.generation == 1
        assert found in (None, again)
        assert await bytes_of(images, name) == data
        assert await images.history(name) == []


async def test_cancelled_overwrites(store: UploadStore) -> None:
    """A cancelled overwrite leaves the old version or the new one, with its bytes and its history."""
    images = store.database
    await images.store_image("a.png", b"0")
    done = [b"0"]
    for number in range(1, 31):
        data = b"%d" % number
        task = asyncio.create_task(images.store_image("a.png", data))
        await asyncio.sleep(random.uniform(0, 0.02))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.tasks.drain(20)
        got = await bytes_of(images, "a.png")
        assert got in (done[-1], data)
        done += [data] if got == data else []
    assert (await existing_record(images)).generation == len(done)
    versions = await images.history("a.png")
    assert [version.sha256 for version in reversed(versions)] == [sha256_of(data) for data in done[:-1]]


# -- several processes -------------------------------------------------------------------------------------------------


async def test_tables_made_by_several_processes(database_url: str) -> None:
    """Several processes at once can create the tables, and store a file right after."""
    await in_processes("create_tables", database_url)
    images = ImageStorage(database_url)
    assert await images.count() == PROCESSES
    await images.close()
    assert len((await contents(database_url))["image_schema"]) == 1


async def test_several_processes_upload(images: ImageStorage, database_url: str) -> None:
    """Parallel uploads of several processes into one database all succeed."""
    await in_processes("upload", database_url)
    for number in range(PROCESSES):
        for turn in range(TURNS):
            data = random.Random(f"{number}/{turn}").randbytes(200_000)
            assert await bytes_of(images, f"{number}/{turn}.png") == data
        assert await bytes_of(images, f"{number}/same.png") == b"same" * (TURNS - 1)
    shared = await images.find("shared.png")
    assert shared is not None
    assert shared.generation == TURNS * PROCESSES
    versions = await images.history("shared.png")
    assert [version.generation for version in versions] == list(range(shared.generation - 1, 0, -1))
