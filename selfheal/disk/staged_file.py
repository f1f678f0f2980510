"""Staged files: a file is written, hashed and synced before it gets its name. A name is absent or whole."""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets

from ..names import OWN_PREFIX
from . import syscalls
from .syscalls import Closing, Directory

TEMPORARY = f"{OWN_PREFIX}-tmp"  # the directory below the root for files that need a temporary name

WRITE_BEHIND = 8 * 1024 * 1024
"""Bytes of a large file after which the disk starts to write, so that the sync has less to wait for."""

_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP)


class StagedFile(Closing):
    """A context manager: a file without a name, removed unless published; `parent` is its directory."""

    def __init__(self, root: Directory, parent: int, name: str) -> None:
        self.size = self._written_back = 0
        self._hash = hashlib.sha256()
        self._last = name.rpartition("/")[2]
        self._temporary: _Temporary | None = None
        self._root = root
        self._parent = os.dup(parent)
        try:
            self.fd = self._open()
        except BaseException:
            os.close(self._parent)
            raise

    @property
    def sha256(self) -> str:
        """The digest of the bytes written so far, in hex."""
        return self._hash.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Append and hash a chunk. Raises `OSError` (ENOSPC, EDQUOT, EFBIG, EIO) if the disk does not take it all."""
        view = memoryview(chunk)
        while view:
            view = view[os.pwrite(self.fd, view, self.size + len(chunk) - len(view)) :]
        self._hash.update(chunk)
        self.size += len(chunk)
        if self.size - self._written_back >= WRITE_BEHIND:
            syscalls.begin_writing_back(self.fd, self._written_back, self.size - self._written_back)
            self._written_back = self.size

    def seal(self, modified_ns: int, mode: int) -> None:
        """Set the mode, whatever the umask, and the mtime, in ns since the epoch."""
        os.fchmod(self.fd, mode)
        with contextlib.suppress(OverflowError):  # a time out of range (CVE-2017-20005): the present one stays
            os.utime(self.fd, ns=(modified_ns, modified_ns))

    def sync(self) -> None:
        """Write the bytes to the disk (fsync). After an error their state is unknown: throw the file away."""
        os.fsync(self.fd)

    def publish(self) -> bool:
        """Give the file its name; return False, and change nothing, if the name is taken."""
        try:
            if self._temporary is None:
                syscalls.name_descriptor(self.fd, self._parent, self._last)
            else:
                self._temporary.link(self._parent, self._last)
        except FileExistsError:
            return False
        return True

    def replace(self) -> None:
        """Give the file its name and replace the file that has it: readers see the old or the new one, whole."""
        if self.publish():
            return
        if self._temporary is None:
            self._temporary = _Temporary(self._root.fd)
            syscalls.name_descriptor(self.fd, self._temporary.directory, self._temporary.name)
        self._temporary.rename(self._parent, self._last)

    def close(self) -> None:
        """Close both descriptors; remove the file if it was not published."""
        if self._temporary is not None:
            self._temporary.close(self._root.fd)
            self._temporary = None
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self._parent)
        self.fd = self._parent = -1

    def _open(self) -> int:
        try:
            return syscalls.open_unnamed(self._parent)
        except OSError as error:
            if error.errno == errno.EPERM and not os.fstat(self._parent).st_nlink:  # ext4: the directory was removed
                raise syscalls.failure(errno.ENOENT, self._last) from None
            if error.errno not in _NO_UNNAMED_FILES:
                raise
        temporary = _Temporary(self._root.fd)
        try:
            fd = temporary.create()
        except BaseException:
            temporary.close(self._root.fd)
            raise
        self._temporary = temporary
        return fd


class _Temporary:
    """A name in the temporary directory. Its users share a lock: an exclusive one proves that all died."""

    def __init__(self, root: int) -> None:
        self.name = secrets.token_hex()
        self.directory = _enter(root)

    def create(self) -> int:
        return os.open(self.name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600, dir_fd=self.directory)

    def link(self, parent: int, last: str) -> None:
        try:
            os.link(self.name, last, src_dir_fd=self.directory, dst_dir_fd=parent)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._move(parent, last)

    def rename(self, parent: int, last: str) -> None:
        os.rename(self.name, last, src_dir_fd=self.directory, dst_dir_fd=parent)

    def close(self, root: int) -> None:
        with contextlib.suppress(OSError):  # renamed; or the disk takes no change now, and a later sweep removes it
            os.unlink(self.name, dir_fd=self.directory)
        os.close(self.directory)
        sweep(root)

    def _move(self, parent: int, last: str) -> None:
        """Publish on a file system without links (FAT); another process may take the name between check and rename."""
        with contextlib.suppress(FileNotFoundError):
            os.lstat(last, dir_fd=parent)
            raise FileExistsError
        self.rename(parent, last)


def _enter(root: int) -> int:
    """Make and open the temporary directory, which another process may remove meanwhile, and share its lock."""
    for _ in range(100):
        with contextlib.suppress(FileExistsError):
            os.mkdir(TEMPORARY, 0o700, dir_fd=root)
        try:
            directory = syscalls.open_directory(root, TEMPORARY)
        except FileNotFoundError:
            continue
        except OSError:
            _remove(root)
            raise
        with contextlib.suppress(OSError):  # a file system without locks: nothing is swept then
            fcntl.flock(directory, fcntl.LOCK_SH)
        if _is_there(root, directory):
            return directory
        os.close(directory)
    raise syscalls.failure(errno.EBUSY, TEMPORARY)


def _is_there(root: int, directory: int) -> bool:
    """Whether the open temporary directory still has its name."""
    try:
        return os.path.samestat(os.lstat(TEMPORARY, dir_fd=root), os.fstat(directory))
    except FileNotFoundError:
        return False


def sweep(root: int) -> int:
    """Remove the files that dead processes left in the temporary directory; return their number."""
    try:
        directory = syscalls.open_directory(root, TEMPORARY)
    except OSError:
        return 0
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _sweep_locked(root, directory)
    except BlockingIOError:
        return 0  # a process uses it
    except OSError:
        _remove(root)  # a file system without locks: remove only an empty directory
        return 0
    finally:
        os.close(directory)


def _sweep_locked(root: int, directory: int) -> int:
    swept = 0
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory)
            swept += 1
    if _is_there(root, directory):
        _remove(root)
    return swept


def _remove(root: int) -> None:
    with contextlib.suppress(OSError):  # not empty, gone already, or the disk takes no change now
        os.rmdir(TEMPORARY, dir_fd=root)
