"""Equal bytes are stored once, and chunks are moved to the digest that is known at the end. Over every database."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from selfheal import CorruptBlob, DatabaseUnavailable, ImageStorage, Record
from selfheal.blobs.database import WRITE_AT_ONCE
from selfheal.content.sources import CHUNK
from selfheal.errors import FileChanged
from tests.support.constants import set_constants
from tests.support.damaged_chunks import (
    a_bit_of_the_data,
    a_missing_chunk,
    an_extra_chunk,
)
from tests.support.records import digests_of, read_record
from tests.support.sample_data import noise, pieces_of_sizes
from tests.support.tables import stored_sizes

LARGE = WRITE_AT_ONCE * CHUNK + 12345
"""Bytes that are stored in more than one transaction."""


# -- equal bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1000, CHUNK + 1, LARGE])
async def test_equal_bytes_once(images: ImageStorage, database_url: str, size: int) -> None:
    """Equal bytes are stored once, whatever their names and sources are."""
    data = noise(size)
    records = [
        await images.store_image("a.png", data),
        await images.store_image("b.png", pieces_of_sizes(data, (100_000,))),
        await images.store_image("c.png", data, known=digests_of(data)),
        await images.store_image("a.png", data),
    ]
    assert await stored_sizes(database_url) == (1, -(-size // CHUNK), size)
    assert [await read_record(images, record) for record in records] == [data] * 4


@pytest.mark.parametrize("size", [1000, LARGE], ids=["small", "large"])
async def test_equal_bytes_at_the_same_time(images: ImageStorage, database_url: str, size: int) -> None:
    """Equal bytes that are saved under several names at once are stored once, and every name has them."""
    data = noise(size)
    records: dict[str, Record] = {}

    async def save(name: str) -> None:
        records[name] = await images.store_image(name, pieces_of_sizes(data, (CHUNK,)))

    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(save, f"{number}.png")
    assert sorted(records) == [f"{number}.png" for number in range(6)]
    for name, record in records.items():
        assert await images.find(name) == record
        assert await read_record(images, record) == data
    assert await stored_sizes(database_url) == (1, -(-size // CHUNK), size)


async def test_known_and_unknown_digests_at_the_same_time(images: ImageStorage) -> None:
    """Two saves of the same large bytes at once, one with known digests, both succeed."""
    for turn in range(8):
        data = turn.to_bytes(4, "big") + noise(3 * LARGE)

        async def save_known(data: bytes = data, turn: int = turn) -> Record:
            await anyio.sleep(turn * 0.025)
            return await images.store_image(f"{turn}/known.png", data, known=digests_of(data))

        saving = images.store_image(f"{turn}/unknown.png", pieces_of_sizes(data, (CHUNK,)))
        for record in await asyncio.gather(saving, save_known()):
            assert await read_record(images, record) == data


async def test_the_same_bytes_at_the_same_time(images: ImageStorage) -> None:
    """Many saves of the same bytes under one name at once are one change."""
    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(images.store_image, "a.png", b"same")
    record = await images.find("a.png")
    assert record is not None
    assert record.generation == 1
    assert await images.history("a.png") == []


# -- moving chunks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_damaged", [False, True], ids=["new", "damaged"])
async def test_chunks_that_are_moved_in_several_transactions(
    images: ImageStorage, database_url: str, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    """Chunks that are moved to their digest in several transactions replace damaged ones, while others save."""
    monkeypatch.setattr("selfheal.blobs.database.MOVE_AT_ONCE", 3)
    data = noise(2 * LARGE)
    if is_damaged:
        record = await images.store_image("a.png", data, known=digests_of(data))
        for damage in (a_bit_of_the_data(4, 9), a_missing_chunk(7), an_extra_chunk(b"more")):
            await damage(database_url, record)
    records = [await images.store_image("a.png", pieces_of_sizes(data, (CHUNK,)))]

    async def save(name: str) -> None:
        records.append(await images.store_image(name, pieces_of_sizes(data, (CHUNK,))))

    async with anyio.create_task_group() as group:
        group.start_soon(save, "b.png")
        group.start_soon(save, "c.png")
        group.start_soon(images.store_image, "small.png", b"small")
    assert await stored_sizes(database_url) == (2, -(-len(data) // CHUNK) + 1, len(data) + 5)
    assert [await read_record(images, record) for record in records] == [data] * 3


@pytest.mark.parametrize("moved_at_once", [1, 3, 7])
async def test_any_number_of_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved_at_once: int) -> None:
    """An upload of any number of chunks is stored whole, however they are divided into transactions."""
    set_constants(monkeypatch, CHUNK=16, HASH_AT_ONCE=2, WRITE_AT_ONCE=5, MOVE_AT_ONCE=moved_at_once)
    database_url = f"sqlite+aiosqlite:///{tmp_path / 'app.db'}"
    images = ImageStorage(database_url)
    await images.create_tables()
    chunks = size = 0
    for count in range(1, 23):
        data = noise(16 * count - 3 * (count % 2))
        first = await images.store_image(f"{count}/first.png", pieces_of_sizes(data, (7,)))
        again = await images.store_image(f"{count}/again.png", pieces_of_sizes(data, (16,)))
        assert await read_record(images, first) == await read_record(images, again) == data
        with pytest.raises(CorruptBlob):
            await images.versions.mend(again, pieces_of_sizes(data[:-1], (16,)))
        with pytest.raises(CorruptBlob):
            await images.versions.mend(replace(again, sha256="0" * 64), pieces_of_sizes(data, (16,)))
        await a_missing_chunk(count // 2)(database_url, again)
        await images.versions.mend(again, pieces_of_sizes(data, (16,)))
        assert await read_record(images, first) == data
        chunks, size = chunks + count, size + len(data)
    await images.purge(timedelta(0), grace=timedelta(seconds=-5))
    assert await stored_sizes(database_url) == (22, chunks, size)
    await images.close()


@pytest.mark.parametrize("done", [1, 2, 3, 8, 18])
async def test_a_move_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """If moving the chunks breaks off, equal bytes of another name stay whole, and a purge drops the rest."""
    database_url = f"sqlite+aiosqlite:///{tmp_path / 'app.db'}"
    images = ImageStorage(database_url)
    await images.create_tables()
    monkeypatch.setattr("selfheal.blobs.database.MOVE_AT_ONCE", 3)
    data = noise(2 * LARGE)
    before = await images.store_image("before.png", data)
    real, left = images._engine.write, done

    async def write(work: Callable[[AsyncConnection], Awaitable[Any]]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise DatabaseUnavailable("the database is gone")
        return await real(work)

    with monkeypatch.context() as patch:
        patch.setattr(images._engine, "write", write)
        with pytest.raises(DatabaseUnavailable):
            await images.store_image("a.png", pieces_of_sizes(data, (CHUNK,)))
    assert await images.find("a.png") is None
    assert await read_record(images, before) == data
    await images.purge(timedelta(0), grace=timedelta(seconds=-5))
    assert await stored_sizes(database_url) == (1, -(-len(data) // CHUNK), len(data))
    assert await read_record(images, before) == data
    await images.close()


def bytes_written() -> int:
    """Return how many bytes this process has written so far."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["wchar"])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the bytes that a process has written")
