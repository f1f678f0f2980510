"""Database → disk: one flight that many askers follow, and what is answered while it is not on disk, or cannot be."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from subprocess import PIPE
from typing import Any

import anyio
import httpx
import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from selfheal import (
    CorruptBlob,
    DatabaseUnavailable,
    DiskUnwritable,
    SelfHealError,
    SelfHealMiddleware,
    UploadStore,
)
from selfheal.blobs.database import READ_AT_ONCE
from selfheal.content.digests import chunk_digest
from selfheal.content.sources import CHUNK
from selfheal.disk.open_file import OpenFile
from selfheal.events import Event, Kind
from selfheal.healing.bodies import FromDatabase, Incoming, Landed
from selfheal.healing.negative_cache import ABSENT_FOR
from selfheal.healing.restore import WHOLE_FIRST, Answer, Restorer
from selfheal.settings import sqlite_file
from tests.support.sides import (
    BrokenDisk,
    brought_back,
    execute,
    files_below,
    in_database,
    in_quarantine,
    locked,
    noise,
    nothing_is_held_open,
    on_both_sides,
    on_disk,
    statements,
)

NAME = "cats/tom.jpg"
OLD, NEW = b"the old bytes", b"the new bytes, which are others"
STREAMED = WHOLE_FIRST + 9 * CHUNK + 77
"""Bytes of a file that is sent while it is restored."""
SIZES = {"empty": 0, "one-chunk": 1000, "some-chunks": 11 * CHUNK + 3, "streamed": STREAMED}


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> BrokenDisk:
    """A disk that can be broken and mended."""
    return BrokenDisk(monkeypatch)


@pytest.fixture
async def elsewhere(store: UploadStore, tmp_path: Path) -> AsyncIterator[UploadStore]:
    """Another node: a disk of its own, the same database."""
    async with UploadStore(tmp_path / "elsewhere" / "uploads", store.database.url) as other:
        yield other


async def saved_and_lost(store: UploadStore, size: int, name: str = NAME) -> bytes:
    """Bytes that only the database holds any more."""
    saved = await store.save(name, noise(size))
    saved.path.unlink()
    return noise(size)


async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
    """The wrapped app: it knows no such name."""
    await send({"type": "http.response.start", "status": 404, "headers": [(b"x-wrapped", b"yes")]})
    await send({"type": "http.response.body", "body": b"wrapped"})


async def got(app: ASGIApp, name: str = NAME, **headers: str) -> httpx.Response:
    """What a visitor gets."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.get(f"/static/uploads/{name}", headers=headers)


# -- many askers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
async def test_many_askers_are_one_flight(store: UploadStore, size: int) -> None:
    """200 who ask for one missing name get its bytes, and the database is asked no more than for one of them."""
    data = await saved_and_lost(store, size)
    with statements() as asked_by_one:
        assert await brought_back(store, NAME) == data
        await store.tasks.settle(30)
    store.disk.path_of(NAME).unlink()
    stop = min(size, 2 * CHUNK)  # enough of a large file to see that all of them follow it
    with statements() as asked_by_many:
        answers = await asyncio.gather(*(brought_back(store, NAME, 0, stop) for _ in range(200)))
        await store.tasks.settle(30)
    assert all(answer == data[:stop] for answer in answers)
    assert sum("image_chunk" in statement for statement in asked_by_one) > 0
    assert len(asked_by_many) == len(asked_by_one)
    assert await on_both_sides(store, NAME) == data
    await nothing_is_held_open(store.disk.path)


async def test_a_small_image_is_one_blob_read(store: UploadStore) -> None:
    """One image below one chunk comes back with one query of its bytes, whoever asks; many names share a query."""
    names = [f"{number}.jpg" for number in range(40)]
    for number, name in enumerate(names):
        await saved_and_lost(store, 1000 + number, name)
    with statements() as asked:
        await asyncio.gather(*(brought_back(store, name) for name in names for _ in range(5)))
    reading = [statement for statement in asked if "FROM image_storage LEFT OUTER JOIN image_chunk" in statement]
    assert all("image_chunk" not in statement for statement in asked if statement not in reading)
    for name in names:
        assert sum(f"{quote}{name}{quote}" in statement for statement in reading for quote in ("'", '"')) == 1
    assert [on_disk(store, name) for name in names] == [noise(1000 + number) for number in range(40)]


async def test_who_asks_at_any_moment_gets_it_whole(sqlite_store: UploadStore) -> None:
    """From the first chunk of a large restore to its last step, every asker that joins is served whole."""
    data = await saved_and_lost(sqlite_store, STREAMED)
    digest = sha256(data).digest()
    answers: list[asyncio.Task[bytes]] = []

    async def ask() -> bytes:
        body = await sqlite_store.bring_back(NAME)
        assert body is not None
        await asyncio.sleep(0)
        try:
            return b"".join([piece async for piece in body.pieces(body.size - 10, body.size)])
        finally:
            body.close()

    first = asyncio.create_task(brought_back(sqlite_store, NAME))
    while not first.done():
        answers.append(asyncio.create_task(ask()))
        for _ in range(3):
            await asyncio.sleep(0)
    whole = await first
    assert whole is not None
    assert sha256(whole).digest() == digest
    assert set(await asyncio.gather(*answers)) == {data[-10:]}
    await sqlite_store.tasks.settle(30)
    await nothing_is_held_open(sqlite_store.disk.path)


