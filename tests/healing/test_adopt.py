"""Disk → database: files that the app itself wrote or overwrote are adopted once they hold still."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import tracemalloc
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from selfheal.errors import FileChanged, NotStored
from tests.support.faults import BrokenDisk, locked_database
from tests.support.sample_data import noise
from tests.support.store_requests import hit, hit_and_settle
from tests.support.store_state import in_database, in_quarantine, on_disk_and_in_database
from tests.support.uploads import A_DAY_NS, NAME, NEW, OLD, generation_of, history_of, replace_file
from tests.support.waiting import eventually

# -- the app's own overwrite ------------------------------------------------------------------------------------------


async def after_start(store: UploadStore) -> int:
    """Return a time in ns after every record."""
    await asyncio.sleep(0.02)
    return time.time_ns()


@pytest.mark.parametrize("size", [10, 3 * CHUNK + 5])
async def test_the_apps_own_overwrite_is_the_next_generation(store: UploadStore, size: int) -> None:
    """A file modified after its record was overwritten by the app: it is adopted, the history keeps the old bytes."""
    await store.save(NAME, OLD)
    written = replace_file(store, noise(size), await after_start(store)).stat().st_mtime_ns
    await hit_and_settle(store, NAME)
    assert await on_disk_and_in_database(store, NAME) == noise(size)
    record = await store.database.find(NAME)
    assert record is not None
    assert record.generation == 2
    assert written <= record.modified_ns == store.disk.path_of(NAME).stat().st_mtime_ns < written + 10**9
    assert await history_of(store) == [OLD]
    assert in_quarantine(store) == []


async def test_an_overwrite_of_a_file_that_was_compared(store: UploadStore) -> None:
    """A name that was compared is compared again once its file is another one."""
    await store.save(NAME, OLD)
    await hit_and_settle(store, NAME)
    replace_file(store, NEW, await after_start(store))
    await hit_and_settle(store, NAME)
    assert await on_disk_and_in_database(store, NAME) == NEW


async def _append(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(b"x" * 1000)


async def _append_on_a_server_whose_clock_is_ahead(path: Path) -> None:
    await _append(path)
    ahead = time.time_ns() + A_DAY_NS
    os.utime(path, ns=(ahead, ahead))


@pytest.mark.parametrize("write", [_append, _append_on_a_server_whose_clock_is_ahead], ids=["here", "clock ahead"])
@pytest.mark.parametrize("is_new", [False, True], ids=["overwrite", "new"])
async def test_a_file_is_not_adopted_while_it_is_being_written(
    directory: Path, sqlite_url: str, write: Callable[[Path], Coroutine[Any, Any, None]], is_new: bool
) -> None:
    """A file may be requested many times during its write; only the whole file becomes a generation."""
    async with UploadStore(directory, sqlite_url, settled_after=0.5) as sqlite_store:
        await sqlite_store.database.create_tables()
        await _write_while_it_is_requested(sqlite_store, write, is_new=is_new)


async def _write_while_it_is_requested(
    sqlite_store: UploadStore, write: Callable[[Path], Coroutine[Any, Any, None]], *, is_new: bool
) -> None:
    if not is_new:
        await sqlite_store.save(NAME, OLD)
    before = await generation_of(sqlite_store)
    await asyncio.sleep(0.02)
    path = replace_file(sqlite_store, b"", time.time_ns())
    for _ in range(24):
        await write(path)
        hit(sqlite_store, NAME)
        await asyncio.sleep(0.1)
    assert await generation_of(sqlite_store) == before

    async def is_adopted() -> bool:
        hit(sqlite_store, NAME)
        return await in_database(sqlite_store, NAME) == b"x" * 24_000

    await eventually(is_adopted)
    await sqlite_store.tasks.drain(30)
    assert await generation_of(sqlite_store) == before + 1


async def test_a_missing_file_cannot_be_adopted(sqlite_store: UploadStore) -> None:
    """Without a file there is nothing that could become the next generation, and the record stays."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.unlink()
    with pytest.raises(NotStored):
        await sqlite_store.reconciler.adopt(NAME, overwrite=True)
    assert await in_database(sqlite_store, NAME) == OLD
    assert await generation_of(sqlite_store) == 1


# -- a file that only the disk has ------------------------------------------------------------------------------------


@pytest.mark.parametrize("adopt", [True, False])
async def test_a_file_that_only_the_disk_has(store: UploadStore, adopt: bool) -> None:
    """Its first hit adopts it in the background, with its mtime, unless `adopt` is off; the file stays as it is."""
    before = replace_file(store, NEW, time.time_ns() - A_DAY_NS).stat()
    file = store.disk.open(NAME)
    assert file is not None
    file.close()
    store.background.hit(NAME, file.identity, adopt=adopt)
    await store.tasks.drain(30)
    assert await in_database(store, NAME) == (NEW if adopt else None)
    after = store.disk.path_of(NAME).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


