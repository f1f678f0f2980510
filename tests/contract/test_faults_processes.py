"""Server processes that are killed, stopped or forked, and clients that disconnect or are slow."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from tests.support.faulty_server import Gate, running_server
from tests.support.process_faults import Faults
from tests.support.sample_data import noise
from tests.support.served_images import (
    LARGE,
    MEDIUM,
    NAME,
    SMALL,
    is_image,
    is_not_stored,
    save_and_lose,
    wait_for_open_files,
    wait_until_no_connection,
)
from tests.support.store_state import files_below, in_database, in_quarantine, on_disk, on_disk_and_in_database
from tests.support.waiting import eventually

# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_unnamed_files", [True, False], ids=["O_TMPFILE", "named temporary files"])
async def test_sigkill_while_restoring(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, has_unnamed_files: bool
) -> None:
    """After a SIGKILL during a restore there is no torn file; the next process removes litter and serves the file."""
    (name,) = await save_and_lose(sqlite_store, LARGE)
    faults = replace(faults, has_unnamed_files=has_unnamed_files)
    async with running_server(tmp_path, replace(faults, slow={"pwrite": 0.02})) as server:
        async with server.visit(name) as visitor:
            await visitor.read(10 * CHUNK)
            server.kill()
            assert not (await visitor.answer()).is_whole
    litter = files_below(sqlite_store.disk.path)
    assert name not in litter
    assert litter == [] or not has_unnamed_files
    async with running_server(tmp_path, faults) as server:
        assert is_image(await server.get(name), LARGE)
    assert files_below(sqlite_store.disk.path) == [name]


async def test_sigkill_after_an_uploads_commit(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """After a SIGKILL between the commit of an upload and its file, the next GET restores the file."""
    async with running_server(tmp_path, replace(faults, kill_at="link")) as server:
        assert (await server.ask("POST", f"/upload/{NAME}", noise(MEDIUM))).status == 0
    assert files_below(sqlite_store.disk.path) == []
    assert await in_database(sqlite_store, NAME) == noise(MEDIUM)
    async with running_server(tmp_path, faults) as server:
        assert is_image(await server.get(NAME), MEDIUM)
    assert await on_disk_and_in_database(sqlite_store, NAME) == noise(MEDIUM)


@pytest.mark.parametrize(
    ("size", "moment"), [(SMALL, 1), (80 * CHUNK, 1), (80 * CHUNK, 2)], ids=["small", "large", "large, later"]
)
async def test_sigkill_before_an_uploads_commit(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, size: int, moment: int
) -> None:
    """After a SIGKILL before the commit of an upload, there is neither a record nor a file."""
    async with running_server(tmp_path, replace(faults, kill_at=f"commit:{moment}")) as server:
        assert (await server.ask("POST", f"/upload/{NAME}", noise(size))).status == 0
    assert server.process.returncode == -signal.SIGKILL
    assert await sqlite_store.database.find(NAME) is None
    assert files_below(sqlite_store.disk.path) == []
    async with running_server(tmp_path, faults) as server:
        assert (await server.get(NAME)).is_wrapped
        assert (await server.ask("POST", f"/upload/{NAME}", noise(size))).status == 201
    assert await on_disk_and_in_database(sqlite_store, NAME) == noise(size)


async def test_sigkill_in_the_middle_of_an_upload(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """After a SIGKILL while an upload arrives, there is neither a record nor a file."""
    async with running_server(tmp_path, faults) as server:
        head = f"Content-Length: {LARGE}"
        async with server.request(f"/upload/{NAME}", head, method="POST") as client:
            client.writer.write(noise(LARGE)[: LARGE // 2])
            await client.writer.drain()
            server.kill()
    assert await sqlite_store.database.find(NAME) is None
    assert files_below(sqlite_store.disk.path) == []


@pytest.mark.parametrize("stays", [True, False], ids=["visitor stays", "visitor goes"])
async def test_sigterm_while_restoring(tmp_path: Path, sqlite_store: UploadStore, faults: Faults, stays: bool) -> None:
    """A restore during SIGTERM finishes within the grace period of the server."""
    (name,) = await save_and_lose(sqlite_store, LARGE)
    async with running_server(tmp_path, replace(faults, slow={"pwrite": 0.02})) as server:
        async with server.visit(name) as visitor:
            await visitor.read(4 * CHUNK)
            server.terminate()
            if stays:
                assert is_image(await visitor.answer(), LARGE)
        await server.wait()
    assert on_disk(sqlite_store, name) == noise(LARGE)
    assert files_below(sqlite_store.disk.path) == [name]


async def test_two_processes_publish_one_name(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, gate: Gate
) -> None:
    """If two processes restore one name at once, both serve it, and one of them drops its copy."""
    (name,) = await save_and_lose(sqlite_store, MEDIUM)
    second = Gate(tmp_path / "second-gate")
    async with (
        running_server(tmp_path, replace(faults, hold={"link": str(gate.path)})) as one,
        running_server(tmp_path, replace(faults, hold={"link": str(second.path)})) as other,
    ):
        asking = [asyncio.create_task(server.get(name)) for server in (one, other)]
        await gate.met()
        await second.met()
        gate.open()
        second.open()
        assert all(is_image(answer, MEDIUM) for answer in await asyncio.gather(*asking))
        for server in (one, other):
            assert is_image(await server.get(name), MEDIUM)
            await wait_for_open_files(server, 0)
    assert files_below(sqlite_store.disk.path) == [name]
    assert in_quarantine(sqlite_store) == []


async def test_engine_made_before_fork(tmp_path: Path, postgres_store: UploadStore, proxied_faults: Faults) -> None:
    """Workers that are forked after the engine was used make their own connections."""
    names = await save_and_lose(postgres_store, *range(SMALL, SMALL + 60))
    async with running_server(tmp_path, replace(proxied_faults, workers=2)) as server:
        workers = set()
        for number, name in enumerate(names[:20]):
            assert is_image(await server.get(name), SMALL + number)
            workers.add((await server.state())["pid"])
        answers = await server.get_many(names[20:])
        assert all(is_image(answer, SMALL + number) for number, answer in enumerate(answers, 20))
        for _ in range(200):
            workers.add((await server.state())["pid"])
            if len(workers) == 2:
                break
        assert len(workers) == 2
        assert server.process.pid not in workers
    assert files_below(postgres_store.disk.path) == sorted(names)


# -- clients -----------------------------------------------------------------------------------------------------------


async def test_client_gone_while_restoring(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """If the client disconnects during a restore, the restore finishes, and nothing stays open."""
    first, small, large = await save_and_lose(sqlite_store, SMALL - 1, SMALL, LARGE)
    async with running_server(tmp_path, replace(faults, slow={"pwrite": 0.02})) as server:
        assert is_image(await server.get(first), SMALL - 1)
        for name, much in ((small, 0), (large, 4 * CHUNK)):
            async with server.visit(name) as visitor:
                await visitor.read(much)
                await asyncio.sleep(0.01)

        await eventually(lambda: None not in (on_disk(sqlite_store, small), on_disk(sqlite_store, large)))
        await wait_for_open_files(server, 0)
        await wait_until_no_connection(server)
    assert on_disk(sqlite_store, small) == noise(SMALL)
    assert on_disk(sqlite_store, large) == noise(LARGE)
    assert files_below(sqlite_store.disk.path) == sorted([first, small, large])


@pytest.mark.parametrize("case", ["a hit", "a restore", "from the database"])
async def test_slow_client(tmp_path: Path, postgres_store: UploadStore, proxied_faults: Faults, case: str) -> None:
    """A slow client is served; it holds a descriptor at most, and never a database connection."""
    (name,) = await save_and_lose(postgres_store, LARGE)
    broken = {"pwrite": "ENOSPC"} if case == "from the database" else {}
    async with running_server(tmp_path, replace(proxied_faults, fail=broken)) as server:
        if case == "a hit":
            assert is_image(await server.get(name), LARGE)
        async with server.visit(name, buffer=65536) as visitor:
            await visitor.read(2 * CHUNK)

            if case != "from the database":
                await eventually(lambda: on_disk(postgres_store, name) is not None)
            for _ in range(10):
                await wait_until_no_connection(server)
                await asyncio.sleep(0.02)
            await wait_for_open_files(server, 0 if case == "from the database" else 1)
            assert is_image(await visitor.answer(), LARGE)


async def test_deleted_while_being_restored(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, gate: Gate
) -> None:
    """A name that is deleted during its restore gets the wrapped app's answer, and no file is left on disk."""
    (name,) = await save_and_lose(sqlite_store, SMALL)
    async with running_server(tmp_path, replace(faults, hold={"fsync": str(gate.path)})) as server:
        asking = asyncio.create_task(server.get(name))
        await gate.met()
        assert await sqlite_store.delete(name)
        gate.open()
        answer = await asking
        assert answer.is_wrapped
        assert is_not_stored(answer)
    assert files_below(sqlite_store.disk.path) == []


async def test_deleted_while_being_sent(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """A file that is deleted while it is sent is sent whole, from the open descriptor."""
    await sqlite_store.save(NAME, noise(LARGE))
    async with running_server(tmp_path, faults) as server:
        async with server.visit(NAME, buffer=65536) as visitor:
            await visitor.read(2 * CHUNK)
            assert (await server.ask("DELETE", f"/upload/{NAME}")).status == 200
            assert on_disk(sqlite_store, NAME) is None
            assert is_image(await visitor.answer(), LARGE)
        assert (await server.get(NAME)).is_wrapped
