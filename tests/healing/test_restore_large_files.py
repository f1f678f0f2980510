"""Large files are sent while they are restored, in memory that does not grow with them."""

from __future__ import annotations

import asyncio
import errno
import tracemalloc
from collections.abc import AsyncIterator

import pytest

from selfheal import SelfHealError, UploadStore
from selfheal.blobs.blob_store import READ_AT_ONCE
from selfheal.content.sources import CHUNK
from selfheal.healing.bodies import FromDatabase, Restoring
from tests.support.faults import BrokenDisk
from tests.support.open_files import assert_nothing_open_below
from tests.support.raw_sql import execute
from tests.support.sample_data import noise
from tests.support.store_requests import restored_bytes
from tests.support.store_state import files_below, on_disk
from tests.support.uploads import NAME, STREAMED, save_and_lose


async def test_a_large_file_is_sent_while_it_is_restored(store: UploadStore, broken_disk: BrokenDisk) -> None:
    """The first bytes are sent before the restore ends; a range near the end does not wait for the bytes before it."""
    data = await save_and_lose(store, STREAMED)
    held = broken_disk.hold("pwrite", after=8)
    body = await store.restorer.restore(NAME)
    assert body is not None
    assert body.size == STREAMED
    pieces = body.pieces(0, body.size)
    first = await anext(pieces)
    assert data.startswith(first)
    await held.met()
    assert await restored_bytes(store, NAME, STREAMED - 1000) == data[-1000:]
    assert await restored_bytes(store, NAME, 40 * CHUNK + 5, 42 * CHUNK + 1) == data[40 * CHUNK + 5 : 42 * CHUNK + 1]
    assert on_disk(store, NAME) is None
    held.release()
    assert first + b"".join([piece async for piece in pieces]) == data
    body.close()
    await store.tasks.drain(30)
    assert on_disk(store, NAME) == data
    await assert_nothing_open_below(store.disk.path)


async def test_bytes_on_disk_are_not_read_from_the_database_again(
    sqlite_store: UploadStore, broken_disk: BrokenDisk
) -> None:
    """Readers of a restore get each piece as soon as it is written, from the disk and not from the database again."""
    data = await save_and_lose(sqlite_store, STREAMED)
    written, sealed = broken_disk.hold("pwrite", after=16), broken_disk.hold("fsync")
    body = await sqlite_store.restorer.restore(NAME)
    assert isinstance(body, Restoring)
    await written.met()
    await execute(sqlite_store, "DELETE FROM image_chunk WHERE position < 16")
    assert b"".join([piece async for piece in body.pieces(5, 25)]) == data[5:25]
    tail = body.pieces(16 * CHUNK - 10, STREAMED)
    assert await anext(tail) == data[16 * CHUNK - 10 : 16 * CHUNK]
    coming = asyncio.ensure_future(anext(tail))
    await asyncio.sleep(0.01)
    assert not coming.done()
    written.release()
    received = await coming
    await sealed.met()
    while len(received) < STREAMED - 16 * CHUNK - 1:
        received += await anext(tail)
    assert received == data[16 * CHUNK : -1]
    sealed.release()
    assert [piece async for piece in tail] == [data[-1:]]
    body.close()
    await sqlite_store.tasks.drain(30)
    assert on_disk(sqlite_store, NAME) == data


async def test_a_range_is_read_no_further_than_its_end(sqlite_store: UploadStore, broken_disk: BrokenDisk) -> None:
    """A range reads no batch of chunks after its end: damage after the range does not spoil it."""
    data = await save_and_lose(sqlite_store, STREAMED)
    broken_disk.fail("pwrite", errno.ENOSPC)
    body = await sqlite_store.restorer.restore(NAME)
    assert isinstance(body, FromDatabase)
    await execute(sqlite_store, f"DELETE FROM image_chunk WHERE position >= {READ_AT_ONCE}")
    start, stop = 3, READ_AT_ONCE * CHUNK
    assert b"".join([piece async for piece in body.pieces(start, stop)]) == data[start:stop]


async def test_memory_does_not_grow_with_the_file(store: UploadStore) -> None:
    """A file of 32 MiB is restored and sent in less than 16 MiB of memory."""
    size, piece = 32 * 2**20, noise(2**20)

    async def source() -> AsyncIterator[bytes]:
        for number in range(size // len(piece)):
            yield number.to_bytes(4, "big") + piece[4:]

    saved = await store.save(NAME, source())
    saved.path.unlink()
    tracemalloc.start()
    try:
        body = await store.restorer.restore(NAME)
        assert body is not None
        assert sum([len(piece) async for piece in body.pieces(0, body.size)]) == size
        body.close()
        await store.tasks.drain(30)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert saved.path.stat().st_size == size
    assert peak < 16 * 2**20


async def test_a_disk_that_fills_up_during_a_large_restore(store: UploadStore, broken_disk: BrokenDisk) -> None:
    """A body that is being sent goes on from the database to its last byte; no file and no temporary file is left."""
    data = await save_and_lose(store, STREAMED)
    for space in (5 * CHUNK, 30 * CHUNK + 7, STREAMED - 1):
        broken_disk.fill_after(space)
        assert await restored_bytes(store, NAME) == data
        await store.tasks.drain(30)
        assert files_below(store.disk.path) == []
        broken_disk.mend()
    assert await restored_bytes(store, NAME) == data
    await store.tasks.drain(30)
    assert on_disk(store, NAME) == data
    await assert_nothing_open_below(store.disk.path)


async def test_a_large_file_that_cannot_be_named_is_not_restored(
    sqlite_store: UploadStore, broken_disk: BrokenDisk
) -> None:
    """A caller that wants the file on disk gets an error if the file cannot get its name."""
    await save_and_lose(sqlite_store, STREAMED)
    broken_disk.fail("link", errno.ENOMEM)
    with pytest.raises(SelfHealError):
        await sqlite_store.restorer.restore_to_disk(NAME)
    assert files_below(sqlite_store.disk.path) == []
