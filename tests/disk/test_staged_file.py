"""A staged file: its name is absent until the file is whole, and no other file loses its name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from selfheal.disk import staged_file as staging
from selfheal.disk import syscalls
from selfheal.disk.staged_file import StagedFile
from tests.support.disk_files import ABSURD_TIMES
from tests.support.os_errors import fails
from tests.support.special_files import dangling_link, full_directory
from tests.support.staging import MODIFIED, NEW, OLD, Root

# -- written, then named ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 4096], ids=["empty", "one byte", "1 MiB"])
@pytest.mark.parametrize("name", ["tom.png", "cats/tom.png", "Кот é [1]@2x 100%.png"])
def test_bytes_are_published_in_order(root: Root, name: str, data: bytes) -> None:
    """Bytes written in several calls are at the name in order; `size` and `sha256` are those of the whole file."""
    (root.path / "cats").mkdir()
    with root.stage(name) as staged:
        for start in range(0, len(data), 100_000):
            staged.write(data[start : start + 100_000])
        staged.seal(MODIFIED, 0o644)
        staged.sync()
        assert staged.publish()
        assert (staged.size, staged.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (root.path / name).read_bytes() == data
    assert root.entries() == sorted({"cats", name})


def test_the_name_is_absent_until_the_file_is_whole(root: Root) -> None:
    """Before a file is published, no request and no walk can find any part of it."""
    with root.stage() as staged:
        assert root.names() == []
        staged.write(NEW[:10])
        assert root.names() == []
        staged.write(NEW[10:])
        staged.seal(MODIFIED, 0o644)
        staged.sync()
        assert root.names() == []
        assert staged.publish()
        assert root.names() == ["tom.png"]
        assert (root.path / "tom.png").read_bytes() == NEW


def test_the_digest_is_that_of_what_was_written_so_far(root: Root) -> None:
    """`sha256` is correct after every write."""
    with root.stage() as staged:
        assert staged.sha256 == hashlib.sha256().hexdigest()
        staged.write(OLD)
        assert staged.sha256 == hashlib.sha256(OLD).hexdigest()
        staged.write(NEW)
        assert staged.sha256 == hashlib.sha256(OLD + NEW).hexdigest()


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_a_short_write_is_continued(root: Root, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """A write that the system cuts short is continued where it stopped."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:piece], offset))
    root.put(NEW[:9000])
    assert (root.path / "tom.png").read_bytes() == NEW[:9000]


