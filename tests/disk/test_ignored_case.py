"""Disks that ignore case: only the name as it is spelled on disk is a file; another spelling is absent, or refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.listing import Listing, walk
from selfheal.disk.root import MARKER
from selfheal.errors import DiskUnwritable
from tests.disk.conftest import use_kernel
from tests.support.constants import set_constants
from tests.support.disk_files import OTHER, PICTURE, contents_below, put, read, set_modified, write_file
from tests.support.odd_disks import ignore_case, mounted

OTHERS = ["cats/TOM.jpg", "cats/tom.JPG", "Cats/tom.jpg", "CATS/TOM.JPG"]
"""Other spellings of `cats/tom.jpg`."""


@pytest.fixture(params=["openat2", "portable", "exfat", "fat"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on a disk that ignores case: emulated, for both ways to open a path, and real ones."""
    if request.param in ("exfat", "fat"):
        yield from mounted(request.param, tmp_path)
    else:
        use_kernel(monkeypatch, request.param)
        ignore_case(monkeypatch)
        yield tmp_path


@pytest.fixture
def disk(uploads: Callable[..., UploadsDirectory], place: Path) -> UploadsDirectory:
    """An uploads directory on that disk, with one file."""
    disk = uploads(place / "uploads", quarantine=place / "quarantine")
    put(disk, "cats/tom.jpg")
    return disk


def test_the_disk_ignores_case(disk: UploadsDirectory) -> None:
    """The disks of these tests find a file under another spelling."""
    parent = os.open(disk.path / "cats", os.O_RDONLY)
    assert os.stat("TOM.jpg", dir_fd=parent).st_size == len(PICTURE)
    os.close(parent)


@pytest.mark.parametrize("other", OTHERS)
def test_another_spelling_is_absent(disk: UploadsDirectory, other: str) -> None:
    """Under another spelling nothing is opened, measured, hashed, removed, set aside or changed."""
    before = disk.stat("cats/tom.jpg")
    assert before is not None
    assert disk.open(other) is None
    assert disk.stat(other) is None
    assert disk.digest(other) is None
    assert disk.quarantine(other) is None
    assert not disk.remove(other)
    set_modified(disk, other, 42)
    assert read(disk, "cats/tom.jpg") == PICTURE
    after = disk.stat("cats/tom.jpg")
    assert after is not None
    assert after.st_mtime_ns == before.st_mtime_ns
    assert not (disk.quarantine_path).exists()


@pytest.mark.parametrize("name", ["cats/tom.jpg", "cats/TOM.jpg"])
def test_nothing_is_opened_without_a_look_at_the_directory(disk: UploadsDirectory, name: str) -> None:
    """Hits are not answered at once there: the directory must be read first, which may wait for the disk."""
    file = disk.open("cats/tom.jpg")
    assert file is not None
    file.close()
    with pytest.raises(BlockingIOError):
        disk.open_cached(name)
    assert disk.read_again(name.encode(), file.identity, 0, 10) is None


@pytest.mark.parametrize("other", OTHERS)
def test_another_spelling_is_not_published(disk: UploadsDirectory, other: str) -> None:
    """A file is not put in the place of one with another spelling, nor into its directory; the error says why."""
    with pytest.raises(DiskUnwritable, match="ignores case"):
        put(disk, other, OTHER)
    assert contents_below(disk.path) == {"cats/tom.jpg": PICTURE}
    put(disk, "cats/mog.jpg", OTHER)
    assert read(disk, "cats/mog.jpg") == OTHER


def test_of_two_spellings_staged_at_once_one_wins(disk: UploadsDirectory) -> None:
    """If both are staged before one is published, the second is refused and replaces nothing."""
    with disk.stage("cats/mog.jpg") as first, disk.stage("cats/MOG.jpg") as second:
        first.write(PICTURE)
        second.write(OTHER)
        assert first.publish()
        with pytest.raises(DiskUnwritable, match="ignores case"), disk.refusals.raised("cats/MOG.jpg"):
            second.publish()
    assert read(disk, "cats/mog.jpg") == PICTURE
    assert read(disk, "cats/MOG.jpg") is None
    assert sorted(entry.name for entry in walk(disk)) == ["cats/mog.jpg", "cats/tom.jpg"]


def test_a_file_is_replaced_under_its_own_spelling(disk: UploadsDirectory) -> None:
    """The same spelling is replaced and removed as on any disk."""
    put(disk, "cats/tom.jpg", OTHER)
    assert read(disk, "cats/tom.jpg") == OTHER
    assert disk.remove("cats/tom.jpg")
    assert contents_below(disk.path) == {}
    put(disk, "cats/TOM.jpg")
    assert [entry.name for entry in walk(disk)] == ["cats/TOM.jpg"]


@pytest.mark.parametrize("at_most", [100_000, 0])
def test_a_listing_compares_exactly(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, at_most: int) -> None:
    """A listing has only the spelling on disk, also in a directory of more files than are held in memory."""
    set_constants(monkeypatch, LISTED_AT_MOST=at_most)
    listing = Listing(disk)
    assert listing.has("cats/tom.jpg")
    assert listing.has_all(["cats/tom.jpg"])
    for other in OTHERS:
        assert not listing.has(other)
        assert not listing.has_all([other])


@pytest.mark.parametrize("name", ["1/2.3", MARKER, "A/b.png"])
def test_any_name_shows_that_case_is_ignored(uploads: Callable[..., UploadsDirectory], place: Path, name: str) -> None:
    """It is noticed with any first file, also without a letter in the root, and nothing is left of the look."""
    disk = uploads(place / "uploads")
    write_file(disk.path / name)
    write_file(disk.path / "1" / "tom.jpg")
    assert disk.open("1/TOM.jpg") is None
    assert sorted(contents_below(disk.path)) == sorted({name, "1/tom.jpg"})
    assert {path.name for path in disk.path.iterdir()} == {"1", name.partition("/")[0]}


def test_a_disk_that_minds_case_costs_nothing(
    uploads: Callable[..., UploadsDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an ordinary disk no directory is read to open a file, and both spellings are files."""
    disk = uploads(tmp_path / "uploads")
    put(disk, "tom.jpg")
    put(disk, "TOM.jpg", OTHER)
    calls: list[object] = []
    with monkeypatch.context() as patch:
        for call in ("scandir", "listdir"):
            patch.setattr(os, call, calls.append)
        assert [read(disk, name) for name in ("tom.jpg", "TOM.jpg", "Tom.jpg")] == [PICTURE, OTHER, None]
        assert disk.stat("Tom.jpg") is None
    assert calls == []


def test_both_spellings_in_the_root_show_that_case_matters(
    uploads: Callable[..., UploadsDirectory], tmp_path: Path
) -> None:
    """A root in which all names are there in both cases is on an ordinary disk."""
    disk = uploads(tmp_path / "uploads")
    for name, data in (("tom.jpg", PICTURE), ("TOM.JPG", OTHER)):
        write_file(disk.path / name, data)
    assert [read(disk, name) for name in ("tom.jpg", "TOM.JPG", "Tom.jpg")] == [PICTURE, OTHER, None]
