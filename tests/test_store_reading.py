"""`UploadStore.ensure` and `open`: what an app reads itself is restored first."""

from __future__ import annotations

import errno
import io
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from PIL import Image

from selfheal import CorruptBlob, DatabaseUnavailable, DiskUnwritable, InvalidName, NotStored, UploadStore
from selfheal.disk import syscalls
from tests.support.faults import BrokenDisk
from tests.support.files import write_file
from tests.support.raw_sql import execute
from tests.support.store_state import in_database, on_disk, set_aside
from tests.support.uploads import (
    A_DAY_NS,
    NAME,
    NEW,
    OLD,
    RESTORED_SIZES,
    STREAMED,
    replace_file,
    save_and_lose,
    small_png,
)

Reading = Callable[[UploadStore, str], Awaitable[bytes]]


async def ensure(store: UploadStore, name: str) -> bytes:
    """Read a file by the path that `ensure` returns."""
    return (await store.ensure(name)).read_bytes()


async def opened(store: UploadStore, name: str) -> bytes:
    """Read the file that `open` returns."""
    async with store.open(name) as file:
        return file.read()


@pytest.fixture(params=[ensure, opened], ids=["ensure", "open"])
def reading(request: pytest.FixtureRequest) -> Reading:
    """Each way of reading a file."""
    way: Reading = request.param
    return way


@pytest.mark.parametrize("size", RESTORED_SIZES.values(), ids=RESTORED_SIZES)
async def test_a_missing_file_is_restored_first(store: UploadStore, reading: Reading, size: int) -> None:
    """A file of any size that the disk has lost is on the disk again before the app reads it."""
    data = await save_and_lose(store, size)
    assert await reading(store, NAME) == data
    assert on_disk(store, NAME) == data


async def test_a_thumbnail_of_a_lost_picture(sqlite_store: UploadStore) -> None:
    """A picture library reads what is opened, by its path or as a file."""
    saved = await sqlite_store.save("a.png", small_png())
    saved.path.unlink()
    async with sqlite_store.open("a.png") as file:
        assert Image.open(file).size == (8, 8)
    assert file.closed
    saved.path.unlink()
    with await sqlite_store.open("a.png") as file:
        assert Image.open(file).size == (8, 8)
    saved.path.unlink()
    assert await sqlite_store.ensure("a.png") == saved.path
    with Image.open(saved.path) as picture:
        assert picture.size == (8, 8)


async def test_no_such_name(store: UploadStore, reading: Reading) -> None:
    """A name that neither side has, or that is deleted, raises `NotStored`; so does one that is no name."""
    await store.save(NAME, OLD)
    await store.delete(NAME)
    for name in (NAME, "never.jpg"):
        with pytest.raises(NotStored, match=name):
            await reading(store, name)
    with pytest.raises(InvalidName):
        await reading(store, "../etc/passwd")


async def test_a_file_that_is_only_on_disk(store: UploadStore, reading: Reading) -> None:
    """What the app has just written is read at once, and stored in the background."""
    write_file(store.disk.path_of(NAME), NEW)
    store.reconciler.settled_after = 2.0
    started = time.monotonic()
    assert await reading(store, NAME) == NEW
    assert time.monotonic() - started < 1.8
    await store.tasks.drain(10)
    assert await in_database(store, NAME) == NEW


async def test_an_overwrite_is_read_at_once(store: UploadStore, reading: Reading) -> None:
    """A newer file of the app's own is right, though its record is another one yet."""
    await store.save(NAME, OLD)
    replace_file(store, NEW, time.time_ns() + 10**9)
    assert await reading(store, NAME) == NEW
    await store.tasks.drain(10)
    assert await in_database(store, NAME) == NEW


async def test_a_damaged_copy(store: UploadStore, reading: Reading) -> None:
    """A copy that is cut off is healed before it is read, and set aside."""
    await store.save(NAME, NEW)
    replace_file(store, NEW[:5], time.time_ns() - A_DAY_NS)
    assert await reading(store, NAME) == NEW
    assert await set_aside(store, NAME) == [NEW[:5]]


async def test_a_copy_that_another_node_deleted(store: UploadStore, other_store: UploadStore, reading: Reading) -> None:
    """A name that was deleted elsewhere is gone here too, before this node has heard of it."""
    await store.save(NAME, OLD)
    await other_store.delete(NAME)
    with pytest.raises(NotStored):
        await reading(store, NAME)
    assert on_disk(store, NAME) is None


async def test_a_copy_that_another_node_overwrote(
    store: UploadStore, other_store: UploadStore, reading: Reading
) -> None:
    """A name that was overwritten elsewhere is read as it is recorded."""
    await store.save(NAME, OLD)
    await other_store.save(NAME, NEW)
    assert await reading(store, NAME) == NEW


async def test_without_a_database(broken_store: UploadStore, reading: Reading) -> None:
    """What is on disk is read without the database; what is not is unknown."""
    write_file(broken_store.disk.path_of(NAME), NEW)
    assert await reading(broken_store, NAME) == NEW
    with pytest.raises(DatabaseUnavailable):
        await reading(broken_store, "missing.jpg")


async def test_damaged_in_the_database(store: UploadStore, reading: Reading) -> None:
    """Bytes that are not the recorded ones are never read."""
    await save_and_lose(store, 1000)
    await execute(store, "UPDATE image_chunk SET data = digest")
    with pytest.raises(CorruptBlob):
        await reading(store, NAME)


@pytest.mark.parametrize("size", [1000, 3_000_000, STREAMED])
async def test_a_full_disk(store: UploadStore, broken_disk: BrokenDisk, size: int) -> None:
    """If the disk takes no file, `ensure` says so, and `open` returns a temporary file of the right bytes."""
    data = await save_and_lose(store, size)
    broken_disk.fail("pwrite", errno.ENOSPC)
    with pytest.raises(DiskUnwritable):
        await store.ensure(NAME)
    async with store.open(NAME) as file:
        assert file.read() == data
    assert on_disk(store, NAME) is None


async def test_a_disk_that_lost_a_file(store: UploadStore, reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that the disk cannot open any more (EIO) is restored."""
    lost = (await store.save(NAME, NEW)).path.stat().st_ino
    real = syscalls.open_file

    def open_file(root: int, path: str) -> int:
        if store.disk.path_of(path).exists() and store.disk.path_of(path).stat().st_ino == lost:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(root, path)

    monkeypatch.setattr(syscalls, "open_file", open_file)
    monkeypatch.setattr(syscalls, "open_cached", open_file)
    assert await reading(store, NAME) == NEW


async def test_open_without_a_name(directory: Path, sqlite_url: str) -> None:
    """`open()` opens the store, as the lifespan of the middleware does."""
    store = UploadStore(directory, sqlite_url)
    await store.open()  # type: ignore[func-returns-value]
    assert (directory / ".selfheal-disk").exists()
    await store.close()


async def test_a_file_that_is_read_stays_whole(sqlite_store: UploadStore) -> None:
    """A file that was opened has one version's bytes, whatever happens to its name meanwhile."""
    await sqlite_store.save(NAME, OLD)
    with await sqlite_store.open(NAME) as file:
        await sqlite_store.save(NAME, NEW)
        assert file.read() == OLD
        assert isinstance(file, io.BufferedReader)
