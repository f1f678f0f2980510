"""A real server whose database is down, silent, locked, damaged or restarted: unknown is a 503, never a 404."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from tests.support.disk_files import names_in
from tests.support.faults import locked_database
from tests.support.faulty_server import Gate, running_server
from tests.support.postgres import PostgresServer
from tests.support.process_faults import Faults
from tests.support.proxy import CommitAnswerProxy, Proxy
from tests.support.raw_sql import execute
from tests.support.run_script import outcome_counts, run_script
from tests.support.sample_data import noise
from tests.support.served_images import (
    LARGE,
    MEDIUM,
    NAME,
    SMALL,
    is_image,
    is_not_stored,
    is_unknown,
    save_and_lose,
    wait_for_open_files,
    wait_until_no_connection,
    wait_until_served,
)
from tests.support.store_state import files_below, on_disk, on_disk_and_in_database
from tests.support.waiting import eventually
from tests.support.wire import Reply

# -- no answer from the database ---------------------------------------------------------------------------------------


async def test_database_down_file_on_disk(
    tmp_path: Path, postgres_store: UploadStore, proxied_faults: Faults, proxy: Proxy
) -> None:
    """While the database is down, a file on disk is served, and no SQL is sent for a file that was checked before."""
    await postgres_store.save("seen.jpg", noise(SMALL))
    await postgres_store.save("new.jpg", noise(MEDIUM))
    async with running_server(tmp_path, proxied_faults) as server:
        assert is_image(await server.get("seen.jpg"), SMALL)

        async def was_checked() -> bool:
            return await server.count("image_storage") > 0

        await eventually(was_checked)
        await proxy.set_mode("refuse")
        asked = (await server.state())["statements"]
        for _ in range(20):
            assert is_image(await server.get("seen.jpg"), SMALL)
        assert (await server.state())["statements"] == asked
        for _ in range(20):
            assert is_image(await server.get("new.jpg"), MEDIUM)
    assert on_disk(postgres_store, "new.jpg") == noise(MEDIUM)


async def test_database_down_file_missing(
    tmp_path: Path, postgres_store: UploadStore, proxied_faults: Faults, proxy: Proxy
) -> None:
    """While the database is down, a missing file is a 503 with `Retry-After`, and is not remembered as absent."""
    (name,) = await save_and_lose(postgres_store, SMALL)
    await proxy.set_mode("refuse")
    async with running_server(tmp_path, proxied_faults) as server:
        for answer in (await server.get(name), await server.get("never-was.jpg")):
            assert is_unknown(answer)
            assert is_not_stored(answer)
        await proxy.set_mode("pass")
        assert is_image(await server.get(name), SMALL)
        assert (await server.get("never-was.jpg")).is_wrapped
    assert on_disk(postgres_store, name) == noise(SMALL)


async def test_database_silent(
    tmp_path: Path, postgres_store: UploadStore, proxied_faults: Faults, proxy: Proxy
) -> None:
    """While the database is silent, a missing file is a 503 by the deadline (default 5 s) and hits are not delayed;
    afterwards the pool recovers by itself.
    """
    names = await save_and_lose(postgres_store, *range(SMALL, SMALL + 30))
    await postgres_store.save(NAME, noise(MEDIUM))
    async with running_server(tmp_path, replace(proxied_faults, deadline=5.0)) as server:
        assert is_image(await server.get(names[0]), SMALL)
        await proxy.set_mode("stall")
        stalled = proxy.open_links
        started = time.monotonic()
        asking = asyncio.create_task(server.get_many(names[1:]))
        await asyncio.sleep(0.5)
        assert is_image(await server.get(NAME), MEDIUM)
        assert time.monotonic() - started < 4, "a hit waited for the database"
        assert all(is_unknown(answer) for answer in await asking)
        assert time.monotonic() - started < 5 + 4
        await asyncio.sleep(0.5)
        assert is_unknown(await server.get(names[1]))
        await proxy.set_mode("pass")
        await wait_until_served(server, names[1], SMALL + 1)
        answers = await server.get_many(names[2:])
        assert all(is_image(answer, SMALL + number) for number, answer in enumerate(answers, 2))
        assert proxy.accepted > stalled
        await wait_until_no_connection(server)


async def test_database_restarts(tmp_path: Path, postgres: PostgresServer, postgres_store: UploadStore) -> None:
    """After a restart of the database, a read on a dead connection is retried once; during the restart the answer is
    200 or 503, never 404.
    """
    names = await save_and_lose(postgres_store, *range(SMALL, SMALL + 200))
    url = postgres_store.database.url.render_as_string(hide_password=False)
    await postgres_store.close()
    async with running_server(
        tmp_path, Faults(directory=str(postgres_store.disk.path), database=url, deadline=3.0)
    ) as server:
        assert is_image(await server.get(names.pop(0)), SMALL)
        await asyncio.to_thread(postgres.control, "restart", "-m", "fast")
        assert is_image(await server.get(names.pop(0)), SMALL + 1), "the read was not retried on a new connection"

        assert all(answer.status == 200 for answer in await server.get_many(names[:20]))
        restart = asyncio.create_task(asyncio.to_thread(postgres.control, "restart", "-m", "immediate"))
        statuses = set()
        for name in names[20:]:
            statuses.add((await server.get(name)).status)
            await asyncio.sleep(0.01)
        await restart
        assert statuses <= {200, 503}
        for number, name in enumerate(names, SMALL + 2):
            await wait_until_served(server, name, number)


async def test_pool_exhausted_by_misses(tmp_path: Path, postgres_store: UploadStore, proxied_faults: Faults) -> None:
    """While misses have used up the pool, further misses are a 503, and hits are served."""
    names = await save_and_lose(postgres_store, *range(SMALL, SMALL + 40))
    await postgres_store.save(NAME, noise(MEDIUM))
    async with running_server(tmp_path, replace(proxied_faults, pool=2, deadline=3.0)) as server:
        assert is_image(await server.get(names.pop(0)), SMALL)
        await server.ask("POST", "/pool")
        started = time.monotonic()
        asking = asyncio.create_task(server.get_many(names))
        await asyncio.sleep(0.2)
        for _ in range(20):
            assert is_image(await server.get(NAME), MEDIUM)
        assert not asking.done()
        assert all(is_unknown(answer) for answer in await asking)
        assert time.monotonic() - started < 3 + 4
        await server.ask("DELETE", "/pool")
        answers = await server.get_many(names)
        assert all(is_image(answer, SMALL + number) for number, answer in enumerate(answers, 1))


async def test_sqlite_locked(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """While SQLite is locked, a missing file is a 503; concurrent writers all succeed, because a write takes the lock
    at its start (`BEGIN IMMEDIATE`).
    """
    (name,) = await save_and_lose(sqlite_store, SMALL)
    async with running_server(tmp_path, replace(faults, deadline=2.0)) as server:
        async with locked_database(sqlite_store):
            assert is_unknown(await server.get(name))
            assert is_unknown(await server.get("never-was.jpg"))
        assert is_image(await server.get(name), SMALL)
    async with running_server(tmp_path, faults) as server:
        uploads = [server.ask("POST", f"/upload/{number % 4}.jpg", noise(number)) for number in range(16)]
        saves = [sqlite_store.save(f"{number % 4}.jpg", noise(100 + number)) for number in range(16)]
        done = await asyncio.gather(*uploads, *saves)
        assert [answer.status for answer in done[:16] if isinstance(answer, Reply)] == [201] * 16
    for number in range(4):
        record = await sqlite_store.database.find(f"{number}.jpg")
        assert record is not None
        assert record.generation == 8


SCHEMAS = {
    "missing": ("DROP TABLE image_storage", "selfheal migrate"),
    "too new": ("UPDATE image_schema SET version = version + 1", "upgrade"),
    "too old": ("UPDATE image_schema SET version = version - 1", "selfheal migrate"),
}


@pytest.mark.parametrize(("change", "says"), SCHEMAS.values(), ids=SCHEMAS)
async def test_table_missing_schema_too_new_or_old(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, change: str, says: str
) -> None:
    """If a table is missing or the schema is too new or too old, the answer is 503, and one critical log line says what
    to run.
    """
    (name,) = await save_and_lose(sqlite_store, SMALL)
    await execute(sqlite_store, change)
    async with running_server(tmp_path, faults) as server:
        for _ in range(3):
            answer = await server.get(name)
            assert is_unknown(answer)
            assert is_not_stored(answer)
        critical = server.lines_with("CRITICAL")
        assert len(critical) == 1
        assert says in critical[0]
    assert files_below(sqlite_store.disk.path) == []


# -- damaged bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, MEDIUM, LARGE])
async def test_records_bytes_damaged_disk_missing(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, size: int
) -> None:
    """If the recorded bytes are damaged and the file is missing, the answer is a 500 or breaks off; nothing is written,
    the record stays, and there is an event.
    """
    (name,) = await save_and_lose(sqlite_store, size)
    last = (size - 1) // CHUNK
    damaged = noise(size)[last * CHUNK :][::-1]
    await execute(sqlite_store, "UPDATE image_chunk SET data = :data WHERE position = :at", data=damaged, at=last)
    async with running_server(tmp_path, faults, may_fail=size == LARGE) as server:
        answer = await server.get(name)
        if size == LARGE:  # the answer has started before the damage is found
            assert not answer.is_whole
        else:
            assert answer.status == 500
            assert is_not_stored(answer)
        assert (await server.state())["events"]["corrupt"] == 1
    assert files_below(sqlite_store.disk.path) == []
    record = await sqlite_store.database.find(name)
    assert record is not None
    assert (record.size, record.generation, record.is_deleted) == (size, 1, False)


async def test_records_bytes_damaged_disk_good(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """If the recorded bytes are damaged and the file is good, the file is served, `verify` reports the name, and
    `migrate` mends the record from the file.
    """
    await sqlite_store.save(NAME, noise(MEDIUM))
    await execute(sqlite_store, "UPDATE image_chunk SET data = digest WHERE position = 1")
    async with running_server(tmp_path, faults) as server:
        assert is_image(await server.get(NAME), MEDIUM)
    where = {"directory": sqlite_store.disk.path, "database": faults.database}
    code, report = run_script("test_image_storage", **where)
    assert code == 1
    assert outcome_counts(report) == {"corrupt_in_database": 1}
    assert [problem["name"] for problem in report["problems"]] == [NAME]
    code, report = run_script("migrate_images", **where)
    assert code == 0
    code, report = run_script("test_image_storage", **where)
    assert (code, outcome_counts(report)) == (0, {"ok": 1})
    assert await on_disk_and_in_database(sqlite_store, NAME) == noise(MEDIUM)


# -- absent names ------------------------------------------------------------------------------------------------------


async def test_tombstone_disk_absent(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """A deleted name gets the wrapped app's answer."""
    await sqlite_store.save(NAME, noise(SMALL))
    await sqlite_store.delete(NAME)
    async with running_server(tmp_path, faults) as server:
        answer = await server.get(NAME)
        assert answer.is_wrapped
        assert is_not_stored(answer)
    record = await sqlite_store.database.find(NAME)
    assert record is not None
    assert record.is_deleted
    assert files_below(sqlite_store.disk.path) == []


