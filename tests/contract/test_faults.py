"""Every row of the table of faults, against a real server on a real socket; each test is named after its row."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from tests.support.faulty_app import Faults
from tests.support.postgres import PostgresServer
from tests.support.proxy import Proxy
from tests.support.requirements import needs
from tests.support.serving import Answer, CommitsUnheard, Gate, Server, command, outcomes, serving
from tests.support.sides import execute, files_below, in_database, in_quarantine, locked, noise, on_both_sides, on_disk
from tests.support.sockets import make_socket
from tests.support.waiting import eventually

NAME = "cats/tom.jpg"
SMALL, MEDIUM, LARGE = 1000, 3 * CHUNK + 77, 20 * 2**20 + 77
"""Bytes of a file of one chunk, of several, and of one that is sent while it is restored."""
DEADLINE = 1.0


@pytest.fixture
def faults(directory: Path, sqlite_url: str) -> Faults:
    """Nothing fails; the two halves are those of `sqlite_store`."""
    return Faults(directory=str(directory), database=sqlite_url, deadline=5.0)


@pytest.fixture
async def postgres_store(directory: Path, postgres_url: str) -> AsyncIterator[UploadStore]:
    """A store over PostgreSQL, its tables made."""
    async with UploadStore(directory, postgres_url) as store:
        await store.database.create_tables()
        yield store


@pytest.fixture
async def proxy(postgres: PostgresServer) -> AsyncIterator[Proxy]:
    """What stands between the server process and PostgreSQL."""
    async with Proxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture
def distant(directory: Path, postgres_url: str, proxy: Proxy) -> Faults:
    """Nothing fails; the database is the one of `postgres_store`, behind the proxy."""
    url = make_url(postgres_url).set(port=proxy.port).render_as_string(hide_password=False)
    return Faults(directory=str(directory), database=url, deadline=DEADLINE)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """What holds a call of the server process up until it is opened."""
    return Gate(tmp_path / "gate")


class SmallDisk:
    """A file system of its own, with the uploads on it."""

    def __init__(self, mounted: Path) -> None:
        self.mounted = mounted
        self.uploads = mounted / "static" / "uploads"
        self.uploads.mkdir(parents=True)

    def fill(self) -> None:
        """Leave no room."""
        with (self.mounted / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass

    def make_room(self) -> None:
        """There is room again."""
        (self.mounted / "filler").unlink()

    def remount(self, how: str) -> None:
        """`ro` or `rw`."""
        subprocess.run(["mount", "-o", f"remount,{how}", self.mounted], check=True)

    def files(self) -> list[str]:
        """All that is there."""
        return [name for name in files_below(self.mounted) if name != "filler"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A real file system of 2 MiB."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=755", "none", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        needs("permission to mount a tmpfs", "sudo -E make test")
    yield SmallDisk(mounted)
    subprocess.run(["umount", "-l", mounted], check=True)


async def lost(store: UploadStore, *sizes: int) -> list[str]:
    """Names, one for each size, that only the database holds."""
    names = []
    for size in sizes:
        saved = await store.save(f"cats/{size}.jpg", noise(size))
        saved.path.unlink()
        names.append(saved.name)
    return names


def is_unknown(answer: Answer) -> bool:
    """Whether it is our answer when nobody can tell."""
    return answer.status == 503 and int(answer.headers["retry-after"]) > 0


def is_image(answer: Answer, size: int) -> bool:
    """Whether it is the whole file of so many bytes."""
    return answer.status == 200 and answer.is_whole and answer.body == noise(size)


def is_not_stored(answer: Answer) -> bool:
    """Whether no cache keeps it."""
    return answer.headers["cache-control"] == "no-store"


async def comes_back(server: Server, name: str, size: int) -> None:
    """The file is served again before long."""

    async def is_back() -> bool:
        return is_image(await server.get(name), size)

    await eventually(is_back, 30)


# -- the database ---------------------------------------------------------------------------------------------------


async def lets_go_of_connections(server: Server) -> None:
    """The server holds no connection to the database, but for the moment in which it asks what other nodes did."""

    async def holds_none() -> bool:
        return (await server.state())["connections"] == 0

    await eventually(holds_none)


async def test_database_down_file_on_disk(
    tmp_path: Path, postgres_store: UploadStore, distant: Faults, proxy: Proxy
) -> None:
    """database down, file on disk | 200 | no SQL was tried"""
    await postgres_store.save("seen.jpg", noise(SMALL))
    await postgres_store.save("new.jpg", noise(MEDIUM))
    async with serving(tmp_path, distant) as server:
        assert is_image(await server.get("seen.jpg"), SMALL)

        async def was_looked_at() -> bool:
            return await server.count("image_storage") > 0

        await eventually(was_looked_at)
        await proxy.turn("refuse")
        asked = (await server.state())["statements"]
        for _ in range(20):
            assert is_image(await server.get("seen.jpg"), SMALL)
        assert (await server.state())["statements"] == asked
        for _ in range(20):
            assert is_image(await server.get("new.jpg"), MEDIUM)
    assert on_disk(postgres_store, "new.jpg") == noise(MEDIUM)


async def test_database_down_file_missing(
    tmp_path: Path, postgres_store: UploadStore, distant: Faults, proxy: Proxy
) -> None:
    """database down, file missing | 503 + `Retry-After` | not remembered as absent"""
    (name,) = await lost(postgres_store, SMALL)
    await proxy.turn("refuse")
    async with serving(tmp_path, distant) as server:
        for answer in (await server.get(name), await server.get("never-was.jpg")):
            assert is_unknown(answer)
            assert is_not_stored(answer)
        await proxy.turn("pass")
        assert is_image(await server.get(name), SMALL)
        assert (await server.get("never-was.jpg")).is_wrapped
    assert on_disk(postgres_store, name) == noise(SMALL)


async def test_database_silent(tmp_path: Path, postgres_store: UploadStore, distant: Faults, proxy: Proxy) -> None:
    """database silent (black hole) | 503 by the deadline (default 5 s) | the connection is thrown away; the pool
    recovers by itself"""
    names = await lost(postgres_store, *range(SMALL, SMALL + 30))
    await postgres_store.save(NAME, noise(MEDIUM))
    async with serving(tmp_path, replace(distant, deadline=5.0)) as server:
        assert is_image(await server.get(names[0]), SMALL)
        await proxy.turn("stall")
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
        await proxy.turn("pass")
        await comes_back(server, names[1], SMALL + 1)
        answers = await server.get_many(names[2:])
        assert all(is_image(answer, SMALL + number) for number, answer in enumerate(answers, 2))
        assert proxy.accepted > stalled
        await lets_go_of_connections(server)


async def test_database_restarts(tmp_path: Path, postgres: PostgresServer, postgres_store: UploadStore) -> None:
    """database restarts | 200 or 503, never 404 | reads are retried once on a dead connection"""
    names = await lost(postgres_store, *range(SMALL, SMALL + 200))
    url = postgres_store.database.url.render_as_string(hide_password=False)
    await postgres_store.close()
    async with serving(tmp_path, Faults(directory=str(postgres_store.disk.path), database=url, deadline=3.0)) as server:
        assert is_image(await server.get(names.pop(0)), SMALL)
        await asyncio.to_thread(postgres.control, "restart", "-m", "fast")
        assert is_image(await server.get(names.pop(0)), SMALL + 1), "a dead connection was not tried anew"

        assert all(answer.status == 200 for answer in await server.get_many(names[:20]))
        restart = asyncio.create_task(asyncio.to_thread(postgres.control, "restart", "-m", "immediate"))
        statuses = set()
        for name in names[20:]:
            statuses.add((await server.get(name)).status)
            await asyncio.sleep(0.01)
        await restart
        assert statuses <= {200, 503}
        for number, name in enumerate(names, SMALL + 2):
            await comes_back(server, name, number)


async def test_pool_exhausted_by_misses(tmp_path: Path, postgres_store: UploadStore, distant: Faults) -> None:
    """pool exhausted by misses | 503 for misses | hits untouched"""
    names = await lost(postgres_store, *range(SMALL, SMALL + 40))
    await postgres_store.save(NAME, noise(MEDIUM))
    async with serving(tmp_path, replace(distant, pool=2, deadline=3.0)) as server:
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
    """SQLite locked | 503 | writes take the lock at once (`BEGIN IMMEDIATE`)"""
    (name,) = await lost(sqlite_store, SMALL)
    async with serving(tmp_path, replace(faults, deadline=DEADLINE)) as server:
        async with locked(sqlite_store):
            assert is_unknown(await server.get(name))
            assert is_unknown(await server.get("never-was.jpg"))
        assert is_image(await server.get(name), SMALL)
    async with serving(tmp_path, faults) as server:
        uploads = [server.ask("POST", f"/upload/{number % 4}.jpg", noise(number)) for number in range(16)]
        saves = [sqlite_store.save(f"{number % 4}.jpg", noise(100 + number)) for number in range(16)]
        done = await asyncio.gather(*uploads, *saves)
        assert [answer.status for answer in done[:16] if isinstance(answer, Answer)] == [201] * 16
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
    """table missing, schema too new/old | 503 | one critical log line that says what to run"""
    (name,) = await lost(sqlite_store, SMALL)
    await execute(sqlite_store, change)
    async with serving(tmp_path, faults) as server:
        for _ in range(3):
            answer = await server.get(name)
            assert is_unknown(answer)
            assert is_not_stored(answer)
        critical = server.lines_with("CRITICAL")
        assert len(critical) == 1
        assert says in critical[0]
    assert files_below(sqlite_store.disk.path) == []


@pytest.mark.parametrize("size", [SMALL, MEDIUM, LARGE])
async def test_records_bytes_damaged_disk_missing(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, size: int
) -> None:
    """record's bytes damaged, disk missing | 500 | nothing written; record kept; an event"""
    (name,) = await lost(sqlite_store, size)
    last = (size - 1) // CHUNK
    damaged = noise(size)[last * CHUNK :][::-1]
    await execute(sqlite_store, "UPDATE image_chunk SET data = :data WHERE position = :at", data=damaged, at=last)
    async with serving(tmp_path, faults, may_fail=size == LARGE) as server:
        answer = await server.get(name)
        if size == LARGE:  # the answer had begun before the damage was met
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
    """record's bytes damaged, disk good | 200 | `verify` reports it; `migrate` mends it from the disk copy whose hash
    matches"""
    await sqlite_store.save(NAME, noise(MEDIUM))
    await execute(sqlite_store, "UPDATE image_chunk SET data = digest WHERE position = 1")
    async with serving(tmp_path, faults) as server:
        assert is_image(await server.get(NAME), MEDIUM)
    where = {"directory": sqlite_store.disk.path, "database": faults.database}
    code, report = command("test_image_storage", **where)
    assert code == 1
    assert outcomes(report) == {"corrupt_in_database": 1}
    assert [problem["name"] for problem in report["problems"]] == [NAME]
    code, report = command("migrate_images", **where)
    assert code == 0
    code, report = command("test_image_storage", **where)
    assert (code, outcomes(report)) == (0, {"ok": 1})
    assert await on_both_sides(sqlite_store, NAME) == noise(MEDIUM)


