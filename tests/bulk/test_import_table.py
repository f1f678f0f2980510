"""Import from a table of another app, of the same database or another one."""

from __future__ import annotations

import asyncio
import sys
import tracemalloc
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from selfheal import ForeignTables, ImageStorage, SettingsError, UploadStore, bulk
from selfheal.aio.threads import Threads
from selfheal.bulk.import_table import TableSource
from selfheal.bulk.importer import Items
from selfheal.bulk.new_uploads import new_upload
from selfheal.bulk.outcomes import Result
from selfheal.content.sources import CHUNK
from selfheal.errors import DatabaseUnavailable, FileChanged
from selfheal.sql import foreign_table
from selfheal.sql.foreign_table import ForeignColumns, ForeignTable
from tests.support.files import noise
from tests.support.raw_sql import sql

COLUMNS = ForeignColumns("image_storage", "filename", "image_data", "mimetype")
Rows = list[tuple[Any, ...]]


def bytes_type(url: str) -> str:
    """Return what a column of bytes is called."""
    return "BLOB" if url.startswith("sqlite") else "BYTEA"


async def make_table(url: str, rows: Rows, key: str = "id INTEGER PRIMARY KEY, ") -> None:
    """Make the table of another app, with a row for each name, bytes and type."""
    definition = f"{key}filename TEXT, image_data {bytes_type(url)}, mimetype TEXT"
    await sql(url, f"CREATE TABLE image_storage ({definition})")
    columns = "id, filename, image_data, mimetype" if key else "filename, image_data, mimetype"
    for number, row in enumerate(rows, 1):
        values = dict(zip(("n", "d", "t"), row, strict=True)) | (
            {"i": str(number) if "TEXT" in key else number} if key else {}
        )
        await sql(url, f"INSERT INTO image_storage ({columns}) VALUES ({':i, ' if key else ''}:n, :d, :t)", **values)


@pytest.fixture
async def target(database_url: str) -> AsyncIterator[ImageStorage]:
    """A database with tables of a prefix, beside the table of the other app."""
    database = ImageStorage(database_url, table_prefix="ours_")
    database.home.settle()
    yield database
    await database.close()


@pytest.fixture
async def take(target: ImageStorage, database_url: str) -> Callable[..., Awaitable[dict[str, Result]]]:
    """A function that imports the table, and returns the results by their names."""

    async def run(columns: ForeignColumns = COLUMNS, url: str = database_url, **options: Any) -> dict[str, Result]:
        table, threads = ForeignTable(url, columns, timeout=10.0), Threads()
        try:
            async with aclosing(bulk.import_all(target, TableSource(table, target, threads), **options)) as results:
                return {result.name: result async for result in results}
        finally:
            await table.close()
            threads.close()

    return run


async def bytes_of(database: ImageStorage, name: str) -> bytes | None:
    """Return the bytes of a name; None if it has none."""
    record = await database.find(name)
    if record is None or record.is_deleted:
        return None
    return b"".join([chunk async for chunk in database.read(record)])


def outcomes(results: dict[str, Result]) -> dict[str, str]:
    """Return the outcome of each name."""
    return {name: result.outcome.value for name, result in results.items()}


IMAGES = {"a.png": noise(9), "cats/tom.jpg": noise(3 * CHUNK + 1), "empty.gif": b"", "日本 1.webp": noise(CHUNK)}


async def test_every_row_is_copied(take: Any, target: ImageStorage, database_url: str) -> None:
    """Every row becomes an upload with the same bytes and its type, the table stays as it is, again changes nothing."""
    await make_table(database_url, [(name, data, "image/x-own") for name, data in IMAGES.items()])
    before = await sql(database_url, "SELECT * FROM image_storage ORDER BY id")
    without_prefix = ImageStorage(database_url)
    with pytest.raises(ForeignTables, match="columns id, filename, image_data, mimetype"):
        await without_prefix.create_tables()
    await without_prefix.close()
    assert outcomes(await take(dry_run=True)) == dict.fromkeys(IMAGES, "migrated")
    assert outcomes(await take()) == dict.fromkeys(IMAGES, "migrated")
    for name, data in IMAGES.items():
        assert await bytes_of(target, name) == data
        record = await target.find(name)
        assert record is not None
        assert record.content_type == "image/x-own"
    records = await target.catalogue.find(IMAGES)
    assert outcomes(await take()) == dict.fromkeys(IMAGES, "ok")
    assert await target.catalogue.find(IMAGES) == records
    assert await sql(database_url, "SELECT * FROM image_storage ORDER BY id") == before


