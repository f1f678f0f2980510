"""One store, any thread, any event loop: nothing is lost, nothing hangs, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio.to_thread
import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from selfheal import ImageStorage, NotStored, Record, SelfHealMiddleware, UploadStore
from selfheal.aio.threads import WORKERS
from selfheal.content.sources import CHUNK
from selfheal.sql.pool_limit import POOL_SIZE
from selfheal.wsgi import SelfHealMiddleware as WsgiMiddleware
from tests.support.asgi import Wrapped, ask, scope_of
from tests.support.command_line import SECONDS, Done, environment
from tests.support.disk_files import contents_below
from tests.support.files import noise
from tests.support.open_files import open_now, opened_since
from tests.support.waiting import wait_until
from tests.support.wsgi import environ_of

THREADS = 32


@pytest.fixture
def thread_store(directory: Path, database_url: str) -> Iterator[UploadStore]:
    """A store that was not opened on a server's loop, with its tables."""
    store = UploadStore(directory, database_url, deadline=60)  # SQLite writes one after the other
    store.sync.database.create_tables()
    yield store
    store.sync.close()


def sync_url(store: UploadStore) -> str:
    """Return the URL of a store's database for a synchronous driver."""
    url = store.database.url
    return url.set(drivername={"sqlite": "sqlite", "postgresql": "postgresql+psycopg2"}[url.get_backend_name()])


# -- threads and loops -------------------------------------------------------------------------------------------------


def test_many_threads_and_loops(thread_store: UploadStore, times: Callable[[int, int], int]) -> None:
    """Calls from 32 threads, half of them with a new event loop for each call, are all done, and leave nothing."""
    calls = times(400, 10_000)

    def save(number: int) -> None:
        name, data = f"{number % 100}/{number}.png", b"%d" % number
        if number % 2:
            thread_store.sync.save(name, data)
        else:
            asyncio.run(thread_store.save(name, data))

    others = threading.active_count()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(save, range(100)))
        before = open_now()
        list(pool.map(save, range(100, calls)))
        assert len(opened_since(before)) < 20  # connections come and go
        # the callers, the threads for the disk, and those of the connections
        assert threading.active_count() <= others + THREADS + WORKERS + POOL_SIZE
    assert thread_store.sync.database.count() == calls
    assert contents_below(thread_store.disk.path) == {f"{n % 100}/{n}.png": b"%d" % n for n in range(calls)}


async def test_another_loop_beside_the_servers(store: UploadStore) -> None:
    """With a store that is open on one loop, calls from other loops and threads do the same."""

    async def use() -> None:
        await store.save("a/b.png", noise(3 * CHUNK))
        record = await store.database.find("a/b.png")
        assert record is not None
        assert b"".join([piece async for piece in store.database.read(record)]) == noise(3 * CHUNK)
        assert [[r.name for r in page] async for page in store.database.pages()] == [["a/b.png"]]
        store.disk.path_of("a/b.png").unlink()
        await store.restore("a/b.png")
        assert await store.delete("a/b.png")
        with pytest.raises(NotStored):
            await store.restore("a/b.png")
        await store.undo("a/b.png")

    await anyio.to_thread.run_sync(asyncio.run, use())
    assert contents_below(store.disk.path) == {"a/b.png": noise(3 * CHUNK)}
    assert await anyio.to_thread.run_sync(store.sync.delete, "a/b.png")
    assert contents_below(store.disk.path) == {}
    assert store.home.is_here


class Bound:
    """An upload that can be read only on the loop where it was made."""

    filename = "a.bin"

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._loop = asyncio.get_running_loop()

    async def read(self, size: int) -> bytes:
        """Return the next bytes."""
        assert asyncio.get_running_loop() is self._loop
        await asyncio.sleep(0)
        piece, self._data = self._data[:size], self._data[size:]
        return piece


async def pieces_of(data: bytes) -> AsyncIterator[bytes]:
    """Yield bytes on the loop of the caller."""
    loop = asyncio.get_running_loop()
    for start in range(0, len(data), 100_000):
        await asyncio.sleep(0)
        assert asyncio.get_running_loop() is loop
        yield data[start : start + 100_000]


