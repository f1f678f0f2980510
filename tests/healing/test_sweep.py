"""The sweep: what an app writes itself, and nobody asks for, is stored in the database all the same."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from starlette.types import Message

from selfheal import UploadStore
from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.listing import Entry, walk
from selfheal.disk.mark import SWEPT
from tests.support.asgi import Wrapped, ask
from tests.support.constants import set_constants
from tests.support.files import write_file
from tests.support.middleware import wrapping
from tests.support.raw_sql import execute
from tests.support.recorded_statements import recorded_statements
from tests.support.store_requests import restored_bytes
from tests.support.store_state import in_database, on_disk
from tests.support.uploads import NAME, NEW, OLD, replace_file
from tests.support.waiting import eventually

pytestmark = pytest.mark.usefixtures("short_waits")
WRITTEN = "original_images/tom.jpg"


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep begins at once."""
    set_constants(monkeypatch, START_AFTER=0.0, LOOK_EVERY=0.05, RETRY_AFTER=0.1, PAUSE=0.1)


@asynccontextmanager
async def kept_up(store: UploadStore) -> AsyncIterator[None]:
    """Run the upkeep of a store, as a server does while nobody asks it for anything."""
    store.upkeep.start()
    try:
        yield
    finally:
        await store.upkeep.stop()


def write(store: UploadStore, name: str, data: bytes = NEW) -> Path:
    """Write a file as the app itself does."""
    return write_file(store.disk.path_of(name), data)


def swept(store: UploadStore) -> dict[str, object]:
    """Return what the disk remembers of the sweeps."""
    path = store.disk.path / SWEPT
    found: dict[str, object] = json.loads(path.read_text() or "{}") if path.exists() else {}
    return found


async def finished(store: UploadStore) -> None:
    """Wait until a sweep is over."""
    await eventually(lambda: bool(swept(store).get("finished")))


def remember(store: UploadStore, text: str) -> None:
    """Let the disk remember a sweep."""
    (store.disk.path / SWEPT).write_text(text)


async def is_stored(store: UploadStore, name: str) -> bool:
    """Whether the database has the bytes of a name's file."""
    return await in_database(store, name) == on_disk(store, name)


# -- what it does -----------------------------------------------------------------------------------------------------


async def test_a_file_that_nobody_asks_for_is_stored(store: UploadStore) -> None:
    """A file that the app wrote, and no visitor ever asked for, comes back after the disk is lost."""
    path = write(store, WRITTEN)
    async with kept_up(store):
        await eventually(lambda: is_stored(store, WRITTEN))
    path.unlink()
    assert await restored_bytes(store, WRITTEN) == NEW


async def test_it_begins_with_the_lifespan(sqlite_store: UploadStore) -> None:
    """The middleware of an app with lifespan sweeps without any request, and stops with the app."""
    write(sqlite_store, WRITTEN)
    messages: asyncio.Queue[Message] = asyncio.Queue()
    before = asyncio.all_tasks()
    app = asyncio.create_task(
        wrapping(sqlite_store, True, Wrapped())({"type": "lifespan"}, messages.get, lambda _: asyncio.sleep(0))
    )
    await messages.put({"type": "lifespan.startup"})
    await eventually(lambda: is_stored(sqlite_store, WRITTEN))
    await messages.put({"type": "lifespan.shutdown"})
    await app
    assert asyncio.all_tasks() <= before


async def test_it_begins_with_the_first_request(sqlite_store: UploadStore, serve: bool) -> None:
    """Without a lifespan, as in Django, the first request of any kind begins the sweep."""
    write(sqlite_store, WRITTEN)
    await ask(wrapping(sqlite_store, serve), "/")
    await eventually(lambda: is_stored(sqlite_store, WRITTEN))


