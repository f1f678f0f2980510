"""Database → disk: many callers share one restore, and a restored file looks the same as before."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from subprocess import PIPE
from typing import Any

import httpx
import pytest
from starlette.staticfiles import StaticFiles

from selfheal import CorruptBlob, DatabaseUnavailable, DiskUnwritable, SelfHealError, SelfHealMiddleware, UploadStore
from selfheal.content.sources import CHUNK
from selfheal.disk.open_file import OpenFile
from selfheal.events import Kind
from selfheal.healing.bodies import InMemory, Restoring
from tests.support.asgi import Wrapped
from tests.support.faults import BrokenDisk
from tests.support.open_files import assert_nothing_open_below
from tests.support.raw_sql import execute
from tests.support.recorded_statements import recorded_statements
from tests.support.sample_data import noise
from tests.support.store_requests import restored_bytes
from tests.support.store_state import files_below, on_disk, on_disk_and_in_database
from tests.support.uploads import NAME, OLD, RESTORED_SIZES, STREAMED, get, save_and_lose

# -- many callers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", RESTORED_SIZES.values(), ids=RESTORED_SIZES)
async def test_many_callers_share_one_restore(store: UploadStore, size: int) -> None:
    """200 callers of one missing name get its bytes with as many database statements as one caller needs."""
    data = await save_and_lose(store, size)
    with recorded_statements() as statements_of_one:
        assert await restored_bytes(store, NAME) == data
        await store.tasks.drain(30)
    store.disk.path_of(NAME).unlink()
    stop = min(size, 2 * CHUNK)  # enough of a large file to see that all callers follow its restore
    with recorded_statements() as statements_of_many:
        answers = await asyncio.gather(*(restored_bytes(store, NAME, 0, stop) for _ in range(200)))
        await store.tasks.drain(30)
    assert all(answer == data[:stop] for answer in answers)
    assert sum("image_chunk" in statement for statement in statements_of_one) > 0
    assert len(statements_of_many) == len(statements_of_one)
    assert await on_disk_and_in_database(store, NAME) == data
    await assert_nothing_open_below(store.disk.path)


async def test_a_small_image_is_one_blob_read(store: UploadStore) -> None:
    """A file of one chunk is restored with one query of its bytes, however many callers; many names share a query."""
    names = [f"{number}.jpg" for number in range(40)]
    for number, name in enumerate(names):
        await save_and_lose(store, 1000 + number, name)
    with recorded_statements() as seen:
        await asyncio.gather(*(restored_bytes(store, name) for name in names for _ in range(5)))
    reading = [statement for statement in seen if "FROM image_storage LEFT OUTER JOIN image_chunk" in statement]
    assert all("image_chunk" not in statement for statement in seen if statement not in reading)
    for name in names:
        assert sum(f"{quote}{name}{quote}" in statement for statement in reading for quote in ("'", '"')) == 1
    assert [on_disk(store, name) for name in names] == [noise(1000 + number) for number in range(40)]


async def test_a_caller_that_joins_late_gets_the_whole_file(sqlite_store: UploadStore) -> None:
    """A caller that joins at any moment of a large restore, from its first chunk to its end, gets the whole file."""
    data = await save_and_lose(sqlite_store, STREAMED)
    digest = sha256(data).digest()
    answers: list[asyncio.Task[bytes]] = []

    async def call() -> bytes:
        body = await sqlite_store.restorer.restore(NAME)
        assert body is not None
        await asyncio.sleep(0)
        try:
            return b"".join([piece async for piece in body.pieces(body.size - 10, body.size)])
        finally:
            body.close()

    first = asyncio.create_task(restored_bytes(sqlite_store, NAME))
    while not first.done():
        answers.append(asyncio.create_task(call()))
        for _ in range(3):
            await asyncio.sleep(len(answers) // 100 / 100)  # not so many that they slow the restore down
    whole = await first
    assert whole is not None
    assert sha256(whole).digest() == digest
    assert set(await asyncio.gather(*answers)) == {data[-10:]}
    await sqlite_store.tasks.drain(30)
    await assert_nothing_open_below(sqlite_store.disk.path)


async def test_a_restore_outlives_its_callers(store: UploadStore, broken_disk: BrokenDisk) -> None:
    """The restore finishes even if all its callers are cancelled, and nothing stays open."""
    for size in (1000, STREAMED):
        data = await save_and_lose(store, size)
        held = broken_disk.hold("fsync")
        callers = [asyncio.create_task(restored_bytes(store, NAME)) for _ in range(3)]
        await held.met()
        for task in callers:
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        assert on_disk(store, NAME) is None
        held.release()
        await store.tasks.drain(30)
        broken_disk.mend()
        assert on_disk(store, NAME) == data
        store.disk.path_of(NAME).unlink()
    await assert_nothing_open_below(store.disk.path)


async def test_two_names_do_not_wait_for_each_other(store: UploadStore, broken_disk: BrokenDisk) -> None:
    """A restore that is blocked does not delay a caller of another name."""
    await save_and_lose(store, 1000, "slow.jpg")
    await save_and_lose(store, 2000, "other.jpg")
    held = broken_disk.hold("fsync")
    slow = asyncio.create_task(restored_bytes(store, "slow.jpg"))
    await held.met()
    broken_disk.mend()
    assert await restored_bytes(store, "other.jpg") == noise(2000)
    assert not slow.done()
    held.release()
    assert await slow == noise(1000)


OTHER_PROCESS = """
import asyncio, sys
from selfheal import UploadStore

