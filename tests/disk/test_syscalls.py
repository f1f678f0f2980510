"""Calls of the kernel: open beneath a directory without links, files without a name, sync of a file system."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from selfheal.disk import syscalls
from tests.support.requirements import needs
from tests.support.special_files import dangling_link

SECRET = b"not for visitors"
PICTURE = b"a picture"
Open = Callable[[int, str], int]


@pytest.fixture(params=["open_file", "open_cached"])
def opener(request: pytest.FixtureRequest) -> Open:
    """Each of the two functions that open a file."""
    return getattr(syscalls, request.param)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root with pictures, and a secret outside of it."""
    root = tmp_path / "root"
    (root / "cats" / "old").mkdir(parents=True)
    (root / "tom.png").write_bytes(PICTURE)
    (root / "cats" / "old" / "tom.png").write_bytes(PICTURE)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(SECRET)
    return root


@pytest.fixture
def root(tree: Path) -> Iterator[int]:
    """The descriptor of the root."""
    fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def contents(fd: int) -> bytes:
    """Read a descriptor to its end and close it."""
    with os.fdopen(fd, "rb") as file:
        return file.read()


# -- beneath the root ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tom.png", "cats/old/tom.png"])
def test_a_file_beneath_the_root_is_opened(kernel: str, root: int, name: str) -> None:
    """A file is opened at every depth."""
    assert contents(syscalls.open_file(root, name)) == PICTURE


def test_a_cached_file_is_opened_without_waiting(root: int, tree: Path) -> None:
    """A file that was just used is opened by `open_cached`, if the kernel has RESOLVE_CACHED."""
    contents(syscalls.open_file(root, "cats/old/tom.png"))
    try:
        fd = syscalls.open_cached(root, "cats/old/tom.png")
    except BlockingIOError:
        needs("RESOLVE_CACHED", "the tests on Linux 5.12 or later")
    assert contents(fd) == PICTURE


