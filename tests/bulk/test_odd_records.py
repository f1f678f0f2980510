"""Records that other programs wrote: a value of another type or out of range spoils no other name."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from selfheal import UploadStore, bulk
from selfheal.bulk.outcomes import Result
from selfheal.scripts.reporting import moment, plain
from selfheal.sql.sqlite import SQLite
from tests.support.files import noise, write_file
from tests.support.postgres import PostgresServer
from tests.support.runs import remove_tree, report_of

RUNS: dict[str, Callable[[UploadStore], AsyncGenerator[Result, None]]] = {
    "verify": bulk.verify,
    "drill": partial(bulk.verify, drill=True),
    "migrate dry": partial(bulk.migrate, dry_run=True),
    "migrate": bulk.migrate,
    "restore dry": partial(bulk.restore, dry_run=True),
    "restore verify dry": partial(bulk.restore, verify=True, dry_run=True),
    "restore": bulk.restore,
    "restore verify": partial(bulk.restore, verify=True),
}
COLUMNS = {
    "image_storage": "name sha256 size content_type modified_ns created_at changed_at generation deleted_at",
    "image_blob": "sha256 size chunks stored_at",
    "image_chunk": "sha256 position digest data stored_at",
    "image_history": "name generation sha256 size content_type modified_ns replaced_at",
}
OTHER_TYPES = ("x'61ff'", "'abc'", "9.5", "9e999", "''", "CAST(x'61ff' AS TEXT)", "-9223372036854775808")


@pytest.fixture
async def loose_store(directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[UploadStore]:
    """A store whose SQLite tables are not STRICT, as an SQLite before 3.37 or another program makes them."""
    monkeypatch.setattr(SQLite, "table_options", lambda _: {})
    async with UploadStore(directory, sqlite_url, settled_after=0.0) as store:
        await store.database.create_tables()
        yield store


async def _fill(store: UploadStore) -> None:
    for name in ("a.jpg", "b.jpg"):
        await store.save(name, noise(50, f"old {name}"))
        await store.save(name, noise(60, name))


async def _assert_that_all_else_is_done(store: UploadStore) -> None:
    """Let every run, the list and the history pass, with the files and without; the good name is always right."""
    for is_there in (True, False):
        for label, run in RUNS.items():
            if not is_there:
                for path in store.disk.path.iterdir():
                    path.unlink()
            report = await report_of(run(store))
            good = {"ok"} if is_there else {"restored", "missing_on_disk"}
            if is_there or not label.startswith("migrate"):  # which looks at what is on the disk
                assert report.outcomes.get("b.jpg", "ok") in good, (label, report.outcomes)
    listed = [record async for page in store.database.pages(deleted=None) for record in page]
    assert "b.jpg" in [record.name for record in listed]
    assert all(moment(record.modified_ns) and json.dumps(plain(record)) for record in listed)
    for version in await store.database.history("a.jpg"):
        assert json.dumps(plain(version))


@pytest.mark.parametrize("value", OTHER_TYPES)
@pytest.mark.parametrize(
    ("table", "column"), [(table, column) for table, columns in COLUMNS.items() for column in columns.split()]
)
async def test_a_value_of_another_type(loose_store: UploadStore, table: str, column: str, value: str) -> None:
    """No field of any table that is of another type ends a run, the list or the history."""
    store = loose_store
    await _fill(store)
    with closing(sqlite3.connect(str(store.database.url.database))) as connection:
        query = "SELECT sha256 FROM image_storage WHERE name = 'a.jpg'"
        which = f"sha256 = ({query})" if "name" not in COLUMNS[table] else "name = 'a.jpg'"
        connection.execute(f"UPDATE {table} SET {column} = {value} WHERE {which}")
        connection.commit()
    await _assert_that_all_else_is_done(store)
    await store.close()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("name = x'61ff'", {"\ufffdb'a\\xff'": "invalid_name"}),
        ("name = x'622e6a7067'", {"\ufffdb'b.jpg'": "invalid_name"}),
        ("size = 'many'", {"a.jpg": "corrupt_in_database"}),
        ("size = x'05'", {"a.jpg": "corrupt_in_database"}),
        ("size = 9.5", {"a.jpg": "corrupt_in_database"}),
        ("size = 9e999", {"a.jpg": "corrupt_in_database"}),
        ("sha256 = x'61ff'", {"a.jpg": "corrupt_in_database"}),
    ],
)
async def test_what_another_type_is_reported_as(
    loose_store: UploadStore, directory: Path, change: str, expected: dict[str, str]
) -> None:
    """A name or a size that is none is reported once by each run that looks for it, and nothing is written for it."""
    await _fill(loose_store)
    with closing(sqlite3.connect(str(loose_store.database.url.database))) as connection:
        connection.execute(f"UPDATE image_storage SET {change} WHERE name = 'a.jpg'")
        connection.commit()
    remove_tree(directory)
    verified = await report_of(bulk.verify(loose_store))
    assert verified.problems == expected | {"b.jpg": "missing_on_disk"}
    assert (await report_of(bulk.restore(loose_store))).problems == expected
    assert [path.name for path in directory.glob("[!.]*")] == ["b.jpg"]
    await loose_store.close()


OUT_OF_RANGE = {
    "image_storage": {
        **dict.fromkeys(("size", "modified_ns", "generation"), ("9223372036854775807", "-9223372036854775808")),
        **dict.fromkeys(("created_at", "changed_at", "deleted_at"), ("'infinity'", "'-infinity'", "'20000-01-01'")),
        "sha256": ("''", "'not a digest'"),
        "content_type": ("''", "'a\nb'"),
    },
    "image_blob": dict.fromkeys(("size", "chunks"), ("-1", "2147483647")) | {"stored_at": ("'infinity'",)},
    "image_chunk": {"position": ("-1", "2147483647"), "digest": ("''",), "data": ("''",), "stored_at": ("'infinity'",)},
    "image_history": {"size": ("-1",), "modified_ns": ("-9223372036854775808",), "replaced_at": ("'4000-01-01 BC'",)},
}


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        (table, column, value)
        for table, columns in OUT_OF_RANGE.items()
        for column, values in columns.items()
        for value in values
    ],
)
async def test_a_value_out_of_range(
    directory: Path, postgres_url: str, postgres: PostgresServer, table: str, column: str, value: str
) -> None:
    """No field of a PostgreSQL table that is out of range, for Python too, ends a run, the list or the history."""
    async with UploadStore(directory, postgres_url, settled_after=0.0) as store:
        await store.database.create_tables()
        await _fill(store)
        query = "SELECT sha256 FROM image_storage WHERE name = 'a.jpg'"
        which = f"sha256 = ({query})" if "name" not in COLUMNS[table] else "name = 'a.jpg'"
        postgres.sql(f"UPDATE {table} SET {column} = {value} WHERE {which}", str(store.database.url.database))
        await _assert_that_all_else_is_done(store)


async def test_a_name_that_the_encoding_of_the_database_lacks(directory: Path, postgres: PostgresServer) -> None:
    """In a LATIN1 database a name in other letters fails alone; all others are stored, compared and restored."""
    postgres.sql("DROP DATABASE IF EXISTS latin")
    postgres.sql("CREATE DATABASE latin ENCODING LATIN1 LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    names = [f"{number:02}.png" for number in range(40)] + ["größe.png"]
    for name in (*names, "日本.png", "写真/1.bin"):
        write_file(directory / name, noise(5 * 2**20 if name.endswith("bin") else 50, name))
    failed = {"日本.png": "failed", "写真/1.bin": "failed"}
    async with UploadStore(directory, postgres.url("latin"), settled_after=0.0) as store:
        report = await report_of(bulk.migrate(store))
        assert (report.problems, report.counts["migrated"]) == (failed, len(names))
        assert (await report_of(bulk.migrate(store, exclude=["日本*", "写真"]))).counts == {
            "ok": len(names),
            "skipped": 2,
        }
        assert (await report_of(bulk.verify(store))).problems == dict.fromkeys(failed, "missing_in_database")
        remove_tree(directory)
        assert (await report_of(bulk.restore(store))).counts == {"restored": len(names)}
    postgres.sql("DROP DATABASE latin WITH (FORCE)")
