"""Few connections: a process waits for one of its own while the server has no room, and opens no more than was set."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette

from selfheal import DatabaseUnavailable, SelfHealMiddleware, Settings, SettingsError, UploadStore
from tests.support.held_connections import held_connections
from tests.support.raw_sql import sql
from tests.support.records import fill_catalogue
from tests.support.uploads import get

MISSING = [f"folder{number % 7}/{number}.png" for number in range(400)]


async def test_many_misses(limited_url: str, directory: Path) -> None:
    """400 misses at the same time are all 200 with a role that may have 5 connections."""
    await fill_catalogue(limited_url, directory, MISSING)
    async with UploadStore(directory, limited_url) as store:
        app = SelfHealMiddleware(Starlette(), store)
        answers = await asyncio.gather(*(get(app, name) for name in MISSING))
        assert [(answer.status_code, answer.text) for answer in answers] == [(200, name) for name in MISSING]
        answers = await asyncio.gather(*(get(app, f"none/{number}.png") for number in range(200)))
        assert {answer.status_code for answer in answers} == {404}


async def test_many_reads_and_writes(limited_url: str, directory: Path) -> None:
    """Saves, deletions and listings at the same time all succeed with 5 connections."""
    await fill_catalogue(limited_url, directory, [])
    async with UploadStore(directory, limited_url) as store:
        names = MISSING[:60]
        await asyncio.gather(*(store.save(name, name.encode()) for name in names), *(_list(store) for _ in range(9)))
        assert await store.database.count() == len(names)
        assert all(await asyncio.gather(*(store.delete(name) for name in names)))


async def _list(store: UploadStore) -> None:
    async for _ in store.database.pages():
        pass


async def test_no_connection_but_later(limited_url: str, directory: Path) -> None:
    """A process that gets none at first, because others have all, waits and then succeeds."""
    await fill_catalogue(limited_url, directory, ["a.png"])
    async with held_connections(limited_url, 5) as give_back, UploadStore(directory, limited_url) as store:
        asking = asyncio.create_task(get(SelfHealMiddleware(Starlette(), store), "a.png"))
        await asyncio.sleep(0.3)
        assert not asking.done()
        await give_back()
        assert (await asking).text == "a.png"


async def test_no_connection_at_all(limited_url: str, directory: Path) -> None:
    """Without any connection the answer is *unknown* by the deadline, and says why."""
    await fill_catalogue(limited_url, directory, ["a.png"])
    async with held_connections(limited_url, 5), UploadStore(directory, limited_url, deadline=1.0) as store:
        assert (await get(SelfHealMiddleware(Starlette(), store), "a.png")).status_code == 503
        with pytest.raises(DatabaseUnavailable, match="too many connections"):
            await store.database.count()


async def test_room_again(limited_url: str, directory: Path) -> None:
    """Some seconds after the server refused a connection, more of them are opened again."""
    await fill_catalogue(limited_url, directory, MISSING[:50])
    async with UploadStore(directory, limited_url) as store:
        async with held_connections(limited_url, 4):
            assert await store.database.count() == 50
            await asyncio.gather(*(store.database.history(name) for name in MISSING[:20]))
            await asyncio.gather(*(_list(store) for _ in range(20)))
        await asyncio.gather(*(_list(store) for _ in range(20)))


async def test_the_apps_own_engine(limited_url: str, directory: Path) -> None:
    """With the app's own engine a refused connection is waited for as well."""
    await fill_catalogue(limited_url, directory, MISSING[:50])
    engine = create_async_engine(limited_url, pool_size=20)
    async with UploadStore(directory, engine) as store:
        app = SelfHealMiddleware(Starlette(), store)
        answers = await asyncio.gather(*(get(app, name) for name in MISSING[:50]), *(_list(store) for _ in range(20)))
        assert {answer.status_code for answer in answers if answer is not None} == {200}
    await engine.dispose()


async def test_a_busy_engine_of_the_apps_own(postgres_url: str, directory: Path) -> None:
    """An app's own engine may have more connections in use than a pool of selfheal's."""
    await fill_catalogue(postgres_url, directory, ["a.png"])
    engine = create_async_engine(postgres_url, pool_size=20)
    async with AsyncExitStack() as busy, UploadStore(directory, engine) as store:
        for _ in range(15):
            await busy.enter_async_context(engine.connect())
        assert await store.database.count() == 1
    await engine.dispose()


@pytest.mark.parametrize("size", [1, 2, 3])
async def test_a_small_pool(size: int, postgres_url: str, directory: Path) -> None:
    """With `pool_size` a process never has more connections, and everything works with a single one."""
    await fill_catalogue(postgres_url, directory, MISSING[:100])
    counting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'small'"
    async with UploadStore(directory, f"{postgres_url}?application_name=small", pool_size=size) as store:
        app = SelfHealMiddleware(Starlette(), store)
        seen = []

        async def watch() -> None:
            for _ in range(5):
                seen.append((await sql(postgres_url, counting))[0][0])

        asked = [get(app, name) for name in MISSING[:100]]
        answers = await asyncio.gather(*asked, *(_list(store) for _ in range(20)), watch())
        assert {answer.status_code for answer in answers if answer is not None} == {200}
        await asyncio.gather(*(store.save(f"new/{number}.png", bytes(3_000_000)) for number in range(4)))
        assert 0 < max(seen) <= size


@pytest.mark.parametrize("size", [0, -1, 101, "few", "1.5", "²"])
def test_bad_sizes(size: int | str, directory: Path) -> None:
    """A size that is not 1 to 100 is refused in one line, from code and from the environment."""
    with pytest.raises(SettingsError, match="the pool size"):
        UploadStore(directory, "postgres://h/db", pool_size=size)  # type: ignore[typeddict-item]
    if size:
        with pytest.raises(SettingsError, match="the pool size"):
            Settings.from_env({"SELFHEAL_POOL_SIZE": str(size)})


def test_a_size_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`SELFHEAL_POOL_SIZE` is the size of a store's pool."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SELFHEAL_POOL_SIZE", "3")
    assert Settings.from_env().pool_size == 3


@pytest.mark.parametrize(("size", "processes", "enough", "each"), [(10, 4, 4, 2), (3, 4, 3, 1), (1, 4, 1, 1)])
def test_sharing(size: int, processes: int, enough: int, each: int, directory: Path) -> None:
    """The processes of a bulk run share the pool: there are no more of them than connections."""
    database = UploadStore(directory, "postgres://h/db", pool_size=size).database
    assert database.share_connections(processes) == enough
    assert database._engine._connections.limit.size == each