def test_sources_of_the_callers_loop(thread_store: UploadStore) -> None:
    """Async iterators and uploads are read on the loop that they belong to."""
    data = noise(3 * CHUNK + 7)

    async def use() -> None:
        await thread_store.save("iterator.bin", pieces_of(data))
        await thread_store.save("upload.bin", Bound(data))
        await thread_store.database.store_image("database.bin", pieces_of(data))

    asyncio.run(use())
    assert contents_below(thread_store.disk.path) == {"iterator.bin": data, "upload.bin": data}
    record = thread_store.sync.database.find("database.bin")
    assert record is not None
    assert b"".join(thread_store.sync.database.read(record)) == data


def test_a_source_that_fails_elsewhere(thread_store: UploadStore) -> None:
    """An error of the caller's source reaches the caller; nothing was saved."""

    async def failing() -> AsyncIterator[bytes]:
        yield b"x" * CHUNK
        raise EOFError("the client is gone")

    async def use() -> None:
        with pytest.raises(EOFError):
            await thread_store.save("a.png", failing())

    asyncio.run(use())
    assert thread_store.sync.database.count() == 0
    assert contents_below(thread_store.disk.path) == {}


async def test_no_synchronous_call_on_the_home_loop(store: UploadStore) -> None:
    """A synchronous call in the thread of the store's own loop would wait for itself: it fails at once."""
    with pytest.raises(RuntimeError, match="await the method"):
        store.sync.save("a.png", b"x")


@pytest.mark.parametrize("size", [100, 3 * CHUNK, 70 * CHUNK])
def test_requests_on_other_loops(thread_store: UploadStore, size: int) -> None:
    """The middleware answers on a new event loop for each request, as test clients and bridges make them."""
    data = noise(size)
    app = SelfHealMiddleware(Wrapped(), thread_store)
    for number in range(8):
        thread_store.sync.save(f"{number}.bin", data)
        thread_store.disk.path_of(f"{number}.bin").unlink()

    def visit(number: int) -> None:
        url = f"/static/uploads/{number % 8}.bin"
        for _ in range(2):
            answer = asyncio.run(ask(app, url))
            assert (answer.status, answer.body == data) == (200, True)
        assert asyncio.run(ask(app, "/static/uploads/none.bin")).status == 404

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(24)))
    assert len(contents_below(thread_store.disk.path)) == 8


# -- where it lives ----------------------------------------------------------------------------------------------------


def test_a_loop_that_ended(thread_store: UploadStore) -> None:
    """A store whose loop ended without a close goes on in a thread of its own."""

    async def use() -> None:
        await thread_store.open()
        await thread_store.save("a.png", b"one")

    thread_store.sync.close()
    asyncio.run(use())
    thread_store.sync.save("b.png", b"two")
    assert thread_store.sync.database.count() == 2


def test_it_moves_to_the_server(thread_store: UploadStore) -> None:
    """A store that synchronous code used first moves to the loop of the server that opens it, and its thread ends."""
    thread_store.sync.save("a.png", b"one")
    assert thread_store.home.is_own

    async def serve() -> None:
        threads = threading.active_count()
        async with thread_store:
            assert thread_store.home.is_here
            assert not thread_store.home.is_own
            assert threading.active_count() <= threads + 1
            await thread_store.save("b.png", b"two")

    asyncio.run(serve())
    assert thread_store.sync.database.count() == 2


def test_the_thread_ends_with_the_store(directory: Path, sqlite_url: str) -> None:
    """A closed store leaves no thread and no descriptor."""
    before = set(threading.enumerate()), open_now()
    with UploadStore(directory, sqlite_url).sync as uploads:
        uploads.database.create_tables()
        uploads.save("a.png", b"one")

    def others_ended() -> bool:  # the threads of a driver end a moment after their connections
        left = [thread.name for thread in set(threading.enumerate()) - before[0]]
        return all(name.startswith("selfheal") for name in left)

    wait_until(others_ended)
    wait_until(lambda: opened_since(before[1]) == [])


def threads() -> set[threading.Thread]:
    """Return the threads of this process once nothing is garbage."""
    gc.collect()
    return set(threading.enumerate())


