"""Alembic in an app that shares its database with selfheal: autogenerate proposes nothing about our tables."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Column, Connection, Integer, MetaData, Table
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from selfheal import UploadStore, define_tables
from selfheal.alembic import exclude_tables, include_name
from tests.support.raw_sql import sql
from tests.support.tables import described

ENV = """
from alembic import context

options = context.config.attributes
context.configure(connection=options["connection"], target_metadata=options["metadata"], **options["more"])
with context.begin_transaction():
    context.run_migrations()
"""
TEMPLATE = """
from alembic import op
import sqlalchemy as sa
${imports if imports else ""}

revision, down_revision = ${repr(up_revision)}, ${repr(down_revision)}

def upgrade():
    ${upgrades if upgrades else "pass"}

def downgrade():
    ${downgrades if downgrades else "pass"}
"""
Run = Callable[..., Any]


@pytest.fixture
def alembic(tmp_path: Path, database_url: str) -> Run:
    """Run commands of Alembic with the app's MetaData, as its `env.py` does."""
    scripts = tmp_path / "migrations"
    (scripts / "versions").mkdir(parents=True)
    (scripts / "env.py").write_text(ENV)
    (scripts / "script.py.mako").write_text(TEMPLATE)

    async def run(metadata: MetaData, what: Callable[..., Any], *arguments: Any, more: Any = None, **named: Any) -> Any:
        config = Config()
        config.set_main_option("script_location", str(scripts))
        config.set_main_option("path_separator", "os")
        engine = create_async_engine(database_url, poolclass=NullPool)

        def work(connection: Connection) -> Any:
            config.attributes.update(connection=connection, metadata=metadata, more=more or {})
            return what(config, *arguments, **named)

        async with engine.begin() as connection:
            result = await connection.run_sync(work)
        await engine.dispose()
        return result

    return run


@asynccontextmanager
async def opened(directory: Path, url: str, **options: Any) -> AsyncIterator[UploadStore]:
    """Open a store with its tables."""
    async with UploadStore(directory, url, **options) as store:
        await store.database.create_tables()
        yield store


def app_tables() -> MetaData:
    """Return the tables of an app; two of them have names like ours."""
    metadata = MetaData()
    for name in ("cat", "my_image_storage", "image_storage_of_mine"):
        Table(name, metadata, Column("id", Integer, primary_key=True))
    return metadata


OPTIONS: list[dict[str, Any]] = [{}, {"table_prefix": "docs_"}, {"schema": "pictures"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
async def test_autogenerate_leaves_our_tables_alone(
    options: dict[str, Any], alembic: Run, database_url: str, directory: Path
) -> None:
    """Autogenerate makes the app's tables, and afterwards proposes nothing, with a prefix and a schema as well."""
    if "schema" in options and database_url.startswith("sqlite"):
        pytest.skip("SQLite has no schemas")
    metadata = app_tables()
    more = {
        "include_name": exclude_tables(**options) if options else include_name,
        "include_schemas": "schema" in options,
    }
    async with opened(directory, database_url, **options) as store:
        await store.save("a.png", b"x")
        await alembic(metadata, command.revision, autogenerate=True, more=more)
        await alembic(metadata, command.upgrade, "head", more=more)
        await alembic(metadata, command.check, more=more)
        assert await store.database.count() == 1
    assert {*metadata.tables} <= {*await described(database_url)}


async def test_a_table_of_the_apps_is_still_dropped(alembic: Run, database_url: str, directory: Path) -> None:
    """A table that the app gave up is found by autogenerate, also one whose name ends like ours."""
    metadata = app_tables()
    async with opened(directory, database_url, table_prefix="docs_"):
        await alembic(
            metadata, command.revision, autogenerate=True, more={"include_name": exclude_tables(table_prefix="docs_")}
        )
        await alembic(metadata, command.upgrade, "head")
        for name in ("cat", "my_image_storage"):
            metadata.remove(metadata.tables[name])
        more = {"include_name": exclude_tables(table_prefix="docs_")}
        script = await alembic(metadata, command.revision, autogenerate=True, more=more)
    text = Path(script.path).read_text()
    assert text.count("op.drop_table") == 2
    assert "drop_table('my_image_storage')" in text


@pytest.mark.parametrize("options", OPTIONS, ids=str)
async def test_tables_that_alembic_makes(
    options: dict[str, Any], alembic: Run, database_url: str, directory: Path
) -> None:
    """Tables in the app's MetaData that Alembic makes are those that `create_tables` makes; then all works."""
    if "schema" in options and database_url.startswith("sqlite"):
        pytest.skip("SQLite has no schemas")
    schema = options.get("schema")
    async with opened(directory, database_url, **options):
        ours = await definitions(database_url, schema)
    for table in await described(database_url, schema):
        await sql(database_url, f"DROP TABLE {table if schema is None else f'{schema}.{table}'}")
    metadata, more = app_tables(), {"include_schemas": schema is not None}
    define_tables(metadata, **options)
    await alembic(metadata, command.revision, autogenerate=True, more=more)
    await alembic(metadata, command.upgrade, "head", more=more)
    await alembic(metadata, command.check, more=more)
    async with UploadStore(directory, database_url, metadata=metadata, **options) as store:
        await store.save("a.png", b"x")
        await store.database.create_tables()
        assert (await store.database.find("a.png")) is not None
    made = await definitions(database_url, schema)
    assert {name: made[name] for name in ours} == ours
    await alembic(metadata, command.check, more=more)


async def definitions(url: str, schema: str | None) -> dict[str, Any]:
    """Return the columns of each table and the indexes as the database describes them: types, defaults, storage."""
    if url.startswith("sqlite"):
        found = await sql(
            url,
            'SELECT m.name, t.name, t.type, t."notnull", t.dflt_value, t.pk, l.strict, l.wr'
            " FROM sqlite_master m JOIN pragma_table_xinfo(m.name) t JOIN pragma_table_list(m.name) l"
            " WHERE m.type = 'table' ORDER BY 1, t.cid",
        )
        indexes = await sql(url, "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql NOTNULL")
        return {row[0]: [other[1:] for other in found if other[0] == row[0]] for row in found} | dict(indexes)
    columns = await sql(
        url,
        "SELECT c.relname || '.' || a.attname, format_type(a.atttypid, a.atttypmod), CAST(a.attstorage AS text),"
        " a.attnotnull, pg_get_expr(d.adbin, d.adrelid), l.collname FROM pg_attribute a"
        " JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
        " LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum"
        " LEFT JOIN pg_collation l ON l.oid = a.attcollation"
        " WHERE c.relkind = 'r' AND a.attnum > 0 AND n.nspname = :schema",
        schema=schema or "public",
    )
    indexes = await sql(
        url, "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = :schema", schema=schema or "public"
    )
    return {row[0]: row[1:] for row in columns} | {row[0]: row[1] for row in indexes}
