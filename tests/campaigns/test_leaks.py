"""Clients that disconnect at any moment leave nothing open, and no large file blocks the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from selfheal import UploadStore, bulk
from selfheal.content.sources import CHUNK
from tests.support.faulty_server import PREFIX, SECONDS, FaultyServer, Request, running_server
from tests.support.latency import ControlProcess, Latency, latency_during, measure_latency
from tests.support.postgres import PostgresServer
from tests.support.process_faults import Faults
from tests.support.sample_data import noise
from tests.support.store_state import files_below, in_database
from tests.support.waiting import eventually

AT_ONCE = 32
SMALL, MEDIUM, LARGE = 1000, 3 * CHUNK + 77, 17 * 2**20 + 77
"""Bytes of a file of one chunk, of several, and of one that is sent while it is restored."""
KEPT = {f"kept/{number}.jpg": size for number, size in enumerate([SMALL, SMALL + 1, MEDIUM, MEDIUM + 1, LARGE])}
"""Names that do not change; their files are lost again and again."""
LARGEST = max(KEPT, key=lambda name: KEPT[name])
CHANGED = [f"changed/{number}.jpg" for number in range(40)]


@pytest.fixture
def control() -> Iterator[ControlProcess]:
    """An idle process that measures how late the machine is."""
    with ControlProcess() as control:
        yield control


# -- clients that disconnect ----------------------------------------------------------------------------------------


class DisconnectingClients:
    """Clients that disconnect before their answer is complete."""

    def __init__(self, server: FaultyServer, directory: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._server = server
        self._directory = directory
        self._behaviours: list[Callable[[], Awaitable[None]]] = [
            self._send_nothing,
            self._send_half_a_head,
            self._get,
            self._get_and_read_a_little,
            self._get_and_read_a_little,
            self._get_lost_file,
            self._get_lost_file,
            self._get_lost_file_and_read_a_little,
            self._get_absent_name,
            self._upload_half,
            self._upload_all,
            self._delete,
        ]

    async def run(self, number: int) -> None:
        """Run `number` clients, 32 at once."""
        left = iter(range(number))

        async def clients() -> None:
            for _ in left:
                behaviour = random.choice(self._behaviours)
                self.counts[behaviour.__name__.strip("_").replace("_", " ")] += 1
                with contextlib.suppress(ConnectionError):
                    await behaviour()

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(clients())

    async def _send_nothing(self) -> None:
        async with self._connection() as client:
            await self._pause(client)

    async def _send_half_a_head(self) -> None:
        async with self._connection() as client:
            client.writer.write(f"GET {PREFIX}/kept/0.jpg HTTP/1.1\r\nHost: te"[: random.randrange(60)].encode())
            await self._pause(client)

    async def _get(self) -> None:
        async with self._server.visit(self._kept(), *self._range()) as client:
            await self._pause(client)

    async def _get_and_read_a_little(self) -> None:
        name = random.choice((LARGEST, self._kept()))  # the kernel buffers small files whole, but not the large one
        async with self._server.visit(name, buffer=4096) as client:
            await client.read(random.randrange(1, 100_000))

    async def _get_lost_file(self) -> None:
        async with self._server.visit(self._lost(), *self._range()) as client:
            await self._pause(client)

    async def _get_lost_file_and_read_a_little(self) -> None:
        async with self._server.visit(self._lost(), buffer=4096) as client:
            await client.read(random.randrange(1, 100_000))

    async def _get_absent_name(self) -> None:
        async with self._server.visit(f"no/{random.random()}.jpg") as client:
            await self._pause(client)

    async def _upload_half(self) -> None:
        data = self._data()
        async with self._upload(len(data)) as client:
            client.writer.write(data[: random.randrange(len(data))])
            await self._pause(client)

    async def _upload_all(self) -> None:
        data = self._data()
        async with self._upload(len(data)) as client:
            client.writer.write(data)
            await client.writer.drain()
            await self._pause(client)

    async def _delete(self) -> None:
        async with self._server.request(f"/upload/{random.choice(CHANGED)}", method="DELETE") as client:
            await self._pause(client)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Request]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        async with Request(reader, writer) as request:
            yield request

    def _upload(self, size: int) -> contextlib.AbstractAsyncContextManager[Request]:
        target = f"/upload/{random.choice(CHANGED)}"
        return self._server.request(target, f"Content-Length: {size}", method="POST")

    async def _pause(self, client: Request) -> None:
        """Wait for up to 30 ms before the client disconnects."""
        await client.writer.drain()
        await asyncio.sleep(random.choice((0.0, 0.001, 0.003, 0.01, 0.03)) * random.random())

    def _kept(self) -> str:
        """Return a name; seldom that of the large file, which takes a while."""
        return random.choices(list(KEPT), [10, 10, 10, 10, 1])[0]

    def _lost(self) -> str:
        """Delete the file of a name, and return the name."""
        name = self._kept()
        (self._directory / name).unlink(missing_ok=True)
        return name

    def _data(self) -> bytes:
        return noise(random.choice((10, SMALL, MEDIUM)) + random.randrange(100))

    def _range(self) -> list[str]:
        return random.choice(([], [], ["Range: bytes=10-500"], ["Range: bytes=-300000"]))


@dataclass(frozen=True)
class Resources:
    """The resources of a server process; its database connections may stay open, and are counted separately."""

    descriptors: Counter[str]
    tasks: int
    checked_out: int
    connections: int

    def more_than(self, before: Resources) -> list[str]:
        """Describe what there is too much of."""
        more = [f"{count} more of {kind}" for kind, count in (self.descriptors - before.descriptors).items()]
        if self.tasks > before.tasks:
            more.append(f"{self.tasks} tasks, not {before.tasks}")
        if self.checked_out:
            more.append(f"{self.checked_out} connections are checked out")
        if self.connections > 10:
            more.append(f"{self.connections} connections are open")
        return more


async def resources_of(server: FaultyServer, postgres: PostgresServer | None) -> Resources:
    """Return the resources of the process at this moment."""
    state = json.loads((await server.ask("GET", "/resources")).body)
    url = make_url(server.faults.database)
    if postgres is None:
        connections = state["descriptors"].count(str(url.database))
    else:
        sql = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{url.database}'"
        connections = int(await asyncio.to_thread(postgres.sql, sql))
    kinds = Counter(_kind(path, server) for path in state["descriptors"])
    kinds["the database"] = 0
    kinds["socket"] -= connections if postgres is not None else 0
    return Resources(kinds, state["tasks"], state["connections"], connections)


def _kind(path: str, server: FaultyServer) -> str:
    if path.startswith(str(make_url(server.faults.database).database)):
        return "the database"
    return "socket" if path.startswith("socket:") else path.replace(server.faults.directory, "uploads")


@pytest.mark.parametrize("cancels", [False, True], ids=["reported", "cancelled"])
async def test_clients_that_hang_up_leave_nothing_behind(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    directory: Path,
    store: UploadStore,
    database_url: str,
    cancels: bool,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """After clients that disconnect before, in and after a request, an upload or a restore, whether the server cancels
    the request or not, the server has no descriptor, task, connection or temporary file more, and serves every name.
    """
    postgres = request.getfixturevalue("postgres") if database_url.startswith("postgres") else None
    for name, size in KEPT.items():
        await store.save(name, noise(size))
    faults = Faults(directory=str(directory), database=database_url, records_statements=False, cancels=cancels)
    async with running_server(tmp_path, faults) as server:
        clients = DisconnectingClients(server, directory)
        await clients.run(100)
        await asyncio.sleep(1.5)
        before = await resources_of(server, postgres)
        clients.counts.clear()
        start = time.monotonic()
        await clients.run(times(120, 2_500))
        seconds = time.monotonic() - start
        left: list[str] = []

        async def nothing_is_left() -> bool:
            left[:] = (await resources_of(server, postgres)).more_than(before)
            return not left

        try:
            await eventually(nothing_is_left, 20)
        except AssertionError:
            raise AssertionError(f"left over: {left}") from None
        finally:
            record_property(f"clients in {seconds:.0f} s", f"{clients.counts.total()}; left over: {left}")
        for name, size in KEPT.items():
            answer = await server.get(name)
            assert (answer.status, answer.body == noise(size)) == (200, True)
        names = files_below(directory)
        assert not (directory / ".selfheal-tmp").exists()
        for name in names:
            assert (directory / name).read_bytes() == await in_database(store, name)


# -- the event loop -------------------------------------------------------------------------------------------------


NAME = "films/cat.bin"
PIECE = noise(2**20)


async def pieces(size: int) -> AsyncIterator[bytes]:
    """Yield `size` bytes that need no work to create."""
    for start in range(0, size, len(PIECE)):
        await asyncio.sleep(0)
        yield PIECE[: size - start]


async def drain(results: Any) -> None:
    """Read all results; fail if one is a problem."""
    async with aclosing(results):
        async for result in results:
            assert not result.is_problem


async def streamed(store: UploadStore) -> None:
    """Restore a missing file and read it meanwhile, as a server does."""
    body = await store.restorer.restore(NAME)
    assert body is not None
    size = 0
    try:
        async with aclosing(body.pieces(0, body.size)) as read:
            async for piece in read:
                size += len(piece)
    finally:
        body.close()
    assert size == body.size
    await store.tasks.drain(60)


def check_latencies(latencies: dict[str, Latency]) -> None:
    """Fail if one of them is too high; skip the test if one could not be measured."""
    assert [title for title, latency in latencies.items() if latency.is_too_high] == []
    if not all(latency.tries for latency in latencies.values()):
        pytest.skip("this machine is too busy to measure a latency: even an idle process was too late")


async def test_no_large_file_blocks_the_event_loop(
    sqlite_store: UploadStore,
    tmp_path: Path,
    control: ControlProcess,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """While a large file is saved, restored, streamed, migrated, healed or verified, a task that sleeps for 5 ms is
    never more than 50 ms late.
    """
    store, size = sqlite_store, times(64, 512) * 2**20
    path = store.disk.path_of(NAME)
    copy = tmp_path / "copy"

    async def prepared(prepare: Callable[[], object], work: Callable[[], Awaitable[object]]) -> float:
        await asyncio.to_thread(prepare)
        return await latency_during(work)

    def lost() -> None:
        path.unlink(missing_ok=True)

    def differing() -> None:
        with path.open("r+b") as file:
            file.write(b"differs")

    works = {
        "save": lambda: latency_during(lambda: store.save(NAME, pieces(size))),
        "save a file": lambda: prepared(lambda: path.rename(copy), lambda: store.save(NAME, copy)),
        "restore": lambda: prepared(lost, lambda: store.restore(NAME)),
        "stream": lambda: prepared(lost, lambda: streamed(store)),
        "restore all": lambda: prepared(lost, lambda: drain(bulk.restore(store))),
        "verify": lambda: latency_during(lambda: drain(bulk.verify(store))),
        "heal": lambda: prepared(differing, lambda: drain(bulk.restore(store, verify=True))),
        "migrate": lambda: latency_during(lambda: drain(bulk.migrate(store))),
    }
    latencies = {title: await measure_latency(work, control) for title, work in works.items()}
    record_property(f"latency with {size >> 20} MiB", {title: str(latency) for title, latency in latencies.items()})
    check_latencies(latencies)


async def test_no_large_file_blocks_a_server(
    tmp_path: Path,
    directory: Path,
    sqlite_store: UploadStore,
    sqlite_url: str,
    control: ControlProcess,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """The same holds in a server that receives a large upload, sends it, and sends it while it is restored."""
    size = times(64, 512) * 2**20
    whole = sha256()
    async for piece in pieces(size):
        whole.update(piece)
    faults = Faults(directory=str(directory), database=sqlite_url, records_statements=False)
    async with running_server(tmp_path, faults) as server:

        async def measured(work: Callable[[], Awaitable[None]]) -> float:
            await server.ask("POST", "/latency")
            await work()
            return float((await server.ask("GET", "/latency")).body)

        async def upload() -> None:
            async with server.request(f"/upload/{NAME}", f"Content-Length: {size}", method="POST") as client:
                async for piece in pieces(size):
                    client.writer.write(piece)
                    await client.writer.drain()
                assert (await client.answer()).status == 201

        async def download() -> None:
            async with server.visit(NAME) as client:
                assert await read_digest(client) == (size, whole.hexdigest())

        async def download_lost() -> None:
            (directory / NAME).unlink()
            await download()

        works = {"upload": upload, "hit": download, "miss": download_lost}
        latencies: dict[str, Latency] = {}
        for title, work in works.items():
            latencies[title] = await measure_latency(lambda work=work: measured(work), control)  # type: ignore[misc]
    record_property(f"latency with {size >> 20} MiB", {title: str(latency) for title, latency in latencies.items()})
    check_latencies(latencies)


async def read_digest(client: Request) -> tuple[int, str]:
    """Return the size and the digest of an answer's body, which is read in pieces."""
    digest, size = sha256(), 0
    async with asyncio.timeout(5 * SECONDS):
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        while piece := await client.reader.read(2**18):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


async def test_a_blocked_loop_is_measured(control: ControlProcess) -> None:
    """The monitor that the tests above use measures a block of 200 ms."""

    async def blocking() -> None:
        await asyncio.sleep(0.02)
        time.sleep(0.2)

    latency = await measure_latency(lambda: latency_during(blocking), control)
    assert latency.is_too_high
    assert latency.worst >= 0.19
