"""Walking an uploads directory: every file once, in order, and no link is followed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.listing import walk
from selfheal.disk.quarantine import QUARANTINE
from selfheal.disk.root import MARKER
from selfheal.disk.staged_file import TEMPORARY
from tests.support.descriptors import open_descriptors
from tests.support.disk_files import MODIFIED, PICTURE, contents_below, put, read, write_file
from tests.support.sockets import make_socket
from tests.support.special_files import device

Uploads = Callable[..., UploadsDirectory]
pytestmark = pytest.mark.usefixtures("kernel")


@pytest.mark.parametrize("seed", range(5))
def test_a_walk_is_in_the_order_of_bytes(disk: UploadsDirectory, seed: int) -> None:
    """A walk yields every file once, in the byte order of whole names."""
    rng = random.Random(seed)
    parts = ["a", "b", "a-b", "a.b", "a b", "A", "é", "e\u0301", "Я", "字", "a0", "~", "!", "a.png", ".h", ".h-1", "0"]
    for _ in range(200):
        path = disk.path.joinpath(*rng.choices(parts, k=rng.randint(1, 4)))
        with contextlib.suppress(OSError):
            write_file(path, b"x")
    names = [entry.name for entry in walk(disk)]
    assert names == sorted(names, key=os.fsencode)
    files = {
        name for name in contents_below(disk.path) if not any(part.startswith(".") for part in name.split("/")[:-1])
    }
    assert files <= set(names)
    assert len(names) == len(set(names))


def test_a_walk_yields_sizes_and_times(disk: UploadsDirectory) -> None:
    """A regular file has its size and mtime, and no fault."""
    put(disk, "cats/tom.png")
    [entry] = walk(disk)
    assert (entry.name, entry.fault) == ("cats/tom.png", "")
    assert (entry.size, entry.modified_ns) == (len(PICTURE), MODIFIED)


def test_a_walk_follows_no_link(disk: UploadsDirectory, outside: Path) -> None:
    """Links of every kind are yielded once, with a fault that says so, and are not followed."""
    put(disk, "cats/tom.png")
    for name, target in {
        "file": outside / "secret.png",
        "directory": outside,
        "nowhere": outside / "nowhere",
        "circle": disk.path,
        "cats/up": "..",
        "within": "cats",
    }.items():
        disk.path_of(name).symlink_to(target)
    found = {entry.name: entry.fault for entry in walk(disk)}
    assert sorted(found) == ["cats/tom.png", "cats/up", "circle", "directory", "file", "nowhere", "within"]
    assert [name for name, fault in found.items() if not fault] == ["cats/tom.png"]
    assert all("link" in fault for name, fault in found.items() if fault)


@pytest.mark.parametrize("make", [os.mkfifo, make_socket, device])
@pytest.mark.timeout(20)
def test_a_walk_yields_special_files_with_a_fault(disk: UploadsDirectory, make: Callable[[Path], None]) -> None:
    """A FIFO, socket or device is yielded with a fault and never blocks."""
    disk.path.mkdir(parents=True)
    make(disk.path / "special.png")
    assert [(entry.name, bool(entry.fault)) for entry in walk(disk)] == [("special.png", True)]


def test_a_walk_yields_a_hidden_directory_once(disk: UploadsDirectory) -> None:
    """A hidden directory is yielded once, without its files."""
    for name in (".git/objects/1", ".git/objects/2", ".git/HEAD", "cats/.thumbs/tom.png", "cats/.thumbs/mog.png"):
        write_file(disk.path_of(name))
    put(disk, "cats/tom.png")
    found = {entry.name: entry.fault for entry in walk(disk)}
    assert sorted(found) == [".git", "cats/.thumbs", "cats/tom.png"]
    assert found["cats/tom.png"] == ""
    assert "hidden" in found[".git"]
    assert "hidden" in found["cats/.thumbs"]


def test_a_walk_skips_files_that_are_no_uploads(disk: UploadsDirectory) -> None:
    """Files such as `.gitkeep`, and selfheal's own files, are not yielded."""
    put(disk, "tom.png")
    for name in (
        ".gitkeep",
        "cats/.gitignore",
        "cats/.keep",
        ".DS_Store",
        "cats/Thumbs.db",
        MARKER,
        f"{TEMPORARY}/killed",
        f"{QUARANTINE}/20200101T000000-00000000/tom.png",
    ):
        write_file(disk.path_of(name))
    assert [entry.name for entry in walk(disk)] == ["tom.png"]