@pytest.mark.parametrize("every", [None, 0])
async def test_it_can_be_switched_off(directory: Path, sqlite_url: str, every: float | None) -> None:
    """A store with `sweep_every` of None or 0 stores only what is asked for."""
    async with UploadStore(directory, sqlite_url, sweep_every=every) as store:
        await store.database.create_tables()
        write(store, WRITTEN)
        await ask(wrapping(store, True), "/")
        await asyncio.sleep(0.5)
        assert await in_database(store, WRITTEN) is None
        assert swept(store) == {}


async def test_a_middleware_that_adopts_nothing_does_not_sweep(sqlite_store: UploadStore) -> None:
    """With `adopt=False` nothing is taken from the disk, asked for or not."""
    write(sqlite_store, WRITTEN)
    await ask(wrapping(sqlite_store, True, adopt=False), "/")
    await asyncio.sleep(0.5)
    assert await in_database(sqlite_store, WRITTEN) is None


async def test_what_the_sweep_finds(store: UploadStore, other_store: UploadStore) -> None:
    """Each file is treated as at a hit: a deleted name is removed, litter is left alone, other bytes are compared."""
    await store.save(NAME, OLD)
    await store.save("deleted.jpg", OLD)
    await other_store.delete("deleted.jpg")
    replace_file(store, NEW, time.time_ns() + 10**9)
    write(store, "thumbs.db")
    write(store, ".hidden/a.jpg")
    async with kept_up(store):
        await finished(store)
    assert on_disk(store, "deleted.jpg") is None
    assert await in_database(store, NAME) == NEW
    assert await in_database(store, "thumbs.db") is None
    assert await store.database.count() == 1


async def test_files_that_agree_cost_few_queries(sqlite_store: UploadStore) -> None:
    """A sweep over files that are stored already asks the database once for a hundred of them."""
    for number in range(300):
        await sqlite_store.save(f"{number}.jpg", b"%d" % number)
    with recorded_statements() as seen:
        async with kept_up(sqlite_store):
            await finished(sqlite_store)
    assert 0 < len(seen) < 20


# -- one process of all workers, that goes on where another one stopped -----------------------------------------------


async def test_one_process_of_all_workers(sqlite_store: UploadStore) -> None:
    """While another process sweeps, this one does not; it takes over when that one has died."""
    write(sqlite_store, WRITTEN)
    with sqlite_store.disk.only_process(SWEPT) as is_alone:
        assert is_alone
        async with kept_up(sqlite_store):
            await asyncio.sleep(0.5)
            assert await in_database(sqlite_store, WRITTEN) is None
    async with kept_up(sqlite_store):
        await eventually(lambda: is_stored(sqlite_store, WRITTEN))


async def test_a_sweep_goes_on_where_it_was(sqlite_store: UploadStore) -> None:
    """After a restart a sweep goes on behind the last name that was done, in the byte order of names."""
    for name in ("a.jpg", "b/c.jpg", "b0.jpg", "d.jpg"):
        write(sqlite_store, name)
    remember(sqlite_store, '{"after": "b/c.jpg", "finished": 0.0}')
    async with kept_up(sqlite_store):
        await finished(sqlite_store)
    stored = [name for name in ("a.jpg", "b/c.jpg", "b0.jpg", "d.jpg") if await in_database(sqlite_store, name)]
    assert stored == ["b0.jpg", "d.jpg"]


