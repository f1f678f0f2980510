"""Fixtures of the scripts: a fork server that runs commands, and sites of apps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfheal import UploadStore
from tests.support.command_line import IMAGES, ForkServer, Site, start_fork_server
from tests.support.files import write_file


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """One fork server for all commands of the run."""
    with start_fork_server(tmp_path_factory.mktemp("fork-server")) as server:
        yield server


@pytest.fixture
def site(tmp_path: Path, directory: Path, sqlite_url: str, fork_server: ForkServer) -> Site:
    """A site over SQLite, without files and records."""
    return Site(tmp_path, directory, sqlite_url, fork_server)


@pytest.fixture
def full_site(site: Site, sqlite_tables: str) -> Site:
    """A site whose uploads are on disk and in the database."""
    for name, data in IMAGES.items():
        write_file(site.directory / name, data)

    async def adopt_all() -> None:
        async with UploadStore(site.directory, site.database) as store:
            for name in IMAGES:
                await store.adopt(name)

    asyncio.run(adopt_all())
    return site
