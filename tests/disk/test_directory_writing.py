"""Writing into an uploads directory: modes of directories, writers at the same time, staged files, sync and sweep."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from selfheal.disk import directory as directory_module
from selfheal.disk import syscalls
from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.listing import walk
from selfheal.disk.root import OpenFolders
from selfheal.disk.temporary import TEMPORARY
from selfheal.errors import DiskUnwritable
from tests.support.disk_files import PICTURE, contents_below, mode_of, put, read, write_file
from tests.support.open_files import open_now, opened_since
from tests.support.os_errors import fails, no_unnamed_files

Uploads = Callable[..., UploadsDirectory]
pytestmark = pytest.mark.usefixtures("kernel")


# -- directories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o2775])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777], indirect=True)
def test_directories_have_the_mode_given(uploads: Uploads, tmp_path: Path, umask: int, mode: int) -> None:
    """Every new directory, the root too, has the mode given, whatever the umask (CVE-2020-24583)."""
    disk = uploads(tmp_path / "uploads", directory_mode=mode, file_mode=0o640)
    put(disk, "a/b/c/tom.png")
    made = [disk.path, *(disk.path / part for part in ("a", "a/b", "a/b/c"))]
    assert [oct(mode_of(path)) for path in made] == [oct(mode)] * 4
    assert mode_of(disk.path_of("a/b/c/tom.png")) == 0o640


@pytest.mark.parametrize("umask", [0o000, 0o077], indirect=True)
def test_uploads_can_be_read_by_a_web_server(disk: UploadsDirectory, umask: int) -> None:
    """By default everybody can read files and directories, and only the owner can write."""
    put(disk, "cats/tom.png")
    modes = [mode_of(path) for path in (disk.path, disk.path / "cats", disk.path / "cats" / "tom.png")]
    assert [oct(mode) for mode in modes] == [oct(0o755), oct(0o755), oct(0o644)]


@pytest.mark.parametrize("umask", [0o000], indirect=True)
def test_directories_are_never_more_open_than_asked(
    uploads: Uploads, tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private directory is private as soon as it exists, not only after `chmod`."""
    disk = uploads(tmp_path / "uploads", directory_mode=0o700)
    real = os.mkdir
    modes = []

    def observed(path: str, *arguments: int, dir_fd: int | None = None) -> None:
        real(path, *arguments, dir_fd=dir_fd)
        if path != TEMPORARY:
            modes.append(stat.S_IMODE(os.stat(path, dir_fd=dir_fd).st_mode))

    monkeypatch.setattr(os, "mkdir", observed)
    put(disk, "a/b/tom.png")
    assert [oct(mode) for mode in modes] == [oct(0o700)] * 3


def test_existing_directories_keep_their_mode(disk: UploadsDirectory) -> None:
    """The mode of an existing directory is not changed."""
    (disk.path / "cats").mkdir(parents=True)
    (disk.path / "cats").chmod(0o711)
    disk.path.chmod(0o751)
    put(disk, "cats/old/tom.png")
    assert [mode_of(disk.path), mode_of(disk.path / "cats"), mode_of(disk.path / "cats/old")] == [0o751, 0o711, 0o755]


def test_threads_make_the_same_directories_at_once(disk: UploadsDirectory) -> None:
    """Eight threads that store files in the same new directories lose no file and set every mode."""
    errors: list[object] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            barrier.wait()
            for batch in range(10):
                put(disk, f"{batch}/b/c/{number}.png")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(contents_below(disk.path)) == sorted(
        f"{batch}/b/c/{number}.png" for batch in range(10) for number in range(8)
    )
    assert {mode_of(path) for path in disk.path.rglob("*") if path.is_dir()} == {0o755}


def test_the_deepest_name(disk: UploadsDirectory) -> None:
    """A name of 512 bytes in 256 parts is stored, opened, walked and removed like any other."""
    name = "/".join(["a"] * 255 + ["bc"])
    put(disk, name)
    assert read(disk, name) == PICTURE
    assert [entry.name for entry in walk(disk)] == [name]
    assert disk.remove(name)