async def test_it_is_remembered_how_far_a_sweep_is(sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped in the middle of a sweep has written down what it has done."""
    set_constants(monkeypatch, NAMES_AT_ONCE=1)
    for number in range(200):
        write(sqlite_store, f"{number:03}.jpg")
    async with kept_up(sqlite_store):
        await eventually(lambda: str(swept(sqlite_store).get("after", "")) > "003.jpg")
    after = str(swept(sqlite_store)["after"])
    assert "003.jpg" < after < "199.jpg"
    assert await is_stored(sqlite_store, after)


@pytest.mark.parametrize(("age", "is_due"), [(10.0, False), (3500.0, False), (3700.0, True), (-1e6, True)], ids=str)
async def test_a_restart_within_the_hour(sqlite_store: UploadStore, age: float, is_due: bool) -> None:
    """A process that starts soon after a sweep does not sweep again; a time in the future says nothing."""
    write(sqlite_store, WRITTEN)
    remember(sqlite_store, json.dumps({"after": "", "finished": time.time() - age}))
    async with kept_up(sqlite_store):
        if is_due:
            await eventually(lambda: is_stored(sqlite_store, WRITTEN))
        else:
            await asyncio.sleep(0.5)
            assert await in_database(sqlite_store, WRITTEN) is None


@pytest.mark.parametrize("text", ["", "{", '{"after": 1}', "[]", '{"after": "", "finished": "soon"}'])
async def test_a_damaged_memory_of_sweeps(sqlite_store: UploadStore, text: str) -> None:
    """What cannot be read is as if no sweep had been."""
    write(sqlite_store, WRITTEN)
    remember(sqlite_store, text)
    async with kept_up(sqlite_store):
        await eventually(lambda: is_stored(sqlite_store, WRITTEN))


async def test_the_next_sweep(directory: Path, sqlite_url: str) -> None:
    """What is written after a sweep is stored by the next one."""
    async with UploadStore(directory, sqlite_url, sweep_every=1.0) as store:
        await store.database.create_tables()
        async with kept_up(store):
            await finished(store)
            write(store, WRITTEN)
            await eventually(lambda: is_stored(store, WRITTEN))


# -- what fails -------------------------------------------------------------------------------------------------------


async def test_a_database_that_is_away(store: UploadStore) -> None:
    """A sweep that the database does not answer passes no file over: it goes on when the database is back."""
    for number in range(5):
        write(store, f"{number}.jpg")
    await execute(store, "ALTER TABLE image_storage RENAME TO away")
    async with kept_up(store):
        await asyncio.sleep(0.5)
        assert not swept(store).get("finished")
        await execute(store, "ALTER TABLE away RENAME TO image_storage")
        await finished(store)
    assert await store.database.count() == 5


async def test_a_directory_that_is_lost_meanwhile(sqlite_store: UploadStore) -> None:
    """A sweep of a directory that is not there stores nothing and fails nothing; it sweeps the next one."""
    sqlite_store.disk.path.rename(sqlite_store.disk.path.with_name("away"))
    async with kept_up(sqlite_store):
        await asyncio.sleep(0.3)
        write(sqlite_store, WRITTEN)
        await eventually(lambda: is_stored(sqlite_store, WRITTEN))


async def test_a_directory_that_is_replaced_meanwhile(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sweep has done is remembered on the disk that it went over, and not on one that took its place."""
    write(sqlite_store, NAME)
    directory = sqlite_store.disk.path

    def walk_and_replace(disk: UploadsDirectory) -> Iterator[Entry]:
        yield from walk(disk)
        if not directory.with_name("away").exists():
            directory.rename(directory.with_name("away"))
            write(sqlite_store, WRITTEN)

    monkeypatch.setattr("selfheal.healing.sweep.walk", walk_and_replace)
    async with kept_up(sqlite_store):
        await eventually(lambda: is_stored(sqlite_store, WRITTEN))


async def test_a_sweep_rests_while_requests_are_answered(sqlite_store: UploadStore) -> None:
    """While requests keep the event loop busy, a sweep does less than it does in an idle process."""

    async def names_done(seconds: float) -> int:
        before = await sqlite_store.database.count()
        async with kept_up(sqlite_store):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                await asyncio.sleep(0.001)
                if is_busy:
                    time.sleep(0.06)  # a request that blocks the loop
        return await sqlite_store.database.count() - before

    for number in range(600):
        write(sqlite_store, f"{number}.jpg")
    is_busy = True
    busy = await names_done(1.5)
    is_busy = False
    assert busy < await names_done(1.5) / 2