def test_without_openat2_nothing_is_opened_without_waiting(root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without openat2 `open_cached` raises `BlockingIOError`."""
    monkeypatch.setattr(syscalls, "HAS_OPENAT2", False)
    with pytest.raises(BlockingIOError):
        syscalls.open_cached(root, "tom.png")


@pytest.mark.parametrize("name", ["", "cats", "cats/old"])
def test_a_directory_beneath_the_root_is_opened(kernel: str, root: int, tree: Path, name: str) -> None:
    """A directory is opened at every depth; the empty name is the root, on a new descriptor."""
    fd = syscalls.open_directory(root, name)
    try:
        assert fd != root
        assert os.path.samestat(os.fstat(fd), os.stat(tree / name))
    finally:
        os.close(fd)


def test_descriptors_are_not_inherited(kernel: str, root: int) -> None:
    """A child process inherits none of the descriptors."""
    opened = [
        syscalls.open_file(root, "tom.png"),
        syscalls.open_directory(root, ""),
        syscalls.open_directory(root, "cats"),
        syscalls.open_directory(root, "cats/old"),
    ]
    try:
        assert [os.get_inheritable(fd) for fd in opened] == [False] * len(opened)
    finally:
        for fd in opened:
            os.close(fd)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("missing.png", errno.ENOENT),
        ("missing/tom.png", errno.ENOENT),
        ("tom.png/tom.png", errno.ENOTDIR),
        ("x" * 256, errno.ENAMETOOLONG),
        ("x" * 256 + "/tom.png", errno.ENAMETOOLONG),
    ],
)
def test_an_absent_file_raises_its_errno(kernel: str, root: int, name: str, code: int) -> None:
    """An absent file raises the same errno on every kernel."""
    with pytest.raises(OSError) as caught:
        syscalls.open_file(root, name)
    assert caught.value.errno == code


def test_an_absent_file_is_never_opened_without_waiting(root: int) -> None:
    """`open_cached` of an absent name raises `FileNotFoundError` or `BlockingIOError`."""
    with pytest.raises((BlockingIOError, FileNotFoundError)):
        syscalls.open_cached(root, "missing.png")


@pytest.mark.parametrize("name", ["tom.png", "missing", "cats/missing", "tom.png/cats"])
def test_what_is_no_directory_is_not_opened_as_one(kernel: str, root: int, name: str) -> None:
    """`open_directory` raises if the name is a file or absent."""
    with pytest.raises((NotADirectoryError, FileNotFoundError)):
        syscalls.open_directory(root, name)


# -- links and tricks of naming --------------------------------------------------------------------------------------


def link_the_last_part(tree: Path, target: Path) -> str:
    """Make a link at the name itself."""
    (tree / "a.png").symlink_to(target / "secret")
    return "a.png"


def link_a_middle_part(tree: Path, target: Path) -> str:
    """Make a link at a directory in the middle of the name."""
    (tree / "cats" / "b").symlink_to(target)
    return "cats/b/secret"


def link_the_first_part(tree: Path, target: Path) -> str:
    """Make a link at the first directory of the name."""
    (tree / "b").symlink_to(target)
    return "b/secret"


def link_twice(tree: Path, target: Path) -> str:
    """Make a link to a link."""
    (tree / "c").symlink_to(target)
    (tree / "b").symlink_to("c")
    return "b/secret"


def link_within_the_root(tree: Path, target: Path) -> str:
    """Make a link whose target is inside the root."""
    (tree / "b").symlink_to("cats")
    return "b/old/tom.png"


def link_through_proc(tree: Path, target: Path) -> str:
    """Make a link to a magic link of /proc."""
    (tree / "b").symlink_to(f"/proc/self/root{target}")
    return "b/secret"


LINKS = [
    link_the_last_part,
    link_a_middle_part,
    link_the_first_part,
    link_twice,
    link_within_the_root,
    link_through_proc,
]


@pytest.mark.parametrize("link", LINKS)
def test_no_link_is_followed_to_a_file(
    kernel: str, opener: Open, root: int, tree: Path, tmp_path: Path, link: Callable[[Path, Path], str]
) -> None:
    """A link at any part of a name is not followed (CVE-2024-23334)."""
    name = link(tree, tmp_path / "outside")
    assert (tree / name).read_bytes() in {SECRET, PICTURE}
    with pytest.raises(OSError):
        os.close(opener(root, name))


@pytest.mark.parametrize("link", LINKS[1:])
def test_no_link_is_followed_to_a_directory(
    kernel: str, root: int, tree: Path, tmp_path: Path, link: Callable[[Path, Path], str]
) -> None:
    """A link at any part of a directory's name is not followed."""
    name = link(tree, tmp_path / "outside").rpartition("/")[0]
    assert (tree / name).is_dir()
    with pytest.raises(OSError):
        os.close(syscalls.open_directory(root, name))


@pytest.mark.parametrize(
    "name", ["../outside/secret", "cats/../../outside/secret", "{outside}/secret", "..", "cats/../..", "/", "//tom.png"]
)
def test_nothing_outside_the_root_is_opened(kernel: str, opener: Open, root: int, tmp_path: Path, name: str) -> None:
    """A name with `..` or an absolute name raises, even if its grammar was not checked."""
    name = name.format(outside=tmp_path / "outside")
    with pytest.raises(OSError):
        os.close(opener(root, name))
    with pytest.raises(OSError):
        os.close(syscalls.open_directory(root, name.removesuffix("/secret")))


@pytest.mark.parametrize("name", ["tom.png\0", "tom.png\0.jpg", "cats\0/old"])
def test_no_name_is_cut_at_a_nul(kernel: str, opener: Open, root: int, name: str) -> None:
    """A name with a NUL raises; the shorter name before the NUL is not opened."""
    with pytest.raises((ValueError, OSError)):
        os.close(opener(root, name))
    with pytest.raises((ValueError, OSError)):
        os.close(syscalls.open_directory(root, name))


# -- special files ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
def test_a_fifo_never_blocks(kernel: str, opener: Open, root: int, tree: Path) -> None:
    """Opening a FIFO without a writer does not block."""
    os.mkfifo(tree / "pipe.png")
    try:
        fd = opener(root, "pipe.png")
    except OSError:
        return
    assert stat.S_ISFIFO(os.fstat(fd).st_mode)
    os.close(fd)


def test_a_socket_is_not_opened(kernel: str, opener: Open, root: int, tree: Path) -> None:
    """Opening a socket raises."""
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"/proc/self/fd/{root}/socket.png")
        with pytest.raises(OSError):
            os.close(opener(root, "socket.png"))


