"""`UploadStore` itself: options, opening and closing, the app's own engine, and the events of every change."""

from __future__ import annotations

import asyncio
import io
import os
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.datastructures import UploadFile

from selfheal import CorruptBlob, DatabaseUnavailable, UploadPolicy, UploadStore, UploadTypeRefused
from selfheal.content.sources import CHUNK
from selfheal.disk.root import MARKER
from selfheal.disk.temporary import TEMPORARY
from selfheal.events import Event
from tests.support.faults import BrokenDisk, locked_database
from tests.support.open_files import assert_nothing_open_below, open_below
from tests.support.raw_sql import execute
from tests.support.sample_data import noise
from tests.support.store_requests import restored_bytes
from tests.support.store_state import files_below, on_disk, on_disk_and_in_database
from tests.support.uploads import NAME, NEW, OLD, small_png
from tests.support.waiting import eventually

# -- options ----------------------------------------------------------------------------------------------------------


async def test_a_store_from_the_environment(directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directory and database are those of the two variables."""
    monkeypatch.setenv("SELFHEAL_DIRECTORY", str(directory))
    monkeypatch.setenv("SELFHEAL_DATABASE_URL", sqlite_url)
    async with UploadStore.from_env() as store:
        await store.database.create_tables()
        assert (await store.save(NAME, OLD)).path == directory / NAME
        assert store.database.url.render_as_string() == sqlite_url


async def test_options(directory: Path, sqlite_url: str, tmp_path: Path) -> None:
    """Modes, quarantine, marker, tables and policy are those that the app has chosen."""
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
        await store.restorer.set_aside_unreadable(NAME)
        assert [path.name for path in (tmp_path / "bad").rglob("*.jpg")] == ["tom.jpg"]
        (directory / MARKER).unlink()
        await store.save("unmarked.jpg", OLD)
        assert on_disk(store, "unmarked.jpg") is None
    assert UploadStore(directory, sqlite_url).policy == UploadPolicy()
    refusing = UploadStore(directory, sqlite_url, policy=UploadPolicy(extensions=frozenset({"gif"})))
    with pytest.raises(UploadTypeRefused):
        await refusing.save_uploaded_file(UploadFile(io.BytesIO(small_png()), filename="a.png"))


async def test_the_deadline_bounds_the_database_too(store: UploadStore) -> None:
    """A query without an answer ends before the deadline, so that the caller gets the reason."""
    async with UploadStore(store.disk.path, store.database.url, deadline=0.7) as hurried:
        await hurried.database.count()
        async with locked_database(store):
            started = time.monotonic()
            with pytest.raises(DatabaseUnavailable):
                await hurried.database.find(NAME)
            assert time.monotonic() - started < 10


# -- opening and closing ----------------------------------------------------------------------------------------------


async def test_a_store_works_without_being_opened_and_after_being_closed(directory: Path, database_url: str) -> None:
    """It opens at its first use, and opens again at the first use after it was closed."""
    store = UploadStore(directory, database_url)
    await store.database.create_tables()
    await store.save(NAME, OLD)
    await store.close()
    assert await on_disk_and_in_database(store, NAME) == OLD
    await store.close()
    await assert_nothing_open_below(directory)


async def test_the_apps_own_engine_is_used_and_left_open(store: UploadStore, engine: AsyncEngine) -> None:
    """A store over the app's engine saves through it and does not close it."""
    async with UploadStore(store.disk.path, engine) as second:
        await second.save(NAME, OLD)
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM image_storage"))).scalar_one() == 1
    assert await on_disk_and_in_database(store, NAME) == OLD


async def test_a_store_sweeps_when_it_opens(directory: Path, sqlite_url: str) -> None:
    """Temporary files of a process that died are removed when a store opens."""
    leftover = directory / TEMPORARY / "0123456789abcdef"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(OLD)
    async with UploadStore(directory, sqlite_url):
        assert files_below(directory) == []


async def test_a_closed_store_holds_nothing(directory: Path, sqlite_url: str, broken_disk: BrokenDisk) -> None:
    """A close waits for what is running; then no thread, file, directory or connection is left."""
    before = set(threading.enumerate())
    async with UploadStore(directory, sqlite_url) as store:
        await store.database.create_tables()
        saved = await store.save(NAME, noise(3 * CHUNK))
        saved.path.unlink()
        held = broken_disk.hold("fsync")
        caller = asyncio.create_task(restored_bytes(store, NAME))
        await held.met()
        caller.cancel()
        asyncio.get_running_loop().call_later(0.05, held.release)
    assert saved.path.read_bytes() == noise(3 * CHUNK)

    def nothing_is_left() -> bool:
        return set(threading.enumerate()) <= before and not open_below(directory.parent.parent.parent)

    await eventually(nothing_is_left)


# -- events -----------------------------------------------------------------------------------------------------------


async def test_every_change_is_one_event_with_its_size(
    directory: Path, sqlite_url: str, broken_disk: BrokenDisk
) -> None:
    """Listeners get one event for each change, also for those in the background, in the order of the changes."""
    reported: list[tuple[str, str, int]] = []

    def listen(event: Event) -> None:
        reported.append((event.kind.value, event.name, event.size))

    def new_events() -> list[tuple[str, str, int]]:
        now, reported[:] = reported[:], []
        return now

    async with UploadStore(directory, sqlite_url, listeners=[listen]) as store:
        await store.database.create_tables()
        path = (await store.save(NAME, OLD)).path
        await store.save(NAME, NEW)
        await store.delete(NAME)
        await store.delete(NAME)
        assert new_events() == [("saved", NAME, len(OLD)), ("saved", NAME, len(NEW)), ("deleted", NAME, 0)]
        assert await restored_bytes(store, NAME) is None
        await store.undo(NAME)
        assert new_events() == [("absent", NAME, 0), ("undone", NAME, len(NEW))]
        for size in (1000, 3 * CHUNK):
            (await store.save(NAME, noise(size))).path.unlink()
            await restored_bytes(store, NAME)
            assert new_events() == [("saved", NAME, size), ("restored", NAME, size)]
        path.write_bytes(b"bytes that were never saved")
        os.utime(path, ns=(0, 0))
        await store.reconciler.check(NAME)
        assert new_events() == [("set_aside", NAME, 27), ("restored", NAME, 3 * CHUNK)]
        store.disk.path_of("new.jpg").write_bytes(OLD)
        await store.adopt("new.jpg")
        assert new_events() == [("adopted", "new.jpg", len(OLD))]
        await store.database.bury("new.jpg")
        await store.reconciler.check("new.jpg")
        assert new_events() == [("removed", "new.jpg", 0)]
        broken_disk.fill_after(0)
        await store.save("full.jpg", OLD)
        await restored_bytes(store, "full.jpg")
        assert new_events() == [("streamed", "full.jpg", 13), ("saved", "full.jpg", 13), ("streamed", "full.jpg", 13)]
        broken_disk.mend()
        await execute(store, "UPDATE image_chunk SET data = digest")
        with pytest.raises(CorruptBlob):
            await store.restore("full.jpg")
        path.write_bytes(OLD)
        os.utime(path, ns=(0, 0))
        with pytest.raises(CorruptBlob):
            await store.reconciler.check(NAME)
        assert new_events() == [("corrupt", "full.jpg", 13), ("corrupt", NAME, 3 * CHUNK)]
