"""Calls for many names: batches of files, and records with their first chunks. Over every database."""

from __future__ import annotations

import asyncio
import random

from selfheal import ImageStorage, Record
from selfheal.content.sources import CHUNK
from selfheal.sql.models import SmallFile
from tests.support.records import bytes_of, read_record, sha256_of, small_file
from tests.support.similar_names import SIMILAR_NAMES
from tests.support.tables import contents


async def stored_many(images: ImageStorage, files: list[SmallFile]) -> dict[str, Record]:
    """Store a batch, and return the records of its names."""
    stored = await images.store_many(files)
    records = await images.catalogue.find(file.name for file in files)
    assert stored == {
        file.name
        for file in files
        if (records[file.name].sha256, records[file.name].deleted_at) == (file.digests.whole, None)
    }
    return records


async def test_store_many(images: ImageStorage) -> None:
    """Every file of a batch is stored with its own time, equal bytes among them."""
    files = {f"{number:03}.jpg": b"%d" % (number // 2) for number in range(200)}
    files |= {"empty.png": b"", "three.bin": bytes(2 * CHUNK + 1)}
    batch = [small_file(name, data, modified_ns=number) for number, (name, data) in enumerate(files.items())]
    records = await stored_many(images, batch)
    assert sorted(records) == sorted(files)
    assert records == await images.catalogue.find(files)
    for number, (name, data) in enumerate(files.items()):
        record = records[name]
        assert (record.sha256, record.size, record.modified_ns) == (sha256_of(data), len(data), number)
        assert (record.generation, record.is_deleted) == (1, False)
    assert records["000.jpg"].content_type == "image/jpeg"
    for name in ("000.jpg", "001.jpg", "199.jpg", "empty.png", "three.bin"):
        assert await read_record(images, records[name]) == files[name]


async def test_store_many_keeps_existing_records(images: ImageStorage) -> None:
    """A batch changes neither a record nor a tombstone, and reports the names that it has stored."""
    alive = await images.store_image("alive.png", b"one")
    await images.store_image("dead.png", b"one")
    dead = await images.bury("dead.png")
    batch = [small_file(name, b"other") for name in ("alive.png", "dead.png", "new.png")]
    records = await stored_many(images, batch)
    assert (records["alive.png"], records["dead.png"]) == (alive, dead)
    assert records["new.png"].generation == 1
    assert await bytes_of(images, "alive.png") == b"one"
    assert await bytes_of(images, "new.png") == b"other"
    assert await stored_many(images, batch) == records


async def test_store_nothing(images: ImageStorage, database_url: str) -> None:
    """An empty batch changes nothing."""
    before = await contents(database_url)
    assert await stored_many(images, []) == {}
    assert await images.catalogue.find([]) == {}
    assert await images.blobs.fetch([]) == {}
    assert await contents(database_url) == before


async def test_two_batches_at_once(images: ImageStorage) -> None:
    """Two batches of the same files at once, in different order, both succeed."""
    batch = [small_file(f"{number}.png", b"%d" % (number % 40)) for number in range(100)]
    results = await asyncio.gather(*(stored_many(images, order) for order in (batch, batch[::-1], batch[50:])))
    assert results[0] == results[1]
    assert len(results[0]) == 100
    assert {record.generation for record in results[0].values()} == {1}


async def test_two_batches_of_the_same_names(images: ImageStorage) -> None:
    """Two batches with different bytes for the same names, in opposite order, both succeed; one of them is first."""
    names = [f"{number:03}.png" for number in range(300)]
    one = [small_file(name, b"one" + name.encode()) for name in names]
    two = [small_file(name, b"two" + name.encode()) for name in reversed(names)]
    for_one, for_two = await asyncio.gather(stored_many(images, one), stored_many(images, two))
    assert for_one == for_two == await images.catalogue.find(names)
    assert {record.sha256 for record in for_one.values()} <= {file.digests.whole for file in one + two}


async def test_fetch(images: ImageStorage) -> None:
    """One call returns the records of many names with their first chunks; a tombstone has none."""
    large = random.randbytes(CHUNK + 10)
    files = {"small.png": b"small", "empty.png": b"", "large.png": large, "chunk.png": large[:CHUNK]}
    for name, data in files.items():
        await images.store_image(name, data)
    await images.store_image("dead.png", b"dead")
    await images.bury("dead.png")
    found = await images.blobs.fetch([*files, "dead.png", "unknown.png"])
    assert sorted(found) == sorted([*files, "dead.png"])
    assert {name: found[name].record for name in found} == await images.catalogue.find(found)
    assert found["small.png"].first == b"small"
    assert found["large.png"].first == found["chunk.png"].first == large[:CHUNK]
    assert not found["empty.png"].first
    assert found["dead.png"].first is None
    assert found["dead.png"].record.is_deleted


async def test_one_name_alone_or_among_many(images: ImageStorage) -> None:
    """A single name, alive, deleted or unknown, gets the same answer as among many."""
    names = [*SIMILAR_NAMES, "dead.png", "unknown.png"]
    for name in names[:-1]:
        await images.store_image(name, name.encode())
    await images.bury("dead.png")
    together, generations = await images.blobs.fetch(names), await images.catalogue.generations(names)
    assert len(together) == len(generations) == len(names) - 1
    for name in names:
        assert await images.blobs.fetch([name]) == {key: found for key, found in together.items() if key == name}
        assert await images.catalogue.generations([name]) == {key: it for key, it in generations.items() if key == name}


async def test_many_names_in_one_call(images: ImageStorage) -> None:
    """A call with 40,000 names returns every name that has a record."""
    files = [small_file(f"{number}.png", b"%d" % number) for number in range(300)]
    await images.store_many(files)
    names = [f"{number}.png" for number in range(40_000)]
    assert sorted(await images.catalogue.find(names)) == sorted(file.name for file in files)
    found = await images.blobs.fetch(names)
    assert {name: what.first for name, what in found.items()} == {file.name: file.chunks[0] for file in files}
