"""Temporary files: in a hidden directory at the top of a file system, swept when the processes that made them died."""

import contextlib
import errno
import fcntl
import os
import secrets

from ..names import OWN_PREFIX
from . import syscalls
from .features import NOT_SUPPORTED
from .syscalls import Closing, Directory

TEMPORARY = f"{OWN_PREFIX}-tmp"  # the directory for files that need a temporary name


class Temporary(Closing):
    """A name in the temporary directory of `top`. Its users share a lock: an exclusive one proves that all died."""

    def __init__(self, top: Directory) -> None:
        self.name = secrets.token_hex()
        self._top = top
        self.directory = _enter(top.fd)

    def create(self) -> int:
        """Make the file; return its descriptor."""
        return os.open(self.name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600, dir_fd=self.directory)

    def link(self, parent: int, last: str) -> None:
        """Give the file a second name in the directory `parent`, or the only one on a disk without links."""
        try:
            os.link(self.name, last, src_dir_fd=self.directory, dst_dir_fd=parent)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            self._move(parent, last)

    def rename(self, parent: int, last: str) -> None:
        """Give the file its final name, in place of the file that has it."""
        os.rename(self.name, last, src_dir_fd=self.directory, dst_dir_fd=parent)

    def close(self) -> None:
        """Remove the file, unless it was renamed, and the directory with it."""
        with contextlib.suppress(OSError):  # renamed; or the disk takes no change now, and a later sweep removes it
            os.unlink(self.name, dir_fd=self.directory)
        os.close(self.directory)
        sweep(self._top.fd)

    def _move(self, parent: int, last: str) -> None:
        """Publish on a file system without links (FAT); another process may take the name between check and rename."""
        with contextlib.suppress(FileNotFoundError):
            os.lstat(last, dir_fd=parent)
            raise FileExistsError
        self.rename(parent, last)


def _enter(top: int) -> int:
    """Make and open the temporary directory, which another process may remove meanwhile, and share its lock."""
    for _ in range(100):
        with contextlib.suppress(FileExistsError):
            os.mkdir(TEMPORARY, 0o700, dir_fd=top)
        try:
            directory = syscalls.open_directory(top, TEMPORARY)
        except FileNotFoundError:
            continue
        except OSError:
            _remove(top)
            raise
        with contextlib.suppress(OSError):  # a file system without locks: nothing is swept then
            fcntl.flock(directory, fcntl.LOCK_SH)
        if _is_there(top, directory):
            return directory
        os.close(directory)
    raise syscalls.failure(errno.EBUSY, TEMPORARY)


def _is_there(top: int, directory: int) -> bool:
    """Whether the open temporary directory still has its name."""
    try:
        return os.path.samestat(os.lstat(TEMPORARY, dir_fd=top), os.fstat(directory))
    except FileNotFoundError:
        return False


def sweep(top: int) -> int:
    """Remove the files that dead processes left in the temporary directory; return their number."""
    try:
        directory = syscalls.open_directory(top, TEMPORARY)
    except OSError:
        return 0
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _sweep_locked(top, directory)
    except BlockingIOError:
        return 0  # a process uses it
    except OSError:
        _remove(top)  # a file system without locks: remove only an empty directory
        return 0
    finally:
        os.close(directory)


def count(top: int) -> int:
    """Return the number of files in the temporary directory."""
    try:
        directory = syscalls.open_directory(top, TEMPORARY)
    except OSError:
        return 0
    try:
        return len(os.listdir(directory))
    finally:
        os.close(directory)


def _sweep_locked(top: int, directory: int) -> int:
    swept = 0
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory)
            swept += 1
    if _is_there(top, directory):
        _remove(top)
    return swept


def _remove(top: int) -> None:
    with contextlib.suppress(OSError):  # not empty, gone already, or the disk takes no change now
        os.rmdir(TEMPORARY, dir_fd=top)