async def test_bytes_are_written_once(tmp_path: Path) -> None:
    """SQLite writes each chunk once, though the digest of the bytes is known only at the end."""
    images = ImageStorage(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}")
    await images.create_tables()
    data = noise(8 * LARGE)
    before = bytes_written()
    await images.store_image("a.png", pieces_of_sizes(data, (CHUNK,)))
    written = bytes_written() - before
    await images.close()
    assert written < 1.3 * len(data)


# -- known digests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, LARGE, 2 * LARGE])
@pytest.mark.parametrize("is_stored", [True, False], ids=["bytes are stored", "bytes are new"])
async def test_bytes_that_differ_from_known_digests(images: ImageStorage, is_stored: bool, size: int) -> None:
    """Bytes that differ from their known digests are refused, and do not replace the right bytes."""
    good, bad = noise(size), noise(size, seed=1)
    if is_stored:
        await images.store_image("good.png", good)
    for other in (bad, good[:-1], good + b"x", good[: size // 2] + b"x" + good[size // 2 + 1 :]):
        with pytest.raises(FileChanged):
            await images.store_image("bad.png", other, known=digests_of(good))
    assert await images.find("bad.png") is None
    record = await images.store_image("good.png", good) if not is_stored else await images.find("good.png")
    assert record is not None
    assert await read_record(images, record) == good


@pytest.mark.parametrize("size", [0, 1000, LARGE])
async def test_bytes_with_known_digests(images: ImageStorage, size: int) -> None:
    """Bytes with known digests are stored like any others."""
    data = noise(size)
    record = await images.store_image("a.png", data, known=digests_of(data))
    assert await read_record(images, record) == data
