"""Reading an uploads directory: a name leads to a regular file or to nothing."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from selfheal.disk import syscalls
from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.listing import walk
from selfheal.disk.open_file import OpenFile, identity_of
from selfheal.errors import NotAFile
from tests.support.disk_files import ABSURD_TIMES, MODIFIED, OTHER, PICTURE, contents_below, put, read, set_modified
from tests.support.open_files import open_now, opened_since
from tests.support.os_errors import fails
from tests.support.sockets import make_socket
from tests.support.special_files import dangling_link, device, full_directory, link_to_a_file, link_to_itself

Uploads = Callable[..., UploadsDirectory]
pytestmark = pytest.mark.usefixtures("kernel")


# -- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tom.png", "cats/old/tom.png", "Кот é [1]@2x 100%.png", "x" * 255])
def test_a_file_is_opened_and_measured(disk: UploadsDirectory, name: str) -> None:
    """An open file has the bytes, size, mtime, path and identity of the file at the name."""
    put(disk, name)
    file = disk.open(name)
    assert file is not None
    with file:
        assert file.read_waiting(0, file.size + 1) == PICTURE
        assert (file.size, file.modified_ns) == (len(PICTURE), MODIFIED)
        assert Path(file.path) == disk.path_of(name)
        assert file.identity == identity_of(os.stat(file.path))
        assert file.threads is disk.threads


def test_a_cached_file_is_opened_without_waiting(uploads: Uploads, disk: UploadsDirectory) -> None:
    """`open_cached` gives the same file as `open`; before the first use of the root it raises `BlockingIOError`."""
    put(disk, "tom.png")
    unused = uploads(disk.path)
    with pytest.raises(BlockingIOError):
        unused.open_cached("tom.png")
    waited = disk.open("tom.png")
    assert waited is not None
    with waited, contextlib.suppress(BlockingIOError):
        cached = disk.open_cached("tom.png")
        assert cached is not None
        with cached:
            assert (cached.identity, cached.path) == (waited.identity, waited.path)


def test_a_file_that_cannot_be_measured(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """If `fstat` fails (ESTALE on a network file system), the error is raised and no descriptor stays open."""
    put(disk, "tom.png")
    disk.root()
    before = open_now()
    monkeypatch.setattr(os, "fstat", fails(errno.ESTALE))
    with pytest.raises(OSError) as caught:
        disk.open("tom.png")
    monkeypatch.undo()
    assert caught.value.errno == errno.ESTALE
    assert opened_since(before) == []


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_name_that_the_cache_knows_to_be_absent_is_none(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """`open_cached` returns None if the kernel's cache knows that the name is absent."""
    put(disk, "tom.png")
    monkeypatch.setattr(syscalls, "open_cached", fails(code))
    assert disk.open_cached("mog.png") is None


