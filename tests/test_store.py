"""What an app does with its uploads, on both sides: save, delete, undo, restore, adopt; over every database."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import random
import re
import tempfile
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import pytest
from PIL import Image
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from starlette.datastructures import UploadFile

from selfheal import (
    CorruptBlob,
    DatabaseUnavailable,
    DiskUnwritable,
    InvalidName,
    NotStored,
    UploadIncomplete,
    UploadPolicy,
    UploadRefused,
    UploadStore,
    UploadTooLarge,
    UploadTypeRefused,
)
from selfheal.content.digests import Digests, chunk_digest
from selfheal.content.sources import CHUNK
from selfheal.disk.directory import MARKER
from selfheal.disk.staged_file import TEMPORARY
from selfheal.events import Event
from selfheal.sql.models import SmallFile
from tests.support.sides import (
    BrokenDisk,
    brought_back,
    files_below,
    held_open,
    hit,
    in_database,
    in_quarantine,
    locked,
    looked_behind,
    noise,
    nothing_is_held_open,
    on_both_sides,
    on_disk,
    pieces_of,
)
from tests.support.sockets import free_port
from tests.support.waiting import eventually

NAME = "cats/tom.jpg"
OLD, NEW = b"the old bytes", b"the new bytes, which are others"
SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 17 * CHUNK + 3)
UUID4_NAME = re.compile(r"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}\.png")


def png() -> bytes:
    """A small picture, whole."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(file, "PNG")
    return file.getvalue()


async def rows(engine: AsyncEngine) -> dict[str, int]:
    """How many rows each table of the bytes and records has."""
    async with engine.connect() as connection:
        return {
            table: (await connection.execute(text(f"SELECT count(*) FROM {table}"))).scalar_one()
            for table in ("image_storage", "image_blob", "image_chunk", "image_history")
        }


@pytest.fixture
async def engine(store: UploadStore) -> AsyncIterator[AsyncEngine]:
    """The app's own engine, on the same database as the store."""
    engine = create_async_engine(store.database.url)
    yield engine
    await engine.dispose()


@pytest.fixture
async def engine_of_sqlite(sqlite_url: str) -> AsyncIterator[AsyncEngine]:
    """The app's own engine, on the database of `sqlite_store`."""
    engine = create_async_engine(sqlite_url)
    yield engine
    await engine.dispose()


@pytest.fixture
async def other_store(store: UploadStore, tmp_path: Path) -> AsyncIterator[UploadStore]:
    """Another node: a disk of its own, the same database."""
    async with UploadStore(tmp_path / "elsewhere" / "uploads", store.database.url) as other:
        yield other


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> BrokenDisk:
    """A disk that can be broken and mended."""
    return BrokenDisk(monkeypatch)


# -- save ----------------------------------------------------------------------------------------------------------


def _file_of(data: bytes, path: Path) -> Path:
    path.write_bytes(data)
    return path


def _spooled(data: bytes) -> UploadFile:
    file = tempfile.SpooledTemporaryFile(max_size=1024)
    file.write(data)
    return UploadFile(file, filename="tom.jpg")  # type: ignore[arg-type]  # at its end, as after a look at its size


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
async def test_every_kind_of_source_is_saved_on_both_sides(store: UploadStore, tmp_path: Path, kind: str) -> None:
    """Bytes, a path, a file object, an async iterator and an UploadFile of any size arrive whole on both sides."""
    for size in SIZES:
        data = noise(size)
        source = SOURCES[kind](data, tmp_path / "source")
        saved = await store.save(f"{size}.jpg", source)
        if kind == "file-object":
            source.close()
        elif kind == "upload-file":
            await source.close()
        assert await on_both_sides(store, f"{size}.jpg") == data
        assert (saved.size, saved.sha256, saved.generation) == (size, sha256(data).hexdigest(), 1)


async def test_what_cannot_be_read_as_bytes_is_refused(sqlite_store: UploadStore) -> None:
    """A number and a text file are no sources: a TypeError says so, and neither side holds anything."""
    for source in (42, io.StringIO("text")):
        with pytest.raises(TypeError):
            await sqlite_store.save(NAME, source)  # type: ignore[arg-type]
    assert await sqlite_store.database.find(NAME) is None
    assert not sqlite_store.disk.path.exists() or files_below(sqlite_store.disk.path) == []


async def test_saved_says_where_the_file_is(sqlite_store: UploadStore) -> None:
    """What `save` returns is the record with the absolute path of a file of mode 0644 and the record's mtime."""
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
    """An upload of 96 MiB from a stream is saved in far less memory."""
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
async def test_a_name_outside_the_grammar_reaches_neither_side(sqlite_store: UploadStore, name: str) -> None:
    """Every verb refuses such a name before it touches disk or database (CVE-2021-45452)."""
    for verb in (sqlite_store.delete, sqlite_store.restore, sqlite_store.adopt, sqlite_store.undo, sqlite_store.check):
        with pytest.raises(InvalidName):
            await verb(name)
    with pytest.raises(InvalidName):
        await sqlite_store.save(name, OLD)
    assert await sqlite_store.database.count() == 0
    assert not sqlite_store.disk.path.exists()


async def test_a_cancelled_save_closes_the_file_it_reads(sqlite_store: UploadStore, tmp_path: Path) -> None:
    """A save from a path that is cancelled holds neither the source nor its own file open."""
    source = tmp_path / "source.jpg"
    source.write_bytes(noise(19 * CHUNK))
    for number in range(20):
        saving = asyncio.create_task(sqlite_store.save(NAME, source))
        await anyio.sleep(number / 1000)
        saving.cancel()
        await asyncio.gather(saving, return_exceptions=True)
    await sqlite_store.tasks.settle(30)
    del saving
    await nothing_is_held_open(source)
    await nothing_is_held_open(sqlite_store.disk.path)


async def test_an_overwrite_changes_both_sides_and_the_history_keeps_the_old(store: UploadStore) -> None:
    """The next generation of a name is on both sides; the one before it is in the history, with its bytes."""
    first = await store.save(NAME, OLD)
    second = await store.save(NAME, NEW)
    assert await on_both_sides(store, NAME) == NEW
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


