"""Clients that hang up at any moment leave nothing behind, and no large file holds the event loop up."""

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
from tests.support.faulty_app import Faults
from tests.support.heartbeat import Control, Stall, stall_of, with_heart
from tests.support.postgres import PostgresServer
from tests.support.serving import PREFIX, SECONDS, Request, Server, serving
from tests.support.sides import files_below, in_database, noise
from tests.support.waiting import eventually

AT_ONCE = 32
SMALL, MEDIUM, LARGE = 1000, 3 * CHUNK + 77, 17 * 2**20 + 77
"""Bytes of a file of one chunk, of several, and of one that is sent while it is restored."""
KEPT = {f"kept/{number}.jpg": size for number, size in enumerate([SMALL, SMALL + 1, MEDIUM, MEDIUM + 1, LARGE])}
"""Names that nobody changes; their files are lost again and again."""
LARGEST = max(KEPT, key=lambda name: KEPT[name])
CHANGED = [f"changed/{number}.jpg" for number in range(40)]


@pytest.fixture
def control() -> Iterator[Control]:
    """A process that keeps time."""
    with Control() as control:
        yield control


# -- clients that hang up -------------------------------------------------------------------------------------------


class Impatient:
    """Clients, each of whom goes away before it was served to the end."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.seen: Counter[str] = Counter()
        self._server = server
        self._directory = directory
        self._moods: list[Callable[[], Awaitable[None]]] = [
            self._says_nothing,
            self._says_half,
            self._asks_and_goes,
            self._reads_a_little,
            self._reads_a_little,
            self._asks_for_a_lost_file,
            self._asks_for_a_lost_file,
            self._reads_a_little_of_a_lost_file,
            self._asks_for_nothing,
            self._sends_half,
            self._sends_all_and_goes,
            self._deletes_and_goes,
        ]

    async def come(self, number: int) -> None:
        """So many of them, some at once."""
        left = iter(range(number))

        async def queue() -> None:
            for _ in left:
                mood = random.choice(self._moods)
                self.seen[mood.__name__.strip("_").replace("_", " ")] += 1
                with contextlib.suppress(ConnectionError):
                    await mood()

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(queue())

    async def _says_nothing(self) -> None:
        async with self._raw() as client:
            await self._a_moment(client)

    async def _says_half(self) -> None:
        async with self._raw() as client:
            client.writer.write(f"GET {PREFIX}/kept/0.jpg HTTP/1.1\r\nHost: te"[: random.randrange(60)].encode())
            await self._a_moment(client)

    async def _asks_and_goes(self) -> None:
        async with self._server.visit(self._kept(), *self._range()) as client:
            await self._a_moment(client)

    async def _reads_a_little(self) -> None:
        name = random.choice((LARGEST, self._kept()))  # no buffer of the kernel takes the large one whole
        async with self._server.visit(name, buffer=4096) as client:
            await client.read(random.randrange(1, 100_000))

    async def _asks_for_a_lost_file(self) -> None:
        async with self._server.visit(self._lost(), *self._range()) as client:
            await self._a_moment(client)

    async def _reads_a_little_of_a_lost_file(self) -> None:
        async with self._server.visit(self._lost(), buffer=4096) as client:
            await client.read(random.randrange(1, 100_000))

    async def _asks_for_nothing(self) -> None:
        async with self._server.visit(f"no/{random.random()}.jpg") as client:
            await self._a_moment(client)

    async def _sends_half(self) -> None:
        data = self._data()
        async with self._upload(len(data)) as client:
            client.writer.write(data[: random.randrange(len(data))])
            await self._a_moment(client)

    async def _sends_all_and_goes(self) -> None:
        data = self._data()
        async with self._upload(len(data)) as client:
            client.writer.write(data)
            await client.writer.drain()
            await self._a_moment(client)

    async def _deletes_and_goes(self) -> None:
        async with self._server.request(f"/upload/{random.choice(CHANGED)}", method="DELETE") as client:
            await self._a_moment(client)

    @contextlib.asynccontextmanager
    async def _raw(self) -> AsyncIterator[Request]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        async with Request(reader, writer) as request:
            yield request

    def _upload(self, size: int) -> contextlib.AbstractAsyncContextManager[Request]:
        target = f"/upload/{random.choice(CHANGED)}"
        return self._server.request(target, f"Content-Length: {size}", method="POST")

    async def _a_moment(self, client: Request) -> None:
        await client.writer.drain()
        await asyncio.sleep(random.choice((0.0, 0.001, 0.003, 0.01, 0.03)) * random.random())

    def _kept(self) -> str:
        """Seldom the large one: it takes a while."""
        return random.choices(list(KEPT), [10, 10, 10, 10, 1])[0]

    def _lost(self) -> str:
        name = self._kept()
        (self._directory / name).unlink(missing_ok=True)
        return name

    def _data(self) -> bytes:
        return noise(random.choice((10, SMALL, MEDIUM)) + random.randrange(100))

    def _range(self) -> list[str]:
        return random.choice(([], [], ["Range: bytes=10-500"], ["Range: bytes=-300000"]))


@dataclass(frozen=True)
class Holding:
    """What a server process holds on to: its connections to the database may stay, and are counted apart."""

    descriptors: Counter[str]
    tasks: int
    checked_out: int
    connections: int

    def more_than(self, before: Holding) -> list[str]:
        """What there is too much of, in words."""
        more = [f"{count} more of {kind}" for kind, count in (self.descriptors - before.descriptors).items()]
        if self.tasks > before.tasks:
            more.append(f"{self.tasks} tasks, not {before.tasks}")
        if self.checked_out:
            more.append(f"{self.checked_out} connections are checked out")
        if self.connections > 10:
            more.append(f"{self.connections} connections are open")
        return more


async def held_by(server: Server, postgres: PostgresServer | None) -> Holding:
    """What the process holds now."""
    state = json.loads((await server.ask("GET", "/holding")).body)
    url = make_url(server.faults.database)
    if postgres is None:
        connections = state["descriptors"].count(str(url.database))
    else:
        sql = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{url.database}'"
        connections = int(await asyncio.to_thread(postgres.sql, sql))
    kinds = Counter(_kind(path, server) for path in state["descriptors"])
    kinds["the database"] = 0
    kinds["socket"] -= connections if postgres is not None else 0
    return Holding(kinds, state["tasks"], state["connections"], connections)


def _kind(path: str, server: Server) -> str:
    if path.startswith(str(make_url(server.faults.database).database)):
        return "the database"
    return "socket" if path.startswith("socket:") else path.replace(server.faults.directory, "uploads")


@pytest.mark.parametrize("cancels", [False, True], ids=["told", "cancelled"])
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
    """Hung up before, in and after a request, an upload or a restore, whether the server cancels it or not: no
    descriptor, task, connection or temporary file more than before, and every name is served as if nothing had been.
    """
    postgres = request.getfixturevalue("postgres") if database_url.startswith("postgres") else None
    for name, size in KEPT.items():
        await store.save(name, noise(size))
    faults = Faults(directory=str(directory), database=database_url, notes_statements=False, cancels=cancels)
    async with serving(tmp_path, faults) as server:
        crowd = Impatient(server, directory)
        await crowd.come(100)
        await asyncio.sleep(1.5)
        before = await held_by(server, postgres)
        crowd.seen.clear()
        began = time.monotonic()
        await crowd.come(times(120, 2_500))
        took = time.monotonic() - began
        left: list[str] = []

        async def nothing_is_left() -> bool:
            left[:] = (await held_by(server, postgres)).more_than(before)
            return not left

        try:
            await eventually(nothing_is_left, 20)
        except AssertionError:
            raise AssertionError(f"left over: {left}") from None
        finally:
            record_property(f"clients in {took:.0f} s", f"{crowd.seen.total()}; left over: {left}")
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
    """So many bytes, made without work."""
    for start in range(0, size, len(PIECE)):
        await asyncio.sleep(0)
        yield PIECE[: size - start]


async def drain(results: Any) -> None:
    """Take everything, and let nothing be wrong."""
    async with aclosing(results):
        async for result in results:
            assert not result.is_problem


async def streamed(store: UploadStore) -> None:
    """What a server does for a missing file: read it while it comes."""
    body = await store.bring_back(NAME)
    assert body is not None
    size = 0
    try:
        async with aclosing(body.pieces(0, body.size)) as read:
            async for piece in read:
                size += len(piece)
    finally:
        body.close()
    assert size == body.size
    await store.tasks.settle(60)


def judge(stalls: dict[str, Stall]) -> None:
    """None of them may have been noticed."""
    assert [title for title, stall in stalls.items() if stall.is_noticed] == []
    if not all(stall.tries for stall in stalls.values()):
        pytest.skip("this machine is too busy to keep time: even a process that does nothing came too late")


async def test_no_large_file_holds_up_the_loop_it_is_worked_on_in(
    sqlite_store: UploadStore,
    tmp_path: Path,
    control: Control,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """While a large file is saved, restored, streamed, adopted, healed and verified, a task that sleeps 5 ms is never
    more than 50 ms late.
    """
    store, size = sqlite_store, times(64, 512) * 2**20
    path = store.disk.path_of(NAME)
    copy = tmp_path / "copy"

    async def again(prepare: Callable[[], object], work: Callable[[], Awaitable[object]]) -> float:
        await asyncio.to_thread(prepare)
        return await with_heart(work)

    def lost() -> None:
        path.unlink(missing_ok=True)

    def spoiled() -> None:
        with path.open("r+b") as file:
            file.write(b"spoiled")

    works = {
        "save": lambda: with_heart(lambda: store.save(NAME, pieces(size))),
        "save a file": lambda: again(lambda: path.rename(copy), lambda: store.save(NAME, copy)),
        "restore": lambda: again(lost, lambda: store.restore(NAME)),
        "stream": lambda: again(lost, lambda: streamed(store)),
        "restore all": lambda: again(lost, lambda: drain(bulk.restore(store))),
        "verify": lambda: with_heart(lambda: drain(bulk.verify(store))),
        "heal": lambda: again(spoiled, lambda: drain(bulk.restore(store, verify=True))),
        "migrate": lambda: with_heart(lambda: drain(bulk.migrate(store))),
    }
    stalls = {title: await stall_of(work, control) for title, work in works.items()}
    record_property(f"late at most, with {size >> 20} MiB", {title: str(stall) for title, stall in stalls.items()})
    judge(stalls)


async def test_no_large_file_holds_up_a_server(
    tmp_path: Path,
    directory: Path,
    sqlite_store: UploadStore,
    sqlite_url: str,
    control: Control,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """The same in a server, which takes a large upload in, sends it, and sends it again while it is restored."""
    size = times(64, 512) * 2**20
    whole = sha256()
    async for piece in pieces(size):
        whole.update(piece)
    faults = Faults(directory=str(directory), database=sqlite_url, notes_statements=False)
    async with serving(tmp_path, faults) as server:

        async def beating(work: Callable[[], Awaitable[None]]) -> float:
            await server.ask("POST", "/heart")
            await work()
            return float((await server.ask("GET", "/heart")).body)

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
        stalls: dict[str, Stall] = {}
        for title, work in works.items():
            stalls[title] = await stall_of(lambda work=work: beating(work), control)  # type: ignore[misc]
    record_property(f"late at most, with {size >> 20} MiB", {title: str(stall) for title, stall in stalls.items()})
    judge(stalls)


async def read_digest(client: Request) -> tuple[int, str]:
    """The size and the digest of an answer's body, of which no more than a piece is held."""
    digest, size = sha256(), 0
    async with asyncio.timeout(5 * SECONDS):
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        while piece := await client.reader.read(2**18):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


async def test_a_blocked_loop_would_be_noticed(control: Control) -> None:
    """A fifth of a second in which the loop stands still is seen by the heart that the tests above trust."""

    async def blocking() -> None:
        await asyncio.sleep(0.02)
        time.sleep(0.2)

    stall = await stall_of(lambda: with_heart(blocking), control)
    assert stall.is_noticed
    assert stall.worst >= 0.19
