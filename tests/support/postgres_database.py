"""One PostgreSQL database for several tests: to create one takes longer than most tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from tests.support.postgres import PostgresServer


@contextmanager
def new_database(server: PostgresServer) -> Iterator[str]:
    """Create a database, yield its name, and drop it."""
    name = f"t{uuid4().hex[:12]}"
    server.sql(f"CREATE DATABASE {name}")
    yield name
    server.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def drop_tables(server: PostgresServer, database: str) -> None:
    """Drop every table of a database."""
    server.sql("SET lock_timeout = '9s'; DROP SCHEMA public CASCADE; CREATE SCHEMA public", database)
