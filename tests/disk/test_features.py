"""Disks that refuse modes, times, links or syncs: the file is published all the same, and it is logged once."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from selfheal.disk import syscalls
from selfheal.disk.directory import UploadsDirectory
from selfheal.errors import DiskUnwritable
from tests.support.disk_files import (
    ABSURD_TIMES,
    MODIFIED,
    OTHER,
    PICTURE,
    contents_below,
    names_in,
    put,
    read,
    set_modified,
)
from tests.support.mounts import Mount
from tests.support.odd_disks import REAL, mounted
from tests.support.os_errors import fails

Uploads = Callable[..., UploadsDirectory]
REFUSED = [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL]


def publish_together(disk: UploadsDirectory, names: list[str]) -> None:
    """Publish files as a bulk run does, synced together."""
    with disk.stage(names[0]) as first, disk.stage(names[1]) as second:
        for staged in (first, second):
            staged.write(PICTURE)
            staged.seal(MODIFIED, disk.file_mode)
        disk.sync([first, second])
        assert first.publish()
        assert second.publish()


# -- refused calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", REFUSED)
@pytest.mark.parametrize("call", ["fchmod", "utime", "fsync", "fchown"])
def test_what_a_disk_refuses_is_left_out(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, code: int
) -> None:
    """A disk that refuses modes, times, owners or fsync takes files and directories; one line says what it lacks."""
    disk.path.mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(disk.path, 12345, 23456)
    monkeypatch.setattr(os, call, fails(code))
    for number in range(3):
        put(disk, f"cats/{number}.png")
        put(disk, f"cats/{number}.png", OTHER)
    assert [read(disk, f"cats/{number}.png") for number in range(3)] == [OTHER] * 3
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == (1 if call != "fchown" or os.geteuid() == 0 else 0)
    assert all(str(disk.path) in line and os.strerror(code) in line for line in lines)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("call", ["fchmod", "utime", "fsync"])
def test_a_disk_that_fails_takes_no_file(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """An error that is no lack of a feature is still one of the file, which is not published."""
    disk.path.mkdir(parents=True)
    monkeypatch.setattr(os, call, fails(code))
    with pytest.raises(DiskUnwritable):
        put(disk, "tom.png")
    assert names_in(disk.path) == []


@pytest.mark.parametrize("code", REFUSED)
def test_without_syncfs_every_file_is_synced(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """Where syncfs is refused, each file is synced by itself; one line says so."""
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(syscalls, "sync_filesystem", fails(code))
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd)))
    publish_together(disk, ["cats/1.png", "cats/2.png"])
    publish_together(disk, ["cats/3.png", "dogs/4.png"])
    assert len(set(synced)) == 4
    assert len(caplog.records) == 1


def test_each_file_system_is_synced(uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path) -> None:
    """Files on a file system that is mounted below the root are synced with it, not only those of the root."""
    synced: list[int] = []
    mount("size=1m")
    disk = uploads(tmp_path / "volume")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syscalls, "sync_filesystem", lambda fd: synced.append(os.fstat(fd).st_dev))
        publish_together(disk, ["uploads/tom.png", "tom.png"])
    assert set(synced) == {os.stat(disk.path).st_dev, os.stat(disk.path / "uploads").st_dev}


# -- links and unnamed files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [*REFUSED, errno.EISDIR])
def test_without_unnamed_files(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Every errno of a missing O_TMPFILE leads to a file under a temporary name, and later to its final one."""
    monkeypatch.setattr(syscalls, "open_unnamed", fails(code))
    for data in (PICTURE, OTHER):
        put(disk, "cats/tom.png", data)
        assert contents_below(disk.path) == {"cats/tom.png": data}


@pytest.mark.parametrize("code", [*REFUSED, errno.ENOENT])
@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("before", [None, OTHER], ids=["free", "taken"])
def test_unnamed_files_that_cannot_be_named(
    disk: UploadsDirectory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    has_links: bool,
    before: bytes | None,
) -> None:
    """Where an unnamed file gets no name (no links, or no /proc), it is copied to a temporary one, with its time."""
    if before is not None:
        put(disk, "cats/tom.png", before)
    monkeypatch.setattr(syscalls, "name_descriptor", fails(code))
    if not has_links:
        monkeypatch.setattr(os, "link", fails(errno.EPERM))
    for number in range(2):
        put(disk, "cats/tom.png", PICTURE)
        put(disk, f"cats/{number}.png", PICTURE)
    assert contents_below(disk.path) == {f"cats/{name}.png": PICTURE for name in ("tom", 0, 1)}
    found = disk.stat("cats/tom.png")
    assert found is not None
    assert (found.st_mtime_ns, found.st_nlink) == (MODIFIED, 1)
    assert len(caplog.records) == 1


