"""`UploadStore.save`: every kind of source, overwrites, equal bytes, and parallel saves."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.datastructures import UploadFile

from selfheal import InvalidName, NameTaken, UploadStore
from selfheal.content.sources import CHUNK
from selfheal.errors import NotAFile
from tests.support.faults import BrokenDisk
from tests.support.open_files import assert_nothing_open_below
from tests.support.sample_data import noise, pieces_of
from tests.support.store_requests import hit_and_settle
from tests.support.store_state import (
    files_below,
    in_database,
    in_quarantine,
    on_disk,
    on_disk_and_in_database,
    set_aside,
)
from tests.support.uploads import NAME, NEW, OLD, SIZES, row_counts

# -- sources ----------------------------------------------------------------------------------------------------------


def _file_of(data: bytes, path: Path) -> Path:
    path.write_bytes(data)
    return path


def _spooled(data: bytes) -> UploadFile:
    file = tempfile.SpooledTemporaryFile(max_size=1024)
    file.write(data)
    return UploadFile(file, filename="tom.jpg")  # type: ignore[arg-type]  # its position is at the end, as after measuring it


SOURCES: dict[str, Callable[[bytes, Path], Any]] = {
    "bytes": lambda data, _: data,
    "bytearray": lambda data, _: bytearray(data),
    "memoryview": lambda data, _: memoryview(data),
    "path": _file_of,
    "str-path": lambda data, path: str(_file_of(data, path)),
    "file-object": lambda data, path: _file_of(data, path).open("rb"),
    "async-iterator": lambda data, _: pieces_of(data),
    "upload-file": lambda data, _: _spooled(data),
}


@pytest.mark.parametrize("kind", SOURCES)
async def test_every_kind_of_source(store: UploadStore, tmp_path: Path, kind: str) -> None:
    """Bytes, a path, a file object, an async iterator and an UploadFile of any size are stored whole, twice."""
    for size in SIZES:
        data = noise(size)
        source = SOURCES[kind](data, tmp_path / "source")
        saved = await store.save(f"{size}.jpg", source)
        if kind == "file-object":
            source.close()
        elif kind == "upload-file":
            await source.close()
        assert await on_disk_and_in_database(store, f"{size}.jpg") == data
        assert (saved.size, saved.sha256, saved.generation) == (size, sha256(data).hexdigest(), 1)


async def test_a_source_that_has_no_bytes(sqlite_store: UploadStore) -> None:
    """A number and a text file are a TypeError, and nothing is stored on disk or in the database."""
    for source in (42, io.StringIO("text")):
        with pytest.raises(TypeError):
            await sqlite_store.save(NAME, source)  # type: ignore[arg-type]
    assert await sqlite_store.database.find(NAME) is None
    assert not sqlite_store.disk.path.exists() or files_below(sqlite_store.disk.path) == []


async def test_saved_says_where_the_file_is(sqlite_store: UploadStore) -> None:
    """`save` returns the record and the absolute path of a file of mode 0644 with the record's mtime."""
    before = os.umask(0o077)
    try:
        saved = await sqlite_store.save(NAME, OLD)
    finally:
        os.umask(before)
    measured = saved.path.stat()
    assert saved.path.is_absolute()
    assert saved.path == sqlite_store.disk.path / NAME
    assert saved.content_type == "image/jpeg"
    assert measured.st_mode & 0o7777 == 0o644
    assert saved.path.parent.stat().st_mode & 0o7777 == 0o755
    assert measured.st_mtime_ns == saved.modified_ns
    found = await sqlite_store.database.find(NAME)
    assert found is not None
    assert (found.sha256, found.size, found.modified_ns) == (saved.sha256, saved.size, saved.modified_ns)


