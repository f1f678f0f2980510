"""Purges give space back to the disk; statistics say how much is used, saved, and to be had."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from selfheal import ImageStorage, SettingsError
from selfheal.content.sources import CHUNK
from tests.support.raw_sql import sql
from tests.support.records import bytes_of
from tests.support.sample_data import noise
from tests.support.tables import age

NOW = timedelta(0)
MONTH = timedelta(days=30)
SIZE = 40 * CHUNK
"""Bytes of a file that is purged: 10 MiB."""


@pytest.fixture
async def images(database_url: str) -> AsyncIterator[ImageStorage]:
    """The database half, its tables made."""
    images = ImageStorage(database_url)
    await images.create_tables()
    yield images
    await images.close()


only_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def size_of(url: str) -> int:
    """Return the size of a SQLite file."""
    return os.stat(url.partition("///")[2]).st_size


async def pragma(url: str, name: str) -> Any:
    """Return the value of a pragma."""
    return (await sql(url, f"PRAGMA {name}"))[0][0]


async def fill_and_bury(images: ImageStorage, url: str) -> None:
    """Store a large file and a small one, delete the large one, and make all of it old."""
    await images.store_image("kept.png", noise(3 * CHUNK, 1))
    await images.store_image("gone.png", noise(SIZE, 2))
    await images.bury("gone.png")
    await age(url, 31)


@only_sqlite
async def test_a_purge_gives_space_back(images: ImageStorage, database_url: str) -> None:
    """A file that selfheal made shrinks by what a purge drops, while others write."""
    await fill_and_bury(images, database_url)
    before = size_of(database_url)
    purging = asyncio.create_task(images.purge(MONTH))
    for number in range(10):
        await images.store_image(f"{number}.png", b"x")
    purged = await purging
    assert purged.size == SIZE
    assert purged.freed >= SIZE
    assert size_of(database_url) <= before - SIZE
    assert await bytes_of(images, "kept.png") == noise(3 * CHUNK, 1)
    assert await sql(database_url, "PRAGMA integrity_check") == [("ok",)]
    assert (await images.purge(MONTH)).freed == 0


@only_sqlite
async def test_an_old_file_is_rewritten(tmp_path: Path, database_url: str) -> None:
    """A file that an app made keeps its size in a purge; `vacuum` makes it small, and purges shrink it from then on."""
    for statement in ("PRAGMA page_size = 4096", "CREATE TABLE app_cat (id INTEGER)", "INSERT INTO app_cat VALUES (7)"):
        await sql(database_url, statement)
    images = ImageStorage(database_url)
    await images.create_tables()
    await fill_and_bury(images, database_url)
    before = size_of(database_url)
    assert ((await images.purge(MONTH)).freed, size_of(database_url)) == (0, before)
    assert (await images.statistics()).free_bytes >= SIZE
    await images.vacuum()
    assert size_of(database_url) <= before - SIZE
    assert (await pragma(database_url, "auto_vacuum"), await pragma(database_url, "page_size")) == (2, 4096)
    assert await sql(database_url, "SELECT id FROM app_cat") == [(7,)]
    assert await bytes_of(images, "kept.png") == noise(3 * CHUNK, 1)
    await fill_and_bury(images, database_url)
    assert (await images.purge(MONTH)).freed >= SIZE
    assert await sql(database_url, "PRAGMA integrity_check") == [("ok",)]
    await images.close()


@only_sqlite
async def test_space_in_wal_mode(images: ImageStorage, database_url: str) -> None:
    """In WAL mode the file shrinks at once as well."""
    await sql(database_url, "PRAGMA journal_mode=WAL")
    await fill_and_bury(images, database_url)
    assert (await images.purge(MONTH)).freed >= SIZE
    assert size_of(database_url) < SIZE / 2


async def test_a_server_frees_its_space_itself(postgres_url: str) -> None:
    """PostgreSQL has its own vacuum: ours is refused, and a purge reports nothing freed."""
    images = ImageStorage(postgres_url)
    await images.create_tables()
    await fill_and_bury(images, postgres_url)
    assert (await images.purge(MONTH)).freed == 0
    with pytest.raises(SettingsError, match="only SQLite"):
        await images.vacuum()
    await images.close()


async def test_statistics(images: ImageStorage, database_url: str) -> None:
    """Each number is what was stored: names, bytes, versions, what is stored once, and what a purge would drop."""
    empty = await images.statistics()
    assert (empty.names, empty.size, empty.deleted, empty.versions, empty.blobs, empty.saved) == (0, 0, 0, 0, 0, 0)
    for name in ("a.png", "b.png", "c.png"):
        await images.store_image(name, bytes(1000))  # equal bytes
    await images.store_image("d.png", b"four")
    await images.store_image("d.png", b"fifth")
    await images.bury("c.png")
    await age(database_url, 31)
    await images.store_image("a.png", b"x" * 10)
    found = await images.statistics(MONTH)
    assert (found.names, found.size, found.deleted) == (3, 10 + 1000 + 5, 1)
    assert (found.versions, found.version_size) == (3, 4 + 1000 + 1000)
    assert (found.blobs, found.stored) == (4, 1000 + 4 + 5 + 10)
    assert found.saved == 10 + 1000 + 5 + 4 + 1000 + 1000 - found.stored
    assert (found.purgeable_versions, found.purgeable, found.purgeable_size) == (2, 1, 4)
    assert found.file_bytes >= found.stored
    purged = await images.purge(MONTH)
    assert (purged.versions, purged.blobs, purged.size) == (2, 1, 4)
    if database_url.startswith("sqlite"):
        assert (await images.statistics()).file_bytes == size_of(database_url)


async def test_statistics_of_bytes_that_nothing_refers_to(images: ImageStorage, database_url: str) -> None:
    """Bytes without a name are no saving, and can be purged after their grace."""
    await images.store_image("a.png", b"bytes")
    await sql(database_url, "DELETE FROM image_storage")
    assert (await images.statistics()).purgeable == 0
    await age(database_url, 2)
    found = await images.statistics()
    assert (found.saved, found.blobs, found.purgeable, found.purgeable_size) == (0, 1, 1, 5)
