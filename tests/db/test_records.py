"""Records: what they hold, and how saves, overwrites and deletions change them. Over every database."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from selfheal import ImageStorage, InvalidName
from selfheal.blobs.database import WRITE_AT_ONCE
from selfheal.content.sources import CHUNK
from tests.support.records import bytes_of, sha256_of, small_file
from tests.support.tables import contents

LARGE = WRITE_AT_ONCE * CHUNK + 12345
"""Bytes that are stored in more than one transaction."""


def is_recent(moment: datetime) -> bool:
    """Whether a time, which must have a zone, is at most 5 minutes from now."""
    return abs(datetime.now(UTC) - moment) < timedelta(minutes=5)


# -- saves -------------------------------------------------------------------------------------------------------------

NS = 10**9


async def test_a_new_record(images: ImageStorage) -> None:
    """A record describes its bytes, with times in UTC, and is found again."""
    before = time.time_ns()
    record = await images.store_image("cats/tom.png", b"meow")
    assert (record.name, record.sha256, record.size) == ("cats/tom.png", sha256_of(b"meow"), 4)
    assert (record.content_type, record.generation) == ("image/png", 1)
    assert before <= record.modified_ns <= time.time_ns()
    assert is_recent(record.created_at)
    assert is_recent(record.changed_at)
    assert not record.is_deleted
    assert record.deleted_at is None
    assert await images.find("cats/tom.png") == record


async def test_the_callers_time_and_type(images: ImageStorage) -> None:
    """A time, to the nanosecond, and a content type of the caller are kept."""
    for number, modified_ns in enumerate((0, 1, 1_700_000_000_123_456_789, -1, 2**62)):
        name = f"{number}.bin"
        record = await images.store_image(name, b"x", content_type="image/x-own", modified_ns=modified_ns)
        assert (record.content_type, record.modified_ns) == ("image/x-own", modified_ns)
        assert await images.find(name) == record


async def test_names_outside_the_grammar(images: ImageStorage, database_url: str) -> None:
    """A name outside the grammar is refused, and nothing of it is stored."""
    before = await contents(database_url)
    for name in ("", "../x", "a/../b", "a\\b", "/a", "a//b", ".hidden", "a\x00b", "x" * 600):
        with pytest.raises(InvalidName):
            await images.store_image(name, b"x")
        with pytest.raises(InvalidName):
            await images.store_many([small_file("good.png", b"y"), small_file(name, b"x")])
    assert await contents(database_url) == before


async def test_an_unknown_name(images: ImageStorage) -> None:
    """Reads of an unknown name answer that there is no record."""
    await images.store_image("a.png", b"x")
    assert await images.find("b.png") is None
    assert await images.catalogue.find(["b.png", "c.png"]) == {}
    assert await images.blobs.fetch(["b.png"]) == {}
    assert await images.history("b.png") == []


@pytest.mark.parametrize("data", [b"", b"same", bytes(LARGE)], ids=["nothing", "small", "large"])
async def test_the_same_bytes_again(images: ImageStorage, data: bytes) -> None:
    """Storing the same bytes under the same name changes nothing."""
    record = await images.store_image("a.png", data, modified_ns=1)
    again = await images.store_image("a.png", data, modified_ns=2, content_type="image/webp")
    assert again == record
    assert await images.find("a.png") == record
    assert await images.history("a.png") == []


async def test_an_overwrite(images: ImageStorage) -> None:
    """Other bytes are the next generation, and the history keeps the version before."""
    first = await images.store_image("a.png", b"one", modified_ns=1)
    second = await images.store_image("a.png", b"two", modified_ns=2 * NS, content_type="image/webp")
    third = await images.store_image("a.png", b"three", modified_ns=2 * NS + 5)
    assert [record.generation for record in (first, second, third)] == [1, 2, 3]
    assert (second.sha256, second.size) == (sha256_of(b"two"), 3)
    assert (second.modified_ns, second.content_type) == (2 * NS, "image/webp")
    assert third.modified_ns == 3 * NS  # a client that knows only the second of the last time sees that it changed
    assert third.created_at == first.created_at
    assert third.changed_at >= second.changed_at >= first.changed_at
    assert await bytes_of(images, "a.png") == b"three"
    versions = await images.history("a.png")
    for version, was in zip(versions, (second, first), strict=True):
        assert (version.name, version.generation) == ("a.png", was.generation)
        assert (version.sha256, version.size) == (was.sha256, was.size)
        assert (version.content_type, version.modified_ns) == (was.content_type, was.modified_ns)
        assert is_recent(version.replaced_at)


async def test_the_bytes_of_an_earlier_version(images: ImageStorage) -> None:
    """The bytes of an earlier version are a change like any other."""
    for data in (b"one", b"two", b"one"):
        record = await images.store_image("a.png", data)
    assert record.generation == 3
    assert await bytes_of(images, "a.png") == b"one"
    assert [version.sha256 for version in await images.history("a.png")] == [sha256_of(b"two"), sha256_of(b"one")]


# -- deletions ---------------------------------------------------------------------------------------------------------


async def test_deleting(images: ImageStorage) -> None:
    """A deletion leaves a tombstone of the next generation, and the history keeps the version before."""
    record = await images.store_image("a.png", b"one")
    await images.store_image("b.png", b"other")
    tombstone = await images.bury("a.png")
    assert tombstone is not None
    assert tombstone.is_deleted
    assert tombstone.deleted_at is not None
    assert is_recent(tombstone.deleted_at)
    assert (tombstone.generation, tombstone.created_at) == (2, record.created_at)
    assert await images.find("a.png") == tombstone
    assert await images.catalogue.find(["a.png"]) == {"a.png": tombstone}
    assert [version.sha256 for version in await images.history("a.png")] == [record.sha256]
    assert await images.count() == 1


async def test_deleting_twice(images: ImageStorage, database_url: str) -> None:
    """Deleting a deleted name changes nothing."""
    await images.store_image("a.png", b"one")
    tombstone = await images.bury("a.png")
    before = await contents(database_url)
    assert await images.bury("a.png") == tombstone
    assert await contents(database_url) == before


async def test_deleting_an_unknown_name(images: ImageStorage, database_url: str) -> None:
    """Deleting an unknown name leaves no tombstone."""
    assert await images.bury("a.png") is None
    assert await images.find("a.png") is None
    assert (await contents(database_url))["image_storage"] == []


@pytest.mark.parametrize("data", [b"one", b"two"], ids=["the same bytes", "other bytes"])
async def test_saving_a_deleted_name(images: ImageStorage, data: bytes) -> None:
    """Saving a deleted name again makes it alive, as its next generation."""
    first = await images.store_image("a.png", b"one")
    await images.bury("a.png")
    later = first.modified_ns + 5 * NS
    record = await images.store_image("a.png", data, modified_ns=later)
    assert (record.generation, record.deleted_at, record.modified_ns) == (3, None, later)
    assert await bytes_of(images, "a.png") == data
    assert [version.sha256 for version in await images.history("a.png")] == [first.sha256]


@pytest.mark.parametrize("data", [b"one", b"two", bytes(LARGE)], ids=["the same bytes", "other bytes", "large"])
async def test_only_new(images: ImageStorage, data: bytes) -> None:
    """`only_new` stores a name without a record, and changes neither a record nor a tombstone."""
    alive = await images.store_image("alive.png", b"one", modified_ns=1)
    await images.store_image("dead.png", b"one", modified_ns=1)
    dead = await images.bury("dead.png")
    assert await images.store_image("alive.png", data, modified_ns=2, only_new=True) == alive
    assert await images.store_image("dead.png", data, modified_ns=2, only_new=True) == dead
    new = await images.store_image("new.png", data, modified_ns=2, only_new=True)
    assert (await images.find("alive.png"), await images.find("dead.png")) == (alive, dead)
    assert (new.generation, new.modified_ns, await bytes_of(images, "new.png")) == (1, 2, data)
    assert await images.history("alive.png") == []
