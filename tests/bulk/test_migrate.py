"""Migrate, disk → database: files without a record are adopted, damaged blobs are mended, nothing is guessed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from selfheal import SchemaError, UploadStore, bulk
from selfheal.content.sources import CHUNK
from tests.support.damage import (
    BYTES_DAMAGED,
    DELETED,
    DIFFERENT,
    HEALTHY,
    NO_UPLOADS,
    NOT_RECORDED,
    RECORD_WRONG,
    SKIPPED,
    DamagedDisk,
    damage_of,
    sha256_of,
)
from tests.support.disk_files import contents_below
from tests.support.files import MODIFIED_NS, flip_a_bit, noise, snapshot_of, write_file
from tests.support.runs import SQL, outcomes, remove_tree, report_of, rows


async def test_migrate_adopts_and_guesses_nothing(
    damaged_disk: DamagedDisk, store: UploadStore, directory: Path, sql: SQL
) -> None:
    """Files that only the disk has are adopted; differing and deleted ones are reported and left as they are."""
    before, records = snapshot_of(directory.parent), await sql("SELECT * FROM image_storage ORDER BY name")
    report = await report_of(bulk.migrate(store))
    problems = NO_UPLOADS | outcomes(differs=DIFFERENT, deleted=DELETED, failed=("linked.png", "fifo.png"))
    assert report.problems == problems
    assert report.counts == dict(Counter(problems.values())) | {
        "migrated": len(NOT_RECORDED),
        "ok": len(HEALTHY) + 1,
        "skipped": len(SKIPPED),
    }
    assert snapshot_of(directory.parent) == before
    adopted = await sql("SELECT name, size, modified_ns, generation FROM image_storage WHERE name LIKE '%extra%'")
    assert sorted(adopted) == sorted((name, (directory / name).stat().st_size, MODIFIED_NS, 1) for name in NOT_RECORDED)
    known = {name for name, *_ in records}
    assert [row for row in await sql("SELECT * FROM image_storage ORDER BY name") if row[0] in known] == records

    database = await rows(sql)
    again = await report_of(bulk.migrate(store))
    assert (again.problems, again.counts.get("migrated")) == (problems, None)
    assert (snapshot_of(directory.parent), await rows(sql)) == (before, database)


async def test_migrate_prefers_disk(damaged_disk: DamagedDisk, store: UploadStore, directory: Path, sql: SQL) -> None:
    """`--prefer disk` makes the file's bytes the next generation and keeps the old ones in the history, once."""
    before = contents_below(directory.parent)
    report = await report_of(bulk.migrate(store, prefer_disk=True))
    assert report.problems == NO_UPLOADS | outcomes(deleted=DELETED, failed=("linked.png", "fifo.png"))
    assert report.counts["migrated"] == len(NOT_RECORDED) + len(DIFFERENT)
    assert contents_below(directory.parent) == before
    for name in DIFFERENT:
        record = await store.database.find(name)
        assert record is not None
        assert (record.sha256, record.generation) == (sha256_of((directory / name).read_bytes()), 2)
        assert [version.sha256 for version in await store.database.history(name)] == [
            sha256_of(damaged_disk.images[name])
        ]
    files, database = snapshot_of(directory.parent), await rows(sql)
    again = await report_of(bulk.migrate(store, prefer_disk=True))
    assert (again.problems, again.counts.get("migrated")) == (report.problems, None)
    assert (snapshot_of(directory.parent), await rows(sql)) == (files, database)


async def test_migrate_mends_from_good_files(
    damaged_database: dict[str, bytes], store: UploadStore, directory: Path, sql: SQL
) -> None:
    """A damaged blob is written again from the file whose digest matches; a second run finds nothing to do."""
    records, files = await sql("SELECT * FROM image_storage ORDER BY name"), snapshot_of(directory.parent)
    wrong = {name: "corrupt_in_database" for name in damaged_database if damage_of(name) in RECORD_WRONG}
    report = await report_of(bulk.migrate(store))
    assert report.problems == wrong
    assert report.counts == {
        "migrated": len(damaged_database) - len(wrong),
        "corrupt_in_database": len(wrong),
        "ok": 1,
    }
    assert await sql("SELECT * FROM image_storage ORDER BY name") == records
    assert snapshot_of(directory.parent) == files

    database = await rows(sql)
    again = await report_of(bulk.migrate(store))
    assert (again.problems, again.counts.get("migrated")) == (wrong, None)
    assert (snapshot_of(directory.parent), await rows(sql)) == (files, database)

    remove_tree(directory)
    restored = await report_of(bulk.restore(store))
    assert restored.problems == wrong
    for name in damaged_database.keys() - wrong.keys():
        assert (directory / name).read_bytes() == damaged_database[name], name


async def test_migrate_does_not_mend_from_bad_files(
    damaged_database: dict[str, bytes], store: UploadStore, directory: Path, sql: SQL
) -> None:
    """If the file is damaged too, both stay and the name is reported; `--prefer disk` takes the file."""
    damaged = {name: data for name, data in damaged_database.items() if damage_of(name) in BYTES_DAMAGED}
    for name in damaged:
        flip_a_bit(directory / name)
    files, contents = snapshot_of(directory.parent), contents_below(directory.parent)
    report = await report_of(bulk.migrate(store))
    assert report.problems.keys() >= damaged.keys()
    assert {report.outcomes[name] for name in damaged} == {"corrupt_in_database"}
    database = await rows(sql)
    assert (await report_of(bulk.migrate(store))).problems == report.problems
    assert (snapshot_of(directory.parent), await rows(sql)) == (files, database)

    preferred = await report_of(bulk.migrate(store, prefer_disk=True))
    assert {preferred.outcomes[name] for name in damaged} == {"migrated"}
    assert (await report_of(bulk.verify(store))).problems.keys() & damaged.keys() == set()
    assert contents_below(directory.parent) == contents


async def test_a_dry_migration_needs_no_tables(directory: Path, database_url: str, sql: SQL) -> None:
    """Before the first real run a dry one reports what it would adopt and makes no table; other runs refuse."""
    write_file(directory / "a.png", noise(100))
    write_file(directory / "b/huge.bin", noise(5 * 2**20))
    async with UploadStore(directory, database_url) as store:
        report = await report_of(bulk.migrate(store, dry_run=True))
        assert (report.counts, report.problems) == ({"migrated": 2}, {})
        for run in (bulk.restore(store), bulk.verify(store)):
            with pytest.raises(SchemaError, match="selfheal migrate"):
                await report_of(run)
        with pytest.raises(Exception, match="image_storage"):
            await sql("SELECT 1 FROM image_storage")
        assert (await report_of(bulk.migrate(store))).counts == {"migrated": 2}


@pytest.mark.parametrize(("living", "new"), [("album/1.png", "album"), ("album", "album/1.png")])
@pytest.mark.parametrize("size", [9, 3 * CHUNK])
async def test_migrate_beside_a_name_of_the_database(
    store: UploadStore, directory: Path, living: str, new: str, size: int
) -> None:
    """A file where the database has a directory, or the reverse, is refused alone: no disk could hold both names."""
    await store.save(living, b"living")
    await store.disk.threads.run(store.disk.remove, living)
    for name in (new, "b.png", "c.png"):
        write_file(directory / name, noise(size))
    report = await report_of(bulk.migrate(store))
    assert report.outcomes == {new: "failed", "b.png": "migrated", "c.png": "migrated"}
    (detail,) = (result.detail for result in report.results if result.is_problem)
    assert "a name cannot be a file and a directory" in detail
    assert await store.database.find(new) is None
    assert (directory / new).read_bytes() == noise(size)
