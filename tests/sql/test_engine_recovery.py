"""A server that fails and comes back: calls are unknown meanwhile, and the pool recovers by itself."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio
import pytest

from selfheal import DatabaseUnavailable, ImageStorage
from selfheal.content.sources import CHUNK
from selfheal.sql.models import Record
from tests.support.postgres import PostgresServer, start_postgres
from tests.support.proxy import Mode, Proxy
from tests.support.records import bytes_of
from tests.support.storage import (
    CALLS,
    TIMEOUT,
    assert_all_raise,
    prepared_storage,
)

SLACK = 8.0
"""Seconds beyond a timeout that a busy machine may need."""


@pytest.fixture(scope="module")
def own_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server for this module alone, which may be stopped and started."""
    server = start_postgres(tmp_path_factory.mktemp("own-postgres"))
    yield server
    server.control("stop", "-m", "immediate")


def control(server: PostgresServer, verb: str) -> None:
    """Restart, stop or start a server; its log goes to a file, because a pipe would stay open with the server."""
    run = server.data.parent / "run"
    log = ("-l", str(run / "log"))
    crash = ("-m", "immediate")
    options = ("-o", f"-h 127.0.0.1 -p {server.port} -k {run} -c fsync=off -c max_connections=200")
    server.control(verb, *{"restart": (*log, *crash), "stop": crash, "start": (*log, *options)}[verb])


async def warm(images: ImageStorage) -> None:
    """Open several connections of the pool."""
    await asyncio.gather(*(images.find("a.png") for _ in range(10)))


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "unnoticed"])
async def test_a_restart(own_postgres: PostgresServer, noticed: bool) -> None:
    """After a restart of the server every read is answered at once: it is retried on a new connection."""
    async with prepared_storage(own_postgres.url("postgres"), timeout=5) as images:
        await warm(images)
        if noticed:
            await anyio.to_thread.run_sync(control, own_postgres, "restart")
        else:
            control(own_postgres, "restart")  # the loop is blocked, and does not notice the restart
        answers = await asyncio.gather(*(images.find("a.png") for _ in range(5)))
        assert {None if answer is None else answer.name for answer in answers} == {"a.png"}
        assert await bytes_of(images, "a.png") is not None
        await images.store_image("a.png", b"after")
        assert await bytes_of(images, "a.png") == b"after"


async def test_down_and_up_again(own_postgres: PostgresServer) -> None:
    """While the server is stopped every call is unknown; after its start they are answered."""
    async with prepared_storage(own_postgres.url("postgres"), timeout=5) as images:
        await warm(images)
        await anyio.to_thread.run_sync(control, own_postgres, "stop")
        try:
            await assert_all_raise(images, CALLS, DatabaseUnavailable)
        finally:
            await anyio.to_thread.run_sync(control, own_postgres, "start")
        assert await bytes_of(images, "a.png") is not None
        await images.store_image("a.png", b"again")


@asynccontextmanager
async def proxied(postgres: PostgresServer, url: str) -> AsyncIterator[tuple[Proxy, ImageStorage]]:
    """Prepare a database whose connections all go through a proxy."""
    async with (
        Proxy(postgres.port) as proxy,
        prepared_storage(postgres.url(url.rpartition("/")[2], proxy.port)) as images,
    ):
        yield proxy, images
        await proxy.set_mode("pass")


@pytest.mark.parametrize("mode", ["stall", "cut", "refuse"])
async def test_recovery(postgres: PostgresServer, postgres_url: str, mode: Mode) -> None:
    """However a server fails, calls are unknown in bounded time, and the pool recovers by itself."""
    async with proxied(postgres, postgres_url) as (proxy, images):
        await warm(images)
        await proxy.set_mode(mode)
        began = time.monotonic()
        answers = await asyncio.gather(*(images.find("a.png") for _ in range(25)), return_exceptions=True)
        assert {type(answer) for answer in answers} == {DatabaseUnavailable}
        with pytest.raises(DatabaseUnavailable):
            await images.store_image("b.png", b"two")
        assert time.monotonic() - began < 5 * TIMEOUT + SLACK
        await proxy.set_mode("pass")
        records = await asyncio.gather(*(images.find("a.png") for _ in range(25)))
        assert all(record is not None for record in records)
        await images.store_image("b.png", b"two")
        assert await bytes_of(images, "b.png") == b"two"


async def test_connections_that_were_cut(postgres: PostgresServer, postgres_url: str) -> None:
    """Reads are answered although the idle connections of the pool have died."""
    async with proxied(postgres, postgres_url) as (proxy, images):
        await warm(images)
        await proxy.set_mode("cut")
        await proxy.set_mode("pass")
        records = await asyncio.gather(*(images.find("a.png") for _ in range(10)))
        assert all(record is not None for record in records)


async def test_a_black_hole_that_forgets(postgres: PostgresServer, postgres_url: str) -> None:
    """After a silent network comes back without the old connections, as after a fail-over, calls are answered."""
    async with proxied(postgres, postgres_url) as (proxy, images):
        await warm(images)
        await proxy.set_mode("stall")
        with pytest.raises(DatabaseUnavailable):
            await images.find("a.png")
        await proxy.set_mode("cut")
        await proxy.set_mode("pass")
        assert await bytes_of(images, "a.png") == b"one"


async def test_cut_while_saving(postgres: PostgresServer, postgres_url: str) -> None:
    """A save whose connection is cut at any moment is stored whole or not at all, and a repetition is harmless."""
    async with proxied(postgres, postgres_url) as (proxy, images):
        for number in range(12):
            name, data = f"{number}.png", os.urandom(18 * CHUNK)
            saving = asyncio.create_task(images.store_image(name, data))
            await asyncio.sleep(number * 0.02)
            await proxy.set_mode("cut")
            await proxy.set_mode("pass")
            (outcome,) = await asyncio.gather(saving, return_exceptions=True)
            assert isinstance(outcome, (Record, DatabaseUnavailable)), repr(outcome)
            assert await bytes_of(images, name) in ((None, data) if isinstance(outcome, Exception) else (data,))
            again = await images.store_image(name, data)
            assert again.generation == 1
            assert await bytes_of(images, name) == data


@pytest.mark.parametrize("moment", ["read", "connect"])
async def test_cancelled_reads(database_url: str, moment: str) -> None:
    """Reads that are cancelled at any moment cost the pool no connection."""
    async with prepared_storage(database_url) as images:
        for number in range(60):
            asking = asyncio.create_task(images.find("a.png"))
            await asyncio.sleep(0 if moment == "connect" and number % 2 else number * 0.0002)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        records = await asyncio.gather(*(images.find("a.png") for _ in range(20)))
        assert all(record is not None for record in records)
        await images.store_image("a.png", b"two")