def test_a_copy_that_fails_is_never_published(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk fills up while an unnamed file is copied, the name stays absent, also at a second try."""
    monkeypatch.setattr(syscalls, "name_descriptor", fails(errno.EPERM))
    with disk.stage("cats/tom.png") as staged:
        staged.write(PICTURE)
        staged.seal(MODIFIED, None)
        with monkeypatch.context() as full:
            full.setattr(os, "pwrite", fails(errno.ENOSPC))
            with pytest.raises(OSError):
                staged.publish()
        assert contents_below(disk.path) == {}
        assert staged.publish()
    assert contents_below(disk.path) == {"cats/tom.png": PICTURE}


# -- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", REFUSED)
def test_a_refused_time_is_no_error(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """Setting the time of a file on a disk that refuses it changes nothing; one line says so."""
    put(disk, "tom.png")
    monkeypatch.setattr(os, "utime", fails(code))
    for _ in range(3):
        set_modified(disk, "tom.png", 42)
    found = disk.stat("tom.png")
    assert found is not None
    assert found.st_mtime_ns == MODIFIED
    assert len(caplog.records) == 1


@pytest.mark.parametrize("unit", [100, 10_000_000, 1_000_000_000, 2_000_000_000])
def test_a_coarse_time_is_foretold(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, unit: int) -> None:
    """After one file whose time came back coarser, published or set later, `kept_ns` tells that of each file."""
    real = os.utime

    def coarse(file: Any, *, ns: tuple[int, int], **more: Any) -> None:
        real(file, ns=(ns[0] // unit * unit, ns[1] // unit * unit), **more)

    assert disk.kept_ns(MODIFIED) == MODIFIED
    monkeypatch.setattr(os, "utime", coarse)
    with disk.stage("cats/tom.png") as staged:
        staged.seal(MODIFIED, None)
        assert staged.publish()
        assert staged.measure().st_mtime_ns == disk.kept_ns(MODIFIED)
    for number in range(5):
        modified_ns = MODIFIED + number * 1_123_456_789
        set_modified(disk, "cats/tom.png", modified_ns)
        found = disk.stat("cats/tom.png")
        assert found is not None
        assert found.st_mtime_ns == disk.kept_ns(modified_ns) == modified_ns // unit * unit


@pytest.mark.parametrize("modified_ns", [*ABSURD_TIMES, 10**30, -(10**30)])
def test_any_time_can_be_asked_for(disk: UploadsDirectory, modified_ns: int) -> None:
    """A time out of range is set to the nearest one that the disk can keep, and the bytes are published."""
    with disk.stage("cats/tom.png") as staged:
        staged.write(PICTURE)
        staged.seal(modified_ns, None)
        assert staged.publish()
    set_modified(disk, "cats/tom.png", modified_ns)
    assert read(disk, "cats/tom.png") == PICTURE
    assert isinstance(disk.kept_ns(modified_ns), int)
    found = disk.stat("cats/tom.png")
    assert found is not None
    assert (found.st_mtime_ns > MODIFIED) == (modified_ns > MODIFIED)


# -- real file systems ------------------------------------------------------------------------------------------------


@pytest.fixture(params=list(REAL))
def real_disk(request: pytest.FixtureRequest, uploads: Uploads, tmp_path: Path) -> Iterator[UploadsDirectory]:
    """An uploads directory on a real exFAT, FAT or NTFS."""
    for place in mounted(request.param, tmp_path):
        disk = uploads(place / "uploads", quarantine=place / "quarantine")
        yield disk
        disk.close()


def test_a_real_odd_disk_takes_files(real_disk: UploadsDirectory) -> None:
    """On exFAT, FAT and NTFS files are published, replaced, set aside and removed, and no litter is left."""
    put(real_disk, "cats/tom.png")
    put(real_disk, "cats/tom.png", OTHER)
    publish_together(real_disk, ["1.png", "dogs/2.png"])
    assert contents_below(real_disk.path) == {"cats/tom.png": OTHER, "1.png": PICTURE, "dogs/2.png": PICTURE}
    moved = real_disk.quarantine("1.png")
    assert moved is not None
    assert moved.read_bytes() == PICTURE
    for name in ("cats/tom.png", "dogs/2.png"):
        assert real_disk.remove(name)
    assert names_in(real_disk.path) == []


def test_a_real_odd_disk_keeps_the_time_that_is_foretold(real_disk: UploadsDirectory) -> None:
    """After the first files, `kept_ns` tells the time that such a disk gives back for any recorded one."""
    times = [MODIFIED + number * 1_234_567_891 for number in range(20)]
    for number, modified_ns in enumerate(times):
        put(real_disk, f"{number}.png")
        set_modified(real_disk, f"{number}.png", modified_ns)
    for number, modified_ns in enumerate(times):
        found = real_disk.stat(f"{number}.png")
        assert found is not None
        assert found.st_mtime_ns == real_disk.kept_ns(modified_ns)


def test_a_real_odd_disk_takes_any_time(real_disk: UploadsDirectory) -> None:
    """A time that such a disk cannot have does not prevent publishing."""
    for number, modified_ns in enumerate(ABSURD_TIMES):
        with real_disk.stage(f"{number}.png") as staged:
            staged.write(PICTURE)
            staged.seal(modified_ns, None)
            assert staged.publish()
        set_modified(real_disk, f"{number}.png", modified_ns)
        assert read(real_disk, f"{number}.png") == PICTURE