async def test_the_same_bytes_again_bring_back_a_missing_file(sqlite_store: UploadStore) -> None:
    """A repeated upload mends a lost disk copy."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.unlink()
    await sqlite_store.save(NAME, OLD)
    assert await on_both_sides(sqlite_store, NAME) == OLD
    assert saved.path.stat().st_mtime_ns == saved.modified_ns


async def test_the_same_bytes_again_mend_a_damaged_database_copy(store: UploadStore, engine: AsyncEngine) -> None:
    """A repeated upload writes the chunks anew: what was damaged in the database is whole again."""
    await store.save(NAME, noise(2 * CHUNK))
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE image_chunk SET data = :data WHERE position = 1"), {"data": b"x" * CHUNK})
    await store.save(NAME, noise(2 * CHUNK))
    assert await on_both_sides(store, NAME) == noise(2 * CHUNK)


async def test_equal_bytes_are_stored_once(store: UploadStore, engine: AsyncEngine) -> None:
    """Two names with the same bytes share one blob, and deleting one leaves the other whole."""
    await store.save("a.jpg", OLD)
    await store.save("b.jpg", OLD)
    assert await rows(engine) == {"image_storage": 2, "image_blob": 1, "image_chunk": 1, "image_history": 0}
    await store.delete("a.jpg")
    assert await on_both_sides(store, "b.jpg") == OLD


async def test_a_file_that_only_the_disk_knew_is_not_lost_by_a_save(sqlite_store: UploadStore) -> None:
    """Bytes that no record and no history holds go to quarantine when their name is saved anew."""
    path = sqlite_store.disk.path_of(NAME)
    path.parent.mkdir(parents=True)
    path.write_bytes(OLD)
    await sqlite_store.save(NAME, NEW)
    assert await on_both_sides(sqlite_store, NAME) == NEW
    assert in_quarantine(sqlite_store) == [OLD]


async def test_parallel_saves_of_one_name_end_alike_on_both_sides(store: UploadStore, other_store: UploadStore) -> None:
    """Whoever comes last wins on both sides; every save succeeds, and all that lost are in the history."""
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
        await looked_behind(node, NAME)
        assert on_disk(node, NAME) == final


async def test_a_save_that_is_overtaken_between_its_sides(store: UploadStore, disk: BrokenDisk) -> None:
    """A process that commits first and names its file last looks again: the newer bytes stand on disk in the end."""
    await store.save(NAME, b"before both")
    async with UploadStore(store.disk.path, store.database.url) as faster:
        held = disk.hold("fsync")
        saving = asyncio.create_task(store.save(NAME, OLD))
        await held.met()
        disk.mend()
        await faster.save(NAME, NEW)
        held.release()
        await saving
    assert await on_both_sides(store, NAME) == NEW


# -- save within the caller's transaction ---------------------------------------------------------------------------


async def _commit(connection: AsyncConnection | AsyncSession) -> None:
    await connection.commit()


async def _roll_back(connection: AsyncConnection | AsyncSession) -> None:
    await connection.rollback()


@pytest.mark.parametrize("maker", [AsyncSession, None], ids=["session", "connection"])
@pytest.mark.parametrize("size", [10, CHUNK, 17 * CHUNK + 3])
async def test_save_within_a_transaction_that_commits(
    store: UploadStore, engine: AsyncEngine, maker: type[AsyncSession] | None, size: int
) -> None:
    """Nobody sees it before the caller commits; the file appears on disk at its first request."""
    async with maker(engine) if maker else engine.connect() as connection:
        saved = await store.save(NAME, noise(size), connection=connection)
        assert on_disk(store, NAME) is None
        await connection.commit()
    assert on_disk(store, NAME) is None
    assert await brought_back(store, NAME) == noise(size)
    assert await on_both_sides(store, NAME) == noise(size)
    assert saved.path.stat().st_mtime_ns == saved.modified_ns


@pytest.mark.parametrize("maker", [AsyncSession, None], ids=["session", "connection"])
@pytest.mark.parametrize("size", [10, 17 * CHUNK + 3])
async def test_save_within_a_transaction_that_rolls_back(
    store: UploadStore, engine: AsyncEngine, maker: type[AsyncSession] | None, size: int
) -> None:
    """A transaction that is rolled back leaves no row in any table and no file."""
    async with maker(engine) if maker else engine.connect() as connection:
        await store.save(NAME, noise(size), connection=connection)
        await connection.rollback()
    assert await rows(engine) == {"image_storage": 0, "image_blob": 0, "image_chunk": 0, "image_history": 0}
    assert await brought_back(store, NAME) is None
    assert on_disk(store, NAME) is None


async def test_an_overwrite_that_rolls_back_leaves_the_old(store: UploadStore, engine: AsyncEngine) -> None:
    """Both sides still hold the generation before it, and nothing is in the history."""
    await store.save(NAME, OLD)
    async with engine.connect() as connection:
        await store.save(NAME, NEW, connection=connection)
        await connection.rollback()
    await looked_behind(store, NAME)
    assert await on_both_sides(store, NAME) == OLD
    assert await store.database.history(NAME) == []


@pytest.mark.parametrize("was_hit_before", [False, True])
async def test_an_overwrite_within_a_transaction_reaches_the_disk(
    store: UploadStore, engine: AsyncEngine, was_hit_before: bool
) -> None:
    """The disk's older generation gives way behind the first hit, also if this process has served it before."""
    await store.save(NAME, OLD)
    if was_hit_before:
        await looked_behind(store, NAME)
    async with engine.begin() as connection:
        await store.save(NAME, NEW, connection=connection)
    await looked_behind(store, NAME)
    assert await on_both_sides(store, NAME) == NEW
    assert in_quarantine(store) == []


# -- save when something fails --------------------------------------------------------------------------------------


async def test_no_tables_no_file(directory: Path, database_url: str) -> None:
    """A database without the tables gives the caller an error that says what to run, and no file appears."""
    async with UploadStore(directory, database_url) as store:
        with pytest.raises(DatabaseUnavailable, match="selfheal migrate"):
            await store.save(NAME, OLD)
        assert files_below(directory) == []


async def test_no_server_no_file(directory: Path) -> None:
    """A database that refuses connections gives the caller the error, and no file appears."""
    async with UploadStore(directory, f"postgresql://nobody@127.0.0.1:{free_port()}/none", deadline=2) as store:
        for size in (10, 17 * CHUNK):
            with pytest.raises(DatabaseUnavailable):
                await store.save(NAME, pieces_of(noise(size)))
        assert files_below(directory) == []
    await nothing_is_held_open(directory)


