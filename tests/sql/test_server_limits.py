"""A PostgreSQL server that has few connections for all: misses wait for one, and two nodes and a run have enough."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.applications import Starlette

from selfheal import SelfHealMiddleware, UploadStore
from tests.support.held_connections import held_connections
from tests.support.postgres import start_postgres
from tests.support.raw_sql import sql
from tests.support.records import fill_catalogue
from tests.support.run_script import outcome_counts, run_script
from tests.support.uploads import get

NAMES = [f"folder{number % 7}/{number}.png" for number in range(60)]


@pytest.fixture
def server() -> Iterator[Callable[[int], str]]:
    """Start a server that has so many connections, all for everybody; return the URL of its database."""
    with tempfile.TemporaryDirectory(prefix="selfheal-postgres-") as base, ExitStack() as stack:

        def start(connections: int) -> str:
            settings = f"-c max_connections={connections} -c superuser_reserved_connections=0"
            running = start_postgres(Path(base), settings)
            stack.callback(running.control, "stop", "-m", "immediate")
            return running.url("postgres")

        yield start


async def test_a_server_that_is_full(server: Callable[[int], str], directory: Path) -> None:
    """While other programs hold every connection of the server, a miss waits; with one left, many are answered."""
    url = server(6)
    await fill_catalogue(url, directory, NAMES)
    async with UploadStore(directory, url, deadline=30.0) as store:
        app = SelfHealMiddleware(Starlette(), store)
        async with held_connections(url, 6) as give_back:
            asking = asyncio.create_task(get(app, NAMES[0]))
            await asyncio.sleep(0.5)
            assert not asking.done()
            await give_back()
            assert (await asking).text == NAMES[0]
        await store.database.close()
        async with held_connections(url, 5):
            answers = await asyncio.gather(*(get(app, name) for name in NAMES))
            assert [answer.text for answer in answers] == NAMES


async def test_twenty_connections(server: Callable[[int], str], tmp_path: Path) -> None:
    """20 connections carry two nodes under load and a bulk run at the same time: all is answered, the run exits 0."""
    url = server(20)
    names = [*NAMES, "new.png"]
    await fill_catalogue(url, tmp_path / "filling", names)
    stop, seen = asyncio.Event(), []

    async def visit(store: UploadStore) -> None:
        app = SelfHealMiddleware(Starlette(), store)
        while not stop.is_set():
            answers = await asyncio.gather(*(get(app, name) for name in NAMES), store.save("new.png", b"new.png"))
            assert {answer.status_code for answer in answers[:-1]} == {200}  # type: ignore[union-attr]
            for name in NAMES:
                store.disk.remove(name)
            seen.append(len(answers))

    nodes = [UploadStore(tmp_path / name, url, deadline=30.0) for name in ("one", "two")]
    async with nodes[0], nodes[1]:
        visiting = [asyncio.create_task(visit(store)) for store in nodes]
        for module, outcome in (("restore_images", "restored"), ("test_image_storage", "ok")):
            code, report = await asyncio.to_thread(
                run_script, module, "--jobs", "8", directory=tmp_path / "three", database=url
            )
            assert (code, outcome_counts(report)[outcome]) == (0, len(names))
        stop.set()
        await asyncio.gather(*visiting)
    assert len(seen) >= 2
    assert await sql(url, "SELECT count(*) FROM image_storage") == [(len(names),)]
