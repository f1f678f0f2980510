"""A caller of a missing file gets an answer by the deadline, and an error if the restore is stopped."""

from __future__ import annotations

import asyncio
import time

import pytest

from selfheal import DatabaseUnavailable, SelfHealMiddleware, UploadStore
from selfheal.content.sources import CHUNK
from selfheal.healing.bodies import Restoring
from tests.support.asgi import Wrapped
from tests.support.faults import BrokenDisk, locked_database
from tests.support.open_files import assert_nothing_open_below
from tests.support.store_requests import restored_bytes
from tests.support.store_state import files_below, on_disk
from tests.support.uploads import NAME, STREAMED, get, save_and_lose


async def test_no_answer_by_the_deadline_is_a_503(store: UploadStore) -> None:
    """A database that gives no answer is a 503 with Retry-After by the deadline, never a 404; later it is a 200."""
    data = await save_and_lose(store, 1000)
    async with UploadStore(store.disk.path, store.database.url, deadline=1) as hurried:
        app = SelfHealMiddleware(Wrapped(), hurried)
        assert (await get(app, "unknown.jpg")).status_code == 404
        async with locked_database(store):
            started = time.monotonic()
            answers = await asyncio.gather(get(app), get(app, "never-was.jpg"))
            taken = time.monotonic() - started
        for answer in answers:
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert answer.headers["cache-control"] == "no-store"
        assert taken < 4
        later = await get(app)
        assert (later.status_code, later.content) == (200, data)
        assert (await get(app, "never-was.jpg")).status_code == 404


async def test_a_slow_disk_is_unknown_by_the_deadline(sqlite_store: UploadStore, broken_disk: BrokenDisk) -> None:
    """A caller of a restore that is blocked on the disk gets an error by the deadline; the next one gets the file."""
    data = await save_and_lose(sqlite_store, 1000)
    async with UploadStore(sqlite_store.disk.path, sqlite_store.database.url, deadline=0.5) as hurried:
        held = broken_disk.hold("fsync")
        with pytest.raises(DatabaseUnavailable):
            await hurried.restorer.restore(NAME)
        held.release()
        assert await restored_bytes(hurried, NAME) == data


async def test_readers_give_up_a_restore_that_makes_no_progress(
    sqlite_store: UploadStore, broken_disk: BrokenDisk
) -> None:
    """Readers of a restore that makes no progress wait no longer than the deadline; the restore itself goes on."""
    data = await save_and_lose(sqlite_store, STREAMED)
    async with UploadStore(sqlite_store.disk.path, sqlite_store.database.url, deadline=0.4) as hurried:
        held = broken_disk.hold("pwrite", after=16)
        body = await hurried.restorer.restore(NAME)
        assert isinstance(body, Restoring)
        await held.met()
        pieces = body.pieces(0, body.size)
        for number in range(16):
            assert await anext(pieces) == data[number * CHUNK : (number + 1) * CHUNK]
        with pytest.raises(DatabaseUnavailable, match="makes no progress"):
            await anext(pieces)
        with pytest.raises(DatabaseUnavailable, match="makes no progress"):
            await body.on_disk()
        held.release()
        await body.on_disk()
        assert on_disk(hurried, NAME) == data
        body.close()
        await hurried.tasks.drain(30)
    await assert_nothing_open_below(sqlite_store.disk.path)


# -- a restore that is stopped ----------------------------------------------------------------------------------------


async def test_callers_of_a_stopped_restore_are_cancelled(
    sqlite_store: UploadStore, broken_disk: BrokenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is closed during a long restore stops it: its callers are cancelled, and no file is left."""
    monkeypatch.setattr("selfheal.store.CLOSING_GRACE", 0.05)
    await save_and_lose(sqlite_store, 3 * CHUNK)
    held = broken_disk.hold("pwrite")
    caller = asyncio.create_task(sqlite_store.restorer.restore(NAME))
    await held.met()
    closing = asyncio.create_task(sqlite_store.close())
    await asyncio.sleep(0.1)
    held.release()
    await closing
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert files_below(sqlite_store.disk.path) == []
    await assert_nothing_open_below(sqlite_store.disk.path)


async def test_readers_of_a_stopped_restore_get_an_error(
    sqlite_store: UploadStore, broken_disk: BrokenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers of a large restore that is stopped half way get an error; they do not wait for bytes that never come."""
    monkeypatch.setattr("selfheal.store.CLOSING_GRACE", 0.05)
    data = await save_and_lose(sqlite_store, STREAMED)
    held = broken_disk.hold("pwrite", after=8)
    body = await sqlite_store.restorer.restore(NAME)
    assert isinstance(body, Restoring)
    await held.met()
    closing = asyncio.create_task(sqlite_store.close())
    await asyncio.sleep(0.1)
    held.release()
    await closing
    pieces = body.pieces(0, STREAMED)
    with pytest.raises(DatabaseUnavailable, match="broken off"):
        await anext(pieces)
    with pytest.raises(DatabaseUnavailable, match="broken off"):
        await body.on_disk()
    assert await body._staged.read(0, CHUNK) == data[:CHUNK]  # the file was open until now
    body.close()
    assert files_below(sqlite_store.disk.path) == []
