"""Restore, database → disk: missing files are written, deleted ones removed, and nothing damaged becomes a file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from selfheal import UploadStore, bulk
from tests.support.constants import set_constants
from tests.support.damage import (
    BLOCKED,
    BYTES_DAMAGED,
    BYTES_WHOLE,
    DELETED,
    DIFFERENT,
    HEALTHY,
    LARGE,
    RECORD_WRONG,
    REMOVED,
    SMALL,
    TOUCHED,
    DamagedDisk,
    damage_of,
)
from tests.support.disk_files import contents_below
from tests.support.files import MODIFIED_NS, flip_a_bit, noise, own_files_below, snapshot_of
from tests.support.runs import SQL, after_listing, all_set_aside, outcomes, quarantine_of, remove_tree, report_of, rows
from tests.support.store_state import files_below

# -- damage on disk ---------------------------------------------------------------------------------------------------


async def test_restore_writes_missing_files_only(
    damaged_disk: DamagedDisk, store: UploadStore, directory: Path, sql: SQL
) -> None:
    """A plain restore writes missing files and removes deleted ones; other files and all records stay as they are."""
    before = snapshot_of(directory)
    report = await report_of(bulk.restore(store))
    assert report.problems == outcomes(failed=BLOCKED)
    assert report.counts == {
        "ok": len(HEALTHY) + len(DIFFERENT) + 1,
        "restored": len(REMOVED),
        "deleted": len(DELETED),
        "failed": len(BLOCKED),
    }
    for name in REMOVED:
        assert (directory / name).read_bytes() == damaged_disk.images[name]
        assert (directory / name).stat().st_mtime_ns == MODIFIED_NS
    assert [name for name in DELETED if (directory / name).exists()] == []
    assert await all_set_aside(store) == [("deleted-other.png", b"other bytes")]
    assert quarantine_of(store) == []
    changed = {str(directory / name) for name in (*REMOVED, *DELETED, "gone", "")} | {str(directory)}
    after = snapshot_of(directory)
    assert {path: seen for path, seen in after.items() if path not in changed} == {
        path: seen for path, seen in before.items() if path not in changed
    }

    files, database = snapshot_of(directory.parent), await rows(sql)
    again = await report_of(bulk.restore(store))
    assert again.counts == {"ok": len(HEALTHY) + len(DIFFERENT) + 1 + len(REMOVED), "failed": len(BLOCKED)}
    assert (snapshot_of(directory.parent), await rows(sql)) == (files, database)


async def test_restore_with_verify_heals_and_quarantines(
    damaged_disk: DamagedDisk, store: UploadStore, directory: Path, sql: SQL
) -> None:
    """Differing files are restored, their bytes become versions; in a second run all is ok."""
    bad = {name: (directory / name).read_bytes() for name in DIFFERENT}
    report = await report_of(bulk.restore(store, verify=True))
    assert report.problems == outcomes(failed=BLOCKED)
    assert report.outcomes == outcomes(
        ok=(*HEALTHY, TOUCHED), restored=(*REMOVED, *DIFFERENT), deleted=DELETED, failed=BLOCKED
    )
    for name in (*HEALTHY, *DIFFERENT, *REMOVED, TOUCHED):
        there = (directory / name).stat()
        assert (directory / name).read_bytes() == damaged_disk.images[name], name
        assert (there.st_mtime_ns, there.st_mode & 0o777) == (MODIFIED_NS, 0o644), name
    assert await all_set_aside(store) == sorted([*bad.items(), ("deleted-other.png", b"other bytes")])
    assert quarantine_of(store) == []
    assert (damaged_disk.outside / "secret.png").read_bytes() == b"secret"
    assert own_files_below(directory) == []

    files, database = snapshot_of(directory.parent), await rows(sql)
    again = await report_of(bulk.restore(store, verify=True))
    assert again.counts == {"ok": len(HEALTHY) + 1 + len(DIFFERENT) + len(REMOVED), "failed": len(BLOCKED)}
    assert (snapshot_of(directory.parent), await rows(sql)) == (files, database)


async def test_a_lost_mount_is_not_written_to(directory: Path, database_url: str) -> None:
    """Without its marker the mount may be lost: every name is reported as failed, and nothing is written."""
    async with UploadStore(directory, database_url, require_marker=True) as store:
        await store.database.create_tables()
        for name in ("a.png", "b/b.png"):
            await store.database.store_image(name, noise(100, name))
        await store.database.store_image("large.bin", noise(LARGE))
        directory.mkdir(parents=True, exist_ok=True)
        report = await report_of(bulk.restore(store))
        assert report.problems == dict.fromkeys(["a.png", "b/b.png", "large.bin"], "failed")
        assert files_below(directory) == []
        store.disk.mark()
    async with UploadStore(directory, database_url, require_marker=True) as store:
        assert (await report_of(bulk.restore(store))).counts == {"restored": 3}


# -- damage in the database -------------------------------------------------------------------------------------------


async def test_restore_writes_no_damaged_byte(
    damaged_database: dict[str, bytes], store: UploadStore, directory: Path, sql: SQL
) -> None:
    """Damaged records are reported by name and skipped; the others are restored, and every file is whole."""
    remove_tree(directory)
    database = await rows(sql)
    whole = {name for name in damaged_database if damage_of(name) in BYTES_WHOLE}
    report = await report_of(bulk.restore(store))
    assert report.problems == dict.fromkeys(damaged_database.keys() - whole, "corrupt_in_database")
    assert {name for name, outcome in report.outcomes.items() if outcome == "restored"} == whole | {"good.png"}
    assert contents_below(directory) == {name: damaged_database[name] for name in whole} | {"good.png": noise(7)}
    assert await rows(sql) == database

    before = snapshot_of(directory)
    again = await report_of(bulk.restore(store))
    assert (again.problems, again.counts["ok"]) == (report.problems, len(whole) + 1)
    assert snapshot_of(directory) == before


async def test_restore_keeps_good_files_of_damaged_records(
    damaged_database: dict[str, bytes], store: UploadStore, directory: Path
) -> None:
    """A good file, which may be the last copy, is never touched because its record is damaged."""
    data = {name: damaged_database[name] for name in damaged_database if damage_of(name) not in RECORD_WRONG}
    await report_of(bulk.restore(store, verify=True))
    assert {name: (directory / name).read_bytes() for name in data} == data
    assert quarantine_of(store) == []


async def test_restore_keeps_both_if_both_are_damaged(
    damaged_database: dict[str, bytes], store: UploadStore, directory: Path
) -> None:
    """A damaged file stays where it is until the database has good bytes to replace it."""
    bad = {name for name in damaged_database if damage_of(name) in BYTES_DAMAGED}
    for name in bad:
        flip_a_bit(directory / name)
    before = snapshot_of(directory)
    report = await report_of(bulk.restore(store, verify=True))
    assert {name for name, outcome in report.problems.items() if outcome == "corrupt_in_database"} >= bad
    assert {path: seen for path, seen in snapshot_of(directory).items() if path.endswith(".png")} == {
        path: seen for path, seen in before.items() if path.endswith(".png")
    }


# -- changes during the run -------------------------------------------------------------------------------------------


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one file, so that something can happen between two files."""
    set_constants(monkeypatch, FILES_AT_ONCE=1)


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_a_name_that_is_deleted_during_the_run(
    sqlite_store: UploadStore, directory: Path, one_by_one: None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is deleted during the run is no damage, and its file does not stay."""
    for name in ("1.png", "2.png", "3.png"):
        await sqlite_store.database.store_image(name, noise(size, name))
    after_listing(sqlite_store, monkeypatch, lambda: sqlite_store.database.bury("2.png"))
    results = [result async for result in bulk.restore(sqlite_store)]
    assert [(one.name, one.outcome.value, one.is_problem) for one in results] == [
        ("1.png", "restored", False),
        ("2.png", "deleted", False),
        ("3.png", "restored", False),
    ]
    assert files_below(directory) == ["1.png", "3.png"]


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_a_name_that_is_overwritten_during_the_run(
    sqlite_store: UploadStore, directory: Path, one_by_one: None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that another node overwrites during the run is restored with its new bytes."""
    for name in ("1.png", "2.png"):
        await sqlite_store.database.store_image(name, noise(size, name))
    save = partial(sqlite_store.database.store_image, "2.png", noise(size, "new"), modified_ns=MODIFIED_NS)
    after_listing(sqlite_store, monkeypatch, save)
    results = [result async for result in bulk.restore(sqlite_store)]
    assert {(one.name, one.outcome.value, one.is_problem) for one in results} == {
        ("1.png", "restored", False),
        ("2.png", "restored", False),
    }
    assert (directory / "2.png").read_bytes() == noise(size, "new")
    record = await sqlite_store.database.find("2.png")
    assert record is not None
    assert (directory / "2.png").stat().st_mtime_ns == record.modified_ns > MODIFIED_NS


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("change", ["save", "delete", "overwrite elsewhere"])
async def test_a_change_after_the_file_has_its_name(
    sqlite_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch, change: str, size: int
) -> None:
    """A change between the file's publication and the last check of its record wins, on whichever node it is made."""
    await sqlite_store.database.store_image("a.png", noise(size, "old"))
    generations, changes = sqlite_store.database.catalogue.generations, [change]

    async def change_first(wanted: Any) -> dict[str, int]:
        if changes:
            changes.clear()
            if change == "save":
                await sqlite_store.save("a.png", noise(size, "new"))
            elif change == "delete":
                await sqlite_store.delete("a.png")
            else:
                await sqlite_store.database.store_image("a.png", noise(size, "new"))
        return await generations(wanted)

    monkeypatch.setattr(sqlite_store.database.catalogue, "generations", change_first)
    assert (await report_of(bulk.restore(sqlite_store))).problems == {}
    assert changes == []
    if change == "delete":
        assert not (directory / "a.png").exists()
    else:
        assert (directory / "a.png").read_bytes() == noise(size, "new")
    assert quarantine_of(sqlite_store) == []
