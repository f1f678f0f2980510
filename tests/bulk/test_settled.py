"""Files that are still being written: migrate waits until they hold still, and records no half of one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from selfheal import UploadStore, bulk
from selfheal.bulk import disk_files
from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.listing import Entry, walk
from tests.support.constants import set_constants
from tests.support.files import noise, write_file
from tests.support.runs import report_of

SECONDS = 0.6
LARGE = 5 * 2**20


@pytest.fixture
async def waiting_store(directory: Path, database_tables: str) -> AsyncIterator[UploadStore]:
    """A store that waits for files to hold still, with its tables."""
    async with UploadStore(directory, database_tables, settled_after=SECONDS) as store:
        yield store


def _after_listing(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Let `change` happen once, after a run has listed the files and before it reads them."""

    def list_and_change(disk: UploadsDirectory) -> Iterator[Entry]:
        entries = list(walk(disk))
        monkeypatch.setattr(disk_files, "walk", walk)
        change()
        return iter(entries)

    monkeypatch.setattr(disk_files, "walk", list_and_change)


async def _write_slowly(path: Path, data: bytes, until: asyncio.Event) -> None:
    """Write half of a file, go on byte by byte until told to stop, and then write the rest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        done = file.write(data[: len(data) // 2])
        while not until.is_set():
            await asyncio.sleep(SECONDS / 12)
            done += file.write(data[done : done + 1])
        file.write(data[done:])


@pytest.mark.parametrize("size", [2000, LARGE])
async def test_a_file_that_is_still_being_written(waiting_store: UploadStore, directory: Path, size: int) -> None:
    """It is failed and not recorded; the others are stored, and the next run stores the whole."""
    data, done = noise(size), asyncio.Event()
    write_file(directory / "other.png", noise(10))
    writing = asyncio.create_task(_write_slowly(directory / "half.bin", data, done))
    await asyncio.sleep(0.05)
    report = await report_of(bulk.migrate(waiting_store))
    done.set()
    await writing
    assert report.outcomes == {"half.bin": "failed", "other.png": "migrated"}
    [detail] = [result.detail for result in report.results if result.is_problem]
    assert "still being written" in detail
    assert await waiting_store.database.find("half.bin") is None
    assert (await report_of(bulk.migrate(waiting_store))).outcomes == {"half.bin": "migrated", "other.png": "ok"}
    record = await waiting_store.database.find("half.bin")
    assert record is not None
    assert b"".join([chunk async for chunk in waiting_store.database.read(record)]) == data


async def test_a_copy_with_an_old_time_is_young(
    waiting_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cp -p` and `rsync -t` give old times: the ctime shows that the file is young, and that it was changed."""
    path = write_file(directory / "a.png", noise(2000))
    _after_listing(monkeypatch, lambda: write_file(path, noise(2000, "the same size and time")))
    assert (await report_of(bulk.migrate(waiting_store))).outcomes == {"a.png": "failed"}
    assert (await report_of(bulk.migrate(waiting_store))).outcomes == {"a.png": "migrated"}


async def test_an_overwrite_that_goes_on(
    waiting_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `prefer_disk` too, a recorded file that is being overwritten is left for the next run."""
    await waiting_store.save("a.bin", noise(500))
    path = write_file(directory / "a.bin", noise(1000))
    _after_listing(monkeypatch, lambda: path.write_bytes(noise(2000)))
    report = await report_of(bulk.migrate(waiting_store, prefer_disk=True))
    assert report.outcomes == {"a.bin": "failed"}
    assert (await report_of(bulk.migrate(waiting_store, prefer_disk=True))).outcomes == {"a.bin": "migrated"}


async def test_a_file_that_vanishes_while_migrate_waits(
    waiting_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is gone when its turn comes needs no migration, and is no problem."""
    for name, size in (("small.png", 100), ("large.bin", LARGE)):
        write_file(directory / name, noise(size))
    _after_listing(monkeypatch, lambda: [path.unlink() for path in directory.iterdir()])
    assert (await report_of(bulk.migrate(waiting_store))).outcomes == {"small.png": "skipped", "large.bin": "skipped"}


async def test_young_files_come_last(waiting_store: UploadStore, directory: Path) -> None:
    """Old files are stored before the run waits for young ones."""
    write_file(directory / "old.png", noise(10))
    await asyncio.sleep(1.0)
    waiting_store.settled_after = 1.0
    write_file(directory / "a young one.png", noise(10))
    report = await report_of(bulk.migrate(waiting_store))
    assert [result.name for result in report.results] == ["old.png", "a young one.png"]
    assert report.counts == {"migrated": 2}


async def test_a_dry_run_does_not_wait(waiting_store: UploadStore, directory: Path) -> None:
    """A dry run reports young files at once; so does verify, which stores nothing."""
    write_file(directory / "a.png", noise(10))
    waiting_store.settled_after = 600.0
    async with asyncio.timeout(60):
        assert (await report_of(bulk.migrate(waiting_store, dry_run=True))).counts == {"migrated": 1}
        assert (await report_of(bulk.verify(waiting_store))).counts == {"missing_in_database": 1}


@pytest.mark.parametrize("ahead", [3600, 10**9])
async def test_a_time_in_the_future(waiting_store: UploadStore, directory: Path, ahead: int) -> None:
    """The clock of a network disk may be ahead: such a file is young, and the wait is not longer than for others."""
    write_file(directory / "a.png", noise(10), modified_ns=time.time_ns() + ahead * 10**9)
    async with asyncio.timeout(SECONDS * 10):
        assert (await report_of(bulk.migrate(waiting_store))).counts == {"migrated": 1}


async def test_more_young_files_than_memory_holds(
    waiting_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Young files are done in groups: each is done once."""
    set_constants(monkeypatch, ENTRIES_AT_ONCE=3, YOUNG_AT_ONCE=7)
    for index in range(40):
        write_file(directory / f"{index:02}.png", noise(10, index))
    assert (await report_of(bulk.migrate(waiting_store))).counts == {"migrated": 40}
    assert (await report_of(bulk.migrate(waiting_store))).counts == {"ok": 40}
