"""Owners and modes of what is made: like the directory that it goes to, whoever runs selfheal."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from selfheal.disk import syscalls
from selfheal.disk.directory import UploadsDirectory
from selfheal.errors import DiskUnwritable
from tests.support.disk_files import OTHER, PICTURE, contents_below, mode_of, put, read, write_file
from tests.support.os_errors import fails, no_unnamed_files
from tests.support.requirements import needs

Uploads = Callable[..., UploadsDirectory]
OWNER, GROUP = 12345, 23456


@pytest.fixture(params=["unnamed", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With O_TMPFILE and without it."""
    if request.param == "named":
        monkeypatch.setattr(syscalls, "open_unnamed", no_unnamed_files)


def directory_of(path: Path, mode: int) -> Path:
    """Make a directory of another user and group; skip the test where that is not allowed."""
    path.mkdir(parents=True)
    try:
        os.chown(path, OWNER, GROUP)
    except PermissionError:
        needs("the right to change owners", "the tests as root")
    path.chmod(mode)
    return path


def owner_of(path: Path) -> tuple[int, int]:
    """Return the user and the group that own a path."""
    found = path.lstat()
    return found.st_uid, found.st_gid


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("umask", [0o000, 0o077], indirect=True)
@pytest.mark.parametrize(
    ("given", "directory", "file"), [(0o755, 0o755, 0o644), (0o2775, 0o2775, 0o664), (0o700, 0o755, 0o644)]
)
def test_what_root_makes_is_like_its_directory(
    uploads: Uploads, tmp_path: Path, umask: int, given: int, directory: int, file: int
) -> None:
    """Files and directories of a command that root runs belong to the owner of the uploads, who can write there."""
    disk = uploads(directory_of(tmp_path / "uploads", given))
    put(disk, "cats/old/tom.png")
    put(disk, "cats/old/tom.png", OTHER)
    made = [disk.path / "cats", disk.path / "cats/old", disk.path / "cats/old/tom.png"]
    assert [owner_of(path) for path in made] == [(OWNER, GROUP)] * 3
    assert [oct(mode_of(path)) for path in made] == [oct(directory), oct(directory), oct(file)]


def test_directories_above_the_root_are_like_theirs(uploads: Uploads, tmp_path: Path) -> None:
    """The root itself, and the directories above it that are missing, belong to the owner of the one that is there."""
    directory_of(tmp_path / "app", 0o2775)
    disk = uploads(tmp_path / "app" / "static" / "uploads")
    put(disk, "tom.png")
    made = [tmp_path / "app/static", disk.path, disk.path / "tom.png"]
    assert [owner_of(path) for path in made] == [(OWNER, GROUP)] * 3
    assert [oct(mode_of(path)) for path in made] == [oct(0o2775), oct(0o2775), oct(0o664)]


def test_modes_that_are_given_win(uploads: Uploads, tmp_path: Path) -> None:
    """Modes that the app gives are used as they are; the owner is still that of the directory."""
    disk = uploads(directory_of(tmp_path / "uploads", 0o2775), file_mode=0o600, directory_mode=0o700)
    put(disk, "cats/tom.png")
    made = [disk.path / "cats", disk.path / "cats/tom.png"]
    assert [oct(mode_of(path)) for path in made] == [oct(0o700), oct(0o600)]
    assert [owner_of(path) for path in made] == [(OWNER, GROUP)] * 2


def test_the_group_may_write_only_if_it_is_the_directorys(uploads: Uploads, ordinary_directory: Path) -> None:
    """A file whose group is not that of its directory is not writable for that other group."""
    path = ordinary_directory / "uploads"
    path.mkdir()
    path.chmod(0o775)
    if path.stat().st_gid == os.getegid():
        is_root = os.getuid() == 0
        if not is_root:
            needs("a second group", "the tests as root")
        user = os.geteuid()
        os.seteuid(0)
        os.chown(path, -1, GROUP)
        os.seteuid(user)
    disk = uploads(path)
    put(disk, "tom.png")
    assert oct(mode_of(path / "tom.png")) == oct(0o644)


