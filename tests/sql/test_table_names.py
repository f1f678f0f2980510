"""Several stores in one database: a table prefix or a schema keeps them apart; without one they are refused."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData, event, text
from sqlalchemy.ext.asyncio import create_async_engine

from selfheal import ImageStorage, Settings, SettingsError, UploadStore, define_tables
from tests.support.raw_sql import sql
from tests.support.records import bytes_of

NAMES = {
    "sqlite": "SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'",
    "postgresql": "SELECT relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
    " WHERE nspname = 'public' AND relkind IN ('r', 'i')",
}


@pytest.fixture
def claimed_tables() -> None:
    """Tables belong to one directory in this test, as they do for users."""


@asynccontextmanager
async def opened(directory: Path, url: Any, **options: Any) -> AsyncIterator[UploadStore]:
    """Open a store with its tables."""
    async with UploadStore(directory, url, **options) as store:
        await store.database.create_tables()
        yield store


@pytest.mark.parametrize("key", ["table_prefix", "schema"])
async def test_the_same_name_in_two_stores(key: str, database_url: str, tmp_path: Path, claimed_tables: None) -> None:
    """Two stores of one database have each their own bytes, versions and deletions of a name."""
    if key == "schema" and database_url.startswith("sqlite"):
        pytest.skip("SQLite has no schemas")
    options = [{key: "docs"}, {key: "avatars"}]
    async with (
        opened(tmp_path / "docs", database_url, **options[0]) as docs,
        opened(tmp_path / "avatars", database_url, **options[1]) as avatars,
    ):
        (await docs.save("1.png", b"private")).path.unlink()
        assert await avatars.database.find("1.png") is None
        await avatars.save("1.png", b"a face")
        await avatars.delete("1.png")
        assert await bytes_of(docs.database, "1.png") == b"private"
        assert (await docs.restore("1.png")).path.read_bytes() == b"private"


async def test_every_name_has_the_prefix(database_url: str, directory: Path) -> None:
    """Tables and indexes carry the prefix: none can meet another store's or app's."""
    async with opened(directory, database_url, table_prefix="shop_") as store:
        names = [row[0] for row in await sql(database_url, NAMES[store.database.backend.name])]
        assert len(names) >= 8
        assert [name for name in names if "shop_image_" not in name] == []


@pytest.mark.parametrize("prefix", ["_" * 31, "a" * 31])
async def test_the_longest_prefix(prefix: str, database_url: str, directory: Path) -> None:
    """With the longest prefix the tables can be made, twice, and used."""
    async with opened(directory, database_url, table_prefix=prefix) as store:
        await store.database.create_tables()
        await store.save("a.png", b"x")
        assert await store.database.count() == 1


@pytest.mark.parametrize("prefix", ["Shop", "1a", "a-b", "a.b", 'a"', "a" * 32, " ", "ä", "a\n"])
def test_bad_prefixes(prefix: str, directory: Path) -> None:
    """A prefix that is not a plain lower-case identifier is refused, in one line."""
    for refused in (
        lambda: Settings(table_prefix=prefix),
        lambda: UploadStore(directory, "sqlite://", table_prefix=prefix),
        lambda: define_tables(MetaData(), table_prefix=prefix),
    ):
        with pytest.raises(SettingsError, match="the table prefix"):
            refused()


@pytest.mark.parametrize("schema", ['a"b', "a.b", "1", "a" * 64, "a\0"])
def test_bad_schemas(schema: str, directory: Path) -> None:
    """A schema that is no plain identifier is refused."""
    with pytest.raises(SettingsError, match="the schema"):
        UploadStore(directory, "postgres://h/db", schema=schema)


async def test_a_schema_that_is_missing(postgres_url: str, directory: Path) -> None:
    """A missing schema is made; one that is there is used without the right to make any."""
    async with opened(directory, postgres_url, schema="Web-Shop") as store:
        await store.save("a.png", b"x")
    assert await sql(postgres_url, 'SELECT name FROM "Web-Shop".image_storage') == [("a.png",)]
    await sql(postgres_url, "CREATE ROLE schema_user LOGIN")
    try:
        await sql(postgres_url, "CREATE SCHEMA there AUTHORIZATION schema_user")
        url = postgres_url.replace("postgres@", "schema_user@")
        async with opened(directory, url, schema="there") as store:
            await store.save("a.png", b"x")
    finally:
        await sql(postgres_url, "DROP OWNED BY schema_user CASCADE")
        await sql(postgres_url, "DROP ROLE schema_user")


def test_sqlite_has_no_schemas(sqlite_url: str, directory: Path) -> None:
    """A schema over SQLite is refused at once, with what to use instead."""
    with pytest.raises(SettingsError, match="use a table prefix"):
        UploadStore(directory, sqlite_url, schema="shop")


async def test_an_attached_database(sqlite_url: str, directory: Path, tmp_path: Path) -> None:
    """A SQLite database that an app's own engine attaches is a schema; another name is refused."""
    engine = create_async_engine(sqlite_url)

    @event.listens_for(engine.sync_engine, "connect")
    def attach(connection: Any, _record: Any) -> None:
        connection.execute(f"ATTACH '{tmp_path}/attached.db' AS apart")

    async with opened(directory, engine, schema="apart") as store:
        await store.save("a.png", b"x")
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT name FROM apart.image_storage"))).all() == [("a.png",)]
    with pytest.raises(SettingsError, match="no schema 'other'"):
        await ImageStorage(engine, schema="other").create_tables()
    await engine.dispose()


