"""A real server whose disk is full, read-only, broken or gone, or whose files are damaged: the database serves."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from tests.support.faulty_server import FaultyServer, running_server
from tests.support.process_faults import Faults
from tests.support.requirements import needs
from tests.support.run_script import outcome_counts, run_script
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
)
from tests.support.small_disk import SmallDisk
from tests.support.sockets import make_socket
from tests.support.store_state import (
    files_below,
    in_database,
    in_quarantine,
    on_disk,
    on_disk_and_in_database,
    set_aside,
)
from tests.support.waiting import eventually

# -- a damaged file ----------------------------------------------------------------------------------------------------


async def test_disk_copy_damaged_size(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """A file of the wrong size is found in the background of its first hit in each process, set aside, and restored."""
    saved = await sqlite_store.save(NAME, noise(SMALL))
    damaged = noise(SMALL)[:-1]

    for _ in range(2):
        saved.path.write_bytes(damaged)
        os.utime(saved.path, ns=(saved.modified_ns, saved.modified_ns))
        async with running_server(tmp_path, faults) as server:
            assert (await server.get(NAME)).body == damaged
            await eventually(lambda: on_disk(sqlite_store, NAME) == noise(SMALL))
            assert is_image(await server.get(NAME), SMALL)
    assert await set_aside(sqlite_store, NAME) == [damaged]
    assert in_quarantine(sqlite_store) == []
    assert saved.path.stat().st_mtime_ns == saved.modified_ns
    assert await in_database(sqlite_store, NAME) == noise(SMALL)


async def test_disk_copy_damaged_same_size(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """A damaged file of the right size is found by `verify`; `restore --verify` sets it aside and restores it."""
    saved = await sqlite_store.save(NAME, noise(MEDIUM))
    damaged = noise(MEDIUM)[::-1]
    saved.path.write_bytes(damaged)
    os.utime(saved.path, ns=(saved.modified_ns, saved.modified_ns))
    where = {"directory": sqlite_store.disk.path, "database": faults.database}
    code, report = run_script("test_image_storage", **where)
    assert code == 1
    assert outcome_counts(report) == {"differs": 1}
    assert on_disk(sqlite_store, NAME) == damaged
    code, report = run_script("restore_images", "--verify", **where)
    assert code == 0
    assert await set_aside(sqlite_store, NAME) == [damaged]
    assert await on_disk_and_in_database(sqlite_store, NAME) == noise(MEDIUM)
    assert saved.path.stat().st_mtime_ns == saved.modified_ns
    code, report = run_script("test_image_storage", **where)
    assert (code, outcome_counts(report)) == (0, {"ok": 1})


@pytest.mark.parametrize("bad_from", [0, 3 * CHUNK], ids=["at its start", "further on"])
async def test_eio_reading_the_disk_copy(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, bad_from: int
) -> None:
    """A file that cannot be read (EIO) is set aside, and served from the database."""
    saved = await sqlite_store.save(NAME, noise(8 * CHUNK))
    bad = saved.path.stat().st_ino
    async with running_server(
        tmp_path, replace(faults, bad_file=bad, bad_from=bad_from), may_fail=bad_from > 0
    ) as server:
        answer = await server.get(NAME)
        if bad_from:  # the answer has started before the error
            assert not answer.is_whole or is_image(answer, 8 * CHUNK)
            answer = await server.get(NAME)
        assert is_image(answer, 8 * CHUNK)
        assert saved.path.stat().st_ino != bad
        assert on_disk(sqlite_store, NAME) == noise(8 * CHUNK)
    assert len(in_quarantine(sqlite_store)) == 1


async def test_eio_reading_the_disk_copy_of_a_read_only_disk(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, small_disk: SmallDisk
) -> None:
    """A file that cannot be read (EIO) on a read-only disk is served from the database; kernels make failing disks
    read-only.
    """
    await sqlite_store.database.store_image(NAME, noise(SMALL))
    path = small_disk.uploads / NAME
    path.parent.mkdir()
    path.write_bytes(noise(SMALL))
    small_disk.remount("ro")
    failing = replace(faults, directory=str(small_disk.uploads), bad_file=path.stat().st_ino)
    async with running_server(tmp_path, failing) as server:
        for _ in range(3):
            assert is_image(await server.get(NAME), SMALL)


async def test_file_there_but_unreadable_and_recorded(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults
) -> None:
    """A file that must not be read (EACCES) is served from the database; a log line says whose it should be."""
    saved = await sqlite_store.save(NAME, noise(SMALL))
    saved.path.chmod(0)
    async with running_server(tmp_path, replace(faults, is_privileged=False)) as server:
        assert is_image(await server.get(NAME), SMALL)
        (line,) = [line for line in server.lines_with("ERROR") if NAME in line]
        assert "chown" in line
    assert in_quarantine(sqlite_store) == []


async def test_file_there_but_unreadable(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """An unreadable file that the database lacks is a 500 with a clear log line; it does not count as missing."""
    path = sqlite_store.disk.path_of(NAME)
    path.parent.mkdir(parents=True)
    path.write_bytes(noise(SMALL))
    path.chmod(0)
    before = path.stat()
    async with running_server(tmp_path, replace(faults, is_privileged=False)) as server:
        answer = await server.get(NAME)
        assert answer.status == 500
        assert is_not_stored(answer)
        (line,) = [line for line in server.lines_with("ERROR") if NAME in line]
        assert "Permission denied" in line
    assert path.stat() == before
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
    """A directory, FIFO, socket, device or link in place of a file gets the wrapped app's answer, and never blocks."""
    await save_and_lose(sqlite_store, SMALL)
    for name in (f"cats/{SMALL}.jpg", "cats/never-was.jpg"):
        make(sqlite_store.disk.path_of(name))
    async with running_server(tmp_path, faults) as server:
        started = time.monotonic()
        for name in (f"cats/{SMALL}.jpg", "cats/never-was.jpg"):
            answer = await server.get(name)
            assert answer.is_wrapped
            assert is_not_stored(answer)
        assert time.monotonic() - started < 5
    for name in (f"cats/{SMALL}.jpg", "cats/never-was.jpg"):
        assert not stat.S_ISREG(sqlite_store.disk.path_of(name).lstat().st_mode)