async def test_an_asker_that_goes_does_not_take_the_restore_down(store: UploadStore, disk: BrokenDisk) -> None:
    """Whoever asked is cancelled: the restore goes on to its end, and nothing stays open."""
    for size in (1000, STREAMED):
        data = await saved_and_lost(store, size)
        held = disk.hold("fsync")
        asking = [asyncio.create_task(brought_back(store, NAME)) for _ in range(3)]
        await held.met()
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        assert on_disk(store, NAME) is None
        held.release()
        await store.tasks.settle(30)
        disk.mend()
        assert on_disk(store, NAME) == data
        store.disk.path_of(NAME).unlink()
    await nothing_is_held_open(store.disk.path)


async def test_two_names_do_not_wait_for_each_other(store: UploadStore, disk: BrokenDisk) -> None:
    """A restore that stands still holds up nobody who asks for another name."""
    await saved_and_lost(store, 1000, "slow.jpg")
    await saved_and_lost(store, 2000, "other.jpg")
    held = disk.hold("fsync")
    slow = asyncio.create_task(brought_back(store, "slow.jpg"))
    await held.met()
    disk.mend()
    assert await brought_back(store, "other.jpg") == noise(2000)
    assert not slow.done()
    held.release()
    assert await slow == noise(1000)


# -- the deadline ---------------------------------------------------------------------------------------------------


async def test_no_answer_by_the_deadline_is_a_503(store: UploadStore) -> None:
    """A database that gives no answer is a 503 with Retry-After by the deadline, never a 404; later it is a 200."""
    data = await saved_and_lost(store, 1000)
    async with UploadStore(store.disk.path, store.database.url, deadline=1) as hurried:
        app = SelfHealMiddleware(wrapped, hurried)
        assert (await got(app, "unknown.jpg")).status_code == 404
        async with locked(store):
            started = time.monotonic()
            answers = await asyncio.gather(got(app), got(app, "never-was.jpg"))
            taken = time.monotonic() - started
        for answer in answers:
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert answer.headers["cache-control"] == "no-store"
        assert taken < 4
        later = await got(app)
        assert (later.status_code, later.content) == (200, data)
        assert (await got(app, "never-was.jpg")).status_code == 404


async def test_a_slow_disk_is_a_503_by_the_deadline(sqlite_store: UploadStore, disk: BrokenDisk) -> None:
    """A restore that stands still on the disk answers by the deadline too; it goes on, and the next asker has it."""
    data = await saved_and_lost(sqlite_store, 1000)
    async with UploadStore(sqlite_store.disk.path, sqlite_store.database.url, deadline=0.5) as hurried:
        held = disk.hold("fsync")
        with pytest.raises(DatabaseUnavailable):
            await hurried.bring_back(NAME)
        held.release()
        assert await brought_back(hurried, NAME) == data


async def test_a_large_restore_that_stands_still_is_given_up_by_its_readers(
    sqlite_store: UploadStore, disk: BrokenDisk
) -> None:
    """Who follows a restore that no longer moves waits no longer than the deadline; the restore itself goes on."""
    data = await saved_and_lost(sqlite_store, STREAMED)
    async with UploadStore(sqlite_store.disk.path, sqlite_store.database.url, deadline=0.4) as hurried:
        held = disk.hold("pwrite", after=16)
        body = await hurried.bring_back(NAME)
        assert isinstance(body, Incoming)
        await held.met()
        pieces = body.pieces(0, body.size)
        for number in range(16):
            assert await anext(pieces) == data[number * CHUNK : (number + 1) * CHUNK]
        with pytest.raises(DatabaseUnavailable, match="stands still"):
            await anext(pieces)
        with pytest.raises(DatabaseUnavailable, match="stands still"):
            await body.finished()
        held.release()
        await body.finished()
        assert on_disk(hurried, NAME) == data
        body.close()
        await hurried.tasks.settle(30)
    await nothing_is_held_open(sqlite_store.disk.path)