async def test_tombstone_disk_absent(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """tombstone, disk absent | the wrapped app's answer | —"""
    await sqlite_store.save(NAME, noise(SMALL))
    await sqlite_store.delete(NAME)
    async with serving(tmp_path, faults) as server:
        answer = await server.get(NAME)
        assert answer.is_wrapped
        assert is_not_stored(answer)
    record = await sqlite_store.database.find(NAME)
    assert record is not None
    assert record.is_deleted
    assert files_below(sqlite_store.disk.path) == []


async def test_no_record(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """no record | the wrapped app's answer | remembered as absent for at most 2 s, in bounded memory"""
    async with serving(tmp_path, faults) as server:
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
    assert not sqlite_store.disk.path.exists()


async def test_just_uploaded_on_another_node(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """just uploaded on another node | 200 within those 2 s | —"""
    async with serving(tmp_path, replace(faults, directory=str(tmp_path / "node" / "uploads"))) as server:
        assert (await server.get(NAME)).is_wrapped
        await sqlite_store.save(NAME, noise(SMALL))
        saved = time.monotonic()
        while not is_image(await server.get(NAME), SMALL):
            assert time.monotonic() - saved < 2 + 1
            await asyncio.sleep(0.05)
    assert (tmp_path / "node" / "uploads" / NAME).read_bytes() == noise(SMALL)


async def test_restore_fails_for_the_first_asker(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, gate: Gate
) -> None:
    """restore fails for the first asker | all get that answer | the next asker tries anew"""
    (name,) = await lost(sqlite_store, SMALL)
    await execute(sqlite_store, "UPDATE image_chunk SET data = :data", data=b"x" * SMALL)
    async with serving(tmp_path, replace(faults, hold={"pwrite": str(gate.path)})) as server:
        asking = asyncio.create_task(server.get_many([name] * 20))
        await gate.met()
        await asyncio.sleep(0.5)
        gate.open()
        assert [answer.status for answer in await asking] == [500] * 20
        assert await server.count("image_chunk") == 1
        assert files_below(sqlite_store.disk.path) == []
        await execute(sqlite_store, "UPDATE image_chunk SET data = :data", data=noise(SMALL))
        assert is_image(await server.get(name), SMALL)


async def test_1000_clients_one_missing_name(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """1,000 clients, one missing name | all 200 | one blob read per process"""
    small, medium = await lost(sqlite_store, SMALL, MEDIUM)
    async with serving(tmp_path, faults) as server:
        answers = await server.get_many([small] * 200)
        assert all(is_image(answer, SMALL) for answer in answers)
        assert await server.count("image_chunk") == 1
        answers = await server.get_many([medium] * 50)
        assert all(is_image(answer, MEDIUM) for answer in answers)
        assert await server.count("image_chunk") == 3  # the question for it, and its chunks
    assert on_disk(sqlite_store, small) == noise(SMALL)
    assert on_disk(sqlite_store, medium) == noise(MEDIUM)


# -- the disk copy --------------------------------------------------------------------------------------------------


async def test_disk_copy_damaged_size(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """disk copy damaged (size) | seen behind the first hit of each process | quarantine, then restored"""
    saved = await sqlite_store.save(NAME, noise(SMALL))
    damaged = noise(SMALL)[:-1]

    async def is_whole() -> bool:
        return on_disk(sqlite_store, NAME) == noise(SMALL)

    for _ in range(2):
        saved.path.write_bytes(damaged)
        os.utime(saved.path, ns=(saved.modified_ns, saved.modified_ns))
        async with serving(tmp_path, faults) as server:
            assert (await server.get(NAME)).body == damaged
            await eventually(is_whole)
            assert is_image(await server.get(NAME), SMALL)
    assert in_quarantine(sqlite_store) == [damaged] * 2
    assert saved.path.stat().st_mtime_ns == saved.modified_ns
    assert await in_database(sqlite_store, NAME) == noise(SMALL)


async def test_disk_copy_damaged_same_size(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """disk copy damaged (same size) | seen by `verify` / `restore --verify` | quarantine, then restored"""
    saved = await sqlite_store.save(NAME, noise(MEDIUM))
    damaged = noise(MEDIUM)[::-1]
    saved.path.write_bytes(damaged)
    os.utime(saved.path, ns=(saved.modified_ns, saved.modified_ns))
    where = {"directory": sqlite_store.disk.path, "database": faults.database}
    code, report = command("test_image_storage", **where)
    assert code == 1
    assert outcomes(report) == {"differs": 1}
    assert on_disk(sqlite_store, NAME) == damaged
    code, report = command("restore_images", "--verify", **where)
    assert code == 0
    assert in_quarantine(sqlite_store) == [damaged]
    assert await on_both_sides(sqlite_store, NAME) == noise(MEDIUM)
    assert saved.path.stat().st_mtime_ns == saved.modified_ns
    code, report = command("test_image_storage", **where)
    assert (code, outcomes(report)) == (0, {"ok": 1})


@pytest.mark.parametrize("bad_from", [0, 3 * CHUNK], ids=["at its start", "further on"])
async def test_eio_reading_the_disk_copy(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, bad_from: int
) -> None:
    """EIO reading the disk copy | 200 from the database | quarantine"""
    saved = await sqlite_store.save(NAME, noise(8 * CHUNK))
    bad = saved.path.stat().st_ino
    async with serving(tmp_path, replace(faults, bad_file=bad, bad_from=bad_from), may_fail=bad_from > 0) as server:
        answer = await server.get(NAME)
        if bad_from:  # the answer had begun before the bad place was met
            assert not answer.is_whole or is_image(answer, 8 * CHUNK)
            answer = await server.get(NAME)
        assert is_image(answer, 8 * CHUNK)
        assert saved.path.stat().st_ino != bad
        assert on_disk(sqlite_store, NAME) == noise(8 * CHUNK)
    assert len(in_quarantine(sqlite_store)) == 1


async def test_eio_reading_the_disk_copy_of_a_read_only_disk(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, small_disk: SmallDisk
) -> None:
    """EIO reading the disk copy | 200 from the database | a disk that fails is often made read-only by its kernel"""
    await sqlite_store.database.store_image(NAME, noise(SMALL))
    path = small_disk.uploads / NAME
    path.parent.mkdir()
    path.write_bytes(noise(SMALL))
    small_disk.remount("ro")
    failing = replace(faults, directory=str(small_disk.uploads), bad_file=path.stat().st_ino)
    async with serving(tmp_path, failing) as server:
        for _ in range(3):
            assert is_image(await server.get(NAME), SMALL)


async def test_file_there_but_unreadable(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """file there but unreadable (EACCES) | 500 | not taken for missing; a clear log line"""
    saved = await sqlite_store.save(NAME, noise(SMALL))
    saved.path.chmod(0)
    before = saved.path.stat()
    async with serving(tmp_path, replace(faults, is_privileged=False)) as server:
        answer = await server.get(NAME)
        assert answer.status == 500
        assert is_not_stored(answer)
        (line,) = [line for line in server.lines_with("ERROR") if NAME in line]
        assert "Permission denied" in line
        assert await server.count("image_chunk") == 0
    assert saved.path.stat() == before
    assert in_quarantine(sqlite_store) == []


def _directory(path: Path) -> None:
    path.mkdir()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 5))
    except PermissionError:
        needs("permission to make a device", "sudo -E make test")


def _link(path: Path) -> None:
    secret = path.parent.parent.parent / "secret"
    secret.write_text("secret")
    path.symlink_to(secret)


@pytest.mark.parametrize("make", [_directory, _fifo, make_socket, _device, _link])
async def test_a_directory_fifo_socket_or_device_at_the_name(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, make: Callable[[Path], None]
) -> None:
    """a directory, FIFO, socket or device at the name | the wrapped app's answer | never blocks"""
    await lost(sqlite_store, SMALL)
    for name in (f"cats/{SMALL}.jpg", "cats/never-was.jpg"):
        make(sqlite_store.disk.path_of(name))
    async with serving(tmp_path, faults) as server:
        started = time.monotonic()
        for name in (f"cats/{SMALL}.jpg", "cats/never-was.jpg"):
            answer = await server.get(name)
            assert answer.is_wrapped
            assert is_not_stored(answer)
        assert time.monotonic() - started < 5
    for name in (f"cats/{SMALL}.jpg", "cats/never-was.jpg"):
        assert not stat.S_ISREG(sqlite_store.disk.path_of(name).lstat().st_mode)


# -- the disk -------------------------------------------------------------------------------------------------------


async def test_disk_full_while_restoring(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, small_disk: SmallDisk
) -> None:
    """disk full (ENOSPC, EDQUOT, EFBIG) while restoring | 200, streamed from the database | no file, no litter; one
    warning a minute"""
    sizes = (SMALL, MEDIUM, LARGE)
    names = await lost(sqlite_store, *sizes)
    small_disk.fill()
    async with serving(tmp_path, replace(faults, directory=str(small_disk.uploads))) as server:
        for _ in range(2):
            for name, size in zip(names, sizes, strict=True):
                assert is_image(await server.get(name), size)
                assert small_disk.files() == []
        assert len(server.lines_with("WARNING")) == 1
        small_disk.make_room()
        assert is_image(await server.get(names[1]), MEDIUM)
        assert small_disk.files() == [f"static/uploads/{names[1]}"]


@pytest.mark.parametrize(
    "broken",
    [Faults(file_size=2 * CHUNK), Faults(fail={"pwrite": "EDQUOT"}), Faults(fail={"link": "ENOSPC"})],
    ids=["EFBIG", "EDQUOT", "ENOSPC for the name"],
)
async def test_disk_full_while_restoring_in_other_ways(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, broken: Faults
) -> None:
    """disk full (ENOSPC, EDQUOT, EFBIG) while restoring | 200, streamed from the database | no file, no litter; one
    warning a minute"""
    names = await lost(sqlite_store, MEDIUM, LARGE)
    faults = replace(faults, file_size=broken.file_size, fail=broken.fail)
    async with serving(tmp_path, faults) as server:
        for name, size in zip(names, (MEDIUM, LARGE), strict=True):
            assert is_image(await server.get(name), size)
        assert len(server.lines_with("WARNING")) == 1
        assert (await server.state())["files"] == []
    assert files_below(sqlite_store.disk.path) == []


async def test_disk_read_only(tmp_path: Path, sqlite_store: UploadStore, faults: Faults, small_disk: SmallDisk) -> None:
    """disk read-only / not writable | 200, streamed from the database | no write is tried for 30 s"""
    small, medium = await lost(sqlite_store, SMALL, MEDIUM)
    small_disk.remount("ro")
    async with serving(tmp_path, replace(faults, directory=str(small_disk.uploads))) as server:
        assert is_image(await server.get(small), SMALL)
        small_disk.remount("rw")
        assert is_image(await server.get(small), SMALL)
        assert is_image(await server.get(medium), MEDIUM)
        assert small_disk.files() == []


async def test_eio_on_fsync(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """EIO on fsync | 200 from the database | the file is thrown away; never fsync that descriptor again"""
    syncs = tmp_path / "syncs"
    names = await lost(sqlite_store, SMALL, MEDIUM, LARGE)
    async with serving(tmp_path, replace(faults, fail={"fsync": "EIO"}, syncs=str(syncs))) as server:
        for name, size in zip(names, (SMALL, MEDIUM, LARGE), strict=True):
            before = len(syncs.read_text().split()) if syncs.exists() else 0
            assert is_image(await server.get(name), size)
            assert len(syncs.read_text().split()) == before + 1
        assert (await server.state())["files"] == []
    assert files_below(sqlite_store.disk.path) == []


async def test_too_many_open_files(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """too many open files | 503 | —"""
    await sqlite_store.save(NAME, noise(SMALL))
    names = await lost(sqlite_store, *range(MEDIUM, MEDIUM + 10))
    async with serving(tmp_path, replace(faults, descriptors=100, deadline=2.0)) as server:
        assert is_image(await server.get(NAME), SMALL)
        assert is_image(await server.get(names.pop()), MEDIUM + 9)
        gets = [f"/static/uploads/{name}" for name in (NAME, *names)]
        for free in range(8):
            wanted = [("POST", f"/descriptors?free={free}"), *(("GET", path) for path in gets)]
            statuses = await _on_one_connection(server, [*wanted, ("DELETE", "/descriptors")])
            assert statuses[0] == statuses[-1] == 200
            assert set(statuses[1:-1]) <= {200, 503}
            assert statuses[1] == 503 or free > 0
        for number, name in enumerate(names):
            assert is_image(await server.get(name), MEDIUM + number)
        assert is_image(await server.get(NAME), SMALL)
    assert files_below(sqlite_store.disk.path) == sorted([NAME, *names, f"cats/{MEDIUM + 9}.jpg"])
    assert in_quarantine(sqlite_store) == []


async def _on_one_connection(server: Server, requests: list[tuple[str, str]]) -> list[int]:
    """The statuses of requests that share a connection, for a server that has no descriptor left for another."""
    statuses = []
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for method, path in requests:
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n".encode())
        async with asyncio.timeout(30):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r")[0]))
        statuses.append(int(head.split(" ")[1]))
    writer.close()
    await writer.wait_closed()
    return statuses


async def test_uploads_directory_deleted(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """uploads directory deleted | 200 | directory made anew"""
    await sqlite_store.save(NAME, noise(SMALL))
    async with serving(tmp_path, faults) as server:
        assert is_image(await server.get(NAME), SMALL)
        shutil.rmtree(sqlite_store.disk.path)
        assert is_image(await server.get(NAME), SMALL)
    assert files_below(sqlite_store.disk.path) == [NAME]


async def test_uploads_directory_is_a_lost_mount(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """uploads directory is a lost mount (marker file gone, `require_marker=True`) | 200 from the database | nothing is
    written beneath the mount point"""
    names = await lost(sqlite_store, SMALL, LARGE)
    shutil.rmtree(sqlite_store.disk.path)
    sqlite_store.disk.path.mkdir()
    async with serving(tmp_path, replace(faults, require_marker=True)) as server:
        for name, size in zip(names, (SMALL, LARGE), strict=True):
            assert is_image(await server.get(name), size)
        assert (await server.ask("POST", f"/upload/{NAME}", noise(MEDIUM))).status == 201
        assert is_image(await server.get(NAME), MEDIUM)
        assert list(sqlite_store.disk.path.iterdir()) == []


# -- who asks, and who dies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_unnamed_files", [True, False], ids=["O_TMPFILE", "named temporary files"])
async def test_sigkill_while_restoring(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, has_unnamed_files: bool
) -> None:
    """SIGKILL while restoring | connection reset | next GET 200; no torn file; no litter (`O_TMPFILE`, or swept at
    start)"""
    (name,) = await lost(sqlite_store, LARGE)
    faults = replace(faults, has_unnamed_files=has_unnamed_files)
    async with serving(tmp_path, replace(faults, slow={"pwrite": 0.02})) as server:
        async with server.visit(name) as visitor:
            await visitor.read(10 * CHUNK)
            server.kill()
            assert not (await visitor.answer()).is_whole
    litter = files_below(sqlite_store.disk.path)
    assert name not in litter
    assert litter == [] or not has_unnamed_files
    async with serving(tmp_path, faults) as server:
        assert is_image(await server.get(name), LARGE)
    assert files_below(sqlite_store.disk.path) == [name]


async def test_sigkill_after_an_uploads_commit(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """SIGKILL after an upload's commit | unknown to the client | next GET heals"""
    async with serving(tmp_path, replace(faults, kill_at="link")) as server:
        assert (await server.ask("POST", f"/upload/{NAME}", noise(MEDIUM))).status == 0
    assert files_below(sqlite_store.disk.path) == []
    assert await in_database(sqlite_store, NAME) == noise(MEDIUM)
    async with serving(tmp_path, faults) as server:
        assert is_image(await server.get(NAME), MEDIUM)
    assert await on_both_sides(sqlite_store, NAME) == noise(MEDIUM)


@pytest.mark.parametrize(
    ("size", "moment"), [(SMALL, 1), (80 * CHUNK, 1), (80 * CHUNK, 2)], ids=["small", "large", "large, later"]
)
async def test_sigkill_before_an_uploads_commit(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, size: int, moment: int
) -> None:
    """SIGKILL before it | unknown | no record, no file"""
    async with serving(tmp_path, replace(faults, kill_at=f"commit:{moment}")) as server:
        assert (await server.ask("POST", f"/upload/{NAME}", noise(size))).status == 0
    assert server.process.returncode == -signal.SIGKILL
    assert await sqlite_store.database.find(NAME) is None
    assert files_below(sqlite_store.disk.path) == []
    async with serving(tmp_path, faults) as server:
        assert (await server.get(NAME)).is_wrapped
        assert (await server.ask("POST", f"/upload/{NAME}", noise(size))).status == 201
    assert await on_both_sides(sqlite_store, NAME) == noise(size)


async def test_sigkill_in_the_middle_of_an_upload(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """SIGKILL before it | unknown | no record, no file"""
    async with serving(tmp_path, faults) as server:
        head = f"Content-Length: {LARGE}"
        async with server.request(f"/upload/{NAME}", head, method="POST") as client:
            client.writer.write(noise(LARGE)[: LARGE // 2])
            await client.writer.drain()
            server.kill()
    assert await sqlite_store.database.find(NAME) is None
    assert files_below(sqlite_store.disk.path) == []


@pytest.mark.parametrize("size", [SMALL, 40 * CHUNK])
async def test_commits_outcome_unknown(
    tmp_path: Path, postgres: PostgresServer, postgres_store: UploadStore, distant: Faults, size: int
) -> None:
    """commit's outcome unknown | 503 | the same upload again is harmless"""
    async with CommitsUnheard(postgres.port) as unheard:
        url = make_url(distant.database).set(port=unheard.port).render_as_string(hide_password=False)
        async with serving(tmp_path, replace(distant, database=url, deadline=5.0)) as server:
            unheard.is_armed = True
            assert (await server.ask("POST", f"/upload/{NAME}", noise(size))).status == 503
            assert unheard.broken == 1
            unheard.is_armed = False
            assert files_below(postgres_store.disk.path) == []
            assert (await server.ask("POST", f"/upload/{NAME}", noise(size))).status == 201
            assert is_image(await server.get(NAME), size)
    assert await on_both_sides(postgres_store, NAME) == noise(size)
    record = await postgres_store.database.find(NAME)
    assert record is not None
    assert record.generation == 1
    assert await postgres_store.database.history(NAME) == []


async def test_client_gone_while_restoring(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """client gone while restoring | — | the restore goes on to its end; nothing leaks"""
    first, small, large = await lost(sqlite_store, SMALL - 1, SMALL, LARGE)
    async with serving(tmp_path, replace(faults, slow={"pwrite": 0.02})) as server:
        assert is_image(await server.get(first), SMALL - 1)
        before = (await server.state())["files"]
        for name, much in ((small, 0), (large, 4 * CHUNK)):
            async with server.visit(name) as visitor:
                await visitor.read(much)
                await asyncio.sleep(0.01)

        async def is_restored() -> bool:
            return on_disk(sqlite_store, small) is not None and on_disk(sqlite_store, large) is not None

        await eventually(is_restored, 30)

        async def nothing_is_open() -> bool:
            return (await server.state())["files"] == before

        await eventually(nothing_is_open)
        await lets_go_of_connections(server)
    assert on_disk(sqlite_store, small) == noise(SMALL)
    assert on_disk(sqlite_store, large) == noise(LARGE)
    assert files_below(sqlite_store.disk.path) == sorted([first, small, large])


@pytest.mark.parametrize("case", ["a hit", "a restore", "from the database"])
async def test_slow_client(tmp_path: Path, postgres_store: UploadStore, distant: Faults, case: str) -> None:
    """slow client | served | holds a descriptor, never a database connection"""
    (name,) = await lost(postgres_store, LARGE)
    broken = {"pwrite": "ENOSPC"} if case == "from the database" else {}
    async with serving(tmp_path, replace(distant, fail=broken, deadline=5.0)) as server:
        if case == "a hit":
            assert is_image(await server.get(name), LARGE)
        async with server.visit(name, buffer=65536) as visitor:
            await visitor.read(2 * CHUNK)

            async def is_restored() -> bool:
                return case == "from the database" or on_disk(postgres_store, name) is not None

            await eventually(is_restored, 30)
            for _ in range(10):
                await lets_go_of_connections(server)
                await asyncio.sleep(0.02)
            assert len((await server.state())["files"]) == (0 if case == "from the database" else 1)
            assert is_image(await visitor.answer(), LARGE)


async def test_deleted_while_being_restored(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, gate: Gate
) -> None:
    """deleted while being restored | the wrapped app's answer | the file is not left on disk"""
    (name,) = await lost(sqlite_store, SMALL)
    async with serving(tmp_path, replace(faults, hold={"fsync": str(gate.path)})) as server:
        asking = asyncio.create_task(server.get(name))
        await gate.met()
        assert await sqlite_store.delete(name)
        gate.open()
        answer = await asking
        assert answer.is_wrapped
        assert is_not_stored(answer)
    assert files_below(sqlite_store.disk.path) == []


async def test_deleted_while_being_sent(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """deleted while being sent | whole file | sent from the open descriptor"""
    await sqlite_store.save(NAME, noise(LARGE))
    async with serving(tmp_path, faults) as server:
        async with server.visit(NAME, buffer=65536) as visitor:
            await visitor.read(2 * CHUNK)
            assert (await server.ask("DELETE", f"/upload/{NAME}")).status == 200
            assert on_disk(sqlite_store, NAME) is None
            assert is_image(await visitor.answer(), LARGE)
        assert (await server.get(NAME)).is_wrapped


async def test_two_processes_publish_one_name(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, gate: Gate
) -> None:
    """two processes publish one name | 200 | one wins, the other drops its copy"""
    (name,) = await lost(sqlite_store, MEDIUM)
    second = Gate(tmp_path / "second-gate")
    async with (
        serving(tmp_path, replace(faults, hold={"link": str(gate.path)})) as one,
        serving(tmp_path, replace(faults, hold={"link": str(second.path)})) as other,
    ):
        asking = [asyncio.create_task(server.get(name)) for server in (one, other)]
        await gate.met()
        await second.met()
        gate.open()
        second.open()
        assert all(is_image(answer, MEDIUM) for answer in await asyncio.gather(*asking))
        for server in (one, other):
            assert is_image(await server.get(name), MEDIUM)
            assert (await server.state())["files"] == []
    assert files_below(sqlite_store.disk.path) == [name]
    assert in_quarantine(sqlite_store) == []


async def test_engine_made_before_fork(tmp_path: Path, postgres_store: UploadStore, distant: Faults) -> None:
    """engine made before fork | — | each worker makes its own"""
    names = await lost(postgres_store, *range(SMALL, SMALL + 60))
    async with serving(tmp_path, replace(distant, workers=2, deadline=5.0)) as server:
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


async def test_upload_disk_full_database_fine(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, small_disk: SmallDisk
) -> None:
    """upload: disk full, database fine | saved | healed later"""
    small_disk.fill()
    async with serving(tmp_path, replace(faults, directory=str(small_disk.uploads))) as server:
        for size in (SMALL, MEDIUM, LARGE):
            assert (await server.ask("POST", f"/upload/{size}.jpg", noise(size))).status == 201
        assert small_disk.files() == []
        assert is_image(await server.get(f"{LARGE}.jpg"), LARGE)
        small_disk.make_room()
        for size in (SMALL, MEDIUM):
            assert is_image(await server.get(f"{size}.jpg"), size)
        assert small_disk.files() == sorted([f"static/uploads/{size}.jpg" for size in (SMALL, MEDIUM)])
    for size in (SMALL, MEDIUM, LARGE):
        assert await in_database(sqlite_store, f"{size}.jpg") == noise(size)


async def test_upload_database_fails(
    tmp_path: Path, postgres_store: UploadStore, distant: Faults, proxy: Proxy
) -> None:
    """upload: database fails | the caller gets the error | nothing on disk"""
    await postgres_store.save("old.jpg", noise(SMALL))
    async with serving(tmp_path, replace(distant, deadline=2.0)) as server:
        assert (await server.ask("POST", "/upload/first.jpg", noise(SMALL))).status == 201
        for mode in ("refuse", "cut", "stall"):
            await proxy.turn(mode)
            for name, size in ((NAME, SMALL), (NAME, 40 * CHUNK), ("old.jpg", MEDIUM)):
                assert (await server.ask("POST", f"/upload/{name}", noise(size))).status == 503
            assert files_below(postgres_store.disk.path) == ["first.jpg", "old.jpg"]
            await proxy.turn("pass")
        assert (await server.state())["files"] == []
    assert await postgres_store.database.find(NAME) is None
    assert await on_both_sides(postgres_store, "old.jpg") == noise(SMALL)


@pytest.mark.parametrize("stays", [True, False], ids=["visitor stays", "visitor goes"])
async def test_sigterm_while_restoring(tmp_path: Path, sqlite_store: UploadStore, faults: Faults, stays: bool) -> None:
    """SIGTERM while restoring | finished, within the server's grace | —"""
    (name,) = await lost(sqlite_store, LARGE)
    async with serving(tmp_path, replace(faults, slow={"pwrite": 0.02})) as server:
        async with server.visit(name) as visitor:
            await visitor.read(4 * CHUNK)
            server.terminate()
            if stays:
                assert is_image(await visitor.answer(), LARGE)
        await server.wait()
    assert on_disk(sqlite_store, name) == noise(LARGE)
    assert files_below(sqlite_store.disk.path) == [name]
