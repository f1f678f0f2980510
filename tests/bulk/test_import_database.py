"""Import from another selfheal database: SQLite and PostgreSQL, both ways, again and again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from selfheal import ImageStorage, UploadStore, bulk
from selfheal.bulk.import_database import DatabaseSource
from selfheal.sql.models import Version
from tests.healing.test_changes import follow_until
from tests.support.asgi import ask
from tests.support.constants import set_constants
from tests.support.middleware import PREFIX, wrapping
from tests.support.raw_sql import sql
from tests.support.runs import Report, report_of
from tests.support.store_requests import hit_and_settle
from tests.support.store_state import on_disk
from tests.support.transfers import LARGE, NAMES, bytes_of, damage, fill, state_of

PAIRS = [("sqlite", "postgres"), ("postgres", "sqlite"), ("sqlite", "sqlite"), ("postgres", "postgres")]


@pytest.fixture(params=PAIRS, ids=[" to ".join(pair) for pair in PAIRS])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[ImageStorage, ImageStorage]]:
    """A source, and a target in another database or under another table prefix."""
    urls = [request.getfixturevalue(f"{kind}_url") for kind in request.param]
    source, target = ImageStorage(urls[0]), ImageStorage(urls[1], table_prefix="copy_")
    for database in (source, target):
        database.home.settle()
    await source.create_tables()
    yield source, target
    await source.close()
    await target.close()


@pytest.fixture
def source(pair: tuple[ImageStorage, ImageStorage]) -> ImageStorage:
    """The database that is copied."""
    return pair[0]


@pytest.fixture
def target(pair: tuple[ImageStorage, ImageStorage]) -> ImageStorage:
    """The database that it is copied to; it has no tables yet."""
    return pair[1]


async def copied(source: ImageStorage, target: ImageStorage, **options: Any) -> Report:
    """Import everything, and return the report."""
    return await report_of(bulk.import_all(target, DatabaseSource(source), **options))


async def test_everything_is_copied(source: ImageStorage, target: ImageStorage) -> None:
    """Records, tombstones, history and bytes are the same after a copy, and all times; again changes nothing."""
    await fill(source)
    before = await state_of(source)
    assert (await copied(source, target)).counts == {"migrated": NAMES}
    assert await state_of(target) == before
    assert await state_of(source) == before
    again = await copied(source, target)
    assert (again.counts, again.problems) == ({"ok": NAMES}, {})
    assert await state_of(target) == before
    record = await target.undo("a.png", 1)
    assert await bytes_of(target, record) == b"one"
    assert await bytes_of(target, await target.undo("gone.png")) == b"gone"


async def test_a_dry_run(source: ImageStorage, target: ImageStorage) -> None:
    """A dry run says what would be copied, needs no tables, and makes none."""
    await fill(source)
    if target.backend.file(target.url) == source.backend.file(source.url):
        assert (await copied(source, target, dry_run=True)).counts == {"migrated": NAMES}
        assert "copy_image_storage" not in await tables_of(target)
    await target.create_tables()
    await target.store_image("a.png", b"mine")
    before = await state_of(target)
    assert (await copied(source, target, dry_run=True)).problems == {"a.png": "differs"}
    assert await state_of(target) == before


async def tables_of(database: ImageStorage) -> list[str]:
    """Return the names of the tables in a database."""
    url = database.url.render_as_string(hide_password=False)
    catalogue = "sqlite_master" if url.startswith("sqlite") else "pg_class"
    column = "name" if url.startswith("sqlite") else "relname"
    return [row[0] for row in await sql(url, f"SELECT {column} FROM {catalogue}")]


async def test_the_source_goes_on(source: ImageStorage, target: ImageStorage) -> None:
    """What happened in the source after a copy comes with the next one: overwrites, deletions, new saves, undos."""
    await fill(source)
    await copied(source, target)
    await source.store_image("a.png", b"three")
    await source.bury("cats/tom.jpg")
    await source.store_image("gone.png", b"saved anew")
    await source.store_image("new.png", b"new")
    await source.undo("aside.png")
    report = await copied(source, target)
    assert (report.counts, report.problems) == ({"migrated": 5, "ok": NAMES - 4}, {})
    assert await state_of(target) == await state_of(source)


async def test_every_change_is_numbered(source: ImageStorage, target: ImageStorage) -> None:
    """Other nodes of the target see each copied name in the sequence of changes."""
    await fill(source)
    await copied(source, target)
    assert {name for name, _ in await target.changes.after(0, 100)} == set(await state_of(source))
    assert not (await target.changes.position()).has_unnumbered


async def test_headers_are_the_same_after_an_import(source: ImageStorage, target: ImageStorage, tmp_path: Path) -> None:
    """The copy answers with the same bytes, ETag, Last-Modified and Content-Type, and 404 for what was deleted."""
    await fill(source)
    await copied(source, target)
    stores = [
        UploadStore(tmp_path / "before", source.url),
        UploadStore(tmp_path / "after", target.url, table_prefix="copy_"),
    ]
    for name in ("a.png", "cats/tom.jpg", "back.png", "empty.gif", "gone.png", "aside.png"):
        before, after = [await ask(wrapping(store, True), f"{PREFIX}/{name}") for store in stores]
        assert before.status == (404 if name in ("gone.png", "aside.png") else 200)
        assert (after.status, after.headers, after.body) == (before.status, before.headers, before.body)
    for store in stores:
        await store.close()


async def test_nodes_follow_an_import(store: UploadStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with copies on its disk replaces, retimes and removes them after an import into its database."""
    set_constants(monkeypatch, FOLLOW_EVERY=0.05, PAUSE=0.2)
    source = ImageStorage(f"sqlite+aiosqlite:///{tmp_path}/source.db")
    source.home.settle()
    await source.create_tables()
    for name in ("new.png", "time.png", "gone.png"):
        await source.store_image(name, b"old", modified_ns=10**18)
    await copied(source, store.database)
    for name in ("new.png", "gone.png"):
        await store.restore(name)
    await store.save("same.png", b"same")
    await source.store_image("same.png", b"same", modified_ns=10**18)
    for name in ("new.png", "gone.png", "same.png"):
        await hit_and_settle(store, name)
    await source.store_image("new.png", b"new", modified_ns=10**18)
    await source.bury("gone.png")
    assert not (await copied(source, store.database)).problems
    await follow_until(store, lambda: (on_disk(store, "new.png"), on_disk(store, "gone.png")) == (b"new", None))
    await follow_until(store, lambda: store.disk.path_of("same.png").stat().st_mtime_ns == 10**18)
    await source.close()


