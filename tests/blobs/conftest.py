"""Fixtures of the tests in this folder: a database that they share, and the database half over it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from selfheal import ImageStorage, UploadStore
from tests.support.postgres import PostgresServer
from tests.support.postgres_database import drop_tables, new_database


@pytest.fixture(scope="module")
def module_database(postgres: PostgresServer) -> Iterator[str]:
    """The name of a PostgreSQL database for all tests of a module."""
    with new_database(postgres) as name:
        yield name


@pytest.fixture
def postgres_url(postgres: PostgresServer, module_database: str) -> Iterator[str]:
    """The URL of that database; its tables are dropped after each test."""
    yield postgres.url(module_database)
    drop_tables(postgres, module_database)


@pytest.fixture
def images(store: UploadStore) -> ImageStorage:
    """The database half, its tables created."""
    return store.database