# -- files without a name --------------------------------------------------------------------------------------------


@pytest.fixture
def unnamed(root: int) -> Iterator[int]:
    """An open file without a name."""
    try:
        fd = syscalls.open_unnamed(root)
    except OSError:
        needs("O_TMPFILE", "the tests with TMPDIR on ext4, xfs, btrfs or tmpfs")
    yield fd
    os.close(fd)


def test_an_unnamed_file_is_private(unnamed: int, tree: Path) -> None:
    """An unnamed file is not listed, not inherited, and readable only by its owner."""
    os.write(unnamed, PICTURE)
    assert {path.name for path in tree.iterdir()} == {"tom.png", "cats"}
    assert stat.S_IMODE(os.fstat(unnamed).st_mode) & 0o077 == 0
    assert not os.get_inheritable(unnamed)


def test_an_unnamed_file_gets_a_name(unnamed: int, root: int, tree: Path) -> None:
    """An unnamed file that gets a name is an ordinary file."""
    os.write(unnamed, PICTURE)
    syscalls.name_descriptor(unnamed, root, "new.png")
    assert (tree / "new.png").read_bytes() == PICTURE
    assert os.fstat(unnamed).st_nlink == 1


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, os.mkfifo, dangling_link])
def test_a_name_is_never_taken_from_another(unnamed: int, root: int, tree: Path, make: Callable[[Path], None]) -> None:
    """If anything has the name, `FileExistsError` is raised, and nothing is replaced or written through a link."""
    make(tree / "taken.png")
    before = os.lstat(tree / "taken.png")
    with pytest.raises(FileExistsError):
        syscalls.name_descriptor(unnamed, root, "taken.png")
    assert os.path.samestat(os.lstat(tree / "taken.png"), before)
    assert not (tree / "nowhere").exists()


