"""The tables of the catalogue, in the app's own MetaData if it likes, so that Alembic sees them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import TypeEngine

from ..errors import SchemaError
from .backend import Backend
from .backends import BACKENDS

SCHEMA_VERSION = 1


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


def define_tables(metadata: sa.MetaData, *dialects: str) -> Tables:
    """Define the tables in `metadata`, or return its own; each of `dialects` costs some 30 ms to load."""
    names = ("image_storage", "image_blob", "image_chunk", "image_history", "image_schema")
    keys = [name if metadata.schema is None else f"{metadata.schema}.{name}" for name in names]
    if keys[0] in metadata.tables:
        return Tables(*(metadata.tables[key] for key in keys))
    backends = [backend for backend in BACKENDS if not dialects or backend.name in dialects]
    options = {key: value for backend in backends for key, value in backend.table_options().items()}
    columns = _columns(backends)
    tables = Tables(*(sa.Table(name, metadata, *columns[name], **options) for name in names))
    records = tables.records
    changed = records.c.generation > sa.literal_column("1")  # a new name has no old copy anywhere, and costs no entry
    where: dict[str, Any] = {f"{backend.name}_where": changed for backend in backends if backend.has_partial_indexes}
    sa.Index("ix_image_storage_changed_at", records.c.changed_at, **where)
    for backend in backends:
        backend.prepare_chunks(tables.chunks)
    return tables


async def create_tables(connection: AsyncConnection, tables: Tables, backend: Backend) -> None:
    """Create the tables and indexes that are missing. Raises `SchemaError` if they are of another version."""
    for table in tables.all():
        await connection.run_sync(table.create, checkfirst=True)
    for index in tables.records.indexes:  # of a table that an earlier selfheal made
        await connection.run_sync(index.create, checkfirst=True)
    check_version((await connection.execute(sa.select(sa.func.max(tables.schema.c.version)))).scalar_one())
    ours = backend.insert(tables.schema).values(version=SCHEMA_VERSION)
    await connection.execute(ours.on_conflict_do_nothing())


def check_version(version: int | None) -> None:
    """Raise `SchemaError` unless the tables have our version, or none (a migration of the app's made them)."""
    if version is not None and version > SCHEMA_VERSION:
        raise SchemaError(f"the tables are of version {version}, made by a newer selfheal; upgrade selfheal")
    if version is not None and version < SCHEMA_VERSION:
        raise SchemaError(f"the tables are of version {version}; run `selfheal migrate` to bring them up to date")


def _columns(backends: Iterable[Backend]) -> dict[str, list[sa.Column[Any]]]:
    """The columns of each table. Rows are read by position: the order matters."""
    name = _with_variants("name", sa.String(512), backends)
    digest = _with_variants("text", sa.String(64), backends)
    kind = _with_variants("text", sa.String(255), backends)
    integer = _with_variants("integer", sa.BigInteger(), backends)
    moment = _with_variants("moment", sa.DateTime(timezone=True), backends)
    now = sa.func.now()
    return {
        "image_storage": [
            sa.Column("name", name, primary_key=True),
            *_contents(digest, integer, kind),
            sa.Column("created_at", moment, nullable=False, server_default=now),
            sa.Column("changed_at", moment, nullable=False, server_default=now),
            sa.Column("generation", integer, nullable=False, server_default="1"),
            sa.Column("deleted_at", moment),
        ],
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
        "image_history": [
            sa.Column("name", name, primary_key=True),
            sa.Column("generation", integer, primary_key=True, autoincrement=False),
            *_contents(digest, integer, kind),
            sa.Column("replaced_at", moment, nullable=False, server_default=now),
        ],
        "image_schema": [sa.Column("version", sa.Integer, primary_key=True, autoincrement=False)],
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