def test_a_directory_removed_while_it_is_staged_in(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the directory is removed while a file is staged, that file may be refused, but not the next one."""
    real = directory_module.StagedFile

    def stage_after_removal(root: int, parent: int, name: str) -> object:
        shutil.rmtree(disk.path)
        return real(root, parent, name)

    disk.path.mkdir(parents=True)
    with monkeypatch.context() as patch, contextlib.suppress(DiskUnwritable):
        patch.setattr(directory_module, "StagedFile", stage_after_removal)
        put(disk, "cats/tom.png")
    put(disk, "cats/tom.png")
    assert read(disk, "cats/tom.png") == PICTURE


# -- staged files -----------------------------------------------------------------------------------------------------


def test_many_are_staged_among_directories_that_stay_open(disk: UploadsDirectory) -> None:
    """`stage_among` opens each directory once for all its files, and each file is published in its directory."""
    names = [f"{folder}{number}.png" for folder in ("", "cats/", "cats/old/") for number in range(3)]
    disk.stage("tom.png").close()
    before = open_now()
    with OpenFolders() as opened:
        for name in names:
            with disk.stage_among(opened, name) as staged:
                staged.write(name.encode())
                assert staged.publish()
        assert sorted(opened.folders) == ["", "cats", "cats/old"]
        assert len(opened_since(before)) == 3
    assert contents_below(disk.path) == {name: name.encode() for name in names}


def test_threads_that_open_a_directory_at_once_share_one_descriptor(tmp_path: Path) -> None:
    """Threads that open a directory at once use the first descriptor; all descriptors are closed at the end."""
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    with OpenFolders() as opened:
        assert [opened.keep("cats", fd) for fd in (first, second, first)] == [first, first, first]
        assert all(stat.S_ISDIR(os.fstat(fd).st_mode) for fd in (first, second))
    for fd in (first, second):
        with pytest.raises(OSError):
            os.fstat(fd)


@pytest.mark.parametrize("way", ["unnamed", "named"])
def test_a_staged_file_is_read_while_it_grows(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A reader of a staged file sees what was written so far, and can go on after the writer has closed."""
    if way == "named":
        monkeypatch.setattr(syscalls, "open_unnamed", no_unnamed_files)
    with disk.stage("cats/tom.png") as staged:
        reader = disk.reader(staged, "cats/tom.png")
        staged.write(PICTURE[:100])
        assert reader.read_waiting(0, 1000) == PICTURE[:100]
        staged.write(PICTURE[100:])
    with reader:
        assert Path(reader.path) == disk.path_of("cats/tom.png")
        assert reader.read_waiting(0, len(PICTURE) + 1) == PICTURE
        assert reader.identity[2] == os.fstat(reader.fd).st_ino
        assert reader.threads is disk.threads
    assert contents_below(disk.path) == {}


def test_readers_never_see_a_torn_file(disk: UploadsDirectory) -> None:
    """While a name is removed and published 200 times, every reader gets one whole version, or none."""
    versions = [bytes([number]) * (30_000 + 41 * number) for number in range(200)]
    put(disk, "cats/tom.png", versions[0])
    seen: set[bytes] = set()
    errors: list[object] = []
    is_over = threading.Event()

    def keep_reading() -> None:
        while not is_over.is_set():
            try:
                data = read(disk, "cats/tom.png")
            except BaseException as error:
                errors.append(error)
            else:
                seen.update(() if data is None else (data,))

    reader = threading.Thread(target=keep_reading)
    reader.start()
    for version in versions:
        put(disk, "cats/tom.png", version)
    is_over.set()
    reader.join()
    assert errors == []
    assert seen <= set(versions)
    assert len(seen) > 1, "the reader saw only one version"


# -- sync and sweep ---------------------------------------------------------------------------------------------------


def test_everything_is_synced_at_once(disk: UploadsDirectory) -> None:
    """`sync` succeeds for files that are staged, and for none."""
    with disk.stage("tom.png") as first, disk.stage("cats/tom.png") as second:
        disk.sync([first, second])
        disk.sync([])
        assert first.publish()
    assert read(disk, "tom.png") == b""


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_sync_is_raised(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A failure of `sync` is raised: a bulk run must not record lost files as safe."""
    monkeypatch.setattr(syscalls, "sync_filesystem", fails(code))
    with disk.stage("tom.png") as staged, pytest.raises(OSError) as caught:
        disk.sync([staged])
    assert caught.value.errno == code


def test_temporary_files_are_swept(disk: UploadsDirectory) -> None:
    """`sweep` removes and counts the temporary files of killed processes, and no upload."""
    put(disk, "tom.png")
    write_file(disk.path / TEMPORARY / "killed")
    assert [disk.sweep(), disk.sweep()] == [1, 0]
    assert contents_below(disk.path) == {"tom.png": PICTURE}
