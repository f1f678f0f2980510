"""Files that are no uploads are counted and left alone; what was recorded is never hidden."""

from __future__ import annotations

from pathlib import Path

from selfheal import UploadStore, bulk
from tests.support.files import noise, snapshot_of, write_file
from tests.support.runs import remove_tree, report_of

LITTER = (".htaccess", "cats/._tom.png", "@eaDir/x.png", "Thumbs.db", "movie.mp4.part", "CACHE/1.jpg", "notes.txt~")


async def test_litter_is_no_problem_and_not_stored(store: UploadStore, directory: Path) -> None:
    """No run reports litter or changes it; nothing of it is in the database."""
    for name in (*LITTER, "cats/tom.png", ".git/objects/1", ".git/objects/2"):
        write_file(directory / name, noise(10, name))
    before = snapshot_of(directory)
    for run in (bulk.migrate(store, dry_run=True), bulk.migrate(store), bulk.verify(store), bulk.migrate(store)):
        report = await report_of(run)
        assert report.problems == {}
        assert {name for name, outcome in report.outcomes.items() if outcome == "skipped"} == {*LITTER, ".git"}
        assert report.counts["skipped"] == len(LITTER) + 1
    assert await store.database.count() == 1
    assert (await report_of(bulk.restore(store, verify=True))).counts == {"ok": 1}
    assert snapshot_of(directory) == before


async def test_recorded_litter_is_not_hidden(store: UploadStore, directory: Path) -> None:
    """A name that has a record is compared and restored, whatever it looks like; a deleted one stays deleted."""
    recorded = [name for name in LITTER if not name.startswith(".") and "/." not in name]
    for name in (*recorded, "old~"):
        await store.save(name, noise(10, name))
    await store.delete("old~")
    assert (await report_of(bulk.migrate(store))).outcomes == dict.fromkeys(recorded, "ok")
    write_file(directory / recorded[0], noise(10, "other"))
    write_file(directory / "old~", noise(10))
    for run in (bulk.migrate(store), bulk.verify(store)):
        assert (await report_of(run)).problems == {recorded[0]: "differs", "old~": "deleted"}
    remove_tree(directory)
    assert (await report_of(bulk.verify(store))).problems == dict.fromkeys(recorded, "missing_on_disk")
    assert (await report_of(bulk.restore(store))).counts == {"restored": len(recorded)}


async def test_exclusions_of_the_store(directory: Path, database_url: str) -> None:
    """What the store excludes is not stored; what is recorded already is compared and restored all the same."""
    async with UploadStore(directory, database_url, settled_after=0.0, exclude=["*.tmp", "thumbs/*"]) as store:
        await store.database.create_tables()
        await store.save("thumbs/old.png", noise(10))
        for name in ("a.png", "a.tmp", "cats/thumbs.png", "thumbs/new.png"):
            write_file(directory / name, noise(10, name))
        report = await report_of(bulk.migrate(store))
        stored = {"a.png": "migrated", "cats/thumbs.png": "migrated", "thumbs/old.png": "ok"}
        assert report.outcomes == stored | {"a.tmp": "skipped", "thumbs/new.png": "skipped"}
        remove_tree(directory)
        assert (await report_of(bulk.restore(store))).counts == {"restored": 3}


async def test_what_a_run_excludes(store: UploadStore, directory: Path) -> None:
    """The globs of a run leave names alone on both sides, recorded or not, deleted or not."""
    for name in ("videos/1.mp4", "videos/2.mp4", "videos/deleted.mp4", "a.png"):
        await store.save(name, noise(10, name))
    await store.delete("videos/deleted.mp4")
    write_file(directory / "videos/deleted.mp4", noise(10))
    write_file(directory / "videos/new.mp4", noise(10))
    write_file(directory / "videos/1.mp4", noise(11))
    exclude = ["videos"]
    before = snapshot_of(directory)
    for run in (bulk.migrate(store, exclude=exclude), bulk.verify(store, exclude=exclude)):
        assert (await report_of(run)).counts == {"ok": 1, "skipped": 4}
    for verify in (False, True):
        assert (await report_of(bulk.restore(store, verify=verify, exclude=exclude))).counts == {"ok": 1, "skipped": 2}
    assert snapshot_of(directory) == before
    remove_tree(directory)
    assert (await report_of(bulk.restore(store, exclude=exclude))).counts == {"restored": 1, "skipped": 2}
    assert (await report_of(bulk.restore(store))).counts == {"ok": 1, "restored": 2}
