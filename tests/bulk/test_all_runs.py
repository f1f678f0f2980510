"""Properties of all three bulk runs: everything is restored, nothing is guessed, a second run changes nothing."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from selfheal import DatabaseUnavailable, SelfHealMiddleware, UploadStore, bulk
from selfheal.content.sources import CHUNK
from selfheal.names import to_path
from tests.support.asgi import Wrapped, ask
from tests.support.constants import set_constants
from tests.support.damage import LARGE, SMALL, DamagedDisk, damage_record
from tests.support.files import MODIFIED_NS, noise, own_files_below, snapshot_of, write_file
from tests.support.runs import SQL, quarantine_of, remove_tree, report_of, rows
from tests.support.store_state import files_below

# -- everything is restored -------------------------------------------------------------------------------------------


SIZES = (0, 1, 255, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2**20 + 3, 3 * 2**20, 4 * 2**20, 4 * 2**20 + 1)
AWKWARD_NAMES = (
    "with space.png",
    "ümläut.jpg",
    "日本/写真 1.jpg",
    "😀/👨‍👩‍👧.gif",
    "caf\u00e9.png",
    "cafe\u0301.png",
    "100%.png",
    "%41.png",
    "a+b&c=d;e.jpg",
    "[x]{y}(z).png",
    "icon@2x.png",
    "quote'\"`.png",
    "CASE.png",
    "case.png",
    "a/b/c/d/e/f/g/h.png",
    f"{'l' * 251}.png",
    f"{'d' * 250}/{'e' * 250}/{'f' * 6}.png",
    "no extension",
    "-rf",
    "~root",
    "two..dots.png",
    "*?.png",
    "$HOME.png",
    "#fragment?query.png",
    "\u00a0nbsp.png",
    "comet.png",
    "<b>&amp;.svg",
    "x.html",
)
MTIMES = (MODIFIED_NS, 0, 1, -1_000_000_001, 999_999_999, 4_102_444_800_000_000_001)


def write_images(directory: Path) -> dict[str, bytes]:
    """Write files of every size and with every awkward name; return their bytes by name."""
    images = {f"sizes/{size}.bin": noise(size) for size in SIZES} | {"huge.bin": noise(20_000_001)}
    images |= {name: noise(100 + index) for index, name in enumerate(AWKWARD_NAMES)}
    for index, (name, data) in enumerate(images.items()):
        write_file(directory / name, data, modified_ns=MTIMES[index % len(MTIMES)])
    return images


async def test_everything_is_restored(store: UploadStore, directory: Path, sql: SQL) -> None:
    """After the directory is lost, every name has its bytes, time, mode and ETag again, and no run changes any more."""
    images = write_images(directory)
    before = {name: (directory / name).stat() for name in images}
    etags = await _etags(store, images)

    migrated = await report_of(bulk.migrate(store))
    assert (migrated.counts, migrated.problems) == ({"migrated": len(images)}, {})
    assert sum(result.size for result in migrated.results) == sum(map(len, images.values()))

    remove_tree(directory)
    umask = os.umask(0o077)
    try:
        restored = await report_of(bulk.restore(store))
    finally:
        os.umask(umask)
    assert (restored.counts, restored.problems) == ({"restored": len(images)}, {})
    assert sum(result.size for result in restored.results) == sum(map(len, images.values()))
    for name, data in images.items():
        there = (directory / name).stat()
        assert (directory / name).read_bytes() == data, name
        assert (there.st_mtime_ns, there.st_mode) == (before[name].st_mtime_ns, before[name].st_mode), name
    assert {path.stat().st_mode & 0o777 for path in directory.rglob("*") if path.is_dir()} == {0o755}
    assert await _etags(store, images) == etags
    assert own_files_below(directory) == []

    files, database = snapshot_of(directory.parent), await rows(sql)
    for run in (bulk.migrate(store), bulk.restore(store, verify=True), bulk.verify(store, drill=True)):
        assert (await report_of(run)).counts == {"ok": len(images)}
    assert (snapshot_of(directory.parent), await rows(sql)) == (files, database)


async def _etags(store: UploadStore, images: Mapping[str, bytes]) -> dict[str, tuple[str, str]]:
    app = SelfHealMiddleware(Wrapped(), store, adopt=False)
    answers = {name: await ask(app, to_path(name, "/static/uploads"), method="HEAD") for name in images}
    assert {answer.status for answer in answers.values()} == {200}
    return {name: (answer.headers["etag"], answer.headers["last-modified"]) for name, answer in answers.items()}


async def test_equal_bytes_are_stored_once(store: UploadStore, directory: Path, sql: SQL) -> None:
    """Equal bytes under many names are one blob, and every name is restored with its own mtime."""
    for index in range(5):
        write_file(directory / f"{index}.png", noise(CHUNK + 9), modified_ns=MODIFIED_NS + index)
    assert (await report_of(bulk.migrate(store))).counts == {"migrated": 5}
    assert await sql("SELECT size, chunks FROM image_blob") == [(CHUNK + 9, 2)]
    remove_tree(directory)
    assert (await report_of(bulk.restore(store))).counts == {"restored": 5}
    assert [(directory / f"{index}.png").stat().st_mtime_ns - MODIFIED_NS for index in range(5)] == [0, 1, 2, 3, 4]


async def test_many_batches_and_pages(store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more files than a batch or page holds, every run reports each file once."""
    set_constants(monkeypatch, FILES_AT_ONCE=8, ENTRIES_AT_ONCE=8, NAMES_AT_ONCE=20, LISTED_AT_MOST=9)
    set_constants(monkeypatch, SMALL_AT_ONCE=3 * CHUNK, LARGE_AT_ONCE=3 * CHUNK)
    for index in range(90):
        write_file(directory / f"{index % 7}/{index:02}.png", noise(index % 50 + CHUNK * (index % 9 == 0), index))
    assert (await report_of(bulk.migrate(store))).counts == {"migrated": 90}
    remove_tree(directory)
    assert (await report_of(bulk.verify(store, jobs=1))).counts == {"missing_on_disk": 90}
    assert (await report_of(bulk.restore(store, names_at_once=20))).counts == {"restored": 90}
    assert (await report_of(bulk.verify(store, drill=True, jobs=64))).counts == {"ok": 90}
    assert (await report_of(bulk.migrate(store))).counts == {"ok": 90}


