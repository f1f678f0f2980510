"""Verify: all damage on disk and in the database is reported by name; `--drill` restores everything elsewhere."""

from __future__ import annotations

import sqlite3
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from selfheal import UploadStore, bulk
from selfheal.content.digests import chunk_digest
from selfheal.content.sources import CHUNK
from selfheal.healing.publish import Published, Publisher
from tests.support.damage import (
    BLOCKED,
    DELETED,
    DIFFERENT,
    HEALTHY,
    LARGE,
    NO_UPLOADS,
    NOT_RECORDED,
    REMOVED,
    SKIPPED,
    TOUCHED,
    DamagedDisk,
)
from tests.support.files import flip_a_bit, noise, snapshot_of
from tests.support.runs import SQL, after_listing, outcomes, remove_tree, report_of, rows

# -- damage -----------------------------------------------------------------------------------------------------------


async def test_verify_sees_all_damage_on_disk(damaged_disk: DamagedDisk, store: UploadStore, directory: Path) -> None:
    """Every damaged, missing and extra file is reported once, by name and kind."""
    report = await report_of(bulk.verify(store))
    problems = NO_UPLOADS | outcomes(
        missing_on_disk=REMOVED,
        differs=DIFFERENT,
        failed=BLOCKED,
        missing_in_database=NOT_RECORDED,
        deleted=DELETED,
    )
    assert report.problems == problems
    assert report.counts == dict(Counter(problems.values())) | {"ok": len(HEALTHY) + 1, "skipped": len(SKIPPED)}
    assert report.outcomes == problems | outcomes(ok=(*HEALTHY, TOUCHED), skipped=SKIPPED)
    drilled = await report_of(bulk.verify(store, drill=True))
    assert drilled.outcomes == report.outcomes


async def test_verify_sees_all_damage_in_the_database(
    damaged_database: dict[str, bytes], store: UploadStore, directory: Path, sql: SQL
) -> None:
    """Every damage is reported by name, with all files or without any, and nothing is changed."""
    database = await rows(sql)
    expected = dict.fromkeys(damaged_database, "corrupt_in_database")
    for _ in ("with the files", "without"):
        before = snapshot_of(directory.parent)
        for drill in (False, True):
            report = await report_of(bulk.verify(store, drill=drill))
            good = {"good.png": "ok" if directory.exists() else "missing_on_disk"}
            assert report.outcomes == expected | good
        assert (snapshot_of(directory.parent), await rows(sql)) == (before, database)
        if directory.exists():
            remove_tree(directory)


async def test_a_chunk_that_is_too_large(sqlite_store: UploadStore) -> None:
    """Bytes that could not be restored are a problem, although every digest is right."""
    data = noise(CHUNK + 1, "large")
    await sqlite_store.save("large.bin", data)
    with closing(sqlite3.connect(str(sqlite_store.database.url.database))) as connection:
        connection.execute("DELETE FROM image_chunk WHERE position = 1")
        connection.execute("UPDATE image_chunk SET data = ?, digest = ?", (data, chunk_digest(0, data)))
        connection.commit()
    assert (await report_of(bulk.verify(sqlite_store))).problems == {"large.bin": "corrupt_in_database"}


async def test_an_empty_file_that_is_deleted_during_the_run(
    sqlite_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty file has no chunk that could be missing; if it is deleted during the run, it is reported once."""
    await sqlite_store.save("empty.gif", b"")
    after_listing(sqlite_store, monkeypatch, lambda: sqlite_store.database.bury("empty.gif"))
    report = await report_of(bulk.verify(sqlite_store))
    assert report.problems == {"empty.gif": "deleted"}
    assert report.counts == {"deleted": 1}


# -- drill ------------------------------------------------------------------------------------------------------------


async def test_a_drill_leaves_nothing(
    damaged_disk: DamagedDisk, store: UploadStore, tmp_path: Path, sql: SQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drill restores into a directory of its own and removes it; files and records stay as they are."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before, database = snapshot_of(tmp_path / "app"), await rows(sql)
    report = await report_of(bulk.verify(store, drill=True))
    assert report.counts["ok"] == len(HEALTHY) + 1
    assert (list(scratch.iterdir()), snapshot_of(tmp_path / "app")) == ([], before)
    assert await rows(sql) == database


async def test_a_drill_reports_what_cannot_be_restored(
    store: UploadStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the restored bytes would not be the recorded ones, a drill reports it, though files and blobs look fine."""
    await store.save("a.png", noise(100))
    await store.save("b.bin", noise(LARGE))
    publish = Publisher.publish

    def publish_and_damage(self: Publisher, staged: Any) -> list[Published]:
        results = publish(self, staged)
        for one in results:
            flip_a_bit(self._disk.path_of(one.record.name))
        return results

    monkeypatch.setattr(Publisher, "publish", publish_and_damage)
    assert (await report_of(bulk.verify(store))).counts == {"ok": 2}
    assert (await report_of(bulk.verify(store, drill=True))).counts == {"corrupt_in_database": 2}
