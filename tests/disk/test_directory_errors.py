"""Disks that fail: unreadable is not absent, and an unwritable disk says why and is not tried again for 30 s."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from selfheal.disk import syscalls
from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.listing import walk
from selfheal.errors import DiskUnwritable
from tests.support.disk_files import OTHER, PICTURE, contents_below, mode_of, put, read, set_modified
from tests.support.mounts import Mount
from tests.support.open_files import few_descriptors, open_now, opened_since
from tests.support.os_errors import no_unnamed_files

Uploads = Callable[..., UploadsDirectory]
pytestmark = pytest.mark.usefixtures("kernel")


# -- unreadable files -------------------------------------------------------------------------------------------------


def test_an_unreadable_file_is_not_absent(uploads: Uploads, ordinary_directory: Path) -> None:
    """EACCES for a file is raised: a restore must not replace a file that only cannot be read."""
    disk = uploads(ordinary_directory / "uploads")
    put(disk, "tom.png")
    disk.path_of("tom.png").chmod(0)
    with pytest.raises(PermissionError):
        disk.open("tom.png")
    with pytest.raises(PermissionError):
        read(disk, "tom.png")


def test_a_file_in_an_unreadable_directory_is_not_absent(uploads: Uploads, ordinary_directory: Path) -> None:
    """EACCES for any directory above a file is raised, up to the parent of the root."""
    disk = uploads(ordinary_directory / "uploads")
    put(disk, "cats/old/tom.png")
    for locked in (disk.path / "cats" / "old", disk.path / "cats", disk.path, ordinary_directory):
        mode = mode_of(locked)
        locked.chmod(0)
        try:
            for call in (disk.open, disk.stat, disk.remove, disk.quarantine):
                with pytest.raises(PermissionError):
                    call("cats/old/tom.png")
        finally:
            locked.chmod(mode)
    assert read(disk, "cats/old/tom.png") == PICTURE


@pytest.mark.parametrize("left", range(9))
def test_too_many_open_files(disk: UploadsDirectory, left: int) -> None:
    """If descriptors run out, EMFILE is raised: the file is not absent, the disk is not unwritable, nothing leaks."""
    put(disk, "cats/tom.png")
    before = open_now()
    outcomes: list[object] = []
    with few_descriptors(left):
        for work in (
            lambda: read(disk, "cats/tom.png"),
            lambda: put(disk, "cats/old/mog.png"),
            lambda: list(walk(disk)),
            lambda: disk.quarantine("cats/tom.png"),
        ):
            try:
                outcomes.append(work())
            except OSError as error:
                outcomes.append(error.errno)
    assert opened_since(before) == []
    assert None not in outcomes[:1]
    assert errno.EMFILE in outcomes or left > 2
    put(disk, "dogs/rex.png")
    assert read(disk, "dogs/rex.png") == PICTURE


# -- unwritable disks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.ENOENT,
    ],
)
def test_an_unwritable_disk_says_why(disk: UploadsDirectory, code: int) -> None:
    """Any errno of writing becomes `DiskUnwritable` with the directory and the reason in its message."""
    with pytest.raises(DiskUnwritable) as caught, disk.refusals.raised():
        raise OSError(code, os.strerror(code))
    assert str(disk.path) in str(caught.value)
    assert os.strerror(code) in str(caught.value)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_lack_of_resources_is_not_an_unwritable_disk(disk: UploadsDirectory, code: int) -> None:
    """Too many open files or too little memory stays an `OSError` (503), and the next write is tried at once."""
    with pytest.raises(OSError) as caught, disk.refusals.raised():
        raise OSError(code, os.strerror(code))
    assert caught.value.errno == code
    put(disk, "tom.png")


def test_other_errors_pass(disk: UploadsDirectory) -> None:
    """An error that does not come from the disk is not changed."""
    with pytest.raises(ZeroDivisionError), disk.refusals.raised():
        raise ZeroDivisionError


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_an_unwritable_disk_is_not_tried_again_for_30_seconds(
    disk: UploadsDirectory, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """After EROFS, EACCES or EPERM no write is tried for 30 s, then one is."""
    with pytest.raises(DiskUnwritable) as first, disk.refusals.raised():
        raise OSError(code, os.strerror(code))
    clock.now += 29.9
    with pytest.raises(DiskUnwritable) as second:
        disk.stage("cats/tom.png")
    assert str(second.value) == str(first.value)
    assert not disk.path.exists()
    clock.now = 1030.0
    put(disk, "cats/tom.png")
    assert read(disk, "cats/tom.png") == PICTURE


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOTDIR])
def test_a_full_disk_is_tried_again_at_once(disk: UploadsDirectory, clock: SimpleNamespace, code: int) -> None:
    """After ENOSPC and the like the next write is tried at once: a smaller file may fit."""
    with pytest.raises(DiskUnwritable), disk.refusals.raised():
        raise OSError(code, os.strerror(code))
    put(disk, "tom.png")
    assert read(disk, "tom.png") == PICTURE


def test_a_file_in_place_of_a_directory_blocks_only_names_below_it(disk: UploadsDirectory) -> None:
    """A file in place of a directory is kept and blocks only the names below it."""
    put(disk, "cats")
    with pytest.raises(DiskUnwritable):
        disk.stage("cats/tom.png")
    with pytest.raises(DiskUnwritable):
        disk.stage("cats/old/tom.png")
    put(disk, "dogs/rex.png")
    assert contents_below(disk.path) == {"cats": PICTURE, "dogs/rex.png": PICTURE}


def test_a_directory_that_may_not_be_written(
    uploads: Uploads, ordinary_directory: Path, clock: SimpleNamespace
) -> None:
    """With a real EACCES existing files are kept, nothing is written, and after 30 s a write is tried again."""
    disk = uploads(ordinary_directory / "uploads")
    put(disk, "tom.png")
    disk.path.chmod(0o555)
    try:
        for name in ("mog.png", "cats/mog.png", "tom.png"):
            with pytest.raises(DiskUnwritable):
                put(disk, name, OTHER)
            clock.now += 31
    finally:
        disk.path.chmod(0o755)
    assert contents_below(disk.path) == {"tom.png": PICTURE}
    put(disk, "mog.png")
    assert read(disk, "mog.png") == PICTURE


# -- real file systems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["unnamed", "named"])
def test_a_full_disk(
    uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """With a real ENOSPC existing files are kept, and all space of the failed write is given back."""
    if way == "named":
        monkeypatch.setattr(syscalls, "open_unnamed", no_unnamed_files)
    disk = uploads(mount("size=256k").path)
    put(disk, "tom.png")
    free = os.statvfs(disk.path).f_bfree
    for name in ("tom.png", "mog.png"):
        with pytest.raises(DiskUnwritable, match=os.strerror(errno.ENOSPC)):
            put(disk, name, OTHER * 100)
    assert contents_below(disk.path) == {"tom.png": PICTURE}
    assert os.statvfs(disk.path).f_bfree == free
    put(disk, "cats/mog.png", OTHER)
    assert contents_below(disk.path) == {"tom.png": PICTURE, "cats/mog.png": OTHER}


def test_a_read_only_disk(uploads: Uploads, mount: Callable[[str], Mount], clock: SimpleNamespace) -> None:
    """With a real EROFS existing files are read, and 30 s after the last failure a write is tried again."""
    volume = mount("size=1m")
    disk = uploads(volume.path)
    put(disk, "tom.png")
    volume.remount("ro")
    for name in ("mog.png", "cats/mog.png", "tom.png"):
        with pytest.raises(DiskUnwritable, match=os.strerror(errno.EROFS)):
            put(disk, name, OTHER)
        clock.now += 31
    assert read(disk, "tom.png") == PICTURE
    for change in (lambda: disk.remove("tom.png"), lambda: set_modified(disk, "tom.png", 0)):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    volume.remount("rw")
    put(disk, "cats/mog.png", OTHER)
    assert contents_below(disk.path) == {"tom.png": PICTURE, "cats/mog.png": OTHER}