async def test_nothing_at_all(store: UploadStore, directory: Path) -> None:
    """Without files and records nothing is reported, and nothing is made."""
    for run in (bulk.migrate(store), bulk.restore(store), bulk.restore(store, verify=True), bulk.verify(store)):
        assert (await report_of(run)).results == []
    assert files_below(directory) == []


# -- names that no run touches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefer_disk", [False, True])
async def test_deleted_stays_deleted(store: UploadStore, directory: Path, prefer_disk: bool) -> None:
    """No run brings a deleted name back, even if its file is put back on disk; restore removes that file."""
    data = noise(5000)
    await store.save("a.png", data)
    await store.delete("a.png")
    assert (await report_of(bulk.restore(store))).results == []
    assert not (directory / "a.png").exists()
    write_file(directory / "a.png", data)
    assert (await report_of(bulk.verify(store))).problems == {"a.png": "deleted"}
    assert (await report_of(bulk.migrate(store, prefer_disk=prefer_disk))).problems == {"a.png": "deleted"}
    report = await report_of(bulk.restore(store))
    assert (report.counts, report.problems) == ({"deleted": 1}, {})
    assert not (directory / "a.png").exists()
    record = await store.database.find("a.png")
    assert record is not None
    assert record.is_deleted
    assert (await report_of(bulk.verify(store, drill=True))).results == []


async def test_a_link_to_a_directory_is_not_followed(store: UploadStore, directory: Path, tmp_path: Path) -> None:
    """A record below a link to a directory is reported as failed; nothing is read or written through the link."""
    await store.save("cats/tom.jpg", noise(5000))
    outside = tmp_path / "outside"
    (directory / "cats").rename(outside)
    (directory / "cats").symlink_to(outside)
    await store.database.store_image("cats/new.jpg", noise(100))
    before = snapshot_of(outside)
    for run in (bulk.restore(store), bulk.restore(store, verify=True)):
        assert (await report_of(run)).problems == {"cats/tom.jpg": "failed", "cats/new.jpg": "failed"}
    report = await report_of(bulk.verify(store))
    assert report.problems == {"cats/tom.jpg": "failed", "cats/new.jpg": "failed"}
    assert (await report_of(bulk.migrate(store))).outcomes == {"cats": "skipped"}
    assert snapshot_of(outside) == before


