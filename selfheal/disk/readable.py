"""Reading a directory of uploads: its files are opened at once, after a wait, or again, and through no link."""

import contextlib
import errno
import os
import stat
from pathlib import Path

from ..aio.threads import Threads
from ..errors import NotAFile
from . import syscalls
from .open_file import Identity, OpenFile, close, identity_of, read_cached
from .root import OpenRoot, Root

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
DISTRUSTED_AT_MOST = 10_000  # files that are known to be wrong and cannot be moved away
_NOT_A_FILE = (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENODEV, errno.EXDEV)


class ReadableDirectory:
    """The files below a root. Every call may wait for a disk, except `open_cached` and `read_again`."""

    def __init__(self, path: Path, root: Root, threads: Threads) -> None:
        self.path = path
        self.threads = threads
        self._root = root
        self._prefix = f"{path}/"
        self._distrusted: set[Identity] = set()

    def path_of(self, name: str) -> Path:
        """Return the absolute path of a name's file."""
        return self.path / name

    def root(self) -> OpenRoot | None:
        """Return the open root as it is now; None if there is no uploads directory."""
        return self._root.open()

    def open_cached(self, name: str) -> OpenFile | None:
        """As `open`, but raises `BlockingIOError` rather than wait for a disk."""
        root = self._root.cached()
        if root is None:
            raise BlockingIOError
        try:
            return self._trusted(self._measure(syscalls.open_cached(root.fd, name), name))
        except OSError as error:
            if not _is_absent(error, name):
                raise
            return None

    def read_again(self, path: bytes, identity: Identity, start: int, stop: int) -> bytes | None:
        """Read a piece of a file opened before; None if it is another one by now, or not in memory."""
        root = self._root.cached()
        if root is None:
            return None
        fd = syscalls.open_known(root.fd, path)
        if fd < 0:
            return None
        try:
            is_same = identity_of(os.fstat(fd)) == identity and not (self._distrusted and identity in self._distrusted)
            data = read_cached(fd, start, stop - start) if is_same and start < stop else b""
        except OSError:
            return None
        finally:
            close(fd)
        return data if is_same and len(data) == stop - start else None

    def open(self, name: str) -> OpenFile | None:
        """Open a name's file; None if there is none, or if it is distrusted. Raises `NotAFile`, `OSError` (EIO, …)."""
        return self._trusted(self.open_distrusted(name))

    def open_distrusted(self, name: str) -> OpenFile | None:
        """As `open`, also a file that is distrusted."""
        root = self._root.open()
        if root is None:
            return None
        try:
            root.check_listed(name)
            return self._measure(syscalls.open_file(root.fd, name), name)
        except OSError as error:
            if not _is_absent(error, name):
                raise
            return None

    def stat(self, name: str) -> os.stat_result | None:
        """Return the stat of a name's regular file; None if there is none. Follows no link."""
        try:
            with self._root.parent_of(name) as parent:
                found = os.lstat(last_part(name), dir_fd=parent)
        except OSError as error:
            if error.errno not in (*ABSENT, *_NOT_A_FILE):
                raise
            return None
        return found if stat.S_ISREG(found.st_mode) else None

    def digest(self, name: str) -> str | None:
        """Return the SHA-256 of a name's file in hex; None if there is no file. Raises as `open` does."""
        file = self.open(name)
        if file is None:
            return None
        with file:
            return file.sha256()

    def distrust(self, name: str) -> None:
        """Do not serve a name's file as it is now: it is not the recorded one, and cannot be moved away."""
        if len(self._distrusted) >= DISTRUSTED_AT_MOST:
            self._distrusted.clear()
        with contextlib.suppress(OSError):
            there = self.stat(name)
            if there is not None:
                self._distrusted.add(identity_of(there))

    @property
    def has_distrusted(self) -> bool:
        """Whether any file is distrusted."""
        return bool(self._distrusted)

    def is_distrusted(self, name: str) -> bool:
        """Whether a name's file is distrusted as it is now."""
        there = self.stat(name)
        return there is not None and identity_of(there) in self._distrusted

    def _trusted(self, file: OpenFile | None) -> OpenFile | None:
        if file is None or not (self._distrusted and file.identity in self._distrusted):
            return file
        file.close()
        return None

    def _measure(self, fd: int, name: str) -> OpenFile:
        try:
            measured = os.fstat(fd)
        except OSError:
            close(fd)
            raise
        if not stat.S_ISREG(measured.st_mode):
            close(fd)
            raise NotAFile(name)
        return OpenFile(fd, self._prefix + name, measured, self.threads)


def last_part(name: str) -> str:
    """Return what follows the last slash of a name."""
    return name.rpartition("/")[2]


def _is_absent(error: OSError, name: str) -> bool:
    if error.errno in _NOT_A_FILE:
        raise NotAFile(name) from error
    return error.errno in ABSENT