@pytest.mark.parametrize("code", [errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENODEV, errno.EXDEV])
def test_a_name_that_the_cache_knows_to_be_no_file_raises(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """`open_cached` raises `NotAFile` with the name for links, devices and directories."""
    put(disk, "tom.png")
    monkeypatch.setattr(syscalls, "open_cached", fails(code))
    with pytest.raises(NotAFile, match=r"^cats/mog\.png$"):
        disk.open_cached("cats/mog.png")


@pytest.mark.parametrize(
    "name", ["missing.png", "missing/tom.png", "tom.png/tom.png", "x" * 256, "x" * 256 + "/tom.png", "cats/missing"]
)
def test_an_absent_name_is_none(disk: UploadsDirectory, name: str) -> None:
    """A missing file or directory, a file in place of a directory, and a part that is too long all mean absent."""
    put(disk, "tom.png")
    put(disk, "cats/tom.png")
    assert read(disk, name) is None
    assert disk.open(name) is None
    assert disk.stat(name) is None
    assert disk.remove(name) is False
    assert disk.quarantine(name) is None


def test_opening_leaves_no_garbage(disk: UploadsDirectory, kernel: str) -> None:
    """An open that waits or finds nothing leaves no work for the garbage collector: it is too frequent."""
    put(disk, "tom.png")
    read(disk, "missing.png")
    gc.collect()
    gc.disable()
    try:
        for number in range(50):
            assert read(disk, f"missing{number}.png") is None
        assert gc.collect() < 50
    finally:
        gc.enable()


def test_an_open_file_can_be_read_after_its_name_is_gone(disk: UploadsDirectory) -> None:
    """A file that is removed, replaced or quarantined after it was opened can still be read to its end."""
    for change in (disk.remove, disk.quarantine, lambda name: put(disk, name, OTHER)):
        put(disk, "tom.png")
        file = disk.open("tom.png")
        assert file is not None
        with file:
            change("tom.png")
            assert file.read_waiting(0, file.size + 1) == PICTURE


def test_an_identity_changes_with_the_file(disk: UploadsDirectory) -> None:
    """The identity changes when a file is stored again, with the same bytes or with others of equal size and time."""
    identities = set()
    held: list[OpenFile] = []
    for data in (PICTURE, PICTURE, PICTURE[::-1]):
        put(disk, "tom.png", data)
        file = disk.open("tom.png")
        assert file is not None
        held.append(file)
        identities.add(file.identity)
    for file in held:
        file.close()
    assert len(identities) == 3


@pytest.mark.parametrize("modified_ns", [*ABSURD_TIMES, -(2**40) * 10**9, 2**40 * 10**9])
def test_an_impossible_time_on_disk_is_accepted(disk: UploadsDirectory, modified_ns: int) -> None:
    """A file whose mtime is impossible is opened, measured and walked like any other (CVE-2017-20005)."""
    put(disk, "tom.png")
    set_modified(disk, "tom.png", modified_ns)
    with contextlib.suppress(OverflowError):
        os.utime(disk.path_of("tom.png"), ns=(modified_ns, modified_ns))
    assert read(disk, "tom.png") == PICTURE
    measured = disk.stat("tom.png")
    assert measured is not None
    assert [entry.identity[0] for entry in walk(disk)] == [measured.st_mtime_ns]


# -- special files ----------------------------------------------------------------------------------------------------

SPECIAL = [Path.mkdir, os.mkfifo, make_socket, device, link_to_a_file, dangling_link, link_to_itself]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["special.png", "cats/special.png"])
@pytest.mark.parametrize("make", SPECIAL)
def test_a_special_file_is_not_opened(disk: UploadsDirectory, name: str, make: Callable[[Path], None]) -> None:
    """A directory, FIFO, socket, device or link raises `NotAFile` and never blocks; `stat` returns None."""
    path = disk.path_of(name)
    path.parent.mkdir(parents=True)
    make(path)
    for opening in (disk.open, functools.partial(read, disk)):
        with pytest.raises(NotAFile) as caught:
            opening(name)
        assert str(caught.value) == name
    assert disk.stat(name) is None


@pytest.mark.parametrize("make", [full_directory, os.mkfifo, make_socket, link_to_a_file, dangling_link])
def test_a_special_file_is_not_replaced(disk: UploadsDirectory, make: Callable[[Path], None]) -> None:
    """Publishing over a directory, FIFO, socket or link changes nothing, and never writes to the target of a link."""
    path = disk.path_of("special.png")
    path.parent.mkdir(parents=True)
    make(path)
    before, expected = path.lstat(), contents_below(disk.path)
    with disk.stage("special.png") as staged:
        staged.write(OTHER)
        assert not staged.publish()
    assert os.path.samestat(path.lstat(), before)
    assert contents_below(disk.path) == expected


# -- times and removal ------------------------------------------------------------------------------------------------


def test_a_time_can_be_set(disk: UploadsDirectory) -> None:
    """The mtime is set to the nanosecond; for a missing file nothing is done."""
    put(disk, "cats/tom.png")
    set_modified(disk, "cats/tom.png", 42)
    measured = disk.stat("cats/tom.png")
    assert measured is not None
    assert measured.st_mtime_ns == 42
    for missing in ("cats/mog.png", "dogs/rex.png"):
        set_modified(disk, missing, 42)
    assert contents_below(disk.path) == {"cats/tom.png": PICTURE}


def test_a_file_can_be_removed(disk: UploadsDirectory) -> None:
    """`remove` returns True for a file and False once it is gone."""
    put(disk, "cats/tom.png")
    assert [disk.remove("cats/tom.png"), disk.remove("cats/tom.png")] == [True, False]
    assert read(disk, "cats/tom.png") is None


def test_removing_leaves_directories_alone(disk: UploadsDirectory) -> None:
    """`remove` and `quarantine` take a directory for no file, and leave it and what is in it."""
    put(disk, "cats/tom.png")
    assert disk.remove("cats") is False
    assert disk.quarantine("cats") is None
    assert not disk.quarantine_path.exists()
    assert contents_below(disk.path) == {"cats/tom.png": PICTURE}
