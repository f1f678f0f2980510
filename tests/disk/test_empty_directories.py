"""Directories without files: they go with their last file, give way to a file, and come back for a restore."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from selfheal.disk import syscalls
from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.root import OpenFolders
from tests.support.disk_files import (
    MODIFIED,
    OTHER,
    PICTURE,
    contents_below,
    names_in,
    put,
    read,
    set_modified,
    write_file,
)
from tests.support.mounts import Mount
from tests.support.os_errors import no_unnamed_files

Uploads = Callable[..., UploadsDirectory]


def directories_below(path: Path) -> list[str]:
    """Return the directories below a path, hidden ones too."""
    return sorted(str(found.relative_to(path)) for found in path.rglob("*") if found.is_dir())


# -- with the last file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("take_away", ["remove", "quarantine"])
def test_empty_directories_go_with_the_last_file(disk: UploadsDirectory, take_away: str) -> None:
    """The directories that a file leaves empty go with it, up to one that holds something else, never the root."""
    for name in ("a/b/c/tom.png", "a/mog.png"):
        put(disk, name)
    getattr(disk, take_away)("a/b/c/tom.png")
    assert directories_below(disk.path) == ["a"]
    getattr(disk, take_away)("a/mog.png")
    assert names_in(disk.path) == []
    getattr(disk, take_away)("a/mog.png")
    assert disk.path.is_dir()


def test_directories_that_hold_anything_stay(disk: UploadsDirectory) -> None:
    """A directory with a hidden file, another directory, or one that was empty before stays."""
    put(disk, "cats/tom.png")
    write_file(disk.path / "cats" / ".gitkeep", b"")
    (disk.path / "dogs").mkdir()
    assert disk.remove("cats/tom.png")
    assert directories_below(disk.path) == ["cats", "dogs"]


def test_a_mount_point_stays(uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path) -> None:
    """The top of a file system that is mounted below the root is not removed."""
    mount("size=1m")
    disk = uploads(tmp_path / "volume")
    put(disk, "uploads/tom.png")
    assert disk.remove("uploads/tom.png")
    assert (disk.path / "uploads").is_mount()


# -- a restore into a directory that is removed -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["unnamed", "named"])
@pytest.mark.parametrize("before", [None, OTHER], ids=["free", "taken"])
def test_the_directory_of_a_staged_file_is_made_again(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, way: str, before: bytes | None
) -> None:
    """If its directory is removed after a file was staged, the file is published in a new one."""
    if way == "named":
        monkeypatch.setattr(syscalls, "open_unnamed", no_unnamed_files)
    put(disk, "a/b/other.png", before or OTHER)
    with disk.stage("a/b/tom.png") as staged:
        staged.write(PICTURE)
        staged.seal(MODIFIED, None)
        assert disk.remove("a/b/other.png")
        assert not (disk.path / "a").exists()
        assert staged.publish()
    assert contents_below(disk.path) == {"a/b/tom.png": PICTURE}


@pytest.mark.parametrize("way", ["unnamed", "named"])
def test_a_directory_that_is_kept_open_and_removed(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A bulk run that keeps a directory open stages files in it after it was removed."""
    if way == "named":
        monkeypatch.setattr(syscalls, "open_unnamed", no_unnamed_files)
    with OpenFolders() as opened:
        for number in range(3):
            with disk.stage_among(opened, f"a/{number}.png") as staged:
                staged.write(PICTURE)
                assert staged.publish()
            assert disk.remove(f"a/{number}.png")
            assert not (disk.path / "a").exists()