# -- what the target has already --------------------------------------------------------------------------------------


async def test_what_the_target_changed_stays(source: ImageStorage, target: ImageStorage) -> None:
    """A record that the target changed after a copy is not replaced; it is reported, and no bytes are lost."""
    await fill(source)
    await copied(source, target)
    await target.store_image("a.png", b"newer here")
    await source.store_image("same.jpg", b"newer there")
    await target.store_image("same.jpg", b"newer here too")
    for _ in range(2):
        assert (await copied(source, target)).problems == {"a.png": "differs", "same.jpg": "differs"}
        state = await state_of(target)
        assert (state["a.png"][2], state["same.jpg"][2]) == (b"newer here", b"newer here too")
        assert b"newer there" in state["same.jpg"][3]
        assert len(state["same.jpg"][3]) == 2
    aside = next(one for one in state["same.jpg"][1] if one.reason)
    assert await bytes_of(target, await target.undo("same.jpg", aside.generation)) == b"newer there"


async def test_names_that_both_have(source: ImageStorage, target: ImageStorage) -> None:
    """Other bytes under one name: those of the target stay, those of the source and its history become versions."""
    await target.create_tables()
    await source.store_image("a.png", b"theirs 1")
    await source.store_image("a.png", b"theirs 2")
    await target.store_image("a.png", b"ours")
    for _ in range(2):
        assert (await copied(source, target)).problems == {"a.png": "differs"}
        _, versions, now, before = (await state_of(target))["a.png"]
        assert now == b"ours"
        assert before == [b"theirs 2", b"theirs 1"]
        assert {one.reason for one in versions} == {"imported; the name had other bytes"}


async def test_equal_bytes_get_the_history(source: ImageStorage, target: ImageStorage) -> None:
    """A name that the target has with the same bytes, from its disk, gets the record and the history of the source."""
    await target.create_tables()
    await source.store_image("a.png", b"one")
    await source.store_image("a.png", b"two")
    await target.store_image("a.png", b"two")
    assert (await copied(source, target)).counts == {"migrated": 1}
    assert await state_of(target) == await state_of(source)


async def test_deleted_stays_deleted(source: ImageStorage, target: ImageStorage) -> None:
    """A name that was deleted in the target is not brought back, also after several copies; its bytes are versions."""
    await target.create_tables()
    await source.store_image("a.png", b"theirs")
    await source.store_image("b.png", b"b")
    await target.store_image("a.png", b"ours")
    await target.bury("a.png")
    await copied(source, target)
    await target.bury("b.png")
    await source.store_image("b.png", b"b 2")
    for _ in range(2):
        assert (await copied(source, target)).problems == {"a.png": "deleted", "b.png": "deleted"}
        state = await state_of(target)
        assert state["a.png"][0].is_deleted
        assert state["b.png"][0].is_deleted
        assert sorted(state["a.png"][3]) == [b"ours", b"theirs"]
        assert sorted(state["b.png"][3]) == [b"b", b"b 2"]