def test_a_large_file_is_written_back_while_it_grows(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing back starts as soon as enough bytes are new; the parts do not overlap and leave no gap."""
    started: list[tuple[int, int, int]] = []
    monkeypatch.setattr(staging, "WRITE_BEHIND", 1000)
    monkeypatch.setattr(syscalls, "begin_writing_back", lambda *part: started.append(part))
    with root.stage() as staged:
        for size in (999, 1, 400, 400, 400, 3000, 10):
            staged.write(NEW[:size])
        assert started == [(staged.fd, 0, 1000), (staged.fd, 1000, 1200), (staged.fd, 2200, 3000)]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777], indirect=True)
def test_the_mode_is_the_one_given(root: Root, umask: int, mode: int) -> None:
    """The umask does not change the mode of a published file."""
    with root.stage() as staged:
        staged.seal(MODIFIED, mode)
        assert staged.publish()
    assert stat.S_IMODE(os.stat(root.path / "tom.png").st_mode) == mode


@pytest.mark.parametrize("umask", [0o000], indirect=True)
def test_nobody_else_reads_what_is_not_yet_published(root: Root, umask: int) -> None:
    """Before it is sealed, only the owner can read a staged file or enter the temporary directory."""
    with root.stage() as staged:
        assert stat.S_IMODE(os.fstat(staged.fd).st_mode) & 0o077 == 0
        for entry in root.path.iterdir():
            assert stat.S_IMODE(entry.lstat().st_mode) == 0o700


def test_the_mtime_is_the_one_given(root: Root) -> None:
    """The mtime is the one of the record, to the nanosecond, so that ETag and Last-Modified are equal on every disk."""
    root.put(NEW)
    assert os.stat(root.path / "tom.png").st_mtime_ns == MODIFIED


@pytest.mark.parametrize("modified_ns", ABSURD_TIMES)
def test_an_impossible_time_is_accepted(root: Root, modified_ns: int) -> None:
    """A time that no clock or file system can have does not prevent publishing (CVE-2017-20005)."""
    with root.stage() as staged:
        staged.write(NEW)
        staged.seal(modified_ns, 0o644)
        assert staged.publish()
    assert (root.path / "tom.png").read_bytes() == NEW


# -- given up before it is published ----------------------------------------------------------------------------------


def write(staged: StagedFile) -> None:
    """Write bytes."""
    staged.write(NEW)


def seal(staged: StagedFile) -> None:
    """Write bytes and seal the file."""
    staged.write(NEW)
    staged.seal(MODIFIED, 0o644)


@pytest.mark.parametrize("step", [lambda staged: None, write, seal], ids=["opened", "written", "sealed"])
def test_an_abandoned_file_leaves_no_trace(root: Root, step: Callable[[StagedFile], None]) -> None:
    """An error before publishing leaves the disk unchanged."""
    with contextlib.suppress(ZeroDivisionError), root.stage() as staged:
        step(staged)
        raise ZeroDivisionError
    assert root.entries() == []


def test_closing_twice_is_harmless(root: Root) -> None:
    """A second `close` does not close a descriptor that now belongs to another file."""
    staged = root.stage()
    staged.close()
    with open(root.path / "other", "wb") as other:
        staged.close()
        other.write(NEW)
    assert root.entries() == ["other"]


def test_descriptor_zero_is_closed(root: Root) -> None:
    """Descriptor 0, which a process without standard input can get, is closed like any other."""
    kept, staged = os.dup(0), root.stage()
    try:
        os.dup2(staged.fd, 0)
        os.close(staged.fd)
        staged.fd = 0
        staged.close()
        with pytest.raises(OSError):
            os.fstat(0)
    finally:
        os.dup2(kept, 0)
        os.close(kept)
    assert root.entries() == []


# -- a name that is taken ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Path.touch, full_directory, os.mkfifo, dangling_link])
def test_publishing_never_takes_a_name_from_another(root: Root, make: Callable[[Path], None]) -> None:
    """If anything has the name, `publish` returns False and changes nothing."""
    make(root.path / "tom.png")
    before, entries = os.lstat(root.path / "tom.png"), root.entries()
    with root.stage() as staged:
        staged.write(NEW)
        assert not staged.publish()
    assert os.path.samestat(os.lstat(root.path / "tom.png"), before)
    assert root.entries() == entries


def test_of_two_that_publish_one_name_one_wins(root: Root) -> None:
    """The first of two files to be published gets the name; the other is removed."""
    with root.stage() as first, root.stage() as second:
        first.write(OLD)
        second.write(NEW)
        assert [second.publish(), first.publish()] == [True, False]
    assert (root.path / "tom.png").read_bytes() == NEW
    assert root.entries() == ["tom.png"]


def test_replacing_an_absent_name_publishes(root: Root) -> None:
    """`replace` publishes the file if nothing has the name."""
    root.put(NEW)
    assert (root.path / "tom.png").read_bytes() == NEW
    assert root.entries() == ["tom.png"]


def test_replacing_a_file(root: Root) -> None:
    """`replace` puts the new file in the place of the old one and leaves no other name of it."""
    root.put(OLD)
    root.put(NEW)
    assert (root.path / "tom.png").read_bytes() == NEW
    assert os.stat(root.path / "tom.png").st_nlink == 1
    assert root.entries() == ["tom.png"]


def test_replacing_a_file_below_a_directory(root: Root) -> None:
    """`replace` works in a subdirectory as in the root."""
    (root.path / "cats").mkdir()
    root.put(OLD, "cats/tom.png")
    root.put(NEW, "cats/tom.png")
    assert (root.path / "cats/tom.png").read_bytes() == NEW
    assert root.entries() == ["cats", "cats/tom.png"]


def test_replacing_a_link_does_not_follow_it(root: Root, tmp_path: Path) -> None:
    """`replace` replaces a symbolic link itself, not the file that it points to."""
    (tmp_path / "elsewhere").write_bytes(OLD)
    (root.path / "tom.png").symlink_to(tmp_path / "elsewhere")
    root.put(NEW)
    assert (tmp_path / "elsewhere").read_bytes() == OLD
    assert not (root.path / "tom.png").is_symlink()
    assert (root.path / "tom.png").read_bytes() == NEW


def test_a_directory_is_not_replaced(root: Root) -> None:
    """`replace` raises if a directory has the name, and leaves the directory and its files unchanged."""
    (root.path / "tom.png").mkdir()
    (root.path / "tom.png" / "inside").write_bytes(OLD)
    with pytest.raises(OSError):
        root.put(NEW)
    assert root.entries() == ["tom.png", "tom.png/inside"]


def test_readers_of_the_old_file_keep_it(root: Root) -> None:
    """A reader that opened the old file before `replace` reads all of it."""
    root.put(OLD)
    with open(root.path / "tom.png", "rb") as reader:
        root.put(NEW)
        assert reader.read() == OLD


def test_readers_never_see_a_torn_file(root: Root) -> None:
    """While a file is removed and published 200 times, every reader gets one whole version, or none."""
    versions = {bytes([number]) * (20_000 + 37 * number) for number in range(200)}
    root.put(min(versions))
    seen: set[bytes] = set()
    errors: list[object] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            try:
                data = (root.path / "tom.png").read_bytes()
            except FileNotFoundError:
                pass
            except OSError as error:
                errors.append(error)
            else:
                seen.add(data)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for version in sorted(versions):
        root.put(version)
    is_over.set()
    for reader in readers:
        reader.join()
    assert errors == []
    assert seen <= versions
    assert len(seen) > 1, "the readers saw only one version"
    assert root.entries() == ["tom.png"]


# -- a root that is deleted -------------------------------------------------------------------------------------------


def test_a_deleted_root_raises(root: Root) -> None:
    """Staging below a deleted root raises and does not make the root again."""
    root.path.rmdir()
    with pytest.raises(OSError):
        root.put(NEW)
    assert not root.path.exists()


def test_eperm_for_a_deleted_directory_is_not_found(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPERM for a deleted directory (ext4) becomes `FileNotFoundError`: it is not a lack of rights, which would stop
    all writes. For another directory it means that there are no unnamed files.
    """
    monkeypatch.setattr(syscalls, "open_unnamed", fails(errno.EPERM))
    root.put(NEW)
    assert root.entries() == ["tom.png"]
    (root.path / "tom.png").unlink()
    root.path.rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        root.stage()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "tom.png")


def test_a_root_that_is_deleted_while_staging(root: Root) -> None:
    """If the root is deleted after staging began, `publish` raises `FileNotFoundError`."""
    with root.stage() as staged:
        staged.write(NEW)
        shutil.rmtree(root.path)
        with pytest.raises(FileNotFoundError):
            staged.publish()
    assert not root.path.exists()