# -- a disk that accepts no file ---------------------------------------------------------------------------------------


async def test_disk_full_while_restoring(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, small_disk: SmallDisk
) -> None:
    """While the disk is full, missing files are streamed from the database; there is no file, no litter, and one
    warning per minute.
    """
    sizes = (SMALL, MEDIUM, LARGE)
    names = await save_and_lose(sqlite_store, *sizes)
    small_disk.fill()
    async with running_server(tmp_path, replace(faults, directory=str(small_disk.uploads))) as server:
        for _ in range(2):
            for name, size in zip(names, sizes, strict=True):
                assert is_image(await server.get(name), size)
                assert small_disk.files() == []
        assert len(server.lines_with("WARNING")) == 1
        small_disk.free()
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
    """The same holds if a write fails with EFBIG or EDQUOT, or if the name fails with ENOSPC."""
    names = await save_and_lose(sqlite_store, MEDIUM, LARGE)
    faults = replace(faults, file_size=broken.file_size, fail=broken.fail)
    async with running_server(tmp_path, faults) as server:
        for name, size in zip(names, (MEDIUM, LARGE), strict=True):
            assert is_image(await server.get(name), size)
        assert len(server.lines_with("WARNING")) == 1
        await wait_for_open_files(server, 0)
    assert files_below(sqlite_store.disk.path) == []


