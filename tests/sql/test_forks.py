"""A fork while SQLite is in use: the child would keep locks that nobody gives back, and read without any."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from selfheal import DatabaseUnavailable, UploadStore

HELD = 0.7  # seconds that a transaction is open


@pytest.fixture
def used_store(directory: Path, database_url: str) -> Iterator[UploadStore]:
    """A store of synchronous code, over each kind of database."""
    store = UploadStore(directory, database_url)
    store.sync.database.create_tables()
    yield store
    store.sync.close()


def exit_code_in_child(work: Callable[[], object]) -> int:
    """Return how a forked child ends: 0 after `work`, 2 if it raised `DatabaseUnavailable` at once, else 1."""
    child, started = os.fork(), time.monotonic()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except DatabaseUnavailable as error:
            code = 2 if "fork" in str(error) and time.monotonic() - started < 1 else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def held_open(connection: AsyncConnection, begun: threading.Event) -> None:
    """Change a row, and go on after a while."""
    await connection.execute(sa.text("UPDATE image_schema SET version = version"))
    begun.set()
    await asyncio.sleep(HELD)


def test_a_fork_inside_a_transaction(used_store: UploadStore) -> None:
    """A fork from another thread waits for the transaction: child and parent save and find as always."""
    begun = threading.Event()
    engine = used_store.database._engine

    def write() -> None:
        used_store.home.call(engine.write, lambda connection: held_open(connection, begun))

    writer = threading.Thread(target=write)
    writer.start()
    assert begun.wait(20)
    assert exit_code_in_child(lambda: used_store.sync.save("child.png", b"one")) == 0
    writer.join()
    used_store.sync.save("parent.png", b"two")
    assert used_store.sync.database.count() == 2


def test_forks_of_a_busy_store(used_store: UploadStore) -> None:
    """Whenever a process forks that saves and reads, its child can save and read too."""
    is_over = threading.Event()

    def save() -> None:
        while not is_over.is_set():
            used_store.sync.save("busy.png", os.urandom(600_000))
            used_store.disk.path_of("busy.png").unlink()
            used_store.sync.ensure("busy.png")

    writer = threading.Thread(target=save)
    writer.start()
    try:
        codes = []
        for number in range(8):
            time.sleep(0.013 * number)
            codes.append(exit_code_in_child(lambda: used_store.sync.save("child.png", b"one")))
    finally:
        is_over.set()
        writer.join()
    assert codes == [0] * 8


async def test_a_fork_on_the_loop_of_a_transaction(sqlite_store: UploadStore) -> None:
    """Where the fork cannot wait, its child is told so at once, and the parent goes on."""
    begun = threading.Event()
    engine = sqlite_store.database._engine
    writing = asyncio.create_task(engine.write(lambda connection: held_open(connection, begun)))
    while not begun.is_set():
        await asyncio.sleep(0.01)
    assert exit_code_in_child(lambda: asyncio.run(sqlite_store.save("child.png", b"one"))) == 2
    await writing
    await sqlite_store.save("parent.png", b"two")
    assert exit_code_in_child(lambda: asyncio.run(sqlite_store.save("child.png", b"one"))) == 0
    assert await sqlite_store.database.count() == 2


THREAD_POOLS = """if True:
    import asyncio, os, threading
    from selfheal.sql.forks import check_not_torn, no_fork
    import concurrent.futures.thread

    async def use():
        async with no_fork():
            begun.set()
            await asyncio.sleep(0.3)
            await asyncio.to_thread(int)

    begun = threading.Event()
    user = threading.Thread(target=asyncio.run, args=(use(),))
    user.start()
    begun.wait()
    if os.fork() == 0:
        check_not_torn()
        os._exit(0)
    user.join()
    raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_fork_takes_no_lock_before_it_waits() -> None:
    """What uses SQLite may need a thread to come to its end, and a fork holds the lock of Python's thread pools."""
    subprocess.run([sys.executable, "-c", THREAD_POOLS], check=True, timeout=20)
