"""System calls that Python lacks: opening beneath a directory without links, naming a descriptor, syncfs.

All have a portable fallback, except `open_cached`, which raises where the kernel does not offer it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Self

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH, _RESOLVE_CACHED = 0x02, 0x04, 0x08, 0x20
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY  # a FIFO or device never blocks
_DIRECTORY = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _how(flags: int, resolve: int) -> ctypes._CArgObject:
    how = _OpenHow(flags, 0, resolve | _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS)
    return ctypes.byref(how)


# made once: every hit opens a file, and making these takes a third of that time
_NUMBER = ctypes.c_long(437)
_HOW_CACHED = _how(_FILE, _RESOLVE_CACHED)
_HOW_FILE = _how(_FILE, 0)
_HOW_DIRECTORY = _how(_DIRECTORY, 0)
_HOW_SIZE = ctypes.c_size_t(ctypes.sizeof(_OpenHow))

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
# for calls that never wait: it keeps the interpreter's lock, which takes longer to get back than the call
_syscall_at_once = ctypes.PyDLL(None, use_errno=True).syscall
_syscall_at_once.restype = ctypes.c_long


class Closing:
    """A context manager that closes itself."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; closing twice is harmless."""


class Directory(Closing):
    """An open directory, closed by `close` or with its last reference."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def failure(code: int, path: str | None = None) -> OSError:
    """Return the `OSError` of an errno: its subclass, with the system's message."""
    return OSError(code, os.strerror(code), path)


def _openat2(root: int, path: str, how: ctypes._CArgObject, syscall: Callable[..., int] = _syscall) -> int:
    if "\0" in path:
        raise ValueError("embedded null byte")  # C would end the name there
    fd = syscall(_NUMBER, root, os.fsencode(path), how, _HOW_SIZE)  # ctypes passes int as int, bytes as char *
    if fd < 0:
        raise failure(ctypes.get_errno(), path)
    return fd


def _has_openat2() -> bool:
    if sys.platform != "linux":
        return False
    try:
        os.close(_openat2(_AT_FDCWD, ".", _HOW_DIRECTORY))
    except OSError as error:
        return error.errno not in (errno.ENOSYS, errno.EPERM, errno.EINVAL)  # old kernel, or a sandbox that forbids it
    return True


_AT_FDCWD = -100
HAS_OPENAT2 = _has_openat2()


def open_cached(root: int, name: str) -> int:
    """Open a file beneath `root` if no disk is needed, else `BlockingIOError` (CVE-2024-23334, openat2(2))."""
    if not HAS_OPENAT2:
        raise BlockingIOError
    try:
        return _openat2(root, name, _HOW_CACHED, _syscall_at_once)
    except OSError as error:
        if error.errno == errno.EINVAL:  # Linux 5.6 to 5.11 has openat2, but not RESOLVE_CACHED
            raise BlockingIOError from None
        raise


def open_known(root: int, path: bytes) -> int:
    """As `open_cached`, for the encoded path of a file that was opened before; negative on any error."""
    return _syscall_at_once(_NUMBER, root, path, _HOW_CACHED, _HOW_SIZE) if HAS_OPENAT2 else -1


def open_file(root: int, name: str) -> int:
    """Open a file beneath `root` for reading; follow no link. Raises `OSError`. May wait for a disk."""
    return _open_beneath(root, name, _HOW_FILE, _FILE)


def open_directory(root: int, name: str) -> int:
    """Open the directory `name` beneath `root` (the empty name is `root` itself); follow no link."""
    if not name:
        return os.open(".", _DIRECTORY, dir_fd=root)  # a duplicate would share the position of a reader
    return _open_beneath(root, name, _HOW_DIRECTORY, _DIRECTORY)


def _open_beneath(root: int, name: str, how: ctypes._CArgObject, flags: int) -> int:
    if HAS_OPENAT2:
        return _openat2(root, name, how)
    *parents, last = parts = name.split("/")
    if ".." in parts:
        raise failure(errno.EXDEV, name)  # as RESOLVE_BENEATH does
    here = os.dup(root)
    try:
        for part in parents:
            below = os.open(part, _DIRECTORY, dir_fd=here)
            os.close(here)
            here = below
        return os.open(last, flags, dir_fd=here)
    finally:
        os.close(here)


def open_unnamed(directory: int) -> int:
    """Open a new file without a name in `directory` (O_TMPFILE); raises `OSError` where that is not supported."""
    if not hasattr(os, "O_TMPFILE"):
        raise failure(errno.EOPNOTSUPP)
    return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)


def name_descriptor(fd: int, directory: int, name: str) -> None:
    """Give an unnamed file a name in `directory`; raises `FileExistsError` if the name is taken."""
    # src_dir_fd makes Python 3.11 call linkat with AT_SYMLINK_FOLLOW; without it /proc/self/fd gives EXDEV
    os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=_AT_FDCWD, dst_dir_fd=directory, follow_symlinks=True)


def begin_writing_back(fd: int, start: int, size: int) -> None:
    """Start to write a part of a file to the disk, without waiting; it guarantees nothing (sync_file_range(2))."""
    if hasattr(_libc, "sync_file_range"):
        write = ctypes.c_uint(2)
        _libc.sync_file_range(ctypes.c_int(fd), ctypes.c_int64(start), ctypes.c_int64(size), write)


def sync_filesystem(fd: int) -> None:
    """Write all data of the file system that holds `fd` to its disk (syncfs(2)); raises `OSError`."""
    if hasattr(_libc, "syncfs"):
        if _libc.syncfs(ctypes.c_int(fd)) != 0:
            raise failure(ctypes.get_errno())
    else:
        os.sync()


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends, where it can (prctl(2))."""
    if hasattr(_libc, "prctl"):
        _libc.prctl(ctypes.c_int(_PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGKILL))


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory (mallopt(3)): only for a command, which then keeps up to 16 MiB."""
    if hasattr(_libc, "mallopt"):
        for what, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 32 * 2**20), (_M_TRIM_THRESHOLD, 16 * 2**20)):
            _libc.mallopt(ctypes.c_int(what), ctypes.c_int(value))