def test_a_system_without_unnamed_files(root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without O_TMPFILE raises EOPNOTSUPP, as a file system without it does."""
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    with pytest.raises(OSError) as caught:
        syscalls.open_unnamed(root)
    assert caught.value.errno == errno.EOPNOTSUPP


# -- sync ------------------------------------------------------------------------------------------------------------


def test_a_file_system_is_synced(root: int) -> None:
    """`sync_filesystem` takes any descriptor of the file system."""
    syscalls.sync_filesystem(root)


def test_a_failed_sync_raises() -> None:
    """A sync that fails raises."""
    with pytest.raises(OSError) as caught:
        syscalls.sync_filesystem(-1)
    assert caught.value.errno == errno.EBADF


# -- errno in threads ------------------------------------------------------------------------------------------------


def test_threads_get_their_own_errors(kernel: str, root: int, tree: Path) -> None:
    """Threads that fail at the same time in different ways each get their own errno."""
    (tree / "link").symlink_to("tom.png")
    errors: list[int | None] = []

    def fail(name: str, code: int) -> None:
        for _ in range(500):
            with pytest.raises(OSError) as caught:
                syscalls.open_file(root, name)
            if caught.value.errno != code:
                errors.append(caught.value.errno)

    cases = [("missing", errno.ENOENT), ("link", errno.ELOOP), ("tom.png/x", errno.ENOTDIR)] * 2
    threads = [threading.Thread(target=fail, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# -- other kernels ---------------------------------------------------------------------------------------------------


class Libc:
    """The C library of a kernel that answers openat2 with an error, as old kernels and sandboxes do."""

    def __init__(self, real: Any, refuse: Callable[[int], int]) -> None:
        self._real = real
        self._refuse = refuse
        self.syscall = self._Syscall(self)

    class _Syscall:
        restype: Any = None

        def __init__(self, libc: Libc) -> None:
            self._libc = libc

        def __call__(self, number: Any, root: Any, path: Any, how: Any, size: Any) -> int:
            code = self._libc._refuse(how._obj.resolve)
            if code:
                ctypes.set_errno(code)
                return -1
            self._libc._real.syscall.restype = ctypes.c_long
            return self._libc._real.syscall(number, root, path, how, size)


RESOLVE_CACHED = 0x20


def load_on_kernel(monkeypatch: pytest.MonkeyPatch, refuse: Callable[[int], int]) -> ModuleType:
    """Load the module again as on a kernel that refuses some calls; the module in use is not changed."""
    libc = Libc(ctypes.CDLL(None, use_errno=True), refuse)
    for loader in ("CDLL", "PyDLL"):
        monkeypatch.setattr(ctypes, loader, lambda *_, **__: libc)
    spec = importlib.util.spec_from_file_location("selfheal.syscalls_on_another_kernel", syscalls.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EINVAL])
def test_without_openat2_files_are_opened(monkeypatch: pytest.MonkeyPatch, root: int, code: int) -> None:
    """On an old kernel (ENOSYS) or in a sandbox (EPERM) files are opened without openat2."""
    module = load_on_kernel(monkeypatch, lambda resolve: code)
    assert not module.HAS_OPENAT2
    assert contents(module.open_file(root, "cats/old/tom.png")) == PICTURE
    with pytest.raises(BlockingIOError):
        module.open_cached(root, "tom.png")


def test_a_kernel_without_resolve_cached_waits(monkeypatch: pytest.MonkeyPatch, root: int) -> None:
    """On Linux 5.6 to 5.11, which refuses RESOLVE_CACHED (EINVAL), `open_cached` raises `BlockingIOError`."""
    module = load_on_kernel(monkeypatch, lambda resolve: errno.EINVAL if resolve & RESOLVE_CACHED else 0)
    with pytest.raises(BlockingIOError):
        module.open_cached(root, "tom.png")
    assert contents(module.open_file(root, "tom.png")) == PICTURE


def test_a_temporary_failure_does_not_disable_openat2(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that does not come from the kernel's age, such as EMFILE, does not disable openat2."""
    assert load_on_kernel(monkeypatch, lambda resolve: errno.EMFILE).HAS_OPENAT2


def test_openat2_is_called_only_on_linux(monkeypatch: pytest.MonkeyPatch, root: int) -> None:
    """On other systems than Linux openat2 is not called: its number is another call there."""
    called = []
    monkeypatch.setattr(sys, "platform", "darwin")
    module = load_on_kernel(monkeypatch, lambda resolve: called.append(resolve) or errno.ENOSYS)
    assert contents(module.open_file(root, "tom.png")) == PICTURE
    assert called == []


def test_without_syncfs_everything_is_synced(monkeypatch: pytest.MonkeyPatch, root: int) -> None:
    """Without syncfs in the C library all file systems are synced."""
    synced = []
    monkeypatch.setattr(os, "sync", lambda: synced.append(True))
    load_on_kernel(monkeypatch, lambda resolve: errno.ENOSYS).sync_filesystem(root)
    assert synced


CHURN = """
import resource, sys, threading
from selfheal.disk import syscalls
if sys.argv[1] == "kept":
    syscalls.keep_freed_memory()
def use():
    for _ in range(200):
        chunks = [bytes(262144) for _ in range(16)]
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
fetched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
one_at_a_time = threading.Semaphore()
def use_alone():
    with one_at_a_time:
        use()
threads = [threading.Thread(target=use_alone) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
pages = int(open("/proc/self/statm").read().split()[1])
print(fetched, pages * resource.getpagesize() >> 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_freed_memory_is_used_again() -> None:
    """With `keep_freed_memory` freed chunks are used again, and threads do not keep memory of their own."""

    def measure(how: str) -> tuple[int, int]:
        run = subprocess.run([sys.executable, "-c", CHURN, how], capture_output=True, check=True, text=True)
        pages, megabytes = map(int, run.stdout.split())
        return pages, megabytes

    (kept, megabytes), (released, before) = measure("kept"), measure("released")
    assert kept < 2000 < released
    assert megabytes < before + 20


def test_a_c_library_without_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without mallopt (musl, macOS) `keep_freed_memory` does nothing."""
    load_on_kernel(monkeypatch, lambda resolve: errno.ENOSYS).keep_freed_memory()
