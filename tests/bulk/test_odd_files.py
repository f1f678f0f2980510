"""Files and directories with odd properties: each is reported by name, and all others are done."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfheal import UploadStore, bulk, names
from selfheal.disk import syscalls
from tests.support.files import noise, write_file
from tests.support.runs import remove_tree, report_of
from tests.support.sockets import make_socket
from tests.support.special_files import device, link_to_itself

TIMES = (2**63, 2**63 + 1, 10**19, 15 * 10**18, -(2**63) - 1, -(10**19), 2**63 - 1, -1, 0)
"""In ns since the epoch: an integer of 64 bits ends in the years 1677 and 2262."""


async def _assert_that_the_others_are_done(store: UploadStore, problems: dict[str, str], others: int) -> None:
    """Let every run pass: it reports the problems, and nothing else is wrong; each other file is stored."""
    dry = await report_of(bulk.migrate(store, dry_run=True))
    assert dry.counts["migrated"] >= others
    for outcome in ("migrated", "ok"):
        report = await report_of(bulk.migrate(store))
        assert (report.problems, report.counts[outcome]) == (problems, others)
    for run in (bulk.verify(store), bulk.verify(store, drill=True)):
        report = await report_of(run)
        assert (report.problems, report.counts["ok"]) == (problems, others)
    for run in (bulk.restore(store), bulk.restore(store, verify=True), bulk.restore(store, dry_run=True)):
        assert (await report_of(run)).counts == {"ok": others}


async def test_times_out_of_range(store: UploadStore, directory: Path) -> None:
    """The bytes of a file with any time are stored, with the nearest time that a record can hold."""
    for index, modified_ns in enumerate(TIMES):
        for kind, size in (("png", 50), ("bin", 4 * 2**20 + 1)):
            write_file(directory / f"{index}.{kind}", noise(size, index), modified_ns=modified_ns)
    await _assert_that_the_others_are_done(store, {}, 2 * len(TIMES))
    for index in range(len(TIMES)):
        path = directory / f"{index}.png"
        record = await store.database.find(path.name)
        assert record is not None
        assert record.modified_ns == max(-(2**63), min(2**63 - 1, path.stat().st_mtime_ns))
    remove_tree(directory)
    assert (await report_of(bulk.restore(store))).counts == {"restored": 2 * len(TIMES)}
    assert (directory / "0.png").read_bytes() == noise(50, 0)


async def test_names_with_every_byte(store: UploadStore, directory: Path) -> None:
    """A name with any byte in it, of the greatest length, or in a directory of such a name, ends no run."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = os.fsencode(directory) + b"/"
    odd = [b"a%cb.png" % byte for byte in range(1, 256) if byte != ord("/")]
    odd += [b"x" * 255, b"%c/tom.png" % 0xFF, b"CON/tom.png", b"new\nline/tom.png", "ü".encode() * 127]
    for name in odd:
        os.makedirs(os.path.dirname(raw + name), exist_ok=True)
        with open(raw + name, "wb") as file:
            file.write(name)
    invalid = {name for name in map(os.fsdecode, odd) if not names.is_valid(name)}
    assert {"a\\b.png", "a\nb.png", "a\udcffb.png", "CON/tom.png", "\udcff/tom.png"} < invalid
    await _assert_that_the_others_are_done(store, dict.fromkeys(invalid, "invalid_name"), len(odd) - len(invalid))