@pytest.mark.parametrize("name", [b"\xff.png", b"caf\xe9.png", b"\xc3(.png", b"\xed\xa0\x80.png", b"a\nb.png"])
def test_a_name_that_is_no_text_is_yielded(disk: UploadsDirectory, name: bytes) -> None:
    """File and directory names that are no UTF-8 or hold a newline are yielded."""
    raw = os.fsencode(disk.path) + b"/"
    os.makedirs(raw + b"dir" + name)
    for path in (raw + name, raw + b"dir" + name + b"/tom.png", raw + b"zebra.png"):
        with open(path, "wb") as file:
            file.write(PICTURE)
    names = sorted(os.fsencode(entry.name) for entry in walk(disk))
    assert names == sorted([name, b"dir" + name + b"/tom.png", b"zebra.png"])
    for entry in walk(disk):
        assert read(disk, entry.name) == PICTURE


def test_an_unreadable_directory_is_not_skipped(uploads: Uploads, ordinary_directory: Path) -> None:
    """An unreadable directory raises or is yielded with a fault, so that its files do not look missing."""
    disk = uploads(ordinary_directory / "uploads")
    put(disk, "cats/tom.png")
    (disk.path / "cats").chmod(0)
    try:
        found = []
        with contextlib.suppress(PermissionError):
            found = list(walk(disk))
            assert any(entry.fault for entry in found), "the unreadable directory was skipped"
        assert "cats/tom.png" not in [entry.name for entry in found]
    finally:
        (disk.path / "cats").chmod(0o755)


def test_files_that_are_removed_during_a_walk(disk: UploadsDirectory) -> None:
    """Files and directories that are removed during a walk do not stop it."""
    for name in ("a.png", "b.png", "c/1.png", "d/1.png", "e.png"):
        put(disk, name)
    walking = walk(disk)
    assert next(walking).name == "a.png"
    disk.remove("b.png")
    shutil.rmtree(disk.path / "c")
    assert [entry.name for entry in walking] == ["d/1.png", "e.png"]


@pytest.mark.parametrize("make", [Path.touch, "link", os.mkfifo], ids=["file", "link", "fifo"])
@pytest.mark.timeout(20)
def test_a_directory_that_is_replaced_during_a_walk(
    disk: UploadsDirectory, outside: Path, make: Callable[[Path], None] | str
) -> None:
    """A directory that becomes a file, link or FIFO during a walk is not entered, and the walk goes on."""
    for name in ("a.png", "c/1.png", "e.png"):
        put(disk, name)
    walking = walk(disk)
    assert next(walking).name == "a.png"
    shutil.rmtree(disk.path / "c")
    if isinstance(make, str):
        (disk.path / "c").symlink_to(outside)
    else:
        make(disk.path / "c")
    names = [entry.name for entry in walking]
    assert [name for name in names if name != "c"] == ["e.png"]


def test_an_unfinished_walk_leaves_nothing_open(disk: UploadsDirectory) -> None:
    """A walk that is not finished closes its descriptors."""
    put(disk, "a/b/c/1.png")
    put(disk, "a/b/c/2.png")
    before = open_descriptors()
    walking = walk(disk)
    next(walking)
    del walking
    assert open_descriptors() == before


def test_a_walk_of_a_large_directory(disk: UploadsDirectory) -> None:
    """2,000 files in one directory are yielded, each once."""
    disk.path.mkdir(parents=True)
    wanted = [f"{number:04}.png" for number in range(2_000)]
    for name in wanted:
        (disk.path / name).touch()
    assert [entry.name for entry in walk(disk)] == wanted
