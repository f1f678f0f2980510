"""The tables of the catalogue, in the app's own MetaData if it likes, so that Alembic sees them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import TypeEngine

from ..errors import ForeignTables, NewerTables, SchemaError
from .backend import Backend
from .backends import BACKENDS
from .table_names import TABLE_NAMES, check_schema, check_table_prefix

SCHEMA_VERSION = 2
NOT_NUMBERED = -1  # the sequence of a change that was committed, and that no process has numbered yet
_OURS = {  # columns that every version of our tables has
    "records": {"name", "sha256", "size", "modified_ns", "generation"},
    "blobs": {"sha256", "size", "chunks"},
    "chunks": {"sha256", "position", "data"},
    "history": {"name", "generation", "sha256", "size"},
    "schema": {"version"},
}


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables."""

    records: sa.Table
    blobs: sa.Table
    chunks: sa.Table
    history: sa.Table
    schema: sa.Table

    def all(self) -> tuple[sa.Table, ...]:
        """Return all tables, in an order in which they can be made."""
        return self.records, self.blobs, self.chunks, self.history, self.schema


def define_tables(metadata: sa.MetaData, *dialects: str, table_prefix: str = "", schema: str | None = None) -> Tables:
    """Define the tables in `metadata`, or return its own; each of `dialects` costs some 30 ms to load."""
    prefix = check_table_prefix(table_prefix)
    schema = check_schema(schema) or metadata.schema
    keys = [f"{prefix}{name}" if schema is None else f"{schema}.{prefix}{name}" for name in TABLE_NAMES]
    if keys[0] in metadata.tables:
        return Tables(*(metadata.tables[key] for key in keys))
    backends = [backend for backend in BACKENDS if not dialects or backend.name in dialects]
    options = {key: value for backend in backends for key, value in backend.table_options().items()}
    columns = _columns(backends)
    options["schema"] = schema
    tables = Tables(*(sa.Table(f"{prefix}{name}", metadata, *columns[name], **options) for name in TABLE_NAMES))
    records = tables.records
    where = {f"{backend.name}_where": is_changed(records) for backend in backends if backend.has_partial_indexes}
    index: dict[str, Any] = dict(where)
    sa.Index(f"ix_{prefix}image_storage_sequence", records.c.sequence, **index)
    for backend in backends:
        backend.prepare_chunks(tables.chunks)
    return tables


def is_changed(records: sa.Table) -> sa.ColumnElement[bool]:
    """Whether a record was ever changed: a new name has no old copy anywhere, and costs no entry of the index."""
    return records.c.sequence != sa.literal_column("0")


def record_columns(records: sa.Table) -> list[sa.Column[Any]]:
    """Return the columns of a record: all but `sequence`, which only the inside needs."""
    return [column for column in records.c if column.name != "sequence"]


async def create_tables(connection: AsyncConnection, tables: Tables, backend: Backend) -> None:
    """Create the tables, columns and indexes that are missing.

    Raises `SchemaError` if a newer selfheal made them, `ForeignTables` if another app did.
    """
    if tables.records.schema is not None:
        await backend.prepare_schema(connection, tables.records.schema)
    await connection.run_sync(refuse_foreign, tables)
    for table in tables.all():
        await connection.run_sync(table.create, checkfirst=True)
    for table in tables.all():
        await connection.run_sync(_add_columns, table)
    await backend.mend_chunks(connection, tables.chunks)
    for index in tables.records.indexes:
        await connection.run_sync(index.create, checkfirst=True)
    version = (await connection.execute(sa.select(sa.func.max(tables.schema.c.version)))).scalar_one()
    if version is None or version > SCHEMA_VERSION:
        check_version(version)
    if version != SCHEMA_VERSION:
        ours = backend.insert(tables.schema).values(version=SCHEMA_VERSION, epoch=uuid4().hex)
        await connection.execute(ours.on_conflict_do_nothing())


def _add_columns(connection: sa.Connection, table: sa.Table) -> None:
    """Add the columns that tables of an earlier version lack; each has a default."""
    there = {column["name"] for column in sa.inspect(connection).get_columns(table.name, table.schema)}
    for column in table.columns:
        if column.name not in there:
            made = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
            name = connection.dialect.identifier_preparer.format_table(table)
            connection.execute(sa.text(f"ALTER TABLE {name} ADD COLUMN {made}"))