async def test_upload_disk_full_database_fine(
    tmp_path: Path, sqlite_store: UploadStore, faults: Faults, small_disk: SmallDisk
) -> None:
    """An upload to a full disk is saved in the database, and its file is restored later."""
    small_disk.fill()
    async with running_server(tmp_path, replace(faults, directory=str(small_disk.uploads))) as server:
        for size in (SMALL, MEDIUM, LARGE):
            assert (await server.ask("POST", f"/upload/{size}.jpg", noise(size))).status == 201
        assert small_disk.files() == []
        assert is_image(await server.get(f"{LARGE}.jpg"), LARGE)
        small_disk.free()
        for size in (SMALL, MEDIUM):
            assert is_image(await server.get(f"{size}.jpg"), size)
        assert small_disk.files() == sorted([f"static/uploads/{size}.jpg" for size in (SMALL, MEDIUM)])
    for size in (SMALL, MEDIUM, LARGE):
        assert await in_database(sqlite_store, f"{size}.jpg") == noise(size)


async def test_disk_read_only(tmp_path: Path, sqlite_store: UploadStore, faults: Faults, small_disk: SmallDisk) -> None:
    """While the disk is read-only, missing files are streamed from the database, and no write is tried for 30 s."""
    small, medium = await save_and_lose(sqlite_store, SMALL, MEDIUM)
    small_disk.remount("ro")
    async with running_server(tmp_path, replace(faults, directory=str(small_disk.uploads))) as server:
        assert is_image(await server.get(small), SMALL)
        small_disk.remount("rw")
        assert is_image(await server.get(small), SMALL)
        assert is_image(await server.get(medium), MEDIUM)
        assert small_disk.files() == []


async def test_eio_on_fsync(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """A file whose fsync fails (EIO) is served from the database and deleted; its descriptor is not synced again."""
    syncs = tmp_path / "syncs"
    names = await save_and_lose(sqlite_store, SMALL, MEDIUM, LARGE)
    async with running_server(tmp_path, replace(faults, fail={"fsync": "EIO"}, syncs=str(syncs))) as server:
        for name, size in zip(names, (SMALL, MEDIUM, LARGE), strict=True):
            before = len(syncs.read_text().split()) if syncs.exists() else 0
            assert is_image(await server.get(name), size)
            assert len(syncs.read_text().split()) == before + 1
        await wait_for_open_files(server, 0)
    assert files_below(sqlite_store.disk.path) == []


async def test_too_many_open_files(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """Without free descriptors the answer is 503; afterwards every file is served, and nothing is left behind."""
    await sqlite_store.save(NAME, noise(SMALL))
    names = await save_and_lose(sqlite_store, *range(MEDIUM, MEDIUM + 10))
    async with running_server(tmp_path, replace(faults, descriptors=100, deadline=2.0)) as server:
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


async def _on_one_connection(server: FaultyServer, requests: list[tuple[str, str]]) -> list[int]:
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


# -- a disk that is gone -----------------------------------------------------------------------------------------------


async def test_uploads_directory_deleted(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """A deleted uploads directory is created again, and its files are restored."""
    await sqlite_store.save(NAME, noise(SMALL))
    async with running_server(tmp_path, faults) as server:
        assert is_image(await server.get(NAME), SMALL)
        shutil.rmtree(sqlite_store.disk.path)
        assert is_image(await server.get(NAME), SMALL)
    assert files_below(sqlite_store.disk.path) == [NAME]


async def test_uploads_directory_is_a_lost_mount(tmp_path: Path, sqlite_store: UploadStore, faults: Faults) -> None:
    """If `require_marker` is set and the marker file is missing, files are served from the database, and nothing is
    written below the mount point.
    """
    names = await save_and_lose(sqlite_store, SMALL, LARGE)
    shutil.rmtree(sqlite_store.disk.path)
    sqlite_store.disk.path.mkdir()
    async with running_server(tmp_path, replace(faults, require_marker=True)) as server:
        for name, size in zip(names, (SMALL, LARGE), strict=True):
            assert is_image(await server.get(name), size)
        assert (await server.ask("POST", f"/upload/{NAME}", noise(MEDIUM))).status == 201
        assert is_image(await server.get(NAME), MEDIUM)
        assert files_below(sqlite_store.disk.path) == []
