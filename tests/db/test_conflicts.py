"""A name cannot be a file and a directory: also a deleted name, while it is saved anew. Over every database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from selfheal import ImageStorage
from selfheal.errors import NotAFile
from selfheal.sql.models import Record
from tests.db.test_transactions import with_connection
from tests.support.records import bytes_of
from tests.support.tables import contents

PAIRS = pytest.mark.parametrize(("deleted", "living"), [("album", "album/1.png"), ("album/1.png", "album")])
Rows = list[tuple[Any, ...]]
Revive = Callable[[ImageStorage, str, Record], Awaitable[object]]


async def save(images: ImageStorage, name: str, _before: Record) -> object:
    """Save other bytes."""
    return await images.store_image(name, b"new")


async def save_again(images: ImageStorage, name: str, _before: Record) -> object:
    """Save the bytes that were deleted."""
    return await images.store_image(name, b"old")


async def create(images: ImageStorage, name: str, _before: Record) -> object:
    """Save under a name that must be free."""
    return await images.store_image(name, b"new", only_free=True)


async def undo(images: ImageStorage, name: str, _before: Record) -> object:
    """Undo the deletion."""
    return await images.undo(name)


async def copy(images: ImageStorage, name: str, before: Record) -> object:
    """Copy the record of another catalogue, as an import does."""
    return await images.copies.put(before, b"old", [], over=await images.find(name))


async def records_and_history(url: str) -> list[Rows]:
    """Return all rows of both tables."""
    rows = await contents(url)
    return [rows["image_storage"], rows["image_history"]]


async def deleted_and_replaced(images: ImageStorage, deleted: str, living: str) -> Record:
    """Save and delete a name, then save one that it cannot be beside; return the record of before."""
    before = await images.store_image(deleted, b"old")
    await images.bury(deleted)
    await images.store_image(living, b"living")
    return before


@PAIRS
@pytest.mark.parametrize("revive", [save, save_again, create, undo, copy])
async def test_a_deleted_name_that_is_a_directory_now(
    images: ImageStorage, database_url: str, deleted: str, living: str, revive: Revive
) -> None:
    """Its name stays a tombstone as it was, and the error names the other one; once that is deleted too, it comes."""
    before = await deleted_and_replaced(images, deleted, living)
    records = await records_and_history(database_url)
    with pytest.raises(NotAFile, match=f"'{deleted}' cannot be saved: '{living}' is"):
        await revive(images, deleted, before)
    assert await records_and_history(database_url) == records
    await images.bury(living)
    await revive(images, deleted, before)
    assert await bytes_of(images, deleted) in (b"old", b"new")


@PAIRS
@pytest.mark.parametrize("only_free", [False, True])
async def test_a_refusal_in_the_callers_transaction(
    images: ImageStorage, database_url: str, deleted: str, living: str, only_free: bool
) -> None:
    """The caller's transaction may go on: what it commits has the tombstone as it was, and the later save."""
    await deleted_and_replaced(images, deleted, living)
    tombstone, history = await images.find(deleted), await images.history(deleted)

    async def work(connection: AsyncConnection) -> None:
        put = partial(images.store_image, only_free=only_free, connection=connection)
        with pytest.raises(NotAFile):
            await put(deleted, b"new")
        await put("b.png", b"b")

    await with_connection(database_url, work)
    assert (await images.find(deleted), await images.history(deleted)) == (tombstone, history)
    assert [await bytes_of(images, name) for name in (living, "b.png")] == [b"living", b"b"]