@pytest.mark.parametrize("within", [False, True], ids=["own-transaction", "callers-transaction"])
async def test_memory_does_not_grow_with_the_upload(store: UploadStore, engine: AsyncEngine, within: bool) -> None:
    """An upload of 96 MiB from a stream is saved in less than 32 MiB of memory."""
    size, piece = 96 * 2**20, noise(2**20)

    async def source() -> AsyncIterator[bytes]:
        for number in range(size // len(piece)):
            yield number.to_bytes(4, "big") + piece[4:]

    tracemalloc.start()
    try:
        if within:
            async with engine.begin() as connection:
                saved = await store.save(NAME, source(), connection=connection)
        else:
            saved = await store.save(NAME, source())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert saved.size == size
    assert peak < 32 * 2**20


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a//b.jpg", ".hidden", "a\\b.jpg", "", "nul.png", "a/../b"])
async def test_a_name_outside_the_grammar(sqlite_store: UploadStore, name: str) -> None:
    """Every method refuses such a name before it touches disk or database (CVE-2021-45452)."""
    for verb in (sqlite_store.delete, sqlite_store.restore, sqlite_store.adopt, sqlite_store.undo):
        with pytest.raises(InvalidName):
            await verb(name)
    with pytest.raises(InvalidName):
        await sqlite_store.save(name, OLD)
    assert await sqlite_store.database.count() == 0
    assert files_below(sqlite_store.disk.path) == []


async def test_a_cancelled_save_closes_the_file_it_reads(sqlite_store: UploadStore, tmp_path: Path) -> None:
    """A cancelled save from a path leaves neither the source nor its own file open."""
    source = tmp_path / "source.jpg"
    source.write_bytes(noise(19 * CHUNK))
    for number in range(20):
        saving = asyncio.create_task(sqlite_store.save(NAME, source))
        await anyio.sleep(number / 1000)
        saving.cancel()
        await asyncio.gather(saving, return_exceptions=True)
    await sqlite_store.tasks.drain(30)
    del saving
    await assert_nothing_open_below(source)
    await assert_nothing_open_below(sqlite_store.disk.path)


# -- a name that exists -----------------------------------------------------------------------------------------------


async def test_an_overwrite(store: UploadStore) -> None:
    """The next generation is on disk and in the database; the one before is in the history, with its bytes."""
    first = await store.save(NAME, OLD)
    second = await store.save(NAME, NEW)
    assert await on_disk_and_in_database(store, NAME) == NEW
    assert (first.generation, second.generation) == (1, 2)
    assert store.disk.path_of(NAME).stat().st_mtime_ns == second.modified_ns
    (version,) = await store.database.history(NAME)
    assert (version.generation, version.sha256, version.modified_ns) == (1, first.sha256, first.modified_ns)
    assert b"".join([chunk async for chunk in store.database.read(version)]) == OLD
    assert in_quarantine(store) == []


async def test_the_same_bytes_again_change_nothing(store: UploadStore) -> None:
    """A repeated upload keeps generation, history and mtime, so that no browser's cache is emptied."""
    first = await store.save(NAME, OLD)
    again = await store.save(NAME, OLD)
    assert (again.generation, again.modified_ns) == (1, first.modified_ns)
    assert store.disk.path_of(NAME).stat().st_mtime_ns == first.modified_ns
    assert await store.database.history(NAME) == []
    assert files_below(store.disk.path) == [NAME]


async def test_the_same_bytes_again_restore_a_missing_file(sqlite_store: UploadStore) -> None:
    """A repeated upload restores a missing file."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.unlink()
    await sqlite_store.save(NAME, OLD)
    assert await on_disk_and_in_database(sqlite_store, NAME) == OLD
    assert saved.path.stat().st_mtime_ns == saved.modified_ns


async def test_the_same_bytes_again_mend_a_damaged_database_copy(store: UploadStore, engine: AsyncEngine) -> None:
    """A repeated upload writes the chunks again: damaged ones in the database are whole afterwards."""
    await store.save(NAME, noise(2 * CHUNK))
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE image_chunk SET data = :data WHERE position = 1"), {"data": b"x" * CHUNK})
    await store.save(NAME, noise(2 * CHUNK))
    assert await on_disk_and_in_database(store, NAME) == noise(2 * CHUNK)


async def test_equal_bytes_are_stored_once(store: UploadStore, engine: AsyncEngine) -> None:
    """Two names with the same bytes share one blob, and the deletion of one leaves the other whole."""
    await store.save("a.jpg", OLD)
    await store.save("b.jpg", OLD)
    assert await row_counts(engine) == {"image_storage": 2, "image_blob": 1, "image_chunk": 1, "image_history": 0}
    await store.delete("a.jpg")
    assert await on_disk_and_in_database(store, "b.jpg") == OLD


async def test_a_file_that_only_the_disk_has_is_not_lost_by_a_save(sqlite_store: UploadStore) -> None:
    """Bytes that neither record nor history has become a version when their name is saved."""
    path = sqlite_store.disk.path_of(NAME)
    path.parent.mkdir(parents=True)
    path.write_bytes(OLD)
    await sqlite_store.save(NAME, NEW)
    assert await on_disk_and_in_database(sqlite_store, NAME) == NEW
    assert await set_aside(sqlite_store, NAME) == [OLD]


# -- parallel saves ---------------------------------------------------------------------------------------------------


async def test_parallel_saves_of_one_name(store: UploadStore, other_store: UploadStore) -> None:
    """The last save wins on disk and in the database; all saves succeed, and the others are in the history."""
    bodies = [noise(1000 + number) for number in range(20)]
    await asyncio.gather(
        *((store if number % 2 else other_store).save(NAME, data) for number, data in enumerate(bodies))
    )
    final = await in_database(store, NAME)
    assert final in bodies
    record = await store.database.find(NAME)
    assert record is not None
    assert record.generation == len(bodies)
    known = {version.sha256 for version in await store.database.history(NAME)} | {record.sha256}
    assert known == {sha256(data).hexdigest() for data in bodies}
    for node in (store, other_store):
        await node.ensure(NAME)  # a save that was overtaken takes its file back
        await hit_and_settle(node, NAME)
        assert on_disk(node, NAME) == final


async def test_a_save_that_is_overtaken_between_commit_and_file(store: UploadStore, broken_disk: BrokenDisk) -> None:
    """A process that commits first but names its file last checks again: the newer bytes are on disk in the end."""
    await store.save(NAME, b"before both")
    async with UploadStore(store.disk.path, store.database.url) as faster:
        held = broken_disk.hold("fsync")
        saving = asyncio.create_task(store.save(NAME, OLD))
        await held.met()
        broken_disk.mend()
        await faster.save(NAME, NEW)
        held.release()
        await saving
    assert await on_disk_and_in_database(store, NAME) == NEW


@pytest.mark.parametrize(("first", "second"), [("album", "album/1.png"), ("album/1.png", "album"), ("a/b/c.png", "a")])
async def test_a_name_below_a_file_is_refused(store: UploadStore, first: str, second: str) -> None:
    """A name cannot be a file and a directory: the second save is refused before it changes anything on either side."""
    await store.save(first, OLD)
    with pytest.raises(NotAFile, match=second):
        await store.save(second, NEW)
    assert await store.database.find(second) is None
    assert await on_disk_and_in_database(store, first) == OLD
    await store.delete(first)
    await store.save(second, NEW)
    assert await on_disk_and_in_database(store, second) == NEW


@pytest.mark.parametrize("how", ["save", "create", "undo"])
@pytest.mark.parametrize(("deleted", "living"), [("album", "album/1.png"), ("album/1.png", "album")])
@pytest.mark.parametrize("is_on_disk", [True, False])
async def test_a_deleted_name_beside_a_later_one(
    store: UploadStore, deleted: str, living: str, how: str, *, is_on_disk: bool
) -> None:
    """A deleted name does not come back beside a name that is its directory now, or its file: nothing changes."""
    await store.save(deleted, OLD)
    await store.delete(deleted)
    await store.save(living, NEW)
    if not is_on_disk:
        (store.disk.path / living).unlink()
    before = await store.database.find(deleted)
    with pytest.raises(NotAFile, match="cannot be saved"):
        await (store.undo(deleted) if how == "undo" else getattr(store, how)(deleted, OLD))
    assert await store.database.find(deleted) == before
    assert (await store.restore(living)).path.read_bytes() == NEW
    assert files_below(store.disk.path) == [living]


# -- names that must be free ------------------------------------------------------------------------------------------


async def test_create(store: UploadStore) -> None:
    """`create` saves under a name that is not stored, and refuses one that is, also for the same bytes."""
    created = await store.create(NAME, OLD)
    assert await on_disk_and_in_database(store, NAME) == OLD
    for data in (OLD, NEW):
        with pytest.raises(NameTaken, match="another name"):
            await store.create(NAME, data)
    assert (await store.database.find(NAME) or created).generation == created.generation
    assert await on_disk_and_in_database(store, NAME) == OLD
    assert await store.database.history(NAME) == []


async def test_create_over_a_tombstone(store: UploadStore) -> None:
    """A deleted name is free."""
    await store.save(NAME, OLD)
    await store.delete(NAME)
    assert (await store.create(NAME, NEW)).generation == 3
    assert await on_disk_and_in_database(store, NAME) == NEW


@pytest.mark.parametrize("before", ["new", "deleted"])
async def test_create_at_once(store: UploadStore, other_store: UploadStore, before: str) -> None:
    """Of many who create one name at once, with the same bytes, on two nodes, exactly one gets it."""
    if before == "deleted":
        await store.save(NAME, OLD)
        await store.delete(NAME)
    calls = (one.create(NAME, OLD) for one in (store, other_store) for _ in range(5))
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(type(answer).__name__ for answer in answers) == ["NameTaken"] * 9 + ["Saved"]


async def test_create_without_a_disk(store: UploadStore, broken_disk: BrokenDisk) -> None:
    """On a full disk `create` saves in the database, and still refuses a name that is stored."""
    broken_disk.fail("pwrite", errno.ENOSPC)
    await store.create(NAME, OLD)
    with pytest.raises(NameTaken):
        await store.create(NAME, OLD)
    assert await in_database(store, NAME) == OLD