INVALID_NAMES = (
    "../x",
    "../../../etc/cron.d/x",
    "/etc/x",
    "a/../../x",
    "a//b",
    "a/",
    ".",
    "..",
    ".hidden/x.png",
    ".selfheal-tmp/x",
    "NUL",
    "new\nline.png",
    "esc\x1b[2J.png",
    "back\\slash.png",
    "%2e%2e/x",
    "dot.",
    "n" * 256,
)


async def test_records_outside_the_grammar_are_never_written(
    store: UploadStore, directory: Path, tmp_path: Path, sql: SQL
) -> None:
    """Every run reports and skips a record with an invalid name; nothing is ever written for it."""
    data = noise(100)
    await store.save("good.png", data)
    copied = "INSERT INTO image_storage SELECT :name, sha256, size, content_type, modified_ns, created_at, changed_at,"
    for name in INVALID_NAMES:
        await sql(f"{copied} generation, deleted_at, sequence FROM image_storage WHERE name = 'good.png'", name=name)
    database, before = await rows(sql), snapshot_of(tmp_path / "app")
    expected = dict.fromkeys(INVALID_NAMES, "invalid_name")
    runs = [
        bulk.restore(store),
        bulk.restore(store, verify=True),
        bulk.restore(store, dry_run=True),
        bulk.verify(store),
        bulk.verify(store, drill=True),
    ]
    for run in runs:
        report = await report_of(run)
        assert (report.problems, report.counts) == (expected, {"invalid_name": len(INVALID_NAMES), "ok": 1})
    assert (await report_of(bulk.migrate(store))).counts == {"ok": 1}
    assert snapshot_of(tmp_path / "app") == before
    assert await rows(sql) == database


async def test_an_invalid_name_is_reported_once(store: UploadStore, directory: Path, sql: SQL) -> None:
    """An invalid name on disk and in the database is reported once."""
    await store.save("good.png", noise(100))
    await sql("UPDATE image_storage SET name = 'CON'")
    (directory / "good.png").rename(directory / "CON")
    for run in (bulk.verify(store), bulk.restore(store)):
        assert (await report_of(run)).problems == {"CON": "invalid_name"}


# -- damaged chunks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_a_damaged_chunk_digest(store: UploadStore, directory: Path, sql: SQL, size: int) -> None:
    """A digest that does not fit its chunk is reported and mended; a file that is restored is whole."""
    data = noise(size)
    await store.save("a.png", data)
    await sql("UPDATE image_chunk SET digest = :digest WHERE position = :last", digest=b"\0" * 32, last=size // CHUNK)
    assert (await report_of(bulk.verify(store))).problems == {"a.png": "corrupt_in_database"}
    kept = (directory / "a.png").rename(directory.parent / "kept.png")
    report = await report_of(bulk.restore(store))
    if report.counts == {"restored": 1}:
        assert (directory / "a.png").read_bytes() == data
    else:
        assert report.problems == {"a.png": "corrupt_in_database"}
        assert not (directory / "a.png").exists()
        kept.rename(directory / "a.png")
    assert (await report_of(bulk.migrate(store))).counts == {"migrated": 1}
    assert (await report_of(bulk.verify(store))).counts == {"ok": 1}


# -- dry runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        lambda store, dry_run: bulk.migrate(store, dry_run=dry_run),
        lambda store, dry_run: bulk.migrate(store, prefer_disk=True, dry_run=dry_run),
        lambda store, dry_run: bulk.restore(store, dry_run=dry_run),
        lambda store, dry_run: bulk.restore(store, verify=True, dry_run=dry_run),
    ],
    ids=["migrate", "migrate prefer disk", "restore", "restore verify"],
)
async def test_a_dry_run(damaged_disk: DamagedDisk, store: UploadStore, tmp_path: Path, sql: SQL, run: Any) -> None:
    """No byte, mtime or row changes, and the real run after it does what the dry run has reported."""
    for damage in ("data flipped", "blob row missing"):
        write_file(store.disk.path / f"{damage}/1.png", noise(5000, damage))
        await store.adopt(f"{damage}/1.png")
        await damage_record(sql, f"{damage}/1.png", noise(5000, damage))
    before, database = snapshot_of(tmp_path), await rows(sql)
    report = await report_of(run(store, True))
    assert snapshot_of(tmp_path) == before  # the SQLite file is in it
    assert await rows(sql) == database
    real = await report_of(run(store, False))
    done = {name for name, outcome in report.outcomes.items() if outcome in ("restored", "migrated", "deleted")}
    assert {name: real.outcomes[name] for name in done} == {name: report.outcomes[name] for name in done}
    assert {name for name, outcome in real.outcomes.items() if outcome == "ok"} == {
        name for name, outcome in report.outcomes.items() if outcome == "ok"
    }