def test_stores_that_are_dropped(directory: Path, database_url: str) -> None:
    """A store that nobody closes, such as one of an app that each test makes anew, ends with its last reference."""

    def use() -> None:
        store = UploadStore(directory, database_url)
        store.sync.database.create_tables()
        path = store.sync.save("a.png", b"one").path
        path.unlink()
        app = WsgiMiddleware(lambda *_: [b""], store)
        answer = app(environ_of(scope_of("/static/uploads/a.png")), lambda *_: lambda _: None)
        assert b"".join(answer) == b"one"

    before = threads(), open_now()
    for _ in range(3):
        use()
    wait_until(lambda: threads() <= before[0])
    wait_until(lambda: opened_since(before[1]) == [])


def test_a_store_that_is_dropped_while_it_works(directory: Path, database_url: str) -> None:
    """What a dropped store still does in the background is done where it began: no other thread starts for it."""
    found = list[Record | None]()

    def use() -> None:
        store = UploadStore(directory, database_url)
        store.sync.database.create_tables()
        store.sync.save("a.png", b"one")

        async def work(database: ImageStorage = store.database) -> None:
            await asyncio.sleep(0.3)
            found.append(await database.find("a.png"))

        store.home.soon(store.tasks.start, work())

    before = threads(), open_now()
    use()
    wait_until(lambda: threads() <= before[0])
    assert [record is not None for record in found] == [True]
    wait_until(lambda: opened_since(before[1]) == [])


SCRIPT = """if True:
    import os, sys
    from selfheal import UploadStore
    uploads = UploadStore(sys.argv[1], sys.argv[2])
    uploads.sync.database.create_tables()
    uploads.sync.save("a.png", b"one")
    if len(sys.argv) > 3:
        child = os.fork()
        uploads.sync.save("b.png", b"two")
        if child:
            assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("more", [[], ["fork"]])
def test_a_script_that_closes_nothing(directory: Path, database_url: str, more: list[str]) -> None:
    """A process that used a store ends, with its forks, without an error, a warning, or a wait."""
    command = [sys.executable, "-c", SCRIPT, str(directory), database_url, *more]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    assert Done(done.returncode, done.stdout, done.stderr) == Done(0, "", "")


def test_a_loop_that_is_not_asyncios(directory: Path, sqlite_url: str) -> None:
    """A coroutine outside of asyncio (trio) fails at once and says what to do."""
    store = UploadStore(directory, sqlite_url)
    for work in (store.open(), store.save("a.png", b"one"), store.database.find("a.png"), store.close()):
        with pytest.raises(RuntimeError, match="trio"):
            work.send(None)


def test_a_fork_of_a_store_in_use(thread_store: UploadStore) -> None:
    """A forked worker (gunicorn --preload) begins anew, and the parent goes on, as often as it forks."""
    thread_store.sync.save("parent.png", b"one")
    for number in range(3):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                thread_store.sync.save(f"child {number}.png", b"two")
                code = 0 if thread_store.sync.database.count() == 2 + 2 * number else 2
                thread_store.sync.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        thread_store.sync.save(f"parent {number}.png", b"three")
    assert thread_store.sync.database.count() == 7


# -- the caller's own transaction --------------------------------------------------------------------------------------


@pytest.mark.parametrize("commits", [True, False], ids=["committed", "rolled back"])
@pytest.mark.parametrize("kind", ["connection", "session"])
def test_a_synchronous_transaction(thread_store: UploadStore, commits: bool, kind: str) -> None:
    """A save and a delete in a synchronous transaction happen with it, or not at all."""
    uploads = thread_store.sync
    uploads.save("old.png", b"old")
    engine = create_engine(sync_url(thread_store))
    with engine.connect() as connection, Session(connection) as session:
        given = session if kind == "session" else connection
        saved = uploads.save("new.png", noise(2 * CHUNK), connection=given)
        assert saved.size == 2 * CHUNK
        assert uploads.delete("old.png", connection=given)
        assert not uploads.delete("no.png", connection=given)
        if commits:
            given.commit()
        else:
            given.rollback()
    engine.dispose()
    new, old = uploads.database.find("new.png"), uploads.database.find("old.png")
    assert old is not None
    assert old.is_deleted == commits
    if commits:
        assert uploads.restore("new.png").path.read_bytes() == noise(2 * CHUNK)
    else:
        assert new is None