async def test_a_failing_overwrite_leaves_the_old_file(store: UploadStore, engine: AsyncEngine) -> None:
    """When the database fails, the disk still holds what it held."""
    await store.save(NAME, OLD)
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE image_chunk RENAME TO image_chunk_away"))
    with pytest.raises(DatabaseUnavailable):
        await store.save(NAME, NEW)
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE image_chunk_away RENAME TO image_chunk"))
    assert await on_both_sides(store, NAME) == OLD
    assert files_below(store.disk.path) == [NAME]


@pytest.mark.parametrize("size", [10, 17 * CHUNK])
async def test_a_source_that_fails_leaves_nothing(sqlite_store: UploadStore, size: int) -> None:
    """What the source raises reaches the caller; there is no file and no record, and an older one stays."""

    async def source() -> AsyncIterator[bytes]:
        yield noise(size)
        raise ConnectionResetError("the client has gone")

    with pytest.raises(ConnectionResetError):
        await sqlite_store.save(NAME, source())
    assert await on_both_sides(sqlite_store, NAME) is None
    await sqlite_store.save(NAME, OLD)
    with pytest.raises(ConnectionResetError):
        await sqlite_store.save(NAME, source())
    assert await on_both_sides(sqlite_store, NAME) == OLD
    assert files_below(sqlite_store.disk.path) == [NAME]
    await nothing_is_held_open(sqlite_store.disk.path)


FULL_AFTER = {"at-once": 0, "in-the-first-chunk": 1000, "in-the-middle": 3 * CHUNK + 1234, "in-the-last": 19 * CHUNK}


@pytest.mark.parametrize("room", FULL_AFTER.values(), ids=FULL_AFTER)
async def test_disk_full_in_the_middle_of_an_upload(store: UploadStore, disk: BrokenDisk, room: int) -> None:
    """An upload from a one-shot iterator is saved all the same, leaves no litter, and is healed later."""
    data = noise(19 * CHUNK + 77)
    disk.fill_after(room)
    saved = await store.save(NAME, pieces_of(data))
    assert saved.sha256 == sha256(data).hexdigest()
    assert files_below(store.disk.path) == []
    assert await in_database(store, NAME) == data
    disk.mend()
    assert await brought_back(store, NAME) == data
    assert await on_both_sides(store, NAME) == data
    await nothing_is_held_open(store.disk.path)


FAILING = {
    "no file can be made": ("open", errno.EROFS),
    "no directory can be made": ("mkdir", errno.ENOSPC),
    "nothing can be written": ("pwrite", errno.EDQUOT),
    "the file is too large": ("pwrite", errno.EFBIG),
    "it does not reach the disk": ("fsync", errno.EIO),
    "it cannot be named": ("link", errno.ENOSPC),
}


@pytest.mark.parametrize(("call", "number"), FAILING.values(), ids=FAILING)
async def test_a_disk_that_fails_does_not_fail_the_save(
    sqlite_store: UploadStore, disk: BrokenDisk, call: str, number: int
) -> None:
    """Whatever the disk refuses, the upload is saved in the database, no litter stays, and it is healed later."""
    sqlite_store.disk.path.mkdir(parents=True)
    disk.fail(call, number)
    for size in (10, 17 * CHUNK):
        await sqlite_store.save(f"cats/{size}.jpg", pieces_of(noise(size)))
    assert files_below(sqlite_store.disk.path) == []
    disk.mend()
    for size in (10, 17 * CHUNK):
        assert await brought_back(sqlite_store, f"cats/{size}.jpg") == noise(size)
        assert await on_both_sides(sqlite_store, f"cats/{size}.jpg") == noise(size)


@pytest.mark.parametrize("was_hit_before", [False, True])
async def test_an_overwrite_on_a_full_disk_is_healed_later(
    store: UploadStore, disk: BrokenDisk, was_hit_before: bool
) -> None:
    """The old file that the full disk still holds gives way to the new one as soon as there is room."""
    await store.save(NAME, OLD)
    if was_hit_before:
        await looked_behind(store, NAME)
    disk.fill_after(0)
    await store.save(NAME, NEW)
    disk.mend()
    assert await in_database(store, NAME) == NEW
    if on_disk(store, NAME) is None:
        assert await brought_back(store, NAME) == NEW
    else:
        await looked_behind(store, NAME)
    assert await on_both_sides(store, NAME) == NEW


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("is_known", [True, False], ids=["saved once", "unknown"])
async def test_a_full_disk_serves_no_older_file_for_a_newer_record(
    store: UploadStore, disk: BrokenDisk, is_known: bool, call: str
) -> None:
    """An old copy goes, because it would be served; bytes that only the disk has are kept in quarantine."""
    path = store.disk.path_of(NAME)
    if is_known:
        await store.save(NAME, OLD)
    else:
        path.parent.mkdir(parents=True)
        path.write_bytes(OLD)
    disk.fail(call, errno.ENOSPC)
    await store.save(NAME, NEW)
    assert on_disk(store, NAME) is None
    assert in_quarantine(store) == ([] if is_known else [OLD])
    assert await brought_back(store, NAME) == NEW
    disk.fail("unlink", errno.EROFS)
    await store.save(NAME, OLD)  # though nothing can be taken away
    assert await in_database(store, NAME) == OLD