def refuse_foreign(connection: sa.Connection, tables: Tables) -> None:
    """Raise `ForeignTables` if a table of our name is another app's; the message names the solutions."""
    inspector = sa.inspect(connection)
    for key, ours in _OURS.items():
        table: sa.Table = getattr(tables, key)
        if not inspector.has_table(table.name, table.schema):
            continue
        found = [column["name"] for column in inspector.get_columns(table.name, table.schema)]
        if not ours.issubset(found):
            raise ForeignTables(
                f"the table {table.fullname} belongs to another app; choose a table prefix (--table-prefix), a schema "
                f"(--schema) or another database. It has the columns {', '.join(found)}: if it holds uploads, "
                f"`selfheal import --table {table.name} --name COLUMN --data COLUMN` copies them"
            )


def check_version(version: int | None) -> None:
    """Raise `SchemaError` unless the tables have our version, or none (a migration of the app's made them)."""
    if version is not None and version > SCHEMA_VERSION:
        raise NewerTables(f"the tables are of version {version}, made by a newer selfheal; upgrade selfheal")
    if version is not None and version < SCHEMA_VERSION:
        raise SchemaError(f"the tables are of version {version}; run `selfheal migrate` to bring them up to date")


def _columns(backends: Iterable[Backend]) -> dict[str, list[sa.Column[Any]]]:
    """The columns of each table. Rows are read by position: the order matters."""
    name = _with_variants("name", sa.String(512), backends)
    digest = _with_variants("text", sa.String(64), backends)
    kind = _with_variants("text", sa.String(255), backends)
    integer = _with_variants("integer", sa.BigInteger(), backends)
    moment = _with_variants("moment", sa.DateTime(timezone=True), backends)
    now = sa.text("CURRENT_TIMESTAMP")  # not now(): Alembic writes it as it is, and SQLite knows no now()
    return {
        "image_storage": [
            sa.Column("name", name, primary_key=True),
            *_contents(digest, integer, kind),
            sa.Column("created_at", moment, nullable=False, server_default=now),
            sa.Column("changed_at", moment, nullable=False, server_default=now),
            sa.Column("generation", integer, nullable=False, server_default="1"),
            sa.Column("deleted_at", moment),
            sa.Column("sequence", integer, nullable=False, server_default="0"),
        ],
        **_blob_columns(digest, integer, moment),
        "image_history": [
            sa.Column("name", name, primary_key=True),
            sa.Column("generation", integer, primary_key=True, autoincrement=False),
            *_contents(digest, integer, kind),
            sa.Column("replaced_at", moment, nullable=False, server_default=now),
            sa.Column("reason", kind, nullable=False, server_default=""),
        ],
        "image_schema": [
            sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("epoch", digest, nullable=False, server_default=""),
            sa.Column("sequence", integer, nullable=False, server_default="0"),
        ],
    }


def _blob_columns(
    digest: TypeEngine[Any], integer: TypeEngine[Any], moment: TypeEngine[Any]
) -> dict[str, list[sa.Column[Any]]]:
    now = sa.text("CURRENT_TIMESTAMP")  # not now(): Alembic writes it as it is, and SQLite knows no now()
    return {
        "image_blob": [
            sa.Column("sha256", digest, primary_key=True),
            sa.Column("size", integer, nullable=False),
            sa.Column("chunks", sa.Integer, nullable=False),
            sa.Column("stored_at", moment, nullable=False, server_default=now),
        ],
        "image_chunk": [
            sa.Column("sha256", digest, primary_key=True),
            sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("digest", sa.LargeBinary(32), nullable=False),
            sa.Column("stored_at", moment, nullable=False, server_default=now),
            sa.Column("data", sa.LargeBinary, nullable=False),
        ],
    }


def _contents(digest: TypeEngine[Any], integer: TypeEngine[Any], kind: TypeEngine[Any]) -> list[sa.Column[Any]]:
    return [
        sa.Column("sha256", digest, nullable=False, index=True),
        sa.Column("size", integer, nullable=False),
        sa.Column("content_type", kind, nullable=False),
        sa.Column("modified_ns", integer, nullable=False),
    ]


def _with_variants(kind: str, general: TypeEngine[Any], backends: Iterable[Backend]) -> TypeEngine[Any]:
    for backend in backends:
        if kind in backend.types:
            general = general.with_variant(backend.types[kind], backend.name)
    return general
