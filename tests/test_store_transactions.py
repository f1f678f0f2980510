"""`UploadStore.save` inside the app's own transaction."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from tests.support.sample_data import noise
from tests.support.store_requests import hit_and_settle, restored_bytes
from tests.support.store_state import in_quarantine, on_disk, on_disk_and_in_database
from tests.support.uploads import NAME, NEW, OLD, row_counts


@pytest.mark.parametrize("maker", [AsyncSession, None], ids=["session", "connection"])
@pytest.mark.parametrize("size", [10, CHUNK, 17 * CHUNK + 3])
async def test_save_within_a_transaction_that_commits(
    store: UploadStore, engine: AsyncEngine, maker: type[AsyncSession] | None, size: int
) -> None:
    """The upload is invisible before the app commits; the file appears on disk at its first request."""
    async with maker(engine) if maker else engine.connect() as connection:
        saved = await store.save(NAME, noise(size), connection=connection)
        assert on_disk(store, NAME) is None
        await connection.commit()
    assert on_disk(store, NAME) is None
    assert await restored_bytes(store, NAME) == noise(size)
    assert await on_disk_and_in_database(store, NAME) == noise(size)
    assert saved.path.stat().st_mtime_ns == saved.modified_ns


@pytest.mark.parametrize("maker", [AsyncSession, None], ids=["session", "connection"])
@pytest.mark.parametrize("size", [10, 17 * CHUNK + 3])
async def test_save_within_a_transaction_that_rolls_back(
    store: UploadStore, engine: AsyncEngine, maker: type[AsyncSession] | None, size: int
) -> None:
    """A rolled back transaction leaves no row in any table and no file."""
    async with maker(engine) if maker else engine.connect() as connection:
        await store.save(NAME, noise(size), connection=connection)
        await connection.rollback()
    assert await row_counts(engine) == {"image_storage": 0, "image_blob": 0, "image_chunk": 0, "image_history": 0}
    assert await restored_bytes(store, NAME) is None
    assert on_disk(store, NAME) is None


async def test_an_overwrite_that_rolls_back_leaves_the_old(store: UploadStore, engine: AsyncEngine) -> None:
    """Disk and database still have the old generation, and the history is empty."""
    await store.save(NAME, OLD)
    async with engine.connect() as connection:
        await store.save(NAME, NEW, connection=connection)
        await connection.rollback()
    await hit_and_settle(store, NAME)
    assert await on_disk_and_in_database(store, NAME) == OLD
    assert await store.database.history(NAME) == []


@pytest.mark.parametrize("was_hit_before", [False, True])
async def test_an_overwrite_within_a_transaction_reaches_the_disk(
    store: UploadStore, engine: AsyncEngine, was_hit_before: bool
) -> None:
    """The first hit replaces the old file in the background, also if this process has served it before."""
    await store.save(NAME, OLD)
    if was_hit_before:
        await hit_and_settle(store, NAME)
    async with engine.begin() as connection:
        await store.save(NAME, NEW, connection=connection)
    await hit_and_settle(store, NAME)
    assert await on_disk_and_in_database(store, NAME) == NEW
    assert in_quarantine(store) == []