# -- changes and failures during a run --------------------------------------------------------------------------------


async def test_a_database_that_goes_away_ends_the_run(
    store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown is not absent: a run whose database stops answering raises, and reports no name as missing."""
    for index in range(4):
        await store.save(f"{index}.bin", noise(LARGE, index))
    await store.save("small.png", noise(10))
    remove_tree(directory)

    async def fail(*_: object, **__: object) -> Any:
        raise DatabaseUnavailable("gone")

    async def fail_reading(*_: object, **__: object) -> AsyncIterator[bytes]:
        raise DatabaseUnavailable("gone")
        yield b""

    for reading in ("read", "read_unchecked"):
        monkeypatch.setattr(store.database.blobs, reading, fail_reading)
    for run in (bulk.restore(store), bulk.verify(store), bulk.verify(store, drill=True)):
        with pytest.raises(DatabaseUnavailable):
            await report_of(run)
    monkeypatch.setattr(store.database.blobs, "fetch", fail)
    for run in (bulk.restore(store), bulk.verify(store)):
        with pytest.raises(DatabaseUnavailable):
            await report_of(run)
    assert list(directory.rglob("*.bin")) == []
    assert own_files_below(directory) == []


@pytest.mark.parametrize("change", ["overwrite", "delete"])
@pytest.mark.parametrize(
    "run",
    [
        bulk.verify,
        partial(bulk.verify, drill=True),
        bulk.migrate,
        bulk.restore,
        partial(bulk.restore, verify=True),
    ],
    ids=["verify", "drill", "migrate", "restore", "restore verify"],
)
async def test_a_change_under_way_is_no_damage(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch, change: str, run: Any
) -> None:
    """A name that is overwritten or deleted while a run compares it is compared again, and is no problem."""
    store, changed = sqlite_store, set[str]()

    async def change_once(name: str) -> None:
        if name not in changed:
            changed.add(name)
            await (store.save(name, noise(LARGE, f"new {name}")) if change == "overwrite" else store.delete(name))

    async def old_records(wanted: Any) -> Any:
        found = await fetch(wanted)
        for name in found:
            await change_once(name)
        return found

    async def old_names(key_range: Any, **which: Any) -> list[tuple[str, int]]:
        found = await names_in(key_range, **which)
        for name, _ in found:
            if not which.get("deleted") and run not in (bulk.verify, bulk.migrate):
                await change_once(name)
        return found

    async def old_summary(key_range: Any) -> Any:
        found = await summary_of(key_range)
        for name in found.lines.split("\n"):
            await change_once(name)
        return found

    for name in ("small.png", "large.bin"):
        await store.save(name, noise(LARGE if name == "large.bin" else SMALL, name))
    fetch, catalogue = store.database.blobs.fetch, store.database.catalogue
    names_in, summary_of = catalogue.names_in, catalogue.summary
    monkeypatch.setattr(store.database.blobs, "fetch", old_records)
    monkeypatch.setattr(store.database.catalogue, "names_in", old_names)
    monkeypatch.setattr(store.database.catalogue, "summary", old_summary)
    report = await report_of(run(store))
    assert report.problems == {}
    assert changed == {"small.png", "large.bin"}
    for name in changed:
        there = store.disk.path_of(name)
        assert not there.exists() if change == "delete" else there.read_bytes() == noise(LARGE, f"new {name}")
    assert quarantine_of(store) == []
