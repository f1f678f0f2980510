"""The tables: their columns, how they compare names, and how they share the MetaData of an app."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Integer, MetaData, String, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable

from selfheal import ImageStorage, SchemaError, UploadStore, bulk, define_tables
from selfheal.sql.schema import SCHEMA_VERSION
from tests.support.postgres import PostgresServer
from tests.support.raw_sql import sql
from tests.support.requirements import needs
from tests.support.tables import described

COLUMNS = {
    "image_storage": {
        "name", "sha256", "size", "content_type", "modified_ns", "created_at", "changed_at", "generation", "deleted_at",
    },
    "image_blob": {"sha256", "size", "chunks"},
    "image_chunk": {"sha256", "position", "data"},
    "image_history": {"name", "generation", "sha256", "size", "replaced_at"},
    "image_schema": {"version"},
}  # fmt: skip
KEYS = {
    "image_storage": ["name"],
    "image_blob": ["sha256"],
    "image_chunk": ["sha256", "position"],
    "image_history": ["name", "generation"],
    "image_schema": ["version"],
}


async def make_all(url: str, metadata: MetaData) -> None:
    """Create the tables of a MetaData as the app would, without selfheal."""
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()


@asynccontextmanager
async def opened(url: str, metadata: MetaData | None = None) -> AsyncIterator[ImageStorage]:
    """Open the database half over a URL, and close it at the end."""
    images = ImageStorage(url, metadata=metadata)
    try:
        yield images
    finally:
        await images.close()


async def check_working(images: ImageStorage, name: str = "a.png") -> None:
    """Fail if a call that uses a table fails, for a name without a record."""
    await images.store_image(name, b"one")
    await images.store_image(name, b"two")
    await images.bury(name)
    record = await images.undo(name)
    assert b"".join([chunk async for chunk in images.read(record)]) == b"two"
    assert [version.generation for version in await images.history(name)] == [2, 1]


# -- columns and creation ----------------------------------------------------------------------------------------------


async def test_tables_and_keys(store: UploadStore, database_url: str) -> None:
    """The tables have the documented names, columns and keys."""
    tables = await described(database_url)
    assert set(tables) == set(COLUMNS)
    for table, (columns, key) in tables.items():
        assert columns >= COLUMNS[table]
        assert key == KEYS[table]


async def test_a_row_of_another_program(store: UploadStore, database_url: str) -> None:
    """A row that another program wrote, with the documented columns alone, is a record."""
    await sql(
        database_url,
        "INSERT INTO image_storage (name, sha256, size, content_type, modified_ns) VALUES ('a.png', 'x', 1, 'b/c', 2)",
    )
    record = await store.database.find("a.png")
    assert record is not None
    assert (record.sha256, record.size, record.content_type, record.modified_ns) == ("x", 1, "b/c", 2)
    assert (record.generation, record.is_deleted) == (1, False)


async def test_creating_tables_again(store: UploadStore, database_url: str) -> None:
    """Creating the tables again changes nothing in them."""
    record = await store.database.store_image("a.png", b"one")
    for _ in range(3):
        await store.database.create_tables()
    async with opened(database_url) as other:
        await other.create_tables()
        assert await other.find("a.png") == record
    assert await sql(database_url, "SELECT version FROM image_schema") == [(SCHEMA_VERSION,)]


@pytest.mark.parametrize("missing", sorted(COLUMNS))
async def test_creating_what_is_missing(store: UploadStore, database_url: str, missing: str) -> None:
    """If a process is killed while it creates the tables, the next one creates the rest."""
    await sql(database_url, f"DROP TABLE {missing}")
    async with opened(database_url) as images:
        await images.create_tables()
        await check_working(images)


async def test_creating_tables_at_the_same_time(database_url: str) -> None:
    """Several storages of one process may create the tables at once."""
    several = [ImageStorage(database_url) for _ in range(6)]
    await asyncio.gather(*(images.create_tables() for images in several))
    await check_working(several[0])
    for images in several:
        await images.close()


async def test_a_newer_schema_is_left_alone(store: UploadStore, database_url: str) -> None:
    """Creating the tables never changes the version of a newer schema, and raises an error."""
    await sql(database_url, f"UPDATE image_schema SET version = {SCHEMA_VERSION + 1}")
    for images in (store.database, ImageStorage(database_url)):
        with pytest.raises(SchemaError, match="newer"):
            await images.create_tables()
        await images.close()
    assert await sql(database_url, "SELECT version FROM image_schema") == [(SCHEMA_VERSION + 1,)]
    async with opened(database_url) as images:
        with pytest.raises(SchemaError, match="newer"):
            await images.find("a.png")


# -- how names compare -------------------------------------------------------------------------------------------------


def a_database(postgres: PostgresServer, name: str, options: str) -> str:
    """Create a database with these options, and return its URL."""
    postgres.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    postgres.sql(f"CREATE DATABASE {name} TEMPLATE template0 {options}")
    return postgres.url(name)


async def test_names_in_a_database_with_an_icu_collation(postgres: PostgresServer) -> None:
    """Names are compared by their bytes even if the default order of the database ignores case and punctuation."""
    if float(postgres.programs.parent.name if postgres.programs.parent.name.isdigit() else 0) < 15:
        needs("PostgreSQL 15 or later", "apt-get install postgresql")
    url = a_database(postgres, "icu_collation", "LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C.UTF-8'")
    names = ["B.png", "_a.png", "a b.png", "a-b.png", "a.png", "ab.png", "b.png", "z.png", "Ä.png", "é.png", "日.png"]
    query = "SELECT n FROM (VALUES ('_a.png'), ('B.png'), ('a.png')) AS v(n) ORDER BY n"
    assert await sql(url, query) == [("_a.png",), ("a.png",), ("B.png",)]
    async with opened(url) as images:
        await images.create_tables()
        for name in reversed(names):
            await images.store_image(name, b"x")
        got = [record.name for record in [r async for page in images.pages(size=2) for r in page]]
    assert got == sorted(names, key=str.encode)
    postgres.sql("DROP DATABASE icu_collation WITH (FORCE)")


async def test_binary_collation(database_url: str, store: UploadStore) -> None:
    """The columns of names have a binary collation of their own."""
    if database_url.startswith("sqlite"):
        query = "SELECT sql FROM sqlite_master WHERE name IN ('image_storage', 'image_history')"
        for (statement,) in await sql(database_url, query):
            assert "NOCASE" not in statement.upper()
        return
    rows = await sql(
        database_url,
        "SELECT c.relname, l.collname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
        "JOIN pg_collation l ON l.oid = a.attcollation "
        "WHERE a.attname = 'name' AND c.relname IN ('image_storage', 'image_history') AND c.relkind = 'r'",
    )
    assert sorted(rows) == [("image_history", "C"), ("image_storage", "C")]


async def storage_of_data(url: str, schema: str) -> str:
    """Return how PostgreSQL stores the bytes of chunks: e(xternal), m(ain), p(lain) or x (extended, compressed)."""
    rows = await sql(
        url,
        "SELECT CAST(a.attstorage AS text) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
        "JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE a.attname = 'data' AND c.relname = 'image_chunk' AND n.nspname = :schema",
        schema=schema,
    )
    return str(rows[0][0])


async def test_bytes_are_not_compressed(postgres_url: str) -> None:
    """PostgreSQL does not try to compress images."""
    async with opened(postgres_url) as images:
        await images.create_tables()
    assert await storage_of_data(postgres_url, "public") == "e"


async def test_bytes_of_a_table_of_another_owner(postgres_url: str) -> None:
    """Tables of another role, which stores bytes compressed, are used as they are."""
    async with opened(postgres_url) as images:
        await images.create_tables()
    await sql(postgres_url, "ALTER TABLE image_chunk ALTER COLUMN data SET STORAGE EXTENDED")
    await sql(postgres_url, "CREATE ROLE guest LOGIN")
    try:
        await sql(postgres_url, "GRANT USAGE ON SCHEMA public TO guest")
        await sql(postgres_url, "GRANT ALL ON ALL TABLES IN SCHEMA public TO guest")
        async with opened(postgres_url.replace("postgres@", "guest@")) as images:
            await images.create_tables()
            await check_working(images)
    finally:
        await sql(postgres_url, "DROP OWNED BY guest CASCADE")
        await sql(postgres_url, "DROP ROLE guest")
    assert await storage_of_data(postgres_url, "public") == "x"
    async with opened(postgres_url) as images:
        await images.create_tables()
    assert await storage_of_data(postgres_url, "public") == "e"


# -- the app's MetaData ------------------------------------------------------------------------------------------------


def the_apps_metadata(**options: Any) -> MetaData:
    """Return the tables of an app, one of which refers to a table of selfheal."""
    metadata = MetaData(**options)
    ours = define_tables(metadata)
    Table(
        "app_cat",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("picture", String(512), ForeignKey(ours.records.c.name)),
    )
    return metadata


def test_the_apps_metadata_knows_our_tables() -> None:
    """A tool that reads the app's MetaData, such as Alembic, sees our tables beside those of the app."""
    metadata = the_apps_metadata()
    assert set(metadata.tables) == {*COLUMNS, "app_cat"}
    assert "app_cat" in {table.name for table in metadata.sorted_tables}