async def test_two_nodes_adopt_one_name(store: UploadStore, other_store: UploadStore) -> None:
    """Two disks have other bytes under one new name: one is the record, the other is kept in the history."""
    replace_file(store, OLD, time.time_ns() - A_DAY_NS)
    replace_file(other_store, NEW, time.time_ns() - A_DAY_NS)
    await asyncio.gather(hit_and_settle(store, NAME), hit_and_settle(other_store, NAME))
    for node in (store, other_store, store):
        await node.reconciler.check(NAME)
    final = await on_disk_and_in_database(store, NAME)
    assert final in (OLD, NEW)
    assert await on_disk_and_in_database(other_store, NAME) == final
    assert await history_of(store) == [OLD if final == NEW else NEW]


# -- a file that changes while it is read -----------------------------------------------------------------------------


@pytest.fixture(params=[30.0, 0.0], ids=["read twice", "read once"])
def settled_after(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """How many seconds a file must hold still: with 30 the new file is read twice, with 0 once."""
    monkeypatch.setattr("selfheal.store.SETTLED_AFTER", request.param)
    return float(request.param)


async def test_a_file_that_moves_while_it_is_read_is_unsettled(settled_after: float, sqlite_store: UploadStore) -> None:
    """Adopting a file that is replaced at this moment raises `FileChanged`, and nothing is stored."""
    data = noise(64 * CHUNK)
    path = replace_file(sqlite_store, data, time.time_ns() - A_DAY_NS)
    adopting = asyncio.create_task(sqlite_store.adopt(NAME))
    for number in range(200):
        if adopting.done():
            break
        replace_file(sqlite_store, data + bytes(number + 1), time.time_ns() - A_DAY_NS)
        await asyncio.sleep(0)
    with pytest.raises(FileChanged):
        await adopting
    assert await sqlite_store.database.find(NAME) is None
    assert path.exists()


@pytest.mark.parametrize("size", [40 * CHUNK, 3 * CHUNK + 1], ids=["large", "small"])
@pytest.mark.parametrize("is_old_again", [False, True], ids=["", "its time set back"])
async def test_a_file_that_is_overwritten_in_place_while_it_is_read(
    settled_after: float, sqlite_store: UploadStore, broken_disk: BrokenDisk, size: int, is_old_again: bool
) -> None:
    """Adopting a file that is half old, half new raises `FileChanged`, and nothing is stored; the next try succeeds."""
    modified = time.time_ns() - A_DAY_NS
    path = replace_file(sqlite_store, noise(size), modified)
    held = broken_disk.hold("pread", after=2)
    adopting = asyncio.create_task(sqlite_store.adopt(NAME))
    await held.met()
    with path.open("r+b") as file:
        file.write(b"new at its beginning")
    if is_old_again:
        os.utime(path, ns=(modified, modified))
    held.release()
    with pytest.raises(FileChanged):
        await adopting
    assert await sqlite_store.database.find(NAME) is None
    record = await sqlite_store.adopt(NAME)
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert await in_database(sqlite_store, NAME) == path.read_bytes()


# -- large files ------------------------------------------------------------------------------------------------------


async def test_large_bytes_are_adopted_while_they_are_saved(settled_after: float, store: UploadStore) -> None:
    """The same bytes arrive under two names at once, from the disk and from a client: both are stored."""
    data = noise(60 * CHUNK)
    for number in range(3):
        replace_file(store, data, time.time_ns() - A_DAY_NS, f"{number}.png")
        await asyncio.gather(store.adopt(f"{number}.png"), store.save(f"other-{number}.png", data))
        assert await in_database(store, f"{number}.png") == await in_database(store, f"other-{number}.png") == data


async def test_many_large_files_are_adopted_at_once(settled_after: float, sqlite_store: UploadStore) -> None:
    """If many files wait for the database's one writer, few of them are in memory; all are stored in the end."""
    old = time.time_ns() - A_DAY_NS
    files = {f"{number}.png": noise(30 * CHUNK + number) for number in range(8)}
    for name, data in files.items():
        replace_file(sqlite_store, data, old, name)
    tracemalloc.start()
    async with locked_database(sqlite_store):
        adopting = [asyncio.create_task(sqlite_store.adopt(name)) for name in files]
        await asyncio.sleep(1)
        held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    await asyncio.gather(*adopting)
    assert held < 3 * 31 * CHUNK
    for name, data in files.items():
        assert await in_database(sqlite_store, name) == data