async def main(directory, database, names):
    async with UploadStore(directory, database) as store:
        await store.database.count()
        print("ready", flush=True)
        sys.stdin.readline()
        bodies = await asyncio.gather(*(store.restorer.restore(name) for name in names))
        for body in bodies:
            data = b"".join([piece async for piece in body.pieces(0, body.size)])
            assert len(data) == body.size
            body.close()

asyncio.run(main(*sys.argv[1:3], sys.argv[3:]))
"""


async def test_two_processes_restore_the_same_names_at_once(store: UploadStore) -> None:
    """Each name is whole and once on disk, no temporary file is left, and neither process sees an error."""
    sizes = {f"cats/{size}.jpg": size for size in (0, 10, 1000, CHUNK, CHUNK + 1, 5 * CHUNK, STREAMED)}
    for name, size in sizes.items():
        await save_and_lose(store, size, name)
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
        errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert errors == ["", ""]
    assert files_below(store.disk.path) == sorted(sizes)
    for name, size in sizes.items():
        assert on_disk(store, name) == noise(size)


# -- a restore that fails ---------------------------------------------------------------------------------------------


async def test_all_callers_share_a_failure_and_the_next_one_tries_again(
    store: UploadStore, broken_disk: BrokenDisk
) -> None:
    """All callers of a restore that fails get its error; a later caller starts a new restore."""
    await save_and_lose(store, 1000)
    await execute(store, "UPDATE image_chunk SET data = :data", data=b"x" * 1000)
    with recorded_statements() as seen:
        answers = await asyncio.gather(*(restored_bytes(store, NAME) for _ in range(50)), return_exceptions=True)
    assert all(isinstance(answer, CorruptBlob) for answer in answers)
    assert sum("image_chunk" in statement for statement in seen) == 1
    assert files_below(store.disk.path) == []
    await execute(store, "UPDATE image_chunk SET data = :data", data=noise(1000))
    assert await restored_bytes(store, NAME) == noise(1000)


async def test_out_of_descriptors_is_neither_absent_nor_unwritable(
    sqlite_store: UploadStore, broken_disk: BrokenDisk
) -> None:
    """Too many open files fails the restore; the next caller tries again at once, and the file is written."""
    data = await save_and_lose(sqlite_store, 1000)
    broken_disk.fail("open", errno.EMFILE)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        await restored_bytes(sqlite_store, NAME)
    broken_disk.mend()
    assert await restored_bytes(sqlite_store, NAME) == data
    assert on_disk(sqlite_store, NAME) == data


def test_all_errors_have_one_root() -> None:
    """The errors that a restore raises on purpose have one root, so that an app can catch it."""
    for error in (CorruptBlob, DatabaseUnavailable, DiskUnwritable):
        assert issubclass(error, SelfHealError)


# -- the restored file ------------------------------------------------------------------------------------------------


async def test_a_restored_file_looks_the_same(store: UploadStore) -> None:
    """ETag, Last-Modified, mtime and mode are as before, and those that StaticFiles would send."""
    for size in RESTORED_SIZES.values():
        saved = await store.save(NAME, noise(size))
        app = SelfHealMiddleware(Wrapped(), store)
        before, stat_before = await get(app), saved.path.stat()
        saved.path.unlink()
        mask = os.umask(0o077)
        try:
            missed = await get(app)
            await store.tasks.drain(30)
        finally:
            os.umask(mask)
        after, stat_after = await get(app), saved.path.stat()
        plain = StaticFiles(directory=store.disk.path)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(plain), base_url="http://test") as client:
            expected = await client.get(f"/{NAME}")
        for answer in (before, missed, after):
            assert answer.status_code == 200
            assert answer.content == noise(size)
            assert answer.headers["etag"] == expected.headers["etag"]
            assert answer.headers["last-modified"] == expected.headers["last-modified"]
        assert (stat_after.st_mtime_ns, stat_after.st_mode) == (stat_before.st_mtime_ns, stat_before.st_mode)
        assert (await get(app, **{"If-None-Match": before.headers["etag"]})).status_code == 304


async def test_the_first_answer_has_the_headers_of_the_next(
    store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that keeps whole seconds, the restoring answer has the same headers as the next hit."""
    utime = os.utime

    def in_whole_seconds(path: Any, *, ns: tuple[int, int], **named: Any) -> None:
        utime(path, ns=(ns[0] // 10**9 * 10**9, ns[1] // 10**9 * 10**9), **named)

    await save_and_lose(store, 1000)
    monkeypatch.setattr(os, "utime", in_whole_seconds)
    app = SelfHealMiddleware(Wrapped(), store)
    first, second = await get(app), await get(app)
    assert first.content == second.content == noise(1000)
    assert first.headers == second.headers
    assert store.events.counters[Kind.RESTORED] == store.events.counters[Kind.HIT] == 1


async def test_a_deleted_uploads_directory_is_made_again(store: UploadStore, other_store: UploadStore) -> None:
    """A node whose whole uploads directory is gone makes it again, with the usual modes."""
    await store.save(NAME, OLD)
    shutil.rmtree(other_store.disk.path)
    assert await restored_bytes(other_store, NAME) == OLD
    for made in (other_store.disk.path, other_store.disk.path / "cats"):
        assert made.stat().st_mode & 0o7777 == 0o755


async def test_a_file_whose_name_is_not_cached(sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restored file is opened in a thread if opening it might wait for the disk."""
    data = await save_and_lose(sqlite_store, 1000)
    monkeypatch.setattr("selfheal.disk.root.CHECK_EVERY", -1.0)
    assert await restored_bytes(sqlite_store, NAME) == data


async def test_a_closed_body_holds_nothing_open(store: UploadStore) -> None:
    """A body that its caller closes, read or not, leaves no file open."""
    for size in RESTORED_SIZES.values():
        await save_and_lose(store, size)
        bodies = await asyncio.gather(*(store.restorer.restore(NAME) for _ in range(5)))
        assert all(isinstance(body, InMemory | OpenFile | Restoring) for body in bodies)
        for body in bodies:
            assert body is not None
            body.close()
        await store.tasks.drain(30)
        store.disk.path_of(NAME).unlink()
    await assert_nothing_open_below(store.disk.path)