async def test_a_restore_that_is_stopped_leaves_nobody_waiting(
    sqlite_store: UploadStore, disk: BrokenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that closes over a restore that does not end stops it: its askers are told, and nothing is left."""
    monkeypatch.setattr("selfheal.store.CLOSING_GRACE", 0.05)
    await saved_and_lost(sqlite_store, 3 * CHUNK)
    held = disk.hold("pwrite")
    asking = asyncio.create_task(sqlite_store.bring_back(NAME))
    await held.met()
    closing = asyncio.create_task(sqlite_store.close())
    await asyncio.sleep(0.1)
    held.release()
    await closing
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert files_below(sqlite_store.disk.path) == []
    await nothing_is_held_open(sqlite_store.disk.path)


async def test_who_follows_a_restore_that_is_stopped_is_told(
    sqlite_store: UploadStore, disk: BrokenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large restore that is stopped half way ends in an error for its readers, not in bytes that never came."""
    monkeypatch.setattr("selfheal.store.CLOSING_GRACE", 0.05)
    data = await saved_and_lost(sqlite_store, STREAMED)
    held = disk.hold("pwrite", after=8)
    body = await sqlite_store.bring_back(NAME)
    assert isinstance(body, Incoming)
    await held.met()
    closing = asyncio.create_task(sqlite_store.close())
    await asyncio.sleep(0.1)
    held.release()
    await closing
    pieces = body.pieces(0, STREAMED)
    with pytest.raises(DatabaseUnavailable, match="broken off"):
        await anext(pieces)
    with pytest.raises(DatabaseUnavailable, match="broken off"):
        await body.finished()
    assert await body._staged.read(0, CHUNK) == data[:CHUNK]  # it was open until now
    body.close()
    assert files_below(sqlite_store.disk.path) == []


async def test_a_large_file_that_cannot_be_named_is_not_called_restored(
    sqlite_store: UploadStore, disk: BrokenDisk
) -> None:
    """Whatever keeps the file from its name, whoever wants it on disk is told."""
    await saved_and_lost(sqlite_store, STREAMED)
    disk.fail("link", errno.ENOMEM)
    with pytest.raises(SelfHealError):
        await sqlite_store.is_on_disk_again(NAME)
    assert files_below(sqlite_store.disk.path) == []


# -- failing --------------------------------------------------------------------------------------------------------


async def test_all_askers_share_the_failure_and_the_next_tries_anew(store: UploadStore, disk: BrokenDisk) -> None:
    """A restore that fails gives all who wait the same answer; whoever asks after it starts anew."""
    await saved_and_lost(store, 1000)
    await execute(store, "UPDATE image_chunk SET data = :data", data=b"x" * 1000)
    with statements() as asked:
        answers = await asyncio.gather(*(brought_back(store, NAME) for _ in range(50)), return_exceptions=True)
    assert all(isinstance(answer, CorruptBlob) for answer in answers)
    assert sum("image_chunk" in statement for statement in asked) == 1
    assert files_below(store.disk.path) == []
    await execute(store, "UPDATE image_chunk SET data = :data", data=noise(1000))
    assert await brought_back(store, NAME) == noise(1000)


async def test_out_of_descriptors_is_neither_absent_nor_unwritable(sqlite_store: UploadStore, disk: BrokenDisk) -> None:
    """Too many open files fails the restore; the next asker tries anew at once, and the disk gets its file."""
    data = await saved_and_lost(sqlite_store, 1000)
    disk.fail("open", errno.EMFILE)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        await brought_back(sqlite_store, NAME)
    disk.mend()
    assert await brought_back(sqlite_store, NAME) == data
    assert on_disk(sqlite_store, NAME) == data


# -- absent names ---------------------------------------------------------------------------------------------------


async def test_an_absent_name_is_remembered_for_a_moment(store: UploadStore, elsewhere: UploadStore) -> None:
    """Asked again at once, the database is not; saved on another node meanwhile, it is there within 2 s."""
    assert await brought_back(store, NAME) is None
    with statements() as asked:
        assert await asyncio.gather(*(brought_back(store, NAME) for _ in range(100))) == [None] * 100
    assert asked == []
    await elsewhere.save(NAME, NEW)
    end = time.monotonic() + ABSENT_FOR + 1
    while (data := await brought_back(store, NAME)) is None:
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    assert data == NEW
    assert ABSENT_FOR <= 2


async def test_a_save_makes_a_name_present_at_once(store: UploadStore) -> None:
    """Saved on this node, a name that was absent is there at once, wherever the save happened."""
    engine = create_async_engine(store.database.url)
    assert await brought_back(store, "own.jpg") is None
    assert await brought_back(store, "within.jpg") is None
    await store.save("own.jpg", OLD)
    store.disk.path_of("own.jpg").unlink()
    async with engine.begin() as connection:
        await store.save("within.jpg", NEW, connection=connection)
    assert await brought_back(store, "own.jpg") == OLD
    assert await brought_back(store, "within.jpg") == NEW
    await engine.dispose()


async def test_an_undone_deletion_is_present_at_once(store: UploadStore) -> None:
    """A deleted name that somebody asked for is there again as soon as the deletion is undone."""
    saved = await store.save(NAME, OLD)
    await store.delete(NAME)
    assert await brought_back(store, NAME) is None
    await store.undo(NAME)
    saved.path.unlink()
    assert await brought_back(store, NAME) == OLD


async def test_absent_names_take_bounded_memory(sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many absent names are asked for, only so many are remembered."""
    monkeypatch.setattr("selfheal.healing.negative_cache.ABSENT_AT_MOST", 50)
    names = [f"{number}.jpg" for number in range(300)]
    for _ in range(2):
        with statements() as asked:
            assert set(await asyncio.gather(*(brought_back(sqlite_store, name) for name in names))) == {None}
        found = [name for name in names if any(name in re.findall(r"\d+\.jpg", statement) for statement in asked)]
        assert len(found) >= 250


async def test_a_flood_of_absent_names_leaves_turns_of_the_loop_to_others(sqlite_store: UploadStore) -> None:
    """However many are known to be absent at the same moment, one of them is told so every other turn."""
    names = [f"absent-{index}.jpg" for index in range(20)]
    for name in names:
        assert await sqlite_store.bring_back(name) is None
    told = [0] * 1000  # by turn of the loop

    async def ask(name: str) -> None:
        assert await sqlite_store.bring_back(name) is None
        told[turn] += 1

    asking = [asyncio.create_task(ask(name)) for name in names]
    turn = 0
    while not all(task.done() for task in asking):
        turn += 1
        await asyncio.sleep(0)
        if turn == 1:  # who goes away holds up nobody, be it its turn or not
            asking[0].cancel()
            asking[10].cancel()
    assert sum(told) == 18
    assert max(told) == 1
    assert turn >= 18 * 2


async def test_an_unanswered_question_is_not_remembered_as_absent(store: UploadStore) -> None:
    """Unknown is not absent: as soon as the database answers again, so do we."""
    data = await saved_and_lost(store, 1000)
    async with UploadStore(store.disk.path, store.database.url, deadline=0.5) as hurried:
        async with locked(store):
            with pytest.raises(DatabaseUnavailable):
                await hurried.bring_back(NAME)
        end = time.monotonic() + 10
        while True:
            try:
                assert await brought_back(hurried, NAME) == data
            except DatabaseUnavailable:  # a slow machine
                assert time.monotonic() < end
            else:
                break


# -- changed meanwhile ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 3 * CHUNK])
@pytest.mark.parametrize(("call", "done_first"), [("fsync", False), ("link", True)], ids=["unnamed", "named"])
async def test_deleted_while_being_restored(
    store: UploadStore, elsewhere: UploadStore, disk: BrokenDisk, size: int, call: str, done_first: bool
) -> None:
    """A name deleted on another node before or just after its file has appeared is absent, and no file stays."""
    await saved_and_lost(store, size)
    held = disk.hold(call, done_first=done_first)
    asking = asyncio.create_task(brought_back(store, NAME))
    await held.met()
    await elsewhere.database.bury(NAME)
    held.release()
    assert await asking is None
    assert files_below(store.disk.path) == []


@pytest.mark.parametrize(("call", "done_first"), [("fsync", False), ("link", True)], ids=["unnamed", "named"])
async def test_overwritten_while_being_restored(
    store: UploadStore, elsewhere: UploadStore, disk: BrokenDisk, call: str, done_first: bool
) -> None:
    """A name overwritten on another node while it is restored is answered with its new bytes, on disk as well."""
    await saved_and_lost(store, 1000)
    held = disk.hold(call, done_first=done_first)
    asking = asyncio.create_task(brought_back(store, NAME))
    await held.met()
    await elsewhere.database.store_image(NAME, NEW)
    held.release()
    assert await asking == NEW
    assert await on_both_sides(store, NAME) == NEW


def also(monkeypatch: pytest.MonkeyPatch, do: Any, times: int) -> None:
    """The first `times` files that get their names: something is done just after, in the same thread."""
    real, left = os.link, times

    def link(source: str, target: str, **named: Any) -> None:
        nonlocal left
        real(source, target, **named)
        left -= 1
        if left >= 0:
            do(target, named["dst_dir_fd"])

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("size", [1000, 3 * CHUNK])
@pytest.mark.parametrize("times", [2, 3])
async def test_what_is_changed_as_often_as_it_is_restored_is_unknown(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch, size: int, times: int
) -> None:
    """A name that has a record all the time is never answered as absent; after three tries it is unknown."""
    data = await saved_and_lost(sqlite_store, size)

    def change(*_: Any) -> None:
        with contextlib.closing(sqlite3.connect(str(sqlite_file(sqlite_store.database.url)))) as connection:
            connection.execute("UPDATE image_storage SET generation = generation + 1")
            connection.commit()

    also(monkeypatch, change, times)
    if times < 3:
        assert await brought_back(sqlite_store, NAME) == data
        return
    with pytest.raises(DatabaseUnavailable):
        await brought_back(sqlite_store, NAME)
    assert files_below(sqlite_store.disk.path) == []
    assert await brought_back(sqlite_store, NAME) == data


@pytest.mark.parametrize(("size", "times"), [(1000, 3), (3 * CHUNK, 2), (3 * CHUNK, 3)])
async def test_what_vanishes_as_often_as_it_is_restored_is_unknown(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch, size: int, times: int
) -> None:
    """Something that removes every file as soon as it has its name makes no name absent; two tries more are made.

    A small file is answered all the same: its bytes are at hand.
    """
    data = await saved_and_lost(sqlite_store, size)
    also(monkeypatch, lambda name, directory: os.unlink(name, dir_fd=directory), times)
    if times < 3 or size == 1000:
        assert await brought_back(sqlite_store, NAME) == data
        return
    with pytest.raises(DatabaseUnavailable, match="vanishes"):
        await brought_back(sqlite_store, NAME)
    assert await brought_back(sqlite_store, NAME) == data


@pytest.mark.parametrize("size", [1000, 3 * CHUNK])
async def test_a_newer_file_that_was_faster_stays(store: UploadStore, disk: BrokenDisk, size: int) -> None:
    """A restore of what was overwritten meanwhile takes back nothing that it has not put there itself."""
    await saved_and_lost(store, size)
    held = disk.hold("fsync")
    asking = asyncio.create_task(brought_back(store, NAME))
    await held.met()
    disk.mend()
    saved = await store.save(NAME, NEW)
    inode = saved.path.stat().st_ino
    held.release()
    assert await asking == NEW
    assert saved.path.stat().st_ino == inode
    assert await on_both_sides(store, NAME) == NEW


@pytest.mark.parametrize("size", [1000, 3 * CHUNK])
async def test_a_database_lost_before_the_last_look(store: UploadStore, disk: BrokenDisk, size: int) -> None:
    """Bytes that are checked and whole are served, and stay, though nobody can say any more whether they still hold."""
    data = await saved_and_lost(store, size)
    held = disk.hold("fsync")
    asking = asyncio.create_task(brought_back(store, NAME))
    await held.met()
    await execute(store, "ALTER TABLE image_storage RENAME TO image_storage_away")
    held.release()
    assert await asking == data
    assert on_disk(store, NAME) == data
    await execute(store, "ALTER TABLE image_storage_away RENAME TO image_storage")


async def test_a_file_whose_name_is_not_cached_is_waited_for(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where opening what was just restored might wait for a disk, it is opened in a thread."""
    data = await saved_and_lost(sqlite_store, 1000)
    monkeypatch.setattr("selfheal.disk.directory.LOOK_EVERY", -1.0)
    assert await brought_back(sqlite_store, NAME) == data


async def test_saved_on_this_node_while_being_restored(store: UploadStore, disk: BrokenDisk) -> None:
    """A save that overtakes a restore wins on both sides."""
    await saved_and_lost(store, 1000)
    held = disk.hold("fsync")
    asking = asyncio.create_task(brought_back(store, NAME))
    await held.met()
    saving = asyncio.create_task(store.save(NAME, NEW))
    await asyncio.sleep(0.2)
    held.release()
    await saving
    assert await asking == NEW
    assert await on_both_sides(store, NAME) == NEW


@pytest.mark.parametrize("change", ["deleted", "overwritten"])
async def test_changed_while_a_large_file_is_being_sent(
    store: UploadStore, elsewhere: UploadStore, disk: BrokenDisk, change: str
) -> None:
    """Who is being sent a file gets the whole of what it was; the disk ends as the database says."""
    data = await saved_and_lost(store, STREAMED)
    held = disk.hold("pwrite", after=8)
    body = await store.bring_back(NAME)
    assert isinstance(body, Incoming)
    if change == "deleted":
        await elsewhere.database.bury(NAME)
    else:
        await elsewhere.database.store_image(NAME, NEW)
    held.release()
    assert b"".join([piece async for piece in body.pieces(0, body.size)]) == data
    body.close()
    await store.tasks.settle(30)
    assert await brought_back(store, NAME) == (None if change == "deleted" else NEW)
    assert on_disk(store, NAME) == (None if change == "deleted" else NEW)
    await nothing_is_held_open(store.disk.path)


# -- large files ----------------------------------------------------------------------------------------------------


async def test_a_large_file_is_sent_while_it_is_restored(store: UploadStore, disk: BrokenDisk) -> None:
    """Its first bytes come before the restore is over; a range far ahead does not wait for those before it."""
    data = await saved_and_lost(store, STREAMED)
    held = disk.hold("pwrite", after=8)
    body = await store.bring_back(NAME)
    assert body is not None
    assert body.size == STREAMED
    pieces = body.pieces(0, body.size)
    first = await anext(pieces)
    assert data.startswith(first)
    await held.met()
    assert await brought_back(store, NAME, STREAMED - 1000) == data[-1000:]
    assert await brought_back(store, NAME, 40 * CHUNK + 5, 42 * CHUNK + 1) == data[40 * CHUNK + 5 : 42 * CHUNK + 1]
    assert on_disk(store, NAME) is None
    held.release()
    assert first + b"".join([piece async for piece in pieces]) == data
    body.close()
    await store.tasks.settle(30)
    assert on_disk(store, NAME) == data
    await nothing_is_held_open(store.disk.path)


async def test_what_stands_on_the_disk_already_is_not_read_again(sqlite_store: UploadStore, disk: BrokenDisk) -> None:
    """Who follows a restore is sent what was written, as soon as it was, whatever becomes of it in the database."""
    data = await saved_and_lost(sqlite_store, STREAMED)
    written, sealed = disk.hold("pwrite", after=16), disk.hold("fsync")
    body = await sqlite_store.bring_back(NAME)
    assert isinstance(body, Incoming)
    await written.met()
    await execute(sqlite_store, "DELETE FROM image_chunk WHERE position < 16")
    assert b"".join([piece async for piece in body.pieces(5, 25)]) == data[5:25]
    tail = body.pieces(16 * CHUNK - 10, STREAMED)
    assert await anext(tail) == data[16 * CHUNK - 10 : 16 * CHUNK]
    coming = asyncio.ensure_future(anext(tail))
    await asyncio.sleep(0.01)
    assert not coming.done()
    written.release()
    got = await coming
    await sealed.met()
    while len(got) < STREAMED - 16 * CHUNK - 1:
        got += await anext(tail)
    assert got == data[16 * CHUNK : -1]
    sealed.release()
    assert [piece async for piece in tail] == [data[-1:]]
    body.close()
    await sqlite_store.tasks.settle(30)
    assert on_disk(sqlite_store, NAME) == data


async def test_a_part_is_read_from_the_database_no_further_than_it_goes(
    sqlite_store: UploadStore, disk: BrokenDisk
) -> None:
    """A range that ends with a handful of chunks asks for no more of them: damage past it does not spoil it."""
    data = await saved_and_lost(sqlite_store, STREAMED)
    disk.fail("pwrite", errno.ENOSPC)
    body = await sqlite_store.bring_back(NAME)
    assert isinstance(body, FromDatabase)
    await execute(sqlite_store, f"DELETE FROM image_chunk WHERE position >= {READ_AT_ONCE}")
    start, stop = 3, READ_AT_ONCE * CHUNK
    assert b"".join([piece async for piece in body.pieces(start, stop)]) == data[start:stop]


async def test_memory_does_not_grow_with_the_file(store: UploadStore) -> None:
    """A file of 32 MiB is restored and sent in far less memory."""
    size, piece = 32 * 2**20, noise(2**20)

    async def source() -> AsyncIterator[bytes]:
        for number in range(size // len(piece)):
            yield number.to_bytes(4, "big") + piece[4:]

    saved = await store.save(NAME, source())
    saved.path.unlink()
    tracemalloc.start()
    try:
        body = await store.bring_back(NAME)
        assert body is not None
        assert sum([len(piece) async for piece in body.pieces(0, body.size)]) == size
        body.close()
        await store.tasks.settle(30)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert saved.path.stat().st_size == size
    assert peak < 16 * 2**20


async def test_a_disk_that_fills_up_under_a_large_file(store: UploadStore, disk: BrokenDisk) -> None:
    """What is being sent goes on from the database to the last byte; there is no file and no litter."""
    data = await saved_and_lost(store, STREAMED)
    for room in (5 * CHUNK, 30 * CHUNK + 7, STREAMED - 1):
        disk.fill_after(room)
        assert await brought_back(store, NAME) == data
        await store.tasks.settle(30)
        assert files_below(store.disk.path) == []
        disk.mend()
    assert await brought_back(store, NAME) == data
    await store.tasks.settle(30)
    assert on_disk(store, NAME) == data
    await nothing_is_held_open(store.disk.path)


# -- damage ---------------------------------------------------------------------------------------------------------


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


async def sent_before_the_error(store: UploadStore, name: str) -> int:
    """How many bytes a visitor got of a name before `CorruptBlob` was raised, which it must be."""
    sent = 0
    try:
        body = await store.bring_back(name)
        assert body is not None
        try:
            async for piece in body.pieces(0, body.size):
                sent += len(piece)
        finally:
            body.close()
    except CorruptBlob:
        return sent
    pytest.fail("a damaged body was sent whole")


DAMAGES = [_change_data, _change_data_and_digest, _drop, _shorten, _lengthen, _misplace]


@pytest.mark.parametrize("takes_files", [True, False], ids=["disk good", "disk takes no file"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
async def test_a_damaged_body_is_never_sent_whole(
    sqlite_store: UploadStore, disk: BrokenDisk, damage: object, takes_files: bool
) -> None:
    """Damage in the last chunk, of whatever kind, ends in an error before the last byte; no file, the record kept."""
    assert callable(damage)
    for size in (1000, 3 * CHUNK, 11 * CHUNK + 3, STREAMED):
        name = f"{size}.jpg"
        await saved_and_lost(sqlite_store, size, name)
        last = (size - 1) // CHUNK
        await damage(sqlite_store, last, size - last * CHUNK)
        if not takes_files:
            disk.fail("pwrite", errno.ENOSPC)
        assert await sent_before_the_error(sqlite_store, name) < size
        await sqlite_store.tasks.settle(30)
        assert files_below(sqlite_store.disk.path) == []
        assert await sqlite_store.database.find(name) is not None
        disk.mend()
        await execute(sqlite_store, "DELETE FROM image_chunk")
    await nothing_is_held_open(sqlite_store.disk.path)


def be_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every asker's turn come when the restore that it has joined is over."""
    at_once = Restorer._join

    async def late(self: Restorer, name: str) -> Answer:
        answer = await at_once(self, name)
        while isinstance(answer, Incoming) and not answer.progress.is_over:
            await asyncio.sleep(0.01)
        return answer

    monkeypatch.setattr(Restorer, "_join", late)


async def test_damage_that_is_found_before_an_askers_turn_comes(
    store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy event loop may be told of a restore only when that has failed: it is damage all the same, not unknown."""
    be_late(monkeypatch)
    await saved_and_lost(store, STREAMED)
    last = (STREAMED - 1) // CHUNK
    await _change_data(store, last, STREAMED - last * CHUNK)
    assert (await got(SelfHealMiddleware(wrapped, store))).status_code == 500
    assert files_below(store.disk.path) == []


async def test_a_disk_that_fills_up_before_an_askers_turn_comes(
    store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The visitor is served from the database all the same, however often what was written makes room again."""
    be_late(monkeypatch)
    data = await saved_and_lost(store, STREAMED)
    real = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if offset > 10 * CHUNK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    answer = await got(SelfHealMiddleware(wrapped, store))
    assert (answer.status_code, answer.content) == (200, data)
    assert files_below(store.disk.path) == []


async def test_damage_found_on_a_disk_that_fills_up_meanwhile(store: UploadStore, disk: BrokenDisk) -> None:
    """Also when the disk gives up half way and the rest comes from the database, no damaged body is sent whole."""
    await saved_and_lost(store, STREAMED)
    last = (STREAMED - 1) // CHUNK
    await _change_data_and_digest(store, last, STREAMED - last * CHUNK)
    disk.fill_after(10 * CHUNK)
    assert await sent_before_the_error(store, NAME) < STREAMED


async def test_bytes_dropped_while_they_are_read_are_not_damage(
    store: UploadStore, elsewhere: UploadStore, disk: BrokenDisk
) -> None:
    """A blob that is replaced and dropped under a reader looks like damage; the record is read again, and it is not."""
    await saved_and_lost(store, 20 * CHUNK)
    held = disk.hold("pwrite", after=2)
    asking = asyncio.create_task(brought_back(store, NAME))
    await held.met()
    await elsewhere.database.store_image(NAME, NEW)
    await execute(elsewhere, "DELETE FROM image_chunk WHERE position > 0")
    held.release()
    assert await asking == NEW
    assert await on_both_sides(store, NAME) == NEW


# -- a disk that takes no file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
async def test_an_unwritable_disk_is_left_alone_for_30_seconds(
    directory: Path, sqlite_url: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is served from the database, whole and in part; nothing is written until the time is over, then it heals."""
    async with UploadStore(directory, sqlite_url, require_marker=True) as store:
        await store.database.create_tables()
        data = noise(size)
        await store.database.store_image(NAME, data)
        directory.mkdir(parents=True)  # what is left of a mount that is lost
        assert await brought_back(store, NAME) == data
        store.disk.mark()
        assert await brought_back(store, NAME) == data
        assert await brought_back(store, NAME, size // 3, size // 2) == data[size // 3 : size // 2]
        assert [name for name in files_below(directory) if not name.startswith(".")] == []
        monkeypatch.setattr("selfheal.disk.directory.REFUSED_FOR", 0.01)
        await anyio.sleep(0.02)
        assert await brought_back(store, NAME) == data
        await store.tasks.settle(30)
        assert on_disk(store, NAME) == data


REFUSALS = {
    "ENOSPC": "pwrite",
    "EDQUOT": "pwrite",
    "EFBIG": "pwrite",
    "EIO": "fsync",
    "EROFS": "open",
    "EACCES": "open",
}


@pytest.mark.parametrize(("error", "call"), REFUSALS.items(), ids=REFUSALS)
async def test_whatever_the_disk_refuses_the_visitor_is_served(
    sqlite_store: UploadStore, disk: BrokenDisk, error: str, call: str
) -> None:
    """Bytes come from the database; the disk holds no part of them, and whoever wants the file there is told."""
    for size in SIZES.values():
        name = f"{size}.jpg"
        data = await saved_and_lost(sqlite_store, size, name)
        if not size and call == "pwrite":
            continue  # nothing is written
        disk.fail(call, getattr(errno, error))
        assert await brought_back(sqlite_store, name) == data
        with pytest.raises(DiskUnwritable):
            await sqlite_store.is_on_disk_again(name)
        assert files_below(sqlite_store.disk.path) == []
        disk.mend()
    assert await in_database(sqlite_store, "1000.jpg") == noise(1000)
    await nothing_is_held_open(sqlite_store.disk.path)


# -- set aside ------------------------------------------------------------------------------------------------------


async def test_what_is_set_aside_is_told_once(sqlite_store: UploadStore) -> None:
    """A copy goes to quarantine with an event that says where to; of a file that is not there nothing is said."""
    saved = await sqlite_store.save(NAME, OLD)
    told: list[Event] = []
    sqlite_store.events.listeners = (told.append,)
    for _ in range(2):
        await sqlite_store.set_aside(NAME)
    assert on_disk(sqlite_store, NAME) is None
    assert in_quarantine(sqlite_store) == [OLD]
    (event,) = told
    assert (event.kind, event.name) == (Kind.QUARANTINED, NAME)
    assert str(sqlite_store.disk.quarantine_path) in event.detail
    assert await brought_back(sqlite_store, NAME) == OLD
    assert saved.path.stat().st_mtime_ns == saved.modified_ns


# -- what it looks like after ---------------------------------------------------------------------------------------


async def test_a_restored_file_looks_the_same(store: UploadStore) -> None:
    """ETag, Last-Modified, mtime and mode are the ones of before, and those that StaticFiles would say."""
    for size in SIZES.values():
        saved = await store.save(NAME, noise(size))
        app = SelfHealMiddleware(wrapped, store)
        before, stat_before = await got(app), saved.path.stat()
        saved.path.unlink()
        mask = os.umask(0o077)
        try:
            missed = await got(app)
            await store.tasks.settle(30)
        finally:
            os.umask(mask)
        after, stat_after = await got(app), saved.path.stat()
        plain = StaticFiles(directory=store.disk.path)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(plain), base_url="http://test") as client:
            starlettes = await client.get(f"/{NAME}")
        for answer in (before, missed, after):
            assert answer.status_code == 200
            assert answer.content == noise(size)
            assert answer.headers["etag"] == starlettes.headers["etag"]
            assert answer.headers["last-modified"] == starlettes.headers["last-modified"]
        assert (stat_after.st_mtime_ns, stat_after.st_mode) == (stat_before.st_mtime_ns, stat_before.st_mode)
        assert (await got(app, **{"If-None-Match": before.headers["etag"]})).status_code == 304


async def test_a_deleted_uploads_directory_is_made_anew(store: UploadStore, elsewhere: UploadStore) -> None:
    """A node whose whole directory is gone makes it again, with the modes that directories have."""
    await store.save(NAME, OLD)
    assert not elsewhere.disk.path.exists()
    assert await brought_back(elsewhere, NAME) == OLD
    for made in (elsewhere.disk.path, elsewhere.disk.path / "cats"):
        assert made.stat().st_mode & 0o7777 == 0o755


OTHER_PROCESS = """
import asyncio, sys
from selfheal import UploadStore

async def main(directory, database, names):
    async with UploadStore(directory, database) as store:
        await store.database.count()
        print("ready", flush=True)
        sys.stdin.readline()
        bodies = await asyncio.gather(*(store.bring_back(name) for name in names))
        for body in bodies:
            data = b"".join([piece async for piece in body.pieces(0, body.size)])
            assert len(data) == body.size
            body.close()

asyncio.run(main(*sys.argv[1:3], sys.argv[3:]))
"""


async def test_two_processes_restore_the_same_names_at_once(store: UploadStore) -> None:
    """Each name ends whole and once on disk, nothing is left over, and neither process sees an error."""
    sizes = {f"cats/{size}.jpg": size for size in (0, 10, 1000, CHUNK, CHUNK + 1, 5 * CHUNK, STREAMED)}
    for name, size in sizes.items():
        await saved_and_lost(store, size, name)
    url = store.database.url.render_as_string(hide_password=False)
    command = [sys.executable, "-W", "error", "-c", OTHER_PROCESS, str(store.disk.path), url, *sizes]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True))
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said == ["", ""]
    assert files_below(store.disk.path) == sorted(sizes)
    for name, size in sizes.items():
        assert on_disk(store, name) == noise(size)


async def test_the_first_answer_says_what_the_file_will(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that keeps whole seconds, whoever brings a file back is told the time that the next one is."""
    utime = os.utime

    def of_whole_seconds(path: Any, *, ns: tuple[int, int], **named: Any) -> None:
        utime(path, ns=(ns[0] // 10**9 * 10**9, ns[1] // 10**9 * 10**9), **named)

    await saved_and_lost(store, 1000)
    monkeypatch.setattr(os, "utime", of_whole_seconds)
    app = SelfHealMiddleware(wrapped, store)
    first, second = await got(app), await got(app)
    assert first.content == second.content == noise(1000)
    assert first.headers == second.headers
    assert store.events.counters[Kind.RESTORED] == store.events.counters[Kind.HIT] == 1


async def test_what_is_answered_is_closed(store: UploadStore) -> None:
    """Every body is closed by whoever got it, whether it was read or not; then nothing is held open."""
    for size in SIZES.values():
        await saved_and_lost(store, size)
        bodies = await asyncio.gather(*(store.bring_back(NAME) for _ in range(5)))
        assert all(isinstance(body, Landed | OpenFile | Incoming) for body in bodies)
        for body in bodies:
            assert body is not None
            body.close()
        await store.tasks.settle(30)
        store.disk.path_of(NAME).unlink()
    await nothing_is_held_open(store.disk.path)


def test_no_answer_is_an_error_of_ours() -> None:
    """What a restore raises on purpose has the one root, so that an app can catch it."""
    for error in (CorruptBlob, DatabaseUnavailable, DiskUnwritable):
        assert issubclass(error, SelfHealError)