async def test_a_deletion_of_the_source_does_not_delete_another_upload(
    source: ImageStorage, target: ImageStorage
) -> None:
    """A tombstone of the source deletes only what it deleted there."""
    await target.create_tables()
    await source.store_image("a.png", b"theirs")
    await source.bury("a.png")
    await target.store_image("a.png", b"ours")
    assert (await copied(source, target)).problems == {"a.png": "differs"}
    assert (await state_of(target))["a.png"][2:] == (b"ours", [b"theirs"])


async def test_a_file_and_a_directory(source: ImageStorage, target: ImageStorage) -> None:
    """A name that is a directory of the target is refused alone."""
    await target.create_tables()
    await target.store_image("a/b.png", b"b")
    await source.store_image("a", b"a")
    await source.store_image("c.png", b"c")
    report = await copied(source, target)
    assert report.outcomes == {"a": "failed", "c.png": "migrated"}
    (detail,) = (result.detail for result in report.results if result.is_problem)
    assert "'a/b.png' is, and a name cannot be a file and a directory" in detail
    assert set(await state_of(target)) == {"a/b.png", "c.png"}


# -- damage -----------------------------------------------------------------------------------------------------------


async def test_damage_in_the_source(source: ImageStorage, target: ImageStorage) -> None:
    """Damaged bytes of the source are reported by name, again and again, and never copied; everything else is."""
    await fill(source)
    state = await state_of(source)
    await damage(source, "image_chunk", LARGE)
    await damage(source, "image_chunk", b"one")
    expected = dict.fromkeys(("cats/tom.jpg", "same.jpg", "a.png"), "corrupt_in_database")
    for _ in range(2):
        report = await copied(source, target)
        assert report.problems == expected
        assert set(report.outcomes) == set(state)
    assert await target.find("cats/tom.jpg") is None
    record = await target.find("a.png")
    assert record == state["a.png"][0]
    assert await bytes_of(target, record) == b"two"
    assert len(await target.history("a.png")) == 1


async def test_a_deletion_and_a_purge_meanwhile(
    source: ImageStorage, target: ImageStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is deleted and purged in the source after it was read is no damage, and is for the next run."""
    await fill(source)
    history = source.history

    async def and_purge(name: str) -> list[Version]:
        versions = await history(name)
        monkeypatch.undo()
        await source.bury("a.png")
        await sql(source.url, "DELETE FROM image_history WHERE name = 'a.png'")
        await source.purge(timedelta(days=99), grace=timedelta(0))
        return versions

    monkeypatch.setattr(source, "history", and_purge)
    report = await copied(source, target)
    assert report.problems == {"a.png": "failed"}
    again = await copied(source, target)
    assert (again.problems, again.outcomes["a.png"]) == ({}, "migrated")
    assert await state_of(target) == await state_of(source)


async def test_a_purge_of_versions_meanwhile(
    source: ImageStorage, target: ImageStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions that are purged from the source after its history was read are left out, and are no damage."""
    await fill(source)
    history = source.history

    async def and_purge(name: str) -> list[Version]:
        versions = await history(name)
        monkeypatch.undo()
        await sql(source.url, "DELETE FROM image_history WHERE name = 'a.png'")
        await source.purge(timedelta(days=99), grace=timedelta(0))
        return versions

    monkeypatch.setattr(source, "history", and_purge)
    assert not (await copied(source, target)).problems
    assert await state_of(target) == await state_of(source)


async def test_damage_in_the_target_is_mended(source: ImageStorage, target: ImageStorage) -> None:
    """A second copy finds damaged bytes in the target and stores them again, of records and of their history."""
    await fill(source)
    await copied(source, target)
    await damage(target, "copy_image_chunk", LARGE)
    await damage(target, "copy_image_chunk", b"gone")
    report = await copied(source, target)
    mended = report.counts["migrated"]  # two names have the same bytes: they are mended by one of them, or by both
    assert (mended in (2, 3), report.counts["ok"], report.problems) == (True, NAMES - mended, {})
    assert await state_of(target) == await state_of(source)


async def test_invalid_names(source: ImageStorage, target: ImageStorage) -> None:
    """A record outside the grammar, which another program wrote, is reported and not copied."""
    await source.store_image("a.png", b"a")
    url = source.url.render_as_string(hide_password=False)
    await sql(
        url,
        "INSERT INTO image_storage (name, sha256, size, content_type, modified_ns) VALUES ('../x', 'x', 1, 'b/c', 2)",
    )
    assert (await copied(source, target)).outcomes == {"../x": "invalid_name", "a.png": "migrated"}