@pytest.mark.parametrize("way", ["unnamed", "named"])
def test_threads_that_publish_and_remove_in_one_directory(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Threads that store, read and remove files in the same directory for a while meet no error, and lose no file."""
    if way == "named":
        monkeypatch.setattr(syscalls, "open_unnamed", no_unnamed_files)
    errors: list[object] = []

    def work(number: int) -> None:
        name = f"a/b/{number}.png"
        try:
            for _ in range(150):
                put(disk, name)
                assert read(disk, name) == PICTURE
                set_modified(disk, name, 42)
                assert disk.remove(name)
                assert disk.stat(name) is None
            put(disk, name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert contents_below(disk.path) == {f"a/b/{number}.png": PICTURE for number in range(4)}


def test_threads_that_share_five_names(disk: UploadsDirectory) -> None:
    """Threads that store, time, set aside and remove the same five names meet no error: what vanished is absent."""
    errors: list[object] = []
    names = [f"a/{number}.png" for number in range(5)]

    def work(seed: int) -> None:
        for turn in range(200):
            name = names[(seed + turn) % 5]
            try:
                put(disk, name)
                set_modified(disk, name, turn)
                assert read(disk, name) in (PICTURE, None)
                disk.stat(name)
                disk.digest(name)
                if turn % 7 == seed:
                    disk.quarantine(name)
                disk.remove(name)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# -- a directory in the place of a file -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["unnamed", "named"])
def test_empty_directories_give_way(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A file is published in the place of directories that hold no file."""
    if way == "named":
        monkeypatch.setattr(syscalls, "open_unnamed", no_unnamed_files)
    (disk.path / "album" / "a" / "b").mkdir(parents=True)
    (disk.path / "album" / "c").mkdir()
    assert disk.conflict("album") == ""
    with disk.stage("album") as staged:
        staged.write(PICTURE)
        assert staged.publish()
    assert contents_below(disk.path) == {"album": PICTURE}


def test_a_directory_with_files_does_not_give_way(disk: UploadsDirectory) -> None:
    """A directory with a file anywhere below it stays as it is, with its empty directories."""
    write_file(disk.path / "album" / "a" / "1.png")
    (disk.path / "album" / "empty").mkdir()
    with disk.stage("album") as staged:
        staged.write(OTHER)
        assert not staged.publish()
    assert directories_below(disk.path) == ["album", "album/a", "album/empty"]
    assert contents_below(disk.path) == {"album/a/1.png": PICTURE}


@pytest.mark.usefixtures("kernel")
def test_conflicts_are_known_before(disk: UploadsDirectory, outside: Path) -> None:
    """`conflict` says why a name cannot be a file: it is a directory with files, or a file is above it."""
    assert disk.conflict("album") == ""
    put(disk, "album/1.png")
    assert disk.conflict("album") == "it is a directory, and there are files in it"
    assert disk.conflict("album/1.png/thumb.png") == "a part of its path is a file"
    assert disk.conflict("album/1.png/a/thumb.png") == "a part of its path is a file"
    (disk.path / "link").symlink_to(outside)
    assert disk.conflict("link/tom.png") == "a part of its path is a file"
    for name in ("album/1.png", "album/2.png", "dogs/rex.png"):
        assert disk.conflict(name) == ""
    assert disk.remove("album/1.png")
    assert disk.conflict("album") == ""


# -- the quarantine ---------------------------------------------------------------------------------------------------


def test_an_empty_quarantine_does_not_stay(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a file vanishes before it is moved, nothing is left of the directories for it."""
    put(disk, "cats/tom.png")
    real = os.rename

    def rename_after_removal(*arguments: object, **more: object) -> None:
        disk.path_of("cats/tom.png").unlink(missing_ok=True)
        real(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", rename_after_removal)
    assert disk.quarantine("cats/tom.png") is None
    assert not disk.quarantine_path.exists()
    assert contents_below(disk.path.parent) == {}


def test_a_quarantine_that_was_emptied_is_removed(disk: UploadsDirectory, tmp_path: Path) -> None:
    """Directories of files that were taken out of the quarantine go, and the quarantine with the last one."""
    for name in ("cats/tom.png", "cats/mog.png"):
        put(disk, name)
    first, second = disk.quarantine("cats/tom.png"), disk.quarantine("cats/mog.png")
    assert first is not None
    assert second is not None
    disk.remove_quarantined(first)
    assert contents_below(disk.quarantine_path) == {str(second.relative_to(disk.quarantine_path)): PICTURE}
    disk.remove_quarantined(second)
    assert not disk.quarantine_path.exists()
    assert disk.quarantine_path.parent.is_dir()


def test_a_quarantine_of_the_users_own_stays(uploads: Uploads, directory: Path, tmp_path: Path) -> None:
    """The directory that the app gives as quarantine is not removed: its owner and mode are the app's choice."""
    disk = uploads(directory, quarantine=tmp_path / "aside")
    put(disk, "cats/tom.png")
    moved = disk.quarantine("cats/tom.png")
    assert moved is not None
    disk.remove_quarantined(moved)
    assert list((tmp_path / "aside").iterdir()) == []
