"""A file before it has its name: written, hashed, synced, and only then published. A name is absent or whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable
from typing import Self

from . import syscalls
from .names import OWN_PREFIX

TEMPORARY = f"{OWN_PREFIX}-tmp"
"""The directory, directly below the root, in which a file stands that needs a name before its own."""

_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOENT)


class Staged:
    """Bytes on their way to a name. Use as a context manager: what was not published leaves no trace.

    `root` and `parent` are descriptors of directories; both are only used while they are held by the caller.
    """

    def __init__(self, root: int, parent: int, name: str) -> None:
        self.size = 0
        self._hash = hashlib.sha256()
        self._root = os.dup(root)
        self._parent = os.dup(parent)
        self._last = name.rpartition("/")[2]
        self._temporary: str | None = None
        self.fd = -1
        try:
            self.fd = self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sha256(self) -> str:
        """The digest, in hex, of all that was written so far."""
        return self._hash.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Append and hash; raises `OSError` (ENOSPC, EDQUOT, EFBIG, EIO) if the disk does not take it all."""
        view = memoryview(chunk)
        while view:
            view = view[os.pwrite(self.fd, view, self.size + len(chunk) - len(view)) :]
        self._hash.update(chunk)
        self.size += len(chunk)

    def seal(self, modified_ns: int, mode: int) -> None:
        """Set the mode, whatever the umask, and the time of last modification, in ns since the epoch."""
        os.fchmod(self.fd, mode)
        with contextlib.suppress(OverflowError):  # an absurd time (CVE-2017-20005) keeps the present one
            os.utime(self.fd, ns=(modified_ns, modified_ns))

    def sync(self) -> None:
        """Bring the bytes to the disk. After an error nothing can be said of them: throw the file away."""
        os.fsync(self.fd)

    def publish(self) -> bool:
        """Give the file its name; False, and no change, if the name is taken."""
        try:
            self._link(self._parent, self._last)
        except FileExistsError:
            return False
        return True

    def replace(self) -> None:
        """Give the file its name, in place of whatever file has it: readers see the old or the new one, whole."""
        if self.publish():
            return
        if self._temporary is not None:
            self._rename(self._temporary)
            self._temporary = None
            return
        temporary = self._in_temporary_directory(self._link)
        self._rename(temporary)

    def close(self) -> None:
        """Close every descriptor; remove what was not published."""
        if self._temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{TEMPORARY}/{self._temporary}", dir_fd=self._root)
            self._tidy()
        for fd in (self.fd, self._parent, self._root):
            if fd >= 0:
                os.close(fd)
        self.fd = self._parent = self._root = -1
        self._temporary = None

    def _open(self) -> int:
        try:
            return syscalls.open_unnamed(self._parent)
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        opened: list[int] = []
        self._temporary = self._in_temporary_directory(
            lambda directory, name: opened.append(os.open(name, flags, 0o600, dir_fd=directory))
        )
        fcntl.flock(opened[0], fcntl.LOCK_EX)  # says to a sweep that its owner lives
        return opened[0]

    def _link(self, directory: int, name: str) -> None:
        if self._temporary is None:
            syscalls.name_descriptor(self.fd, directory, name)
            return
        source = f"{TEMPORARY}/{self._temporary}"
        try:
            os.link(source, name, src_dir_fd=self._root, dst_dir_fd=directory)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._move(source, directory, name)  # a file system without links (FAT)

    def _move(self, source: str, directory: int, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.stat(name, dir_fd=directory, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        os.rename(source, name, src_dir_fd=self._root, dst_dir_fd=directory)
        self._temporary = None
        self._tidy()

    def _rename(self, temporary: str) -> None:
        try:
            os.rename(f"{TEMPORARY}/{temporary}", self._last, src_dir_fd=self._root, dst_dir_fd=self._parent)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(f"{TEMPORARY}/{temporary}", dir_fd=self._root)
            self._tidy()

    def _in_temporary_directory(self, make: Callable[[int, str], object]) -> str:
        """Make something under a random name in the temporary directory, which another process may just be removing."""
        for _ in range(100):
            with contextlib.suppress(FileExistsError):
                os.mkdir(TEMPORARY, 0o700, dir_fd=self._root)
            name = secrets.token_hex(16)
            try:
                directory = syscalls.open_directory(self._root, TEMPORARY)
                try:
                    make(directory, name)
                finally:
                    os.close(directory)
            except FileNotFoundError:
                continue
            return name
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), TEMPORARY)

    def _tidy(self) -> None:
        with contextlib.suppress(OSError):  # others may still be at work in it
            os.rmdir(TEMPORARY, dir_fd=self._root)


def sweep(root: int) -> int:
    """Remove the temporary files of processes that died; returns how many. `root` is the directory's descriptor."""
    try:
        directory = syscalls.open_directory(root, TEMPORARY)
    except OSError:
        return 0
    try:
        swept = sum(_sweep_file(directory, name) for name in os.listdir(directory))
    finally:
        os.close(directory)
    with contextlib.suppress(OSError):
        os.rmdir(TEMPORARY, dir_fd=root)
    return swept


def _sweep_file(directory: int, name: str) -> bool:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=directory)
    except OSError:
        return False  # its owner lives, or another sweep was first
    finally:
        os.close(fd)
    return True
