"""Fixtures for a server process with faults: its settings, its databases and disks, and gates for its calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from selfheal import UploadStore
from tests.support.faulty_server import Gate
from tests.support.postgres import PostgresServer
from tests.support.process_faults import Faults
from tests.support.proxy import Proxy
from tests.support.small_disk import SmallDisk, mounted_disk


@pytest.fixture
def faults(directory: Path, sqlite_url: str) -> Faults:
    """The settings of a server without a fault, over the directory and the database of `sqlite_store`."""
    return Faults(directory=str(directory), database=sqlite_url)


@pytest.fixture
async def postgres_store(directory: Path, postgres_tables: str) -> AsyncIterator[UploadStore]:
    """A store over PostgreSQL whose tables exist."""
    async with UploadStore(directory, postgres_tables) as store:
        yield store


@pytest.fixture
async def proxy(postgres: PostgresServer) -> AsyncIterator[Proxy]:
    """A proxy between the server process and PostgreSQL."""
    async with Proxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture
def proxied_faults(directory: Path, postgres_url: str, proxy: Proxy) -> Faults:
    """The settings of a server without a fault, over the database of `postgres_store`, through the proxy."""
    url = make_url(postgres_url).set(port=proxy.port).render_as_string(hide_password=False)
    return Faults(directory=str(directory), database=url)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A gate at which a call of the server process waits until the test opens it."""
    return Gate(tmp_path / "gate")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A real file system of 2 MiB."""
    with mounted_disk(tmp_path / "small") as disk:
        yield disk
