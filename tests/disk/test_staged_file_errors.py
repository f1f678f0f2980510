"""Disks that fail while a file is staged, and file systems that lack a feature."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from selfheal.disk import syscalls
from selfheal.disk.temporary import sweep
from tests.support.mounts import Mount
from tests.support.open_files import few_descriptors, open_now, opened_since
from tests.support.os_errors import fails
from tests.support.special_files import dangling_link, full_directory
from tests.support.staging import (
    MODIFIED,
    NEW,
    OLD,
    Root,
    in_a_process,
    named_only,
    open_root,
    publish_once,
)

# -- disks that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("pwrite", errno.ENOSPC),
        ("pwrite", errno.EDQUOT),
        ("pwrite", errno.EFBIG),
        ("pwrite", errno.EIO),
        ("fchmod", errno.EIO),
        ("utime", errno.EROFS),
        ("fsync", errno.EIO),
        ("fsync", errno.ENOSPC),
    ],
)
@pytest.mark.parametrize("before", [OLD, None], ids=["taken", "free"])
def test_a_failing_call_changes_nothing(
    root: Root, monkeypatch: pytest.MonkeyPatch, before: bytes | None, call: str, code: int
) -> None:
    """If a system call fails, its errno is raised, the name is unchanged, and no temporary file is left."""
    if before is not None:
        (root.path / "tom.png").write_bytes(before)
    expected = root.entries()
    monkeypatch.setattr(os, call, fails(code))
    with pytest.raises(OSError) as caught:
        publish_once(root)
    assert caught.value.errno == code
    assert root.entries() == expected
    assert before is None or (root.path / "tom.png").read_bytes() == before


def test_a_failed_fsync_is_final(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the file is not synced again and not published: its bytes may be lost."""
    synced = []

    def fail(fd: int) -> None:
        synced.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        publish_once(root)
    assert len(synced) == 1
    assert root.entries() == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.EACCES])
def test_a_temporary_file_that_cannot_be_removed(root: Root, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """If the temporary file cannot be removed either, the first error is raised and every descriptor is closed."""
    before = open_now()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails(errno.ENOSPC))
        patch.setattr(os, "unlink", fails(code))
        with pytest.raises(OSError) as caught:
            root.put(NEW)
    assert (caught.value.errno, opened_since(before)) == (errno.ENOSPC, [])
    sweep(root.fd)
    assert root.entries() == []


@pytest.mark.parametrize("left", range(6))
def test_too_many_open_files(root: Root, left: int) -> None:
    """If descriptors run out at any step, EMFILE is raised and the descriptors already open are closed."""
    before = open_now()
    code = 0
    try:
        with few_descriptors(left):
            root.put(NEW)
    except OSError as error:
        code = error.errno or 0
    assert opened_since(before) == []
    assert code == errno.EMFILE or left >= 1
    sweep(root.fd)  # without a descriptor `put` could not sweep itself
    assert root.entries() == ([] if code else ["tom.png"])


def write_past_the_limit(path: str) -> None:
    """Limit the size of files, stage a larger one, and print the errno and what is left."""
    root = open_root(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        publish_once(root)
    except OSError as error:
        print(json.dumps([error.errno, root.entries()]))


def test_a_file_larger_than_the_limit(root: Root, way: str) -> None:
    """RLIMIT_FSIZE leads to EFBIG, not to a signal, and leaves no file."""
    process = in_a_process(write_past_the_limit, str(root.path), way=way)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out) == [errno.EFBIG, []]


# -- real file systems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [OLD, None], ids=["taken", "free"])
def test_a_full_disk(mount: Callable[[str], Mount], way: str, before: bytes | None) -> None:
    """ENOSPC of a real file system leaves the name unchanged and gives all space back."""
    small = mount("size=256k")
    root = open_root(small.path)
    with root.directory:
        if before is not None:
            root.put(before)
        entries, free = root.entries(), os.statvfs(small.path).f_bfree
        with pytest.raises(OSError) as caught:
            root.put(NEW * 100)
        assert caught.value.errno == errno.ENOSPC
        assert (root.entries(), os.statvfs(small.path).f_bfree) == (entries, free)
        assert before is None or (root.path / "tom.png").read_bytes() == before
        root.put(NEW)
        assert (root.path / "tom.png").read_bytes() == NEW


