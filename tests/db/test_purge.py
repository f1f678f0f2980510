"""Purges drop old versions and unreferenced bytes, and nothing else. Over every database."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from selfheal import ImageStorage
from selfheal.blobs.database import WRITE_AT_ONCE
from selfheal.content.sources import CHUNK
from selfheal.db import GRACE
from tests.support.raw_sql import sql
from tests.support.records import bytes_of, digests_of, sha256_of
from tests.support.tables import age, contents, stored_bytes

LARGE = WRITE_AT_ONCE * CHUNK + 12345
"""Bytes that are stored in more than one transaction."""
MONTH = timedelta(days=30)


async def test_purging_history(images: ImageStorage, database_url: str) -> None:
    """A purge drops versions older than `keep` with their bytes; a younger version can still be undone."""
    for data in (b"oldest", b"old", b"now"):
        await images.store_image("a.png", data)
    await age(database_url, 31)
    await images.store_image("a.png", b"later")
    purged = await images.purge(MONTH)
    assert (purged.versions, purged.blobs, purged.size) == (2, 2, len(b"oldest") + len(b"old"))
    assert await stored_bytes(database_url) == [b"later", b"now"]
    assert [version.sha256 for version in await images.history("a.png")] == [sha256_of(b"now")]
    await images.undo("a.png")
    assert await bytes_of(images, "a.png") == b"now"


async def test_a_purge_keeps_young_versions(images: ImageStorage, database_url: str) -> None:
    """A purge drops nothing right after changes of every kind."""
    await images.store_image("a.png", b"one")
    await images.store_image("a.png", b"two")
    await images.store_image("b.png", b"three")
    await images.bury("b.png")
    before = await contents(database_url)
    purged = await images.purge(MONTH)
    assert (purged.versions, purged.blobs, purged.size) == (0, 0, 0)
    assert await contents(database_url) == before


async def test_a_purge_keeps_referenced_bytes(images: ImageStorage, database_url: str) -> None:
    """A purge keeps bytes that a record or a young version refers to, however old they are."""
    await images.store_image("living.png", b"living")
    await images.store_image("shared.png", b"shared")
    await images.store_image("other.png", b"shared")
    await images.bury("other.png")
    await age(database_url, 400)
    await images.store_image("overwritten.png", b"before")
    await images.store_image("overwritten.png", b"after")
    await images.store_image("deleted.png", b"deleted")
    await images.bury("deleted.png")
    await age(database_url, 400, "sha256 IN (SELECT sha256 FROM image_blob) AND 1 = 1")
    await sql(database_url, "UPDATE image_history SET replaced_at = CURRENT_TIMESTAMP WHERE name <> 'other.png'")
    purged = await images.purge(MONTH, grace=timedelta(0))
    assert (purged.versions, purged.blobs, purged.size) == (1, 0, 0)
    assert await stored_bytes(database_url) == [b"after", b"before", b"deleted", b"living", b"shared"]
    await images.undo("overwritten.png")
    await images.undo("deleted.png")
    for name, data in (("living.png", b"living"), ("shared.png", b"shared")):
        assert await bytes_of(images, name) == data
    assert await bytes_of(images, "overwritten.png") == b"before"
    assert await bytes_of(images, "deleted.png") == b"deleted"


async def test_a_purge_keeps_tombstones(images: ImageStorage, database_url: str) -> None:
    """A purge drops the bytes of a deleted name, and keeps its tombstone."""
    await images.store_image("a.png", b"one")
    tombstone = await images.bury("a.png")
    await age(database_url, 31)
    purged = await images.purge(MONTH)
    assert (purged.versions, purged.blobs, purged.size) == (1, 1, 3)
    assert await stored_bytes(database_url) == []
    assert await images.find("a.png") == tombstone
    assert await images.store_image("a.png", b"one", only_new=True) == tombstone
    assert (await images.store_image("a.png", b"one")).generation == 3
    assert await bytes_of(images, "a.png") == b"one"


async def test_a_dry_purge(images: ImageStorage, database_url: str) -> None:
    """A dry run reports what a purge would drop and drops nothing; a second purge finds nothing."""
    for number in range(3):
        await images.store_image("a.png", b"%d" % number)
        await images.store_image(f"{number}.png", bytes(number))
        await images.bury(f"{number}.png")
    await age(database_url, 31)
    before = await contents(database_url)
    would = await images.purge(MONTH, dry_run=True)
    assert await contents(database_url) == before
    assert await images.purge(MONTH) == would
    assert (would.versions, would.blobs, would.size) == (5, 5, 1 + 1 + 0 + 1 + 2)
    again = await images.purge(MONTH)
    assert (again.versions, again.blobs, again.size) == (0, 0, 0)


async def break_off(images: ImageStorage, name: str, *, promise: bool = False) -> None:
    """Start a large upload, and raise an error after its first chunks are stored."""
    data = random.Random(name).randbytes(4 * LARGE + CHUNK)

    async def breaking() -> AsyncIterator[bytes]:
        yield data
        raise EOFError

    with pytest.raises(EOFError):
        await images.store_image(name, breaking(), known=digests_of(data) if promise else None)


@pytest.mark.parametrize("promise", [False, True], ids=["digest unknown", "digest promised"])
async def test_chunks_of_aborted_uploads(images: ImageStorage, database_url: str, promise: bool) -> None:
    """A purge drops the chunks of an upload that broke off, but not within the grace period."""
    await images.store_image("good.png", bytes(LARGE))
    good = await stored_bytes(database_url)
    await break_off(images, "broken.png", promise=promise)
    assert len(await stored_bytes(database_url)) > len(good)
    await age(database_url, 2 * GRACE.days)
    await break_off(images, "young.png", promise=promise)
    both = len(await stored_bytes(database_url)) - len(good)
    await images.purge(MONTH)
    young = len(await stored_bytes(database_url)) - len(good)
    assert 0 < young == both - young
    await images.purge(MONTH, grace=timedelta(days=-1))
    assert await stored_bytes(database_url) == good
    assert await bytes_of(images, "good.png") == bytes(LARGE)


async def test_grace_for_bytes_without_a_record(images: ImageStorage, database_url: str) -> None:
    """A purge keeps bytes that nothing refers to within the grace period."""
    await images.store_image("a.png", b"one")
    await sql(database_url, "DELETE FROM image_storage")
    await age(database_url, 3)
    assert (await images.purge(MONTH, grace=timedelta(days=4))).blobs == 0
    assert await stored_bytes(database_url) == [b"one"]
    assert (await images.purge(MONTH, grace=timedelta(days=2))).blobs == 1
    assert await stored_bytes(database_url) == []


async def test_a_purge_while_old_bytes_are_saved_again(images: ImageStorage, database_url: str) -> None:
    """A purge never drops bytes that are saved again at the same time, and neither call fails."""
    for turn in range(8):
        name, data = f"{turn}.png", b"%d" % turn * CHUNK
        await images.store_image(name, data)
        await images.bury(name)
        await age(database_url, 31)
        await asyncio.gather(
            images.store_image(name, data),
            images.purge(MONTH),
            images.store_image(f"other-{turn}.png", data),
        )
        assert await bytes_of(images, name) == data
        assert await bytes_of(images, f"other-{turn}.png") == data