@pytest.mark.parametrize("schema", [None, "pictures"])
def test_defining_tables_twice(schema: str | None) -> None:
    """Tables that a MetaData already has are used, and not defined again, with a schema as well."""
    metadata = MetaData(schema=schema)
    first = define_tables(metadata)
    again = define_tables(metadata)
    assert [a is b for a, b in zip(first.all(), again.all(), strict=True)] == [True] * 5
    assert len(metadata.tables) == 5


def test_two_metadatas_share_nothing() -> None:
    """Tables in one MetaData are not those of another."""
    assert define_tables(MetaData()).records is not define_tables(MetaData()).records


@pytest.mark.parametrize("dialect", [sqlite.dialect(), postgresql.dialect()], ids=["sqlite", "postgres"])
def test_a_naming_convention(dialect: Any) -> None:
    """The tables can be created with the app's naming convention for keys and indexes."""
    conventions = {
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
    tables = define_tables(MetaData(naming_convention=conventions))
    assert "pk_image_storage" in str(CreateTable(tables.records).compile(dialect=dialect))


async def test_made_by_the_app(database_url: str) -> None:
    """Tables that the app has created, as a migration does, work like our own."""
    metadata = the_apps_metadata()
    await make_all(database_url, metadata)
    assert set(await described(database_url)) == {*COLUMNS, "app_cat"}
    if database_url.startswith("postgresql"):
        assert await storage_of_data(database_url, "public") == "e"
    async with opened(database_url, metadata) as images:
        await check_working(images)
        await images.create_tables()
        await check_working(images, "b.png")


async def test_made_in_the_apps_metadata(database_url: str) -> None:
    """`create_tables` creates our tables, and not those of the app."""
    metadata = the_apps_metadata()
    async with opened(database_url, metadata) as images:
        await images.create_tables()
        assert images.tables.records is metadata.tables["image_storage"]
        assert set(await described(database_url)) == set(COLUMNS)
        await check_working(images)


async def test_a_schema_of_the_apps(postgres_url: str) -> None:
    """If the app's MetaData names a schema, all tables are in it."""
    await sql(postgres_url, "CREATE SCHEMA pictures")
    async with opened(postgres_url, MetaData(schema="pictures")) as images:
        await images.create_tables()
        await check_working(images)
    assert set(await described(postgres_url, "pictures")) == set(COLUMNS)
    assert await described(postgres_url) == {}
    assert await storage_of_data(postgres_url, "pictures") == "e"


async def test_two_catalogues_in_one_database(postgres_url: str) -> None:
    """Catalogues in two schemas of one database are independent."""
    storages = []
    for schema in ("cats", "dogs"):
        await sql(postgres_url, f"CREATE SCHEMA {schema}")
        storages.append(ImageStorage(postgres_url, metadata=MetaData(schema=schema)))
        await storages[-1].create_tables()
    await storages[0].store_image("a.png", b"cat")
    assert await storages[1].find("a.png") is None
    for images in storages:
        await images.close()


async def test_a_path_with_special_characters(tmp_path: Path) -> None:
    """The path of a SQLite file may have spaces, accents, quotes and signs."""
    directory = tmp_path / "ä b'c\"d;e"
    directory.mkdir()
    async with opened(f"sqlite+aiosqlite:///{directory}/the catalogue.db") as images:
        await images.create_tables()
        await check_working(images)
    assert (directory / "the catalogue.db").stat().st_size > 0


async def test_tables_of_an_older_file_go_on_working(sqlite_url: str, tmp_path: Path) -> None:
    """A SQLite file whose tables are not STRICT, as earlier versions made them, is used as it is."""
    metadata = MetaData()
    tables = define_tables(metadata)
    for table in tables.all():
        table.dialect_options["sqlite"]["strict"] = False
    await make_all(sqlite_url, metadata)
    async with UploadStore(tmp_path / "uploads", sqlite_url, settled_after=0.0) as store:
        await store.database.create_tables()
        saved = await store.save("a.png", b"old")
        await store.save("a.png", b"new")
        await store.undo("a.png")
        saved.path.unlink()
        for run, outcome in ((bulk.verify, "missing_on_disk"), (bulk.restore, "restored"), (bulk.migrate, "ok")):
            assert [(one.name, one.outcome) async for one in run(store)] == [("a.png", outcome)]
        assert saved.path.read_bytes() == b"old"
    assert await sql(sqlite_url, "SELECT count(*) FROM sqlite_master WHERE sql LIKE '%STRICT%'") == [(0,)]


# -- tables of other apps ---------------------------------------------------------------------------------------------


def _ways_out(table: str) -> str:
    """Return a pattern of a message that says what was found, and the three solutions."""
    names = r"\(--table-prefix\).*\(--schema\).*columns id, name"
    return f"{table} belongs to another app; .*{names}: .*`selfheal import --table {table} --name COLUMN"


@pytest.mark.parametrize("table", list(KEYS))
async def test_a_table_of_another_app(table: str, database_url: str, directory: Path) -> None:
    """A table of our name without our columns is another app's: nothing is made or changed, and the error says so."""
    await sql(database_url, f"CREATE TABLE {table} (id integer PRIMARY KEY, name text)")
    await sql(database_url, f"INSERT INTO {table} VALUES (1, 'theirs')")
    before = await described(database_url)
    async with UploadStore(directory, database_url) as store:
        with pytest.raises(SchemaError, match=_ways_out(table)):
            await store.database.create_tables()
        with pytest.raises(SchemaError, match=_ways_out(table)):
            await store.database.refuse_foreign_tables()
        with pytest.raises(SchemaError, match="another app's"):
            await store.database.find("a.png")
    assert await described(database_url) == before
    assert await sql(database_url, f"SELECT * FROM {table}") == [(1, "theirs")]
    async with UploadStore(directory, database_url, table_prefix="ours_") as store:
        await store.database.create_tables()
        await store.save("a.png", b"x")
    assert await sql(database_url, f"SELECT * FROM {table}") == [(1, "theirs")]
