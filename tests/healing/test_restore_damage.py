"""Damaged bytes in the database are never sent whole, and never become a file."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os

import pytest

from selfheal import CorruptBlob, SelfHealError, SelfHealMiddleware, UploadStore
from selfheal.aio.single_flight import SingleFlight
from selfheal.content.digests import chunk_digest
from selfheal.content.sources import CHUNK
from selfheal.healing.bodies import Body
from tests.support.asgi import Wrapped
from tests.support.faults import BrokenDisk
from tests.support.open_files import assert_nothing_open_below
from tests.support.raw_sql import execute
from tests.support.store_requests import restored_bytes
from tests.support.store_state import files_below, on_disk_and_in_database
from tests.support.uploads import NAME, NEW, STREAMED, get, save_and_lose

# -- ways to damage a chunk -------------------------------------------------------------------------------------------


async def _change_data(store: UploadStore, position: int, size: int) -> None:
    await execute(store, "UPDATE image_chunk SET data = :data WHERE position = :at", data=b"x" * size, at=position)


async def _change_data_and_digest(store: UploadStore, position: int, size: int) -> None:
    data = b"x" * size
    await execute(
        store, "UPDATE image_chunk SET data = :data, digest = :digest WHERE position = :at",
        data=data, digest=chunk_digest(position, data), at=position,
    )  # fmt: skip


async def _drop(store: UploadStore, position: int, _size: int) -> None:
    await execute(store, "DELETE FROM image_chunk WHERE position = :at", at=position)


async def _shorten(store: UploadStore, position: int, size: int) -> None:
    await _change_data_and_digest(store, position, size - 1)


async def _lengthen(store: UploadStore, position: int, size: int) -> None:
    await _change_data_and_digest(store, position, size + 1)


async def _misplace(store: UploadStore, position: int, _size: int) -> None:
    statement = "UPDATE image_chunk SET position = :to WHERE position = :at"
    await execute(store, statement, at=position, to=-1)
    if position:
        await execute(store, statement, at=position - 1, to=position)
        await execute(store, statement, at=-1, to=position - 1)


DAMAGES = [_change_data, _change_data_and_digest, _drop, _shorten, _lengthen, _misplace]


# -- damage in the last chunk -----------------------------------------------------------------------------------------


async def sent_before_the_error(store: UploadStore, name: str) -> int:
    """Return how many bytes of a name were sent before `CorruptBlob` was raised; fail if it was not."""
    sent = 0
    try:
        body = await store.restorer.restore(name)
        assert body is not None
        try:
            async for piece in body.pieces(0, body.size):
                sent += len(piece)
        finally:
            body.close()
    except CorruptBlob:
        return sent
    pytest.fail("a damaged body was sent whole")


@pytest.mark.parametrize("takes_files", [True, False], ids=["disk good", "disk takes no file"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
async def test_a_damaged_body_is_never_sent_whole(
    sqlite_store: UploadStore, broken_disk: BrokenDisk, damage: object, takes_files: bool
) -> None:
    """Damage of any kind in the last chunk is an error before the last byte; no file appears, the record stays."""
    assert callable(damage)
    for size in (1000, 3 * CHUNK, 11 * CHUNK + 3, STREAMED):
        name = f"{size}.jpg"
        await save_and_lose(sqlite_store, size, name)
        last = (size - 1) // CHUNK
        await damage(sqlite_store, last, size - last * CHUNK)
        if not takes_files:
            broken_disk.fail("pwrite", errno.ENOSPC)
        assert await sent_before_the_error(sqlite_store, name) < size
        await sqlite_store.tasks.drain(30)
        assert files_below(sqlite_store.disk.path) == []
        assert await sqlite_store.database.find(name) is not None
        broken_disk.mend()
        await execute(sqlite_store, "DELETE FROM image_chunk")
    await assert_nothing_open_below(sqlite_store.disk.path)


async def test_damage_found_on_a_disk_that_fills_up(store: UploadStore, broken_disk: BrokenDisk) -> None:
    """No damaged body is sent whole, even if the disk is full half way and the rest comes from the database."""
    await save_and_lose(store, STREAMED)
    last = (STREAMED - 1) // CHUNK
    await _change_data_and_digest(store, last, STREAMED - last * CHUNK)
    broken_disk.fill_after(10 * CHUNK)
    assert await sent_before_the_error(store, NAME) < STREAMED


async def test_bytes_dropped_while_they_are_read_are_not_damage(
    store: UploadStore, other_store: UploadStore, broken_disk: BrokenDisk
) -> None:
    """A blob that is dropped during a read looks damaged; the record is read again, and its new bytes are restored."""
    await save_and_lose(store, 20 * CHUNK)
    held = broken_disk.hold("pwrite", after=2)
    caller = asyncio.create_task(restored_bytes(store, NAME))
    await held.met()
    await other_store.database.store_image(NAME, NEW)
    await execute(other_store, "DELETE FROM image_chunk WHERE position > 0")
    held.release()
    assert await caller == NEW
    assert await on_disk_and_in_database(store, NAME) == NEW


# -- a busy event loop ------------------------------------------------------------------------------------------------


def delay_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every caller run only after the restore that it joined has ended."""
    get = SingleFlight.get

    async def late(self: SingleFlight[str, Body], name: str, timeout: float) -> Body:
        body = await get(self, name, timeout)
        with contextlib.suppress(SelfHealError):
            await body.on_disk()
        return body

    monkeypatch.setattr(SingleFlight, "get", late)


async def test_damage_that_is_found_before_the_caller_runs(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage is a 500 and not a 503, even if the caller runs only after the restore has failed."""
    delay_callers(monkeypatch)
    await save_and_lose(store, STREAMED)
    last = (STREAMED - 1) // CHUNK
    await _change_data(store, last, STREAMED - last * CHUNK)
    assert (await get(SelfHealMiddleware(Wrapped(), store))).status_code == 500
    assert files_below(store.disk.path) == []


async def test_a_disk_that_fills_up_before_the_caller_runs(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is served from the database, even if the caller runs only after the disk has refused the file."""
    delay_callers(monkeypatch)
    data = await save_and_lose(store, STREAMED)
    real = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if offset > 10 * CHUNK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    answer = await get(SelfHealMiddleware(Wrapped(), store))
    assert (answer.status_code, answer.content) == (200, data)
    assert files_below(store.disk.path) == []
