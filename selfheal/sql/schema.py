"""The tables of the catalogue, in a MetaData of your own if you like, so that Alembic sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    DDL,
    BigInteger,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    event,
    func,
    literal_column,
)

SCHEMA_VERSION = 1

_Name = String(512).with_variant(Text(collation="C"), "postgresql")
_Moment = DateTime(timezone=True)


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables by what they hold."""

    records: Table
    blobs: Table
    chunks: Table
    history: Table
    schema: Table

    def all(self) -> tuple[Table, ...]:
        """Every table, in an order in which they can be made."""
        return self.records, self.blobs, self.chunks, self.history, self.schema


def define_tables(metadata: MetaData, *dialects: str) -> Tables:
    """Define the catalogue's tables in `metadata`, or return the ones that are defined there.

    Name the `dialects` that they will be made in if no other needs to be loaded: PostgreSQL's takes 30 ms.
    """
    names = ("image_storage", "image_blob", "image_chunk", "image_history", "image_schema")
    keys = [name if metadata.schema is None else f"{metadata.schema}.{name}" for name in names]
    if keys[0] in metadata.tables:
        return Tables(*(metadata.tables[key] for key in keys))
    now = func.now()
    records = Table(
        "image_storage",
        metadata,
        Column("name", _Name, primary_key=True),
        Column("sha256", String(64), nullable=False, index=True),
        Column("size", BigInteger, nullable=False),
        Column("content_type", String(255), nullable=False),
        Column("modified_ns", BigInteger, nullable=False),
        Column("created_at", _Moment, nullable=False, server_default=now),
        Column("changed_at", _Moment, nullable=False, server_default=now),
        Column("generation", BigInteger, nullable=False, server_default="1"),
        Column("deleted_at", _Moment),
    )
    changed = records.c.generation > literal_column("1")  # new names, of which nobody has an old copy, cost nothing
    only: dict[str, Any] = {f"{dialect}_where": changed for dialect in dialects or ("sqlite", "postgresql")}
    Index("ix_image_storage_changed_at", records.c.changed_at, **only)
    blobs = Table(
        "image_blob",
        metadata,
        Column("sha256", String(64), primary_key=True),
        Column("size", BigInteger, nullable=False),
        Column("chunks", Integer, nullable=False),
        Column("stored_at", _Moment, nullable=False, server_default=now),
    )
    chunks = Table(
        "image_chunk",
        metadata,
        Column("sha256", String(64), primary_key=True),
        Column("position", Integer, primary_key=True, autoincrement=False),
        Column("digest", LargeBinary(32), nullable=False),
        Column("stored_at", _Moment, nullable=False, server_default=now),
        Column("data", LargeBinary, nullable=False),
    )
    history = Table(
        "image_history",
        metadata,
        Column("name", _Name, primary_key=True),
        Column("generation", BigInteger, primary_key=True, autoincrement=False),
        Column("sha256", String(64), nullable=False, index=True),
        Column("size", BigInteger, nullable=False),
        Column("content_type", String(255), nullable=False),
        Column("modified_ns", BigInteger, nullable=False),
        Column("replaced_at", _Moment, nullable=False, server_default=now),
    )
    schema = Table("image_schema", metadata, Column("version", Integer, primary_key=True, autoincrement=False))
    # images do not compress: PostgreSQL would try on every chunk, and then could not read a part of one
    external = DDL("ALTER TABLE %(fullname)s ALTER COLUMN data SET STORAGE EXTERNAL")  # type: ignore[no-untyped-call]
    event.listen(chunks, "after_create", external.execute_if(dialect="postgresql"))
    return Tables(records, blobs, chunks, history, schema)
