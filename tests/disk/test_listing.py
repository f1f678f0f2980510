"""Walking an uploads directory: every file once, in order, and no link is followed."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.listing import Listing, walk
from selfheal.disk.open_file import identity_of
from selfheal.disk.quarantine import QUARANTINE
from selfheal.disk.root import MARKER
from selfheal.disk.temporary import TEMPORARY
from tests.support.disk_files import MODIFIED, PICTURE, contents_below, put, read, write_file
from tests.support.open_files import open_now, opened_since
from tests.support.os_errors import fails
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
    assert (entry.size, entry.identity[0]) == (len(PICTURE), MODIFIED)
    assert entry.changed_ns == disk.path_of("cats/tom.png").stat().st_ctime_ns > MODIFIED


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
    assert found[".git"]
    assert found["cats/.thumbs"]


def test_a_walk_skips_selfheals_own_files(disk: UploadsDirectory) -> None:
    """Selfheal's own files are not yielded."""
    put(disk, "tom.png")
    own = (MARKER, f"{TEMPORARY}/killed", f"cats/{TEMPORARY}/killed", f"{QUARANTINE}/20200101T000000-00000000/tom.png")
    for name in own:
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


@pytest.mark.parametrize("mode", [0o000, 0o300, 0o400, 0o600])
def test_an_unreadable_directory_is_yielded(uploads: Uploads, ordinary_directory: Path, mode: int) -> None:
    """A directory without the right to list or enter it is yielded once, with what mends it; all else is yielded."""
    disk = uploads(ordinary_directory / "uploads")
    for name in ("a.png", "cats/tom.png", "cats/small/mog.png", "z/z.png"):
        put(disk, name)
    (disk.path / "cats").chmod(mode)
    try:
        found = {entry.name: entry.fault for entry in walk(disk)}
    finally:
        (disk.path / "cats").chmod(0o755)
    assert sorted(found) == ["a.png", "cats", "z/z.png"]
    assert [name for name, fault in found.items() if fault] == ["cats"]
    assert f"chmod -R a+rX {disk.path}/cats`" in found["cats"]


@pytest.mark.parametrize(("mode", "is_skipped"), [(0o700, True), (0o755, False)])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory that belongs to root")
def test_lost_and_found(disk: UploadsDirectory, mode: int, is_skipped: bool) -> None:
    """The directory that the file system itself makes is skipped; one of that name in it, or of an app, is walked."""
    walked = ["cats/lost+found/mog.png", "lost+found/tom.png"]
    for path in walked:
        put(disk, path)
        disk.path_of(path).parent.chmod(mode)
    assert [entry.name for entry in walk(disk)] == (walked[:1] if is_skipped else walked)


@pytest.mark.parametrize("call", ["stat", "scandir"])
def test_an_entry_that_cannot_be_measured(disk: UploadsDirectory, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk fails to measure or to list is yielded with a fault; the root raises, for nothing is known then."""
    for name in ("a.png", "b/1.png", "c.png"):
        put(disk, name)
    real = getattr(os, call)
    directory = disk.path.joinpath("b").stat().st_ino

    def fail(path: Any, **how: Any) -> Any:
        if path == "a.png" or (call == "scandir" and os.fstat(path).st_ino == directory):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, **how)

    monkeypatch.setattr(os, call, fail)
    assert {entry.name for entry in walk(disk) if entry.fault} == ({"a.png"} if call == "stat" else {"b"})
    assert [entry.name for entry in walk(disk)][-1] == "c.png"
    monkeypatch.setattr(os, call, fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        list(walk(disk))


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
    before = open_now()
    walking = walk(disk)
    next(walking)
    del walking
    assert opened_since(before) == []


def test_a_walk_of_a_large_directory(disk: UploadsDirectory) -> None:
    """2,000 files in one directory are yielded, each once."""
    disk.path.mkdir(parents=True)
    wanted = [f"{number:04}.png" for number in range(2_000)]
    for name in wanted:
        (disk.path / name).touch()
    assert [entry.name for entry in walk(disk)] == wanted


def test_threads_that_list_the_root_at_once(disk: UploadsDirectory) -> None:
    """Threads that read the same directory at the same time do not take each other's entries."""
    names = [f"{number:04}-{'x' * 100}.png" for number in range(2000)]
    for name in names:
        write_file(disk.path / name, b"")
    found: list[int] = []

    def work() -> None:
        for _ in range(4):
            found.append(sum(Listing(disk).has_all([name]) for name in names[::500]))
            found.append(len(list(walk(disk))) - len(names))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {4, 0}


@pytest.mark.parametrize("modified_ns", [-(10**17), 2**63, 2**64])
def test_times_that_no_record_can_hold(disk: UploadsDirectory, modified_ns: int) -> None:
    """A file whose time is before 1970 or after 2262 is walked, measured and opened like any other."""
    path = write_file(disk.path / "tom.png")
    os.utime(path, ns=(modified_ns, modified_ns))
    kept = path.stat().st_mtime_ns
    assert [entry.identity[0] for entry in walk(disk)] == [kept]
    found, file = disk.stat("tom.png"), disk.open("tom.png")
    assert found is not None
    assert file is not None
    with file:
        assert (identity_of(found), file.modified_ns) == (file.identity, kept)