async def test_an_old_file_that_could_not_be_taken_away_gives_way_later(
    sqlite_store: UploadStore, disk: BrokenDisk
) -> None:
    """A disk that takes neither the new file nor the old one's end: the next hit compares them, seen before or not."""
    saved = await sqlite_store.save(NAME, OLD)
    await looked_behind(sqlite_store, NAME)
    disk.fail("pwrite", errno.ENOSPC)
    disk.fail("unlink", errno.EIO)
    await sqlite_store.save(NAME, NEW)
    assert saved.path.read_bytes() == OLD
    disk.mend()
    await looked_behind(sqlite_store, NAME)
    assert await on_both_sides(sqlite_store, NAME) == NEW
    await looked_behind(sqlite_store, NAME)
    disk.fail("unlink", errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        await sqlite_store.delete(NAME)
    disk.mend()
    await looked_behind(sqlite_store, NAME)
    assert on_disk(sqlite_store, NAME) is None


async def test_out_of_descriptors_is_not_a_full_disk(sqlite_store: UploadStore, disk: BrokenDisk) -> None:
    """Too many open files is the caller's error to see, not a reason to leave the disk out; nothing is left behind."""
    sqlite_store.disk.path.mkdir(parents=True)
    disk.fail("open", errno.EMFILE)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        await sqlite_store.save(NAME, OLD)
    disk.mend()
    assert await on_both_sides(sqlite_store, NAME) is None
    await sqlite_store.save(NAME, OLD)
    assert await on_both_sides(sqlite_store, NAME) == OLD


@pytest.mark.parametrize("size", [10, 19 * CHUNK])
async def test_cancelled_uploads_leave_nothing_and_damage_nothing(store: UploadStore, size: int) -> None:
    """Cancelled at any moment, a save has happened on both sides or on neither, and never half."""
    data = noise(size)
    await store.save("old.jpg", OLD)
    chance = random.Random(7)
    for number in range(12):
        tasks = [
            asyncio.create_task(store.save(name, pieces_of(data, 64 * 1024))) for name in (f"{number}.jpg", "old.jpg")
        ]
        await anyio.sleep(chance.uniform(0, 0.06))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.tasks.settle(30)
        assert await on_both_sides(store, f"{number}.jpg") in (None, data)
        assert await on_both_sides(store, "old.jpg") in (OLD, data)
        await store.save("old.jpg", OLD)
    whole = [name for name in files_below(store.disk.path) if name != "old.jpg"]
    assert await store.database.count() == len(whole) + 1
    await nothing_is_held_open(store.disk.path)


# -- save_uploaded_file ---------------------------------------------------------------------------------------------


def upload_of(data: bytes, filename: str | None) -> UploadFile:
    """What a framework hands to the app."""
    return UploadFile(io.BytesIO(data), filename=filename)


async def test_an_upload_is_saved_under_a_uuid_with_its_extension(store: UploadStore) -> None:
    """The name is a random UUID (version 4) and the extension, lower case; the path absolute; the directory made."""
    assert not store.disk.path.exists()
    saved = await store.save_uploaded_file(upload_of(png(), "Tom the CAT.PNG"))
    assert UUID4_NAME.fullmatch(saved.name)
    assert saved.path.is_absolute()
    assert saved.path == store.disk.path / saved.name
    assert saved.path.read_bytes() == png()
    assert saved.content_type == "image/png"
    again = await store.save_uploaded_file(upload_of(png(), "Tom the CAT.PNG"), folder="cats/2024")
    assert again.name.startswith("cats/2024/")
    assert UUID4_NAME.fullmatch(again.name.removeprefix("cats/2024/"))
    assert await on_both_sides(store, again.name) == png()


HOSTILE = [
    "../../../evil.png", "/etc/evil.png", "..", ".", "/", "", None, "evil.png/..", "evil.png/../../x", "a/b/evil.png",
    "..\\..\\evil.png", "C:\\evil.png", "evil.php\x00.png", "evil\x00.png", "evil.png\x00", "evil.p/ng", "evil.png ",
    "evil.png.", ".png", ".htaccess", "evil.", "evil", "nul.png", "evil.png::$DATA", "%2e%2e%2fevil.png", "evil.ｐｎｇ",
    "evil." + "g" * 300, "x" * 5000 + ".png", "\ud800.png", "evil.png\r\nX-Evil: 1", "~root/evil.png", "a;b|c`d`.png",
]  # fmt: skip


async def test_the_clients_file_name_is_never_a_path(sqlite_store: UploadStore, tmp_path: Path) -> None:
    """Whatever the client calls it, the file is a UUID directly below the uploads, or refused (CVE-2021-28658)."""
    saved = []
    for filename in HOSTILE:
        try:
            saved.append((await sqlite_store.save_uploaded_file(upload_of(png(), filename))).name)
        except UploadRefused:
            continue
    assert all(UUID4_NAME.fullmatch(name) for name in saved)
    assert files_below(sqlite_store.disk.path) == sorted(saved)
    outside = [path for path in files_below(tmp_path) if not path.startswith("app/static/uploads/")]
    assert all(path.startswith("catalogue.db") for path in outside)
    assert await sqlite_store.database.count() == len(saved)


@pytest.mark.parametrize("folder", ["..", "../x", "/etc", "a//b", ".git", "a\\b", "a/"])
async def test_a_folder_outside_the_grammar_is_refused(sqlite_store: UploadStore, tmp_path: Path, folder: str) -> None:
    """The folder is a part of the name, and obeys the same grammar."""
    with pytest.raises(InvalidName):
        await sqlite_store.save_uploaded_file(upload_of(png(), "tom.png"), folder=folder)
    assert [path for path in files_below(tmp_path) if not path.startswith("catalogue.db")] == []


REFUSED: dict[str, tuple[bytes, str, type[UploadRefused], int]] = {
    "too large": (png() + b"\0" * CHUNK, "tom.png", UploadTooLarge, 413),
    "extension not allowed": (png(), "tom.exe", UploadTypeRefused, 415),
    "other bytes than the extension says": (png(), "tom.gif", UploadTypeRefused, 415),
    "empty": (b"", "tom.png", UploadIncomplete, 422),
    "truncated": (png()[:-6], "tom.png", UploadIncomplete, 422),
}


@pytest.mark.parametrize(("data", "filename", "error", "status"), REFUSED.values(), ids=REFUSED)
async def test_a_refused_upload_leaves_nothing(
    directory: Path, sqlite_url: str, data: bytes, filename: str, error: type[UploadRefused], status: int
) -> None:
    """An upload that breaks the policy is a typed error with its HTTP status, and neither side holds any of it."""
    async with UploadStore(directory, sqlite_url, policy=UploadPolicy(max_bytes=CHUNK)) as store:
        await store.database.create_tables()
        with pytest.raises(error) as raised:
            await store.save_uploaded_file(upload_of(data, filename))
        assert raised.value.status == status
        assert await store.database.count() == 0
        assert files_below(directory) == []
    await nothing_is_held_open(directory)


# -- delete ---------------------------------------------------------------------------------------------------------


async def test_delete_leaves_a_tombstone_and_no_file(store: UploadStore) -> None:
    """A deleted name has a tombstone, no file, and its bytes in the history."""
    await store.save(NAME, OLD)
    assert await store.delete(NAME) is True
    assert on_disk(store, NAME) is None
    record = await store.database.find(NAME)
    assert record is not None
    assert record.is_deleted
    assert record.generation == 2
    (version,) = await store.database.history(NAME)
    assert b"".join([chunk async for chunk in store.database.read(version)]) == OLD


async def test_delete_of_an_unknown_name_is_false(store: UploadStore) -> None:
    """A name that neither side knows is not deleted, and gets no tombstone; nor is one deleted twice."""
    assert await store.delete(NAME) is False
    assert await store.database.find(NAME) is None
    await store.save(NAME, OLD)
    assert await store.delete(NAME) is True
    assert await store.delete(NAME) is False
    assert len(await store.database.history(NAME)) == 1


async def test_delete_of_what_is_missing_on_disk(sqlite_store: UploadStore) -> None:
    """A name that only the database holds is deleted all the same."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.unlink()
    assert await sqlite_store.delete(NAME) is True
    assert await brought_back(sqlite_store, NAME) is None


async def test_delete_of_what_is_only_on_disk_can_be_undone(store: UploadStore) -> None:
    """A file that is not backed up yet is adopted before it is deleted."""
    path = store.disk.path_of(NAME)
    path.parent.mkdir(parents=True)
    path.write_bytes(OLD)
    assert await store.delete(NAME) is True
    assert not path.exists()
    await store.undo(NAME)
    assert await on_both_sides(store, NAME) == OLD


async def test_delete_of_what_the_app_overwrote_keeps_its_bytes(store: UploadStore) -> None:
    """Bytes that an app wrote over a file, and that nobody has adopted yet, go to quarantine; nothing is lost."""
    saved = await store.save(NAME, OLD)
    saved.path.write_bytes(NEW)
    assert await store.delete(NAME) is True
    assert on_disk(store, NAME) is None
    assert in_quarantine(store) == [NEW]
    await store.undo(NAME)
    assert await on_both_sides(store, NAME) == OLD


async def test_delete_of_bytes_that_cannot_be_read_keeps_them(sqlite_store: UploadStore, disk: BrokenDisk) -> None:
    """A copy of which nobody can tell whether the history holds it is set aside, not unlinked."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.write_bytes(NEW)
    disk.fail("pread", errno.EIO)
    assert await sqlite_store.delete(NAME) is True
    assert on_disk(sqlite_store, NAME) is None
    assert in_quarantine(sqlite_store) == [NEW]


async def test_delete_of_a_file_that_looks_like_its_record_reads_none_of_it(
    sqlite_store: UploadStore, disk: BrokenDisk
) -> None:
    """What has the record's time and size is taken for it, however large it is."""
    await sqlite_store.save(NAME, OLD)
    disk.fail("pread", errno.EIO)
    assert await sqlite_store.delete(NAME) is True
    assert on_disk(sqlite_store, NAME) is None
    assert in_quarantine(sqlite_store) == []


async def test_delete_of_a_file_that_vanishes(sqlite_store: UploadStore, disk: BrokenDisk) -> None:
    """A file that somebody else removes while its name is deleted is no error, and is deleted."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.write_bytes(NEW)
    held = disk.hold("stat", after=1, done_first=True)
    deleting = asyncio.create_task(sqlite_store.delete(NAME))
    await held.met()
    saved.path.unlink()
    held.release()
    assert await deleting is True
    assert in_quarantine(sqlite_store) == []
    record = await sqlite_store.database.find(NAME)
    assert record is not None
    assert record.is_deleted


async def test_delete_without_a_database_leaves_the_file(directory: Path) -> None:
    """If the tombstone cannot be written the caller gets the error, and the file stays."""
    async with UploadStore(directory, f"postgresql://nobody@127.0.0.1:{free_port()}/none", deadline=2) as store:
        path = store.disk.path_of(NAME)
        path.parent.mkdir(parents=True)
        path.write_bytes(OLD)
        with pytest.raises(DatabaseUnavailable):
            await store.delete(NAME)
        assert path.read_bytes() == OLD


# -- deleted stays deleted ------------------------------------------------------------------------------------------


async def _restore(store: UploadStore) -> None:
    with pytest.raises(NotStored):
        await store.restore(NAME)


async def _adopt(store: UploadStore) -> None:
    store.disk.path_of(NAME).write_bytes(NEW)
    with pytest.raises(NotStored):
        await store.adopt(NAME)
    store.disk.path_of(NAME).unlink()


async def _ask(store: UploadStore) -> None:
    assert await brought_back(store, NAME) is None
    assert await store.is_on_disk_again(NAME) is False


async def _store_only_new(store: UploadStore) -> None:
    record = await store.database.store_image(NAME, NEW, only_new=True)
    assert record.is_deleted


async def _migrate(store: UploadStore) -> None:
    file = SmallFile(NAME, len(NEW), 1, [NEW], Digests.of([NEW]))
    assert await store.database.store_many([file]) == set()


async def _check(store: UploadStore) -> None:
    store.disk.path_of(NAME).write_bytes(OLD)
    await store.check(NAME)


RESURRECTIONS = [_restore, _adopt, _ask, _store_only_new, _migrate, _check]


@pytest.mark.parametrize("attempt", RESURRECTIONS, ids=lambda attempt: attempt.__name__.strip("_"))
async def test_deleted_stays_deleted(
    store: UploadStore, other_store: UploadStore, attempt: Callable[[UploadStore], Any]
) -> None:
    """No restore, adoption, migration or check, here or on another node, brings a deleted name back."""
    await store.save(NAME, OLD)
    await store.delete(NAME)
    for node in (store, other_store):
        node.disk.path_of(NAME).parent.mkdir(parents=True, exist_ok=True)
        await attempt(node)
        record = await store.database.find(NAME)
        assert record is not None
        assert record.is_deleted
        assert on_disk(node, NAME) is None
    assert await brought_back(store, NAME) is None
    assert await brought_back(other_store, NAME) is None


async def test_a_save_anew_brings_a_deleted_name_back(store: UploadStore) -> None:
    """Only somebody who saves the name makes it live again, with the same bytes or with others."""
    for data in (OLD, NEW):
        await store.save(NAME, OLD)
        await store.delete(NAME)
        await store.save(NAME, data)
        assert await on_both_sides(store, NAME) == data
        record = await store.database.find(NAME)
        assert record is not None
        assert not record.is_deleted


@pytest.mark.parametrize("keeps_time", [True, False], ids=["with its mtime", "with a new mtime"])
async def test_a_copy_of_a_deleted_file_is_removed_behind_its_first_hit(store: UploadStore, keeps_time: bool) -> None:
    """A deploy lays back a deleted file: it goes, without a trace in quarantine, because the history holds it."""
    saved = await store.save(NAME, OLD)
    await store.delete(NAME)
    saved.path.write_bytes(OLD)
    if keeps_time:
        os.utime(saved.path, ns=(saved.modified_ns, saved.modified_ns))
    await looked_behind(store, NAME)
    assert on_disk(store, NAME) is None
    assert in_quarantine(store) == []


async def test_a_copy_on_another_node_is_removed_behind_its_first_hit(
    store: UploadStore, other_store: UploadStore
) -> None:
    """A node that still holds a copy of what was deleted elsewhere drops it once it is asked for."""
    await store.save(NAME, OLD)
    assert await brought_back(other_store, NAME) == OLD
    await store.delete(NAME)
    assert on_disk(other_store, NAME) == OLD
    await looked_behind(other_store, NAME)
    assert on_disk(other_store, NAME) is None


async def test_the_very_same_file_laid_back_is_removed_every_time(sqlite_store: UploadStore, tmp_path: Path) -> None:
    """A file of the same inode, mtime and size as one that was served before is no less deleted."""
    saved = await sqlite_store.save(NAME, OLD)
    kept = tmp_path / "kept.jpg"
    os.link(saved.path, kept)
    await looked_behind(sqlite_store, NAME)
    await sqlite_store.delete(NAME)
    for _ in range(2):
        os.link(kept, saved.path)
        await looked_behind(sqlite_store, NAME)
        assert on_disk(sqlite_store, NAME) is None


async def test_bytes_unknown_to_the_history_are_set_aside(sqlite_store: UploadStore) -> None:
    """At a deleted name, other bytes than the recorded ones go to quarantine instead of being unlinked."""
    saved = await sqlite_store.save(NAME, OLD)
    await sqlite_store.delete(NAME)
    saved.path.write_bytes(NEW)
    await looked_behind(sqlite_store, NAME)
    assert on_disk(sqlite_store, NAME) is None
    assert in_quarantine(sqlite_store) == [NEW]
    record = await sqlite_store.database.find(NAME)
    assert record is not None
    assert record.is_deleted


async def test_bytes_are_set_aside_if_nobody_knows_the_history(store: UploadStore, engine: AsyncEngine) -> None:
    """A copy of a deleted file goes to quarantine if the database cannot say whether its history holds it."""
    saved = await store.save(NAME, OLD)
    await store.save(NAME, NEW)
    await store.delete(NAME)
    saved.path.write_bytes(OLD)
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE image_history RENAME TO image_history_away"))
    await store.check(NAME)
    assert on_disk(store, NAME) is None
    assert in_quarantine(store) == [OLD]


# -- undo -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 17 * CHUNK + 3])
async def test_an_overwrite_is_undone(store: UploadStore, size: int) -> None:
    """Both sides hold the bytes and the mtime of before, as the next generation."""
    before = await store.save(NAME, noise(size))
    await store.save(NAME, NEW)
    undone = await store.undo(NAME)
    assert await on_both_sides(store, NAME) == noise(size)
    assert (undone.generation, undone.modified_ns) == (3, before.modified_ns)
    assert undone.path.stat().st_mtime_ns == before.modified_ns
    assert in_quarantine(store) == []


async def test_a_deletion_is_undone(store: UploadStore) -> None:
    """Both sides hold the file again, and it looks the same to every cache."""
    before = await store.save(NAME, OLD)
    await store.delete(NAME)
    undone = await store.undo(NAME)
    assert await on_both_sides(store, NAME) == OLD
    assert undone.path.stat().st_mtime_ns == before.modified_ns
    assert await brought_back(store, NAME) == OLD


async def test_any_generation_can_be_gone_back_to(store: UploadStore) -> None:
    """With a generation, `undo` goes back as far as the history reaches; going back can itself be undone."""
    for number in range(4):
        await store.save(NAME, noise(100 + number))
    await store.undo(NAME, 2)
    assert await on_both_sides(store, NAME) == noise(101)
    await store.undo(NAME)
    assert await on_both_sides(store, NAME) == noise(103)


async def test_there_must_be_something_to_undo(store: UploadStore) -> None:
    """An unknown name, a name without history and a generation that never was are `NotStored`; nothing changes."""
    with pytest.raises(NotStored):
        await store.undo(NAME)
    await store.save(NAME, OLD)
    with pytest.raises(NotStored):
        await store.undo(NAME)
    await store.save(NAME, NEW)
    with pytest.raises(NotStored):
        await store.undo(NAME, 7)
    assert await on_both_sides(store, NAME) == NEW


async def test_undo_to_damaged_bytes_changes_nothing(store: UploadStore, engine: AsyncEngine) -> None:
    """Chunks that agree with their own digests, but not with the file's, are found before a name goes back to them."""
    first = await store.save(NAME, noise(2 * CHUNK))
    await store.save(NAME, NEW)
    data = b"x" * CHUNK
    async with engine.begin() as connection:
        await connection.execute(
            text("UPDATE image_chunk SET data = :data, digest = :digest WHERE sha256 = :sha256 AND position = 1"),
            {"data": data, "digest": chunk_digest(1, data), "sha256": first.sha256},
        )
    with pytest.raises(CorruptBlob):
        await store.undo(NAME)
    assert await on_both_sides(store, NAME) == NEW
    record = await store.database.find(NAME)
    assert record is not None
    assert record.generation == 2


async def test_undo_on_a_full_disk_is_healed_later(sqlite_store: UploadStore, disk: BrokenDisk) -> None:
    """An undo that the disk has no room for is done in the database, and on disk at the first request with room."""
    await sqlite_store.save(NAME, OLD)
    await sqlite_store.delete(NAME)
    disk.fill_after(0)
    await sqlite_store.undo(NAME)
    assert files_below(sqlite_store.disk.path) == []
    disk.mend()
    assert await brought_back(sqlite_store, NAME) == OLD
    assert await on_both_sides(sqlite_store, NAME) == OLD
    await sqlite_store.save(NAME, NEW)
    disk.fill_after(0)
    await sqlite_store.undo(NAME)
    assert on_disk(sqlite_store, NAME) is None
    assert await brought_back(sqlite_store, NAME) == OLD


# -- restore --------------------------------------------------------------------------------------------------------


async def test_a_missing_file_is_restored(store: UploadStore) -> None:
    """After `restore` the file stands on disk, byte for byte, with the mtime and mode that it had."""
    for size in SIZES:
        saved = await store.save(f"{size}.jpg", noise(size))
        before = saved.path.stat()
        saved.path.unlink()
        restored = await store.restore(f"{size}.jpg")
        after = restored.path.stat()
        assert await on_both_sides(store, f"{size}.jpg") == noise(size)
        assert (after.st_mtime_ns, after.st_mode, after.st_size) == (before.st_mtime_ns, before.st_mode, size)


async def test_restore_of_a_file_that_is_there_changes_nothing(sqlite_store: UploadStore) -> None:
    """The very same file stays."""
    saved = await sqlite_store.save(NAME, OLD)
    before = saved.path.stat()
    restored = await sqlite_store.restore(NAME)
    assert restored.sha256 == saved.sha256
    assert saved.path.stat() == before


async def test_restore_of_an_unknown_name(sqlite_store: UploadStore) -> None:
    """A name that the database answers that it does not know is `NotStored`."""
    with pytest.raises(NotStored):
        await sqlite_store.restore(NAME)


async def test_restore_of_a_file_that_only_the_disk_has(sqlite_store: UploadStore) -> None:
    """What the database does not know is not restored, though it is there; nor is it adopted, or taken away."""
    path = sqlite_store.disk.path_of(NAME)
    path.parent.mkdir(parents=True)
    path.write_bytes(OLD)
    with pytest.raises(NotStored):
        await sqlite_store.restore(NAME)
    await sqlite_store.save(NAME, NEW)
    await sqlite_store.database.bury(NAME)
    with pytest.raises(NotStored):
        await sqlite_store.restore(NAME)
    assert on_disk(sqlite_store, NAME) == NEW


async def test_restore_never_says_that_a_file_is_there_which_is_not(
    store: UploadStore, other_store: UploadStore
) -> None:
    """A name that is still remembered as absent, and was saved elsewhere just now, is not called restored."""
    assert await brought_back(store, NAME) is None
    await other_store.save(NAME, NEW)
    with pytest.raises(NotStored):
        await store.restore(NAME)
    assert on_disk(store, NAME) is None


async def test_mending_from_a_file_that_is_not_there(sqlite_store: UploadStore) -> None:
    """Without a disk copy there is nothing to mend a record from."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.unlink()
    with pytest.raises(NotStored):
        await sqlite_store.mend(saved)


@pytest.mark.parametrize("size", [10, 3 * CHUNK, 65 * CHUNK])
async def test_restore_of_damaged_bytes_writes_nothing(store: UploadStore, engine: AsyncEngine, size: int) -> None:
    """Bytes that are not the recorded ones are `CorruptBlob`: no file appears, and the record is kept."""
    saved = await store.save(NAME, noise(size))
    saved.path.unlink()
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE image_chunk SET data = :data"), {"data": b"x" * min(size, CHUNK)})
    with pytest.raises(CorruptBlob):
        await store.restore(NAME)
    assert files_below(store.disk.path) == []
    assert await store.database.find(NAME) is not None


async def test_restore_to_a_disk_that_takes_no_file(sqlite_store: UploadStore, disk: BrokenDisk) -> None:
    """Whoever wants the file on disk is told that the disk takes none."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.unlink()
    disk.fill_after(0)
    with pytest.raises(DiskUnwritable):
        await sqlite_store.restore(NAME)
    assert files_below(sqlite_store.disk.path) == []


# -- adopt ----------------------------------------------------------------------------------------------------------


async def test_a_file_that_is_only_on_disk_is_adopted(store: UploadStore) -> None:
    """Its bytes and its mtime are the record's; the file itself is left as it is."""
    store.disk.path.mkdir(parents=True)
    for size in SIZES:
        path = store.disk.path_of(f"{size}.jpg")
        path.write_bytes(noise(size))
        os.utime(path, ns=(10**18 + 7, 10**18 + 7))
        before = path.stat()
        adopted = await store.adopt(f"{size}.jpg")
        assert await on_both_sides(store, f"{size}.jpg") == noise(size)
        assert (adopted.modified_ns, adopted.generation, adopted.content_type) == (10**18 + 7, 1, "image/jpeg")
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


async def test_adopt_leaves_a_name_with_a_record_as_it_is(sqlite_store: UploadStore) -> None:
    """What the database knows is not overwritten by an adoption."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.write_bytes(NEW)
    adopted = await sqlite_store.adopt(NAME)
    assert (adopted.sha256, adopted.generation) == (saved.sha256, 1)
    assert await in_database(sqlite_store, NAME) == OLD


async def test_adopt_of_what_is_not_there(sqlite_store: UploadStore) -> None:
    """Without a file there is nothing to adopt."""
    with pytest.raises(NotStored):
        await sqlite_store.adopt(NAME)
    assert await sqlite_store.database.find(NAME) is None


async def test_a_new_file_is_adopted_behind_its_first_hit(sqlite_store: UploadStore) -> None:
    """A file that an app wrote by itself is in the database soon after it was first served."""
    path = sqlite_store.disk.path_of(NAME)
    path.parent.mkdir(parents=True)
    path.write_bytes(OLD)
    hit(sqlite_store, NAME)

    async def is_adopted() -> bool:
        return await in_database(sqlite_store, NAME) == OLD

    await eventually(is_adopted)


# -- what is told ---------------------------------------------------------------------------------------------------


async def test_every_change_is_told_once_with_its_size(
    directory: Path, sqlite_url: str, disk: BrokenDisk, engine_of_sqlite: AsyncEngine
) -> None:
    """Listeners hear of each verb, and of each thing done behind, in the order in which it happened."""
    told: list[tuple[str, str, int]] = []

    def listen(event: Event) -> None:
        told.append((event.kind.value, event.name, event.size))

    def heard() -> list[tuple[str, str, int]]:
        now, told[:] = told[:], []
        return now

    async with UploadStore(directory, sqlite_url, listeners=[listen]) as store:
        await store.database.create_tables()
        path = (await store.save(NAME, OLD)).path
        await store.save(NAME, NEW)
        await store.delete(NAME)
        await store.delete(NAME)
        assert heard() == [("saved", NAME, len(OLD)), ("saved", NAME, len(NEW)), ("deleted", NAME, 0)]
        assert await brought_back(store, NAME) is None
        await store.undo(NAME)
        assert heard() == [("absent", NAME, 0), ("undone", NAME, len(NEW))]
        for size in (1000, 3 * CHUNK):
            (await store.save(NAME, noise(size))).path.unlink()
            await brought_back(store, NAME)
            assert heard() == [("saved", NAME, size), ("restored", NAME, size)]
        path.write_bytes(b"which nobody has saved")
        os.utime(path, ns=(0, 0))
        await store.check(NAME)
        assert heard() == [("quarantined", NAME, 0), ("restored", NAME, 3 * CHUNK)]
        store.disk.path_of("new.jpg").write_bytes(OLD)
        await store.adopt("new.jpg")
        assert heard() == [("adopted", "new.jpg", len(OLD))]
        await store.database.bury("new.jpg")
        await store.check("new.jpg")
        assert heard() == [("removed", "new.jpg", 0)]
        disk.fill_after(0)
        await store.save("full.jpg", OLD)
        await brought_back(store, "full.jpg")
        assert heard() == [("streamed", "full.jpg", 13), ("saved", "full.jpg", 13), ("streamed", "full.jpg", 13)]
        disk.mend()
        async with engine_of_sqlite.begin() as connection:
            await connection.execute(text("UPDATE image_chunk SET data = digest"))
        with pytest.raises(CorruptBlob):
            await store.restore("full.jpg")
        path.write_bytes(OLD)
        os.utime(path, ns=(0, 0))
        with pytest.raises(CorruptBlob):
            await store.check(NAME)
        assert heard() == [("corrupt", "full.jpg", 13), ("corrupt", NAME, 3 * CHUNK)]


# -- opening and closing --------------------------------------------------------------------------------------------


async def test_a_store_works_without_being_opened_and_after_being_closed(directory: Path, database_url: str) -> None:
    """It opens at its first use, and anew at the next one after it was closed."""
    store = UploadStore(directory, database_url)
    await store.database.create_tables()
    await store.save(NAME, OLD)
    await store.close()
    assert await on_both_sides(store, NAME) == OLD
    await store.close()
    await nothing_is_held_open(directory)


async def test_the_apps_own_engine_is_used_and_left_open(store: UploadStore, engine: AsyncEngine) -> None:
    """A store over the app's engine saves through it, and does not close it."""
    async with UploadStore(store.disk.path, engine) as second:
        await second.save(NAME, OLD)
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM image_storage"))).scalar_one() == 1
    assert await on_both_sides(store, NAME) == OLD


async def test_a_store_as_the_environment_says(
    directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both halves are where the two variables say."""
    monkeypatch.setenv("SELFHEAL_DIRECTORY", str(directory))
    monkeypatch.setenv("SELFHEAL_DATABASE_URL", sqlite_url)
    async with UploadStore.from_env() as store:
        await store.database.create_tables()
        assert (await store.save(NAME, OLD)).path == directory / NAME
        assert store.database.url.render_as_string() == sqlite_url


async def test_options_reach_where_they_belong(directory: Path, sqlite_url: str, tmp_path: Path) -> None:
    """Modes, quarantine, marker and tables are those that the app has asked for."""
    metadata = MetaData()
    async with UploadStore(
        directory, sqlite_url, metadata=metadata, file_mode=0o600, directory_mode=0o700,
        quarantine=tmp_path / "bad", require_marker=True,
    ) as store:  # fmt: skip
        assert "image_storage" in metadata.tables
        await store.database.create_tables()
        store.disk.mark()
        for name in (NAME, "other.jpg"):
            saved = await store.save(name, OLD)
            assert saved.path.stat().st_mode & 0o7777 == 0o600
        assert saved.path.parent.stat().st_mode & 0o7777 == (directory / "cats").stat().st_mode & 0o7777 == 0o700
        await store.set_aside(NAME)
        assert [path.name for path in (tmp_path / "bad").rglob("*.jpg")] == ["tom.jpg"]
        (directory / MARKER).unlink()
        await store.save("unmarked.jpg", OLD)
        assert on_disk(store, "unmarked.jpg") is None
    assert UploadStore(directory, sqlite_url).policy == UploadPolicy()
    refusing = UploadStore(directory, sqlite_url, policy=UploadPolicy(extensions=frozenset({"gif"})))
    with pytest.raises(UploadTypeRefused):
        await refusing.save_uploaded_file(UploadFile(io.BytesIO(png()), filename="a.png"))


async def test_the_deadline_bounds_the_database_too(store: UploadStore) -> None:
    """Every question is given up before the deadline is over, so that whoever asks hears why."""
    async with UploadStore(store.disk.path, store.database.url, deadline=0.7) as hurried:
        await hurried.database.count()
        async with locked(store):
            started = time.monotonic()
            with pytest.raises(DatabaseUnavailable):
                await hurried.database.find(NAME)
            assert time.monotonic() - started < 1.1


async def test_a_store_sweeps_when_it_opens(directory: Path, sqlite_url: str) -> None:
    """What a process that died has left in the temporary directory is gone once a store is open."""
    litter = directory / TEMPORARY / "0123456789abcdef"
    litter.parent.mkdir(parents=True)
    litter.write_bytes(OLD)
    async with UploadStore(directory, sqlite_url):
        assert files_below(directory) == []


async def test_a_closed_store_holds_nothing(directory: Path, sqlite_url: str, disk: BrokenDisk) -> None:
    """What is under way ends first; then no thread, no file, no directory and no connection is left."""
    before = set(threading.enumerate())
    async with UploadStore(directory, sqlite_url) as store:
        await store.database.create_tables()
        saved = await store.save(NAME, noise(3 * CHUNK))
        saved.path.unlink()
        held = disk.hold("fsync")
        asking = asyncio.create_task(brought_back(store, NAME))
        await held.met()
        asking.cancel()
        asyncio.get_running_loop().call_later(0.05, held.release)
    assert saved.path.read_bytes() == noise(3 * CHUNK)

    async def nothing_is_left() -> bool:
        return set(threading.enumerate()) <= before and not held_open(directory.parent.parent.parent)

    await eventually(nothing_is_left)