def test_a_disk_without_inodes(mount: Callable[[str], Mount], way: str) -> None:
    """A disk without free inodes raises ENOSPC when staging begins, and no file is left."""
    root = open_root(mount("size=1m,nr_inodes=3").path)
    with root.directory:
        for name in ("a", "b"):
            (root.path / name).touch()
        with pytest.raises(OSError) as caught:
            root.put(NEW)
        assert caught.value.errno == errno.ENOSPC
        assert root.entries() == ["a", "b"]


def test_a_read_only_disk(mount: Callable[[str], Mount], way: str) -> None:
    """EROFS of a real file system is raised; once the disk is writable again, files are staged."""
    small = mount("size=1m")
    root = open_root(small.path)
    with root.directory:
        root.put(OLD)
        small.remount("ro")
        with pytest.raises(OSError) as caught:
            root.put(NEW)
        assert caught.value.errno == errno.EROFS
        assert (root.path / "tom.png").read_bytes() == OLD
        small.remount("rw")
        root.put(NEW)
        assert (root.path / "tom.png").read_bytes() == NEW
        assert root.entries() == ["tom.png"]


# -- file systems that lack a feature ---------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(root: Root, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Without flock (some network file systems) files are published, and a sweep removes none that is in use."""
    monkeypatch.setattr(fcntl, "flock", fails(code))
    root.put(OLD)
    with root.stage() as staged:
        staged.write(NEW)
        assert sweep(root.fd) == 0
        staged.seal(MODIFIED, 0o644)
        os.unlink("tom.png", dir_fd=root.fd)
        assert staged.publish()
    assert (root.path / "tom.png").read_bytes() == NEW
    assert root.entries() == ["tom.png"]


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_without_unnamed_files_a_file_is_staged_under_a_name(
    root: Root, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Every errno that means "no O_TMPFILE" leads to a file with a temporary name."""
    monkeypatch.setattr(syscalls, "open_unnamed", fails(code))
    root.put(NEW)
    assert (root.path / "tom.png").read_bytes() == NEW
    assert root.entries() == ["tom.png"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE])
def test_other_failures_of_unnamed_files_are_raised(root: Root, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Any other errno of O_TMPFILE is raised, and no temporary name is tried."""
    monkeypatch.setattr(syscalls, "open_unnamed", fails(code))
    with pytest.raises(OSError) as caught:
        root.stage()
    assert caught.value.errno == code
    assert root.entries() == []


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP])
def without_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links, such as FAT (EPERM) or some FUSE file systems (EOPNOTSUPP)."""
    monkeypatch.setattr(os, "link", fails(request.param))


@named_only
def test_without_links_a_file_is_renamed(without_links: None, root: Root) -> None:
    """Without hard links a file is renamed from its temporary name to its final one."""
    publish_once(root)
    assert (root.path / "tom.png").read_bytes() == NEW
    assert root.entries() == ["tom.png"]


@named_only
@pytest.mark.parametrize("make", [Path.touch, full_directory, os.mkfifo, dangling_link])
def test_without_links_no_name_is_taken_from_another(
    without_links: None, root: Root, make: Callable[[Path], None]
) -> None:
    """Without hard links `publish` also leaves anything that has the name unchanged."""
    make(root.path / "tom.png")
    before, entries = os.lstat(root.path / "tom.png"), root.entries()
    publish_once(root)
    assert os.path.samestat(os.lstat(root.path / "tom.png"), before)
    assert root.entries() == entries


@named_only
def test_without_links_a_file_is_replaced(without_links: None, root: Root) -> None:
    """Without hard links `replace` works."""
    (root.path / "tom.png").write_bytes(OLD)
    root.put(NEW)
    assert (root.path / "tom.png").read_bytes() == NEW
    assert root.entries() == ["tom.png"]


@named_only
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMLINK])
def test_other_failures_of_links_are_raised(root: Root, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Any other errno of `link` is raised, and the file is not renamed."""
    monkeypatch.setattr(os, "link", fails(code))
    with pytest.raises(OSError) as caught:
        publish_once(root)
    assert caught.value.errno == code
    assert root.entries() == []