def test_what_cannot_be_chowned_is_published(uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk or a container that refuses `chown` takes the file all the same."""
    disk = uploads(directory_of(tmp_path / "uploads", 0o2775))
    monkeypatch.setattr(os, "fchown", fails(1))
    put(disk, "cats/tom.png")
    assert read(disk, "cats/tom.png") == PICTURE
    assert oct(mode_of(disk.path / "cats" / "tom.png")) in (oct(0o644), oct(0o664))


def test_a_link_in_place_of_a_new_directory_is_not_followed(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that another user puts in the place of a directory just made changes no owner or mode elsewhere."""
    disk = uploads(directory_of(tmp_path / "uploads", 0o777))
    (tmp_path / "private").mkdir(mode=0o700)
    real = os.mkdir

    def make_and_swap(path: str, mode: int, *, dir_fd: int | None = None) -> None:
        real(path, mode, dir_fd=dir_fd)
        if path == "cats":
            os.rmdir(path, dir_fd=dir_fd)
            os.symlink(tmp_path / "private", path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", make_and_swap)
    with pytest.raises(DiskUnwritable):
        put(disk, "cats/tom.png")
    assert (owner_of(tmp_path / "private")[0], mode_of(tmp_path / "private")) == (os.getuid(), 0o700)


# -- a folder that may not be written ---------------------------------------------------------------------------------


def test_one_unwritable_folder_stops_no_other(uploads: Uploads, ordinary_directory: Path) -> None:
    """After EACCES in one folder, files go to the others, also to the root; that folder is named in the error."""
    disk = uploads(ordinary_directory / "uploads")
    put(disk, "cats/tom.png")
    (disk.path / "cats").chmod(0o555)
    try:
        for _ in range(2):
            with pytest.raises(DiskUnwritable, match=str(disk.path / "cats")):
                put(disk, "cats/mog.png")
            put(disk, "dogs/rex.png")
            put(disk, "root.png")
    finally:
        (disk.path / "cats").chmod(0o755)
    with pytest.raises(DiskUnwritable):  # not tried again for 30 s
        put(disk, "cats/mog.png")
    assert sorted(contents_below(disk.path)) == ["cats/tom.png", "dogs/rex.png", "root.png"]


@pytest.mark.usefixtures("way")
def test_an_unwritable_root_stops_no_folder(uploads: Uploads, ordinary_directory: Path) -> None:
    """If only the root may not be written, files below a folder of ours are published and replaced."""
    disk = uploads(ordinary_directory / "uploads")
    put(disk, "cats/tom.png")
    disk.path.chmod(0o555)
    try:
        with pytest.raises(DiskUnwritable):
            put(disk, "tom.png")
        put(disk, "cats/tom.png", OTHER)
        put(disk, "cats/mog.png", OTHER)
    finally:
        disk.path.chmod(0o755)
    assert contents_below(disk.path) == {"cats/tom.png": OTHER, "cats/mog.png": OTHER}
    assert list(disk.path.rglob(".selfheal-tmp*")) == []


def test_refusals_take_bounded_memory(disk: UploadsDirectory) -> None:
    """Of many folders that refuse a file, only the last ones are remembered."""
    for number in range(3000):
        disk.refusals.meaning(PermissionError(13, "Permission denied"), f"{number}/tom.png")
    disk.refusals.check("0")
    with pytest.raises(DiskUnwritable):
        disk.refusals.check("2999")
    assert len(disk.refusals._last) <= 1024


def test_a_read_only_mount_below_the_root_stops_only_itself(
    uploads: Uploads, mount: Callable[[str], object], tmp_path: Path
) -> None:
    """EROFS of a file system that is mounted below the root does not stop writes elsewhere."""
    disk = uploads(tmp_path / "volume")
    mount("size=1m,ro")
    with pytest.raises(DiskUnwritable):
        put(disk, "uploads/tom.png")
    put(disk, "tom.png")
    assert read(disk, "tom.png") == PICTURE


def test_owners_of_written_files_stay(uploads: Uploads, tmp_path: Path) -> None:
    """Existing files and directories keep their owner and mode."""
    disk = uploads(tmp_path / "uploads")
    write_file(disk.path / "cats" / "tom.png").chmod(0o600)
    put(disk, "cats/mog.png")
    assert stat.S_IMODE((disk.path / "cats" / "tom.png").stat().st_mode) == 0o600
