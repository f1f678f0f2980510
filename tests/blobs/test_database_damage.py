"""Damaged bytes are never read, and right bytes mend them. Over every database."""

from __future__ import annotations

import pytest

from selfheal import CorruptBlob, ImageStorage
from selfheal.blobs.database import WRITE_AT_ONCE
from selfheal.content.sources import CHUNK
from tests.support.damaged_chunks import (
    CHUNKS,
    DAMAGED_CHUNKS,
    OTHER_DAMAGES,
    PICTURE,
    Damage,
    a_bit_of_the_data,
    a_missing_chunk,
)
from tests.support.raw_sql import sql
from tests.support.records import read_record
from tests.support.sample_data import noise, pieces_of_sizes
from tests.support.tables import stored_sizes

LARGE = WRITE_AT_ONCE * CHUNK + 12345
"""Bytes that are stored in more than one transaction."""


# -- reading -----------------------------------------------------------------------------------------------------------


async def read_damaged(images: ImageStorage) -> bytes:
    """Return the bytes that a read yields before it raises an error."""
    record = await images.find("a.png")
    assert record is not None
    got = bytearray()

    async def collect() -> None:
        async for chunk in images.read(record):
            got.extend(chunk)

    with pytest.raises(CorruptBlob) as caught:
        await collect()
    assert caught.value.name == "a.png"
    assert "a.png" in str(caught.value)
    return bytes(got)


@pytest.mark.parametrize(("damage", "intact"), DAMAGED_CHUNKS.values(), ids=DAMAGED_CHUNKS)
async def test_damaged_chunks(images: ImageStorage, database_url: str, damage: Damage, intact: int) -> None:
    """A read yields neither a damaged chunk nor anything after it: never a wrong byte."""
    record = await images.store_image("a.png", PICTURE)
    await damage(database_url, record)
    assert PICTURE[: intact * CHUNK].startswith(await read_damaged(images))


@pytest.mark.parametrize("damage", OTHER_DAMAGES.values(), ids=OTHER_DAMAGES)
async def test_damaged_length(images: ImageStorage, database_url: str, damage: Damage) -> None:
    """If there are more or fewer chunks than the record says, a read raises an error, and yields no wrong byte."""
    record = await images.store_image("a.png", PICTURE)
    await damage(database_url, record)
    assert PICTURE.startswith(await read_damaged(images))


async def test_damage_before_the_first_chunk_that_is_read(images: ImageStorage, database_url: str) -> None:
    """Chunks after a damaged one can be read."""
    record = await images.store_image("a.png", PICTURE)
    await a_bit_of_the_data(0, 0)(database_url, record)
    assert await read_record(images, record, 1) == PICTURE[CHUNK:]


async def test_an_intact_image_beside_a_damaged_one(images: ImageStorage, database_url: str) -> None:
    """Other images can be read beside a damaged one."""
    record = await images.store_image("a.png", PICTURE)
    other = await images.store_image("b.png", noise(1000))
    await a_missing_chunk(0)(database_url, record)
    assert await read_record(images, other) == noise(1000)


# -- mending -----------------------------------------------------------------------------------------------------------


MENDABLE: dict[str, Damage] = {
    what: DAMAGED_CHUNKS[what][0]
    for what in ("data of chunk 0", "digest of chunk 9", "chunk 3 missing", "chunks swapped", "last chunk longer")
} | {"extra chunk": OTHER_DAMAGES["extra chunk"]}


@pytest.mark.parametrize("way", ["mend", "store the same bytes again", "store them under another name"])
async def test_mending(images: ImageStorage, database_url: str, way: str) -> None:
    """Right bytes mend damaged ones, whatever the damage, and the record stays as it was."""
    record = await images.store_image("a.png", PICTURE)
    still_damaged = []
    for what, damage in MENDABLE.items():
        await damage(database_url, record)
        if way == "mend":
            await images.versions.mend(record, pieces_of_sizes(PICTURE, (100_000,)))
        else:
            await images.store_image("a.png" if way == "store the same bytes again" else "b.png", PICTURE)
        assert await images.find("a.png") == record
        if (
            await stored_sizes(database_url) != (1, CHUNKS, len(PICTURE))
            or await read_record(images, record) != PICTURE
        ):
            still_damaged.append(what)
            await sql(database_url, "DELETE FROM image_chunk")
            await images.versions.mend(record, PICTURE)
    assert still_damaged == []


@pytest.mark.parametrize("size", [0, 10, LARGE])
async def test_mending_with_other_bytes(images: ImageStorage, database_url: str, size: int) -> None:
    """Bytes that differ from the recorded ones mend nothing, and change nothing."""
    data = noise(LARGE, seed=2)
    record = await images.store_image("a.png", data)
    with pytest.raises(CorruptBlob, match=r"a\.png"):
        await images.versions.mend(record, noise(size, seed=3))
    assert await images.find("a.png") == record
    assert await read_record(images, record) == data
    assert await images.history("a.png") == []


async def test_mending_missing_bytes(images: ImageStorage, database_url: str) -> None:
    """Bytes that are missing altogether are mended as well."""
    record = await images.store_image("a.png", PICTURE)
    await sql(database_url, "DELETE FROM image_chunk")
    await sql(database_url, "DELETE FROM image_blob")
    await images.versions.mend(record, PICTURE)
    assert await read_record(images, record) == PICTURE
    assert await stored_sizes(database_url) == (1, CHUNKS, len(PICTURE))