@pytest.mark.parametrize("depth", [200, 700, 1500])
async def test_a_deep_tree(store: UploadStore, directory: Path, depth: int) -> None:
    """200 directories in each other are stored; what is too deep for a valid name is reported once."""
    write_file(directory / "z.png", noise(10))
    here = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("tom.png", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    if depth == 200:
        await _assert_that_the_others_are_done(store, {}, 2)
    else:
        await _assert_that_the_others_are_done(store, {"/".join("d" * 256): "failed"}, 1)
    _remove_deep_tree(directory, depth)


def _remove_deep_tree(directory: Path, depth: int) -> None:
    """Remove it from its inside: its path is too long for a system call."""
    top = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.rename("d", "old", src_dir_fd=top, dst_dir_fd=top)
        inside = os.open("old", os.O_RDONLY, dir_fd=top)
        for name in os.listdir(inside):
            os.rename(name, name, src_dir_fd=inside, dst_dir_fd=top)
        os.close(inside)
        os.rmdir("old", dir_fd=top)
    os.close(top)


@pytest.mark.timeout(60)
async def test_what_is_no_file(store: UploadStore, directory: Path) -> None:
    """FIFOs, sockets and devices are reported; links, in a loop or not, are skipped; none of them is opened."""
    for index in range(5):
        write_file(directory / f"{index}.png", noise(10, index))
    kinds: dict[str, Callable[[Path], Any]] = {"fifo": os.mkfifo, "socket": make_socket, "device": device}
    for name, make in kinds.items():
        make(directory / f"{name}.png")
    link_to_itself(directory / "loop.png")
    (directory / "there").symlink_to("back")
    (directory / "back").symlink_to("there")
    (directory / "up").symlink_to(".")
    await _assert_that_the_others_are_done(store, {f"{name}.png": "failed" for name in kinds}, 5)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
async def test_a_directory_that_cannot_be_read(
    store: UploadStore, directory: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreadable directory is one failed line that says what to do; everything else is done."""
    for name in ("a.png", "locked/1.png", "locked/2.png", "z/z.png"):
        write_file(directory / name, noise(10, name))
    open_directory = syscalls.open_directory

    def refuse(root: int, name: str) -> int:
        if name == "locked":
            raise OSError(code, os.strerror(code))
        return open_directory(root, name)

    monkeypatch.setattr(syscalls, "open_directory", refuse)
    await _assert_that_the_others_are_done(store, {"locked": "failed"}, 2)
    [result] = [result async for result in bulk.migrate(store) if result.is_problem]
    locked = str(directory / "locked")
    advice = (f"chown -R {os.geteuid()} {locked}`", f"chmod -R a+rX {locked}`")
    assert all((part in result.detail) is (code == errno.EACCES) for part in advice)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
async def test_a_file_that_cannot_be_read(
    store: UploadStore, directory: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreadable file, small or large, is failed; without permission the line says `chmod`."""
    for name, size in (("a.png", 10), ("locked.png", 10), ("locked.bin", 5 * 2**20), ("z.png", 10)):
        write_file(directory / name, noise(size, name))
    open_file = syscalls.open_file

    def refuse(root: int, name: str) -> int:
        if "locked" in name:
            raise OSError(code, os.strerror(code))
        return open_file(root, name)

    monkeypatch.setattr(syscalls, "open_file", refuse)
    report = await report_of(bulk.migrate(store))
    assert report.outcomes == {"a.png": "migrated", "z.png": "migrated", "locked.png": "failed", "locked.bin": "failed"}
    assert all(("chmod" in one.detail) is (code == errno.EACCES) for one in report.results if one.is_problem)
    assert (await report_of(bulk.verify(store))).counts == {"ok": 2, "missing_in_database": 2}
    assert (await report_of(bulk.restore(store, verify=True))).counts == {"ok": 2}


async def test_a_file_of_the_same_size_and_time(store: UploadStore, directory: Path) -> None:
    """Migrate compares bytes: other ones with the recorded size and time differ, whatever their length."""
    for name, size in (("small.png", 50), ("middle.bin", 2**20), ("large.bin", 5 * 2**20)):
        write_file(directory / name, noise(size, "recorded"))
    write_file(directory / "same.png", noise(50))
    assert (await report_of(bulk.migrate(store))).counts == {"migrated": 4}
    for name, size in (("small.png", 50), ("middle.bin", 2**20), ("large.bin", 5 * 2**20)):
        write_file(directory / name, noise(size, "other"))
    different = dict.fromkeys(("small.png", "middle.bin", "large.bin"), "differs")
    for dry_run in (True, False):
        report = await report_of(bulk.migrate(store, dry_run=dry_run))
        assert report.outcomes == different | {"same.png": "ok"}
    assert (await report_of(bulk.migrate(store, prefer_disk=True))).counts == {"migrated": 3, "ok": 1}
    record = await store.database.find("small.png")
    assert record is not None
    assert b"".join([chunk async for chunk in store.database.read(record)]) == noise(50, "other")
