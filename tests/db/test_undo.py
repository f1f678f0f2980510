"""Undo: a name becomes what it was before. Over every database."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from selfheal import ImageStorage, NotStored
from tests.support.raw_sql import sql
from tests.support.records import bytes_of, existing_record, sha256_of
from tests.support.tables import age, contents

MONTH = timedelta(days=30)

NS = 10**9


async def test_undoing_an_overwrite_twice(images: ImageStorage) -> None:
    """An undo of an overwrite can be undone, back and forth."""
    first = await images.store_image("a.png", b"one", modified_ns=1, content_type="image/webp")
    second = await images.store_image("a.png", b"two", modified_ns=2 * NS)
    back = await images.undo("a.png")
    assert await bytes_of(images, "a.png") == b"one"
    assert (back.generation, back.sha256, back.size) == (3, first.sha256, first.size)
    assert (back.content_type, back.modified_ns, back.created_at) == ("image/webp", 3 * NS, first.created_at)
    forth = await images.undo("a.png")
    assert (forth.generation, forth.sha256, forth.modified_ns) == (4, second.sha256, 4 * NS)
    assert await bytes_of(images, "a.png") == b"two"
    assert (await images.undo("a.png")).sha256 == first.sha256
    assert await images.find("a.png") == replace(
        first, generation=5, modified_ns=5 * NS, changed_at=(await existing_record(images)).changed_at
    )


async def test_undoing_a_deletion(images: ImageStorage) -> None:
    """An undo of a deletion restores the name with its bytes and times."""
    first = await images.store_image("a.png", b"one", modified_ns=1)
    await images.bury("a.png")
    record = await images.undo("a.png")
    assert not record.is_deleted
    assert (record.generation, record.sha256, record.modified_ns) == (3, first.sha256, 1)
    assert await images.find("a.png") == record
    assert await bytes_of(images, "a.png") == b"one"


async def test_undoing_a_deletion_after_an_overwrite(images: ImageStorage) -> None:
    """Undos go back step by step: first the deletion, then the overwrite before it."""
    await images.store_image("a.png", b"one")
    await images.store_image("a.png", b"two")
    await images.bury("a.png")
    await images.undo("a.png")
    assert await bytes_of(images, "a.png") == b"two"
    await images.undo("a.png")
    assert await bytes_of(images, "a.png") == b"one"


async def test_undoing_to_a_generation(images: ImageStorage) -> None:
    """An undo can go back to any generation in the history, from an alive name or a deleted one."""
    for data in (b"one", b"two", b"three"):
        await images.store_image("a.png", data)
    assert (await images.undo("a.png", 1)).generation == 4
    assert await bytes_of(images, "a.png") == b"one"
    assert (await images.undo("a.png", 3)).generation == 5
    assert await bytes_of(images, "a.png") == b"three"
    await images.bury("a.png")
    assert (await images.undo("a.png", 2)).generation == 7
    assert await bytes_of(images, "a.png") == b"two"
    kept = {version.generation: version.sha256 for version in await images.history("a.png")}
    assert [kept[generation] for generation in (1, 2, 3)] == [sha256_of(data) for data in (b"one", b"two", b"three")]


async def test_nothing_to_undo(images: ImageStorage, database_url: str) -> None:
    """An undo without an earlier version raises an error, and changes nothing."""
    await images.store_image("a.png", b"one")
    before = await contents(database_url)
    for name, generation in (("unknown.png", None), ("unknown.png", 1), ("a.png", None), ("a.png", 1), ("a.png", 9)):
        with pytest.raises(NotStored):
            await images.undo(name, generation)
    assert await contents(database_url) == before


@pytest.mark.parametrize("generation", [None, 1])
@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "overwritten"])
async def test_undo_after_a_purge(
    images: ImageStorage, database_url: str, deleted: bool, generation: int | None
) -> None:
    """A version that a purge has dropped cannot be restored, and the record stays as it is."""
    await images.store_image("a.png", b"one")
    await (images.bury("a.png") if deleted else images.store_image("a.png", b"two"))
    await age(database_url, 31)
    await images.purge(MONTH)
    record = await images.find("a.png")
    with pytest.raises(NotStored):
        await images.undo("a.png", generation)
    assert await images.find("a.png") == record


async def test_undo_when_the_bytes_are_gone(images: ImageStorage, database_url: str) -> None:
    """A version without its bytes cannot be restored, and the record stays as it is."""
    first = await images.store_image("a.png", b"one")
    second = await images.store_image("a.png", b"two")
    await sql(database_url, "DELETE FROM image_chunk WHERE sha256 = :key", key=first.sha256)
    await sql(database_url, "DELETE FROM image_blob WHERE sha256 = :key", key=first.sha256)
    with pytest.raises(NotStored):
        await images.undo("a.png")
    assert await images.find("a.png") == second