async def test_prefixed_tables_in_the_apps_metadata(database_url: str, directory: Path) -> None:
    """Tables with several prefixes can be in one MetaData, and a store finds its own there."""
    metadata = MetaData()
    ours = define_tables(metadata, table_prefix="a_")
    others = define_tables(metadata, table_prefix="b_")
    assert ours.records is not others.records
    store = UploadStore(directory, database_url, metadata=metadata, table_prefix="a_")
    assert store.database.tables.records is ours.records


# -- two directories over the same tables -----------------------------------------------------------------------------


async def test_a_second_directory_is_refused(database_url: str, tmp_path: Path, claimed_tables: None) -> None:
    """While a store is open, no store of another directory opens over its tables; after its close one does."""
    second = UploadStore(tmp_path / "two", database_url)
    async with opened(tmp_path / "one", database_url) as first:
        with pytest.raises(SettingsError, match="table_prefix") as caught:
            await second.open()
        assert str(tmp_path / "one") in str(caught.value)
        await first.save("a.png", b"x")
    async with second:
        assert await second.database.count() == 1


async def test_use_without_opening(database_url: str, tmp_path: Path, claimed_tables: None) -> None:
    """A store that is used without having been opened, as under a framework without lifespan, is refused as well."""
    async with opened(tmp_path / "one", database_url):
        second = UploadStore(tmp_path / "two", database_url)
        with pytest.raises(SettingsError, match="table_prefix"):
            await second.save("a.png", b"x")
        assert not (tmp_path / "two" / "a.png").exists()
        await second.close()


async def test_the_same_directory_twice(database_url: str, tmp_path: Path, claimed_tables: None) -> None:
    """Stores of one directory may share tables, however its path is written."""
    (tmp_path / "link").symlink_to(tmp_path / "one")
    async with opened(tmp_path / "one", database_url), opened(tmp_path / "link", database_url) as again:
        assert await again.database.count() == 0


async def test_the_same_file_in_other_words(sqlite_url: str, tmp_path: Path, claimed_tables: None) -> None:
    """A SQLite file is the same through a link, and through an engine of the app."""
    (tmp_path / "link.db").symlink_to(tmp_path / "catalogue.db")
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/link.db")
    async with opened(tmp_path / "one", sqlite_url):
        with pytest.raises(SettingsError, match="table_prefix"):
            await UploadStore(tmp_path / "two", engine).open()
    await engine.dispose()


async def test_a_store_that_is_gone(sqlite_url: str, tmp_path: Path, claimed_tables: None) -> None:
    """A store that was dropped without a close keeps no tables."""
    first = UploadStore(tmp_path / "one", sqlite_url)
    await first.open()
    first.disk.close()
    del first
    gc.collect()
    async with opened(tmp_path / "two", sqlite_url) as second:
        assert await second.database.count() == 0


async def test_databases_in_memory_are_apart(tmp_path: Path, claimed_tables: None) -> None:
    """Two databases in memory are two databases."""
    async with opened(tmp_path / "one", "sqlite://") as first, opened(tmp_path / "two", "sqlite://") as second:
        await first.save("a.png", b"x")
        assert await second.database.count() == 0