async def test_no_record(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """A name without a record gets the wrapped app's answer, and is remembered as absent for at most 2 s."""
    async with running_server(tmp_path, faults) as server:
        answer = await server.get(NAME)
        assert answer.is_wrapped
        assert is_not_stored(answer)
        for _ in range(20):
            assert (await server.get(NAME)).is_wrapped
        assert await server.count("image_chunk") == 1
        await asyncio.sleep(2.1)
        assert (await server.get(NAME)).is_wrapped
        assert await server.count("image_chunk") == 2
    assert await sqlite_store.database.find(NAME) is None
    assert names_in(sqlite_store.disk.path) == []


async def test_just_uploaded_on_another_node(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """A name that was absent and is then saved on another node is served within 2 s."""
    async with running_server(tmp_path, replace(faults, directory=str(tmp_path / "node" / "uploads"))) as server:
        assert (await server.get(NAME)).is_wrapped
        await sqlite_store.save(NAME, noise(SMALL))
        saved = time.monotonic()
        while not is_image(await server.get(NAME), SMALL):
            assert time.monotonic() - saved < 2 + 4
            await asyncio.sleep(0.05)
    assert (tmp_path / "node" / "uploads" / NAME).read_bytes() == noise(SMALL)


# -- many clients ------------------------------------------------------------------------------------------------------


async def test_a_failed_restore_answers_every_caller(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, gate: Gate
) -> None:
    """All callers that wait for a restore get the same answer if it fails; the next caller starts a new restore."""
    (name,) = await save_and_lose(sqlite_store, SMALL)
    await execute(sqlite_store, "UPDATE image_chunk SET data = :data", data=b"x" * SMALL)
    async with running_server(tmp_path, replace(faults, hold={"pwrite": str(gate.path)})) as server:
        asking = asyncio.create_task(server.get_many([name] * 20))
        await gate.met()
        await asyncio.sleep(0.5)
        gate.open()
        assert [answer.status for answer in await asking] == [500] * 20
        assert await server.count("image_chunk") == 1
        assert files_below(sqlite_store.disk.path) == []
        await execute(sqlite_store, "UPDATE image_chunk SET data = :data", data=noise(SMALL))
        assert is_image(await server.get(name), SMALL)


async def test_many_clients_one_missing_name(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """Hundreds of clients that ask for one missing file all get it, and the process reads its bytes once."""
    small, medium = await save_and_lose(sqlite_store, SMALL, MEDIUM)
    async with running_server(tmp_path, faults) as server:
        answers = await server.get_many([small] * 200)
        assert all(is_image(answer, SMALL) for answer in answers)
        assert await server.count("image_chunk") == 1
        answers = await server.get_many([medium] * 50)
        assert all(is_image(answer, MEDIUM) for answer in answers)
        assert await server.count("image_chunk") == 3  # one query for the record, one for the chunks
    assert on_disk(sqlite_store, small) == noise(SMALL)
    assert on_disk(sqlite_store, medium) == noise(MEDIUM)


# -- uploads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, 40 * CHUNK])
async def test_commits_outcome_unknown(
    tmp_path: Path, postgres: PostgresServer, postgres_store: UploadStore, proxied_faults: Faults, size: int
) -> None:
    """If the connection breaks after the COMMIT, an upload is a 503, and the same upload again changes nothing."""
    async with CommitAnswerProxy(postgres.port) as proxy:
        url = make_url(proxied_faults.database).set(port=proxy.port).render_as_string(hide_password=False)
        async with running_server(tmp_path, replace(proxied_faults, database=url)) as server:
            proxy.is_active = True
            assert (await server.ask("POST", f"/upload/{NAME}", noise(size))).status == 503
            assert proxy.lost_answers == 1
            proxy.is_active = False
            assert files_below(postgres_store.disk.path) == []
            assert (await server.ask("POST", f"/upload/{NAME}", noise(size))).status == 201
            assert is_image(await server.get(NAME), size)
    assert await on_disk_and_in_database(postgres_store, NAME) == noise(size)
    record = await postgres_store.database.find(NAME)
    assert record is not None
    assert record.generation == 1
    assert await postgres_store.database.history(NAME) == []


async def test_upload_database_fails(
    tmp_path: Path, postgres_store: UploadStore, proxied_faults: Faults, proxy: Proxy
) -> None:
    """If the database fails during an upload, the caller gets a 503, and nothing new is on disk."""
    await postgres_store.save("old.jpg", noise(SMALL))
    async with running_server(tmp_path, replace(proxied_faults, deadline=2.0)) as server:
        assert (await server.ask("POST", "/upload/first.jpg", noise(SMALL))).status == 201
        for mode in ("refuse", "cut", "stall"):
            await proxy.set_mode(mode)
            for name, size in ((NAME, SMALL), (NAME, 40 * CHUNK), ("old.jpg", MEDIUM)):
                assert (await server.ask("POST", f"/upload/{name}", noise(size))).status == 503
            assert files_below(postgres_store.disk.path) == ["first.jpg", "old.jpg"]
            await proxy.set_mode("pass")
        await wait_for_open_files(server, 0)
    assert await postgres_store.database.find(NAME) is None
    assert await on_disk_and_in_database(postgres_store, "old.jpg") == noise(SMALL)