@pytest.mark.parametrize("key", ["", "id INTEGER PRIMARY KEY, ", "id TEXT, mark TEXT DEFAULT 'x', "])
async def test_pages_and_pieces(
    take: Any, target: ImageStorage, database_url: str, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Many pages of rows, and many pieces of a value, with a simple key, a key of two columns, or without one."""
    monkeypatch.setattr(foreign_table, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(foreign_table, "PIECE", 1000)
    monkeypatch.setattr(foreign_table, "READ_WITH_ROW", 1000)
    images = {f"{number}.png": noise(number * 500) for number in range(1, 11)}
    rows = [(name, data, None) for name, data in images.items()]
    await make_table(database_url, rows, key)
    if "mark" in key:
        await sql(database_url, "ALTER TABLE image_storage RENAME TO plain")
        end = f"filename TEXT, image_data {bytes_type(database_url)}, mimetype TEXT, PRIMARY KEY (mark, id)"
        await sql(database_url, f"CREATE TABLE image_storage (id TEXT, mark TEXT, {end})")
        await sql(database_url, "INSERT INTO image_storage SELECT id, mark, filename, image_data, mimetype FROM plain")
    assert outcomes(await take()) == dict.fromkeys(images, "migrated")
    for name, data in images.items():
        assert await bytes_of(target, name) == data


async def test_another_database(take: Any, target: ImageStorage, sqlite_url: str, postgres_url: str) -> None:
    """The table may be in a database of another kind, in any form of its URL."""
    here = str(target.url.get_backend_name())
    there = postgres_url if here == "sqlite" else sqlite_url
    await make_table(there, [("a.png", b"a", "image/png")])
    short = there.replace("postgresql+asyncpg", "postgres").replace("sqlite+aiosqlite", "sqlite")
    assert outcomes(await take(url=short)) == {"a.png": "migrated"}
    assert await bytes_of(target, "a.png") == b"a"


async def test_names_are_mapped(take: Any, target: ImageStorage, database_url: str) -> None:
    """Names outside the grammar are mapped, each with its origin; what gives no name is reported."""
    rows: Rows = [("../x.png", b"1", None), ("a\\b.png", b"2", None), ("https://h/c.png?v=1", b"3", None)]
    rows += [("", b"4", None), (None, b"5", None), ("n" * 300, b"6", None), ("good.png", b"7", "no type\r\nX: y")]
    await make_table(database_url, rows)
    for outcome in ("migrated", "ok"):
        results = await take()
        assert {name: result.origin for name, result in results.items() if result.origin} == {
            "x.png": "../x.png",
            "a/b.png": "a\\b.png",
            "c.png": "https://h/c.png?v=1",
        }
        expected = dict.fromkeys(("x.png", "a/b.png", "c.png", "good.png"), outcome)
        assert outcomes(results) == expected | dict.fromkeys(("", "None", "n" * 300), "invalid_name")
    assert await bytes_of(target, "x.png") == b"1"
    record = await target.find("good.png")
    assert record is not None
    assert record.content_type == "image/png"


async def test_names_that_become_equal(take: Any, target: ImageStorage, database_url: str) -> None:
    """A valid name wins over one that is mapped to it; a mapped name with other bytes gets a name of its own."""
    rows: Rows = [("../x.png", b"mapped", None), ("x.png", b"exact", None), ("/x.png", b"exact", None)]
    await make_table(database_url, rows)
    for outcome in ("migrated", "ok"):
        results = await take()
        other = next(name for name in results if name != "x.png")
        assert (other, results[other].outcome) == (f"x-{other[2:10]}.png", outcome)
        assert await bytes_of(target, "x.png") == b"exact"
        assert await bytes_of(target, other) == b"mapped"
    await target.bury(other)
    assert outcomes(await take())["x.png"] == "ok"
    assert await bytes_of(target, other) is None


async def test_two_rows_of_one_name(take: Any, target: ImageStorage, database_url: str) -> None:
    """The bytes of the second row of a name become a version of it: nothing is lost."""
    await make_table(database_url, [("x.png", b"first", None), ("x.png", b"second", None)])
    for _ in range(2):
        assert outcomes(await take()) == {"x.png": "differs"}
        assert await bytes_of(target, "x.png") == b"first"
        (version,) = await target.history("x.png")
        assert b"".join([chunk async for chunk in target.read(version)]) == b"second"


@pytest.mark.parametrize("end", [")", ") WITHOUT ROWID"])
async def test_keys_of_sqlite(
    take: Any, target: ImageStorage, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Many rows whose key is NULL, which only SQLite allows, and a table whose rows have no number."""
    monkeypatch.setattr(foreign_table, "ROWS_AT_ONCE", 2)
    columns = "filename TEXT, image_data BLOB, mimetype TEXT, id TEXT PRIMARY KEY"
    await sql(sqlite_url, f"CREATE TABLE image_storage ({columns}{end}")
    images = {f"{number}.png": noise(number) for number in range(9)}
    for number, (name, data) in enumerate(images.items()):
        key = None if end == ")" and number < 7 else f"key {number}"
        statement = "INSERT INTO image_storage (filename, image_data, id) VALUES (:n, :d, :k)"
        await sql(sqlite_url, statement, n=name, d=data, k=key)
    assert outcomes(await take(url=sqlite_url)) == dict.fromkeys(images, "migrated")
    for name, data in images.items():
        assert await bytes_of(target, name) == data


async def test_a_name_that_is_not_utf8(take: Any, target: ImageStorage, sqlite_url: str) -> None:
    """Bytes in a name that are no text are changed in it, and no other row is concerned."""
    await make_table(sqlite_url, [("x", b"1", None), ("b.png", b"2", None)])
    await sql(sqlite_url, "UPDATE image_storage SET filename = CAST(X'636166E92E706E67' AS TEXT) WHERE id = 1")
    assert outcomes(await take(url=sqlite_url)) == {"caf_.png": "migrated", "b.png": "migrated"}
    assert await bytes_of(target, "caf_.png") == b"1"


@pytest.mark.parametrize("end", [")", ") WITHOUT ROWID"])
async def test_keys_that_are_not_utf8(
    take: Any, target: ImageStorage, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A key of another encoding neither ends the import nor hides the rows after it."""
    monkeypatch.setattr(foreign_table, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(foreign_table, "READ_WITH_ROW", 2)
    columns = "filename TEXT NOT NULL PRIMARY KEY, image_data BLOB, mimetype TEXT"
    await sql(sqlite_url, f"CREATE TABLE image_storage ({columns}{end}")
    for number, name in enumerate(("61", "E96162", "E961FF", "7A", "C3A9")):
        values = f"(CAST(X'{name}' AS TEXT), :data)"
        await sql(
            sqlite_url, f"INSERT INTO image_storage (filename, image_data) VALUES {values}", data=noise(5, number)
        )
    names = {"a": 0, "_ab": 1, "_a_": 2, "z": 3, "é": 4}
    assert outcomes(await take(url=sqlite_url)) == dict.fromkeys(names, "migrated")
    for name, number in names.items():
        assert await bytes_of(target, name) == noise(5, number)


async def test_a_column_called_rowid(
    take: Any, target: ImageStorage, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column of SQLite's name for the number of a row is not taken for it: each name gets its own bytes."""
    monkeypatch.setattr(foreign_table, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(foreign_table, "READ_WITH_ROW", 2)
    await sql(sqlite_url, "CREATE TABLE image_storage (RowID TEXT, filename TEXT, image_data BLOB, mimetype TEXT)")
    images = {f"{number}.png": noise(5, number) for number in range(5)}
    for name, data in images.items():
        await sql(sqlite_url, "INSERT INTO image_storage VALUES ('x', :name, :data, NULL)", name=name, data=data)
    assert outcomes(await take(url=sqlite_url)) == dict.fromkeys(images, "migrated")
    for name, data in images.items():
        assert await bytes_of(target, name) == data


async def test_a_table_in_a_schema_and_in_partitions(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of PostgreSQL may be in another schema, in partitions without a key, and have any other columns."""
    monkeypatch.setattr(foreign_table, "ROWS_AT_ONCE", 2)
    await sql(postgres_url, "CREATE SCHEMA theirs")
    columns = "filename text, image_data bytea, part integer, place point"
    await sql(postgres_url, f"CREATE TABLE theirs.pictures ({columns}) PARTITION BY LIST (part)")
    images = {f"{number}.png": noise(number) for number in range(1, 10)}
    for part in range(3):
        await sql(postgres_url, f"CREATE TABLE theirs.p{part} PARTITION OF theirs.pictures FOR VALUES IN ({part})")
    for number, (name, data) in enumerate(images.items()):
        values = {"n": name, "d": data, "p": number % 3}
        await sql(postgres_url, "INSERT INTO theirs.pictures VALUES (:n, :d, :p)", **values)
    table = ForeignTable(postgres_url, ForeignColumns("pictures", "filename", "image_data", schema="theirs"), timeout=9)
    found = {}
    async with aclosing(table.rows()) as rows:
        async for row in rows:
            found[row.name] = b"".join([piece async for piece in table.read(row)])
    await table.close()
    assert found == images


async def test_what_the_target_has_stays(take: Any, target: ImageStorage, database_url: str) -> None:
    """Newer bytes of the target stay, and what was deleted there stays deleted; the bytes of the rows are versions."""
    await make_table(database_url, [("a.png", b"old", None), ("b.png", b"b", None)])
    await target.create_tables()
    await target.store_image("a.png", b"new")
    await target.store_image("b.png", b"b")
    await target.bury("b.png")
    assert outcomes(await take()) == {"a.png": "differs", "b.png": "deleted"}
    assert await bytes_of(target, "a.png") == b"new"
    assert await bytes_of(target, "b.png") is None
    assert [one.size for one in await target.history("a.png")] == [3]


async def test_rows_without_bytes(take: Any, target: ImageStorage, database_url: str) -> None:
    """A row without bytes is reported, and the others are copied."""
    await make_table(database_url, [("a.png", None, None), ("b.png", b"b", None)])
    assert outcomes(await take()) == {"a.png": "failed", "b.png": "migrated"}


async def test_a_column_of_text(take: Any, database_url: str) -> None:
    """A column that holds text and no bytes is reported for each row."""
    await make_table(database_url, [("a.png", b"a", "text")])
    columns = ForeignColumns("image_storage", "filename", "mimetype")
    (result,) = (await take(columns)).values()
    assert (result.outcome.value, "no bytes" in result.detail) == ("failed", True)


async def test_an_empty_text(take: Any, target: ImageStorage, sqlite_url: str) -> None:
    """An empty text in a column of bytes, as some apps store nothing, is no upload; empty bytes are one."""
    await make_table(sqlite_url, [("a.png", b"", None), ("b.png", b"", None)])
    await sql(sqlite_url, "UPDATE image_storage SET image_data = '' WHERE id = 1")
    assert outcomes(await take(url=sqlite_url)) == {"a.png": "failed", "b.png": "migrated"}
    assert await target.find("a.png") is None


@pytest.mark.parametrize("size", [90_000, 150_000])
async def test_a_row_that_changes_while_it_is_read(
    database_url: str, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A value that grows or shrinks after its length was read is never taken in part."""
    monkeypatch.setattr(foreign_table, "PIECE", 50_000)
    await make_table(database_url, [("a.png", noise(100_000), None)])
    table = ForeignTable(database_url, COLUMNS, timeout=10.0)
    async with aclosing(table.rows()) as rows:
        row = await anext(rows)
    await sql(database_url, "UPDATE image_storage SET image_data = :new", new=noise(size))
    with pytest.raises(FileChanged, match="run again"):
        _ = [piece async for piece in table.read(row)]
    await table.close()


async def test_bytes_that_change_before_they_are_stored(target: ImageStorage) -> None:
    """A large upload whose bytes are others at its second reading is reported, and nothing of it is stored."""
    threads, tries = Threads(), iter((noise(CHUNK + 1, 1), noise(CHUNK + 1, 2)))

    class Changing:
        at_once = 1

        async def items(self) -> AsyncGenerator[Items, None]:
            yield [await new_upload("a.png", lambda: next(tries), threads, 0)]

    async with aclosing(bulk.import_all(target, Changing())) as results:
        (result,) = [result async for result in results]
    assert (result.outcome.value, "changed while" in result.detail) == ("failed", True)
    assert await target.find("a.png") is None
    threads.close()


async def test_small_rows_are_stored_many_at_a_time(take: Any, target: ImageStorage, database_url: str) -> None:
    """Hundreds of small rows need few transactions, and one that is refused or in doubt spoils none of the others."""
    images = {f"{number}.png": noise(number, number) for number in range(1, 301)}
    await target.create_tables()
    await target.store_image("taken/a.png", b"a")
    await target.store_image("file", b"file")
    await target.store_image("7.png", b"other bytes")
    await target.store_image("8.png", images["8.png"])
    await target.store_image("9.png", images["9.png"])
    await target.bury("9.png")
    refused = {"taken": b"1", "file/a.png": b"2", "new": b"3", "new/a.png": b"4"}
    await make_table(database_url, [(name, data, None) for name, data in (images | refused).items()])
    times: set[Any] = set()
    for first in ("migrated", "ok"):
        odd = {"7.png": "differs", "8.png": "ok", "9.png": "deleted", "new": first}
        failed = dict.fromkeys(("taken", "file/a.png", "new/a.png"), "failed")
        assert outcomes(await take()) == dict.fromkeys(images, first) | odd | failed
        records = await target.catalogue.find(images)
        times.add(len({record.created_at for record in records.values()}))
        for name, data in images.items():
            assert await bytes_of(target, name) == {"7.png": b"other bytes", "9.png": None}.get(name, data)
    assert await target.find("new/a.png") is None
    if database_url.startswith("postgresql"):  # its clock is that of the transaction
        assert len(times) == 1
        assert times.pop() < 12


async def test_only_some_rows(take: Any, database_url: str) -> None:
    """The condition is used as it is, with colons, percent signs and a comment at its end."""
    await make_table(database_url, [("aa:b.png", b"a", "image/png"), ("c.png", b"c", "image/gif")])
    where = "filename LIKE '%:b.png' AND CAST(id AS text) <> ':none' -- only one"
    columns = ForeignColumns("image_storage", "filename", "image_data", where=where)
    assert outcomes(await take(columns)) == {"aa:b.png": "migrated"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (ForeignColumns("nothing", "filename", "image_data"), "no table nothing"),
        (ForeignColumns("image_storage", "nothing", "image_data"), "nothing"),
        (ForeignColumns("image_storage", "filename", "image_data", where="filename ="), "syntax|incomplete"),
        (ForeignColumns("all_images", "filename", "image_data"), "is a view"),
    ],
)
async def test_what_cannot_be_read(take: Any, database_url: str, columns: ForeignColumns, message: str) -> None:
    """A table or a column that is not there, a wrong condition and a view are errors of usage."""
    await make_table(database_url, [("a.png", b"a", None)])
    await sql(database_url, "CREATE VIEW all_images AS SELECT * FROM image_storage")
    with pytest.raises(SettingsError, match=message):
        await take(columns)
    await sql(database_url, "DROP VIEW all_images")


async def test_a_source_that_does_not_answer(take: Any, tmp_path: Any, dead_port: int) -> None:
    """A database that is not there, or does not answer, is unavailable; no file is made for it."""
    with pytest.raises(DatabaseUnavailable):
        await take(url=f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(DatabaseUnavailable):
        await take(url=f"postgres://nobody@127.0.0.1:{dead_port}/none")
    assert not (tmp_path / "none.db").exists()


async def test_memory_does_not_grow_with_a_value(
    take: Any, target: ImageStorage, database_url: str, sqlite_url: str
) -> None:
    """A value of 48 MiB is read in pieces."""
    data = noise(1024 * 1024) * 48
    await make_table(database_url, [("large.bin", data, None)])
    del data
    await target.create_tables()
    tracemalloc.start()
    assert outcomes(await take()) == {"large.bin": "migrated"}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 1024 * 1024


READ_ONE = """
import asyncio, re, sys
from pathlib import Path
from selfheal.sql.foreign_table import ForeignColumns, ForeignTable

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

async def main(url):
    table = ForeignTable(url, ForeignColumns("image_storage", "filename", "image_data"), timeout=10.0)
    rows = [row async for row in table.rows()]
    sizes = [[len(piece) async for piece in table.read(row)] for row in rows[:1]]
    before = peak()
    sizes += [[len(piece) async for piece in table.read(row)] for row in rows[1:]]
    await table.close()
    print(*map(sum, sizes), peak() - before)

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.parametrize("key", ["id INTEGER PRIMARY KEY, ", "id TEXT PRIMARY KEY, ", ""])
async def test_memory_of_sqlite_does_not_grow_with_a_value(sqlite_url: str, key: str) -> None:
    """SQLite itself does not load a value of 96 MiB either, whatever the key of its row is."""
    mib = 1024 * 1024
    await make_table(sqlite_url, [("small.bin", bytes(5 * mib), None)], key)
    await sql(
        sqlite_url, "INSERT INTO image_storage (filename, image_data) VALUES ('z.bin', zeroblob(96 * 1024 * 1024))"
    )
    if "TEXT" in key:
        await sql(sqlite_url, "UPDATE image_storage SET id = 'z' WHERE id IS NULL")
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", READ_ONE, sqlite_url, stdout=PIPE)
    printed, _ = await process.communicate()
    small, large, grown = map(int, printed.split())
    assert (small, large) == (5 * mib, 96 * mib)
    assert grown < 24 * mib


async def test_a_value_that_sqlite_does_not_open(take: Any, target: ImageStorage, sqlite_url: str) -> None:
    """Large bytes in a column that is generated are read too; large text is no upload."""
    columns = "id INTEGER PRIMARY KEY, filename TEXT, mimetype TEXT, kept BLOB, image_data BLOB AS (kept)"
    await sql(sqlite_url, f"CREATE TABLE image_storage ({columns})")
    for name, data in {"a.png": noise(3 * CHUNK), "b.png": "text" * CHUNK}.items():
        await sql(sqlite_url, "INSERT INTO image_storage (filename, kept) VALUES (:name, :data)", name=name, data=data)
    assert outcomes(await take(url=sqlite_url)) == {"a.png": "migrated", "b.png": "failed"}
    assert await bytes_of(target, "a.png") == noise(3 * CHUNK)


async def test_another_apps_sqlite_file_is_not_changed(take: Any, tmp_path: Any) -> None:
    """The file of another app keeps every byte, its journal mode among them."""
    url = f"sqlite+aiosqlite:///{tmp_path}/theirs.db"
    await make_table(url, [("a.png", b"a", None)])
    before = (tmp_path / "theirs.db").read_bytes()
    assert outcomes(await take(url=url)) == {"a.png": "migrated"}
    assert (tmp_path / "theirs.db").read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("theirs*")) == ["theirs.db"]


async def test_imported_uploads_are_served(take: Any, database_url: str, directory: Any) -> None:
    """What was imported appears on disk when it is asked for."""
    await make_table(database_url, [("cats/a.png", b"a", None)])
    await take()
    async with UploadStore(directory, database_url, table_prefix="ours_") as store:
        assert (await store.restore("cats/a.png")).path.read_bytes() == b"a"
