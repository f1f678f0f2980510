"""Staged files: a file is written, hashed and synced before it gets its name. A name is absent or whole."""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

from ..content.times import clamp_ns
from . import empty_directories, mount_points, syscalls
from .features import NOT_SUPPORTED, DiskFeatures
from .permissions import settle_file
from .root import TRIES, OpenRoot
from .syscalls import Closing, Directory
from .temporary import Temporary

T = TypeVar("T")

WRITE_BEHIND = 8 * 1024 * 1024
"""Bytes of a large file after which the disk starts to write, so that the sync has less to wait for."""
COPIED = 1024 * 1024  # bytes of a copy that are in memory

_LINK = "link unnamed files"
_NO_UNNAMED_FILES = (*NOT_SUPPORTED, errno.EISDIR)
_NO_LINK = (*NOT_SUPPORTED, errno.ENOENT)  # ENOENT: there is no /proc


class StagedFile(Closing):
    """A context manager: a file without a name, removed unless published; `parent` is its directory."""

    def __init__(self, root: OpenRoot, parent: int, name: str) -> None:
        self.name = name
        self.size = self._written_back = 0
        self._hash = hashlib.sha256()
        self._folder, _, self._last = name.rpartition("/")
        self._temporary: Temporary | None = None
        self._sealed: tuple[int, int | None] | None = None
        self._root = root
        self._parent = os.dup(parent)
        try:
            self.fd = self._in_folder(self._open)
        except BaseException:
            os.close(self._parent)
            raise

    @property
    def sha256(self) -> str:
        """The digest of the bytes written so far, in hex."""
        return self._hash.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Append and hash a chunk. Raises `OSError` (ENOSPC, EDQUOT, EFBIG, EIO) if the disk does not take it all."""
        _write_all(self.fd, chunk, self.size)
        self._hash.update(chunk)
        self.size += len(chunk)
        if self.size - self._written_back >= WRITE_BEHIND:
            syscalls.begin_writing_back(self.fd, self._written_back, self.size - self._written_back)
            self._written_back = self.size

    def seal(self, modified_ns: int, mode: int | None) -> None:
        """Set the mtime, in ns since the epoch, the owner, and the mode: `mode`, or one like the directory's."""
        features, wanted = self._root.features, clamp_ns(modified_ns)
        self._sealed = wanted, mode
        settle_file(self.fd, os.fstat(self._parent), mode, features)
        features.attempt("set times", os.utime, self.fd, ns=(wanted, wanted))

    def measure(self) -> os.stat_result:
        """Return the stat of the file, and learn from it what the disk kept of the time that was set."""
        measured = os.fstat(self.fd)
        if self._sealed is not None:
            self._root.features.times.learn(self._sealed[0], measured.st_mtime_ns)
        return measured

    def sync(self) -> None:
        """Write the bytes to the disk (fsync). After an error their state is unknown: throw the file away."""
        self._root.features.attempt("sync files", os.fsync, self.fd)

    def publish(self) -> bool:
        """Give the file its name, in place of directories without files; return False if the name is taken.

        Raises `FileExistsError` if it is taken by another spelling of the name, on a disk that ignores case.
        """
        for _ in range(TRIES):
            try:
                self._in_folder(self._give_name)
                return True
            except FileExistsError:
                pass
            self._root.check_free(self.name)
            if not empty_directories.remove_tree(self._parent, self._last):
                return False
        return False

    def close(self) -> None:
        """Close both descriptors; remove the file if it was not published."""
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self._parent)
        self.fd = self._parent = -1
        if self._temporary is not None:  # after the descriptor: FUSE gives an open file another name instead of none
            self._temporary.close()
            self._temporary = None

    def _open(self) -> int:
        if not self._root.features.lacks(_LINK):
            try:
                return syscalls.open_unnamed(self._parent)
            except OSError as error:
                if error.errno == errno.EPERM and _is_removed(self._parent):  # ext4
                    raise syscalls.failure(errno.ENOENT, self._last) from None
                if error.errno not in _NO_UNNAMED_FILES:
                    raise
        with ExitStack() as undo:
            temporary = undo.enter_context(self._new_temporary())
            fd = temporary.create()
            undo.pop_all()
        self._temporary = temporary
        return fd

    def _in_folder(self, work: Callable[[], T]) -> T:
        """Call `work`, and again if the folder is removed meanwhile: an empty one goes with its last file."""
        for number in range(TRIES):
            try:
                return work()
            except FileNotFoundError:
                if not self._folder:
                    raise
            time.sleep(number / 10_000)  # threads that make and remove it in step must come out of step
            parent = self._root.make_folder(self._folder)
            os.close(self._parent)
            self._parent = parent
        return work()

    def _give_name(self) -> None:
        if self._temporary is not None or not self._link(self._parent, self._last):
            self._with_temporary_name().link(self._parent, self._last)

    def _with_temporary_name(self) -> Temporary:
        """Return the temporary name; an unnamed file is linked to it, or copied where the disk does not link it."""
        if self._temporary is None:
            with ExitStack() as undo:
                temporary = undo.enter_context(self._new_temporary())
                if not self._link(temporary.directory, temporary.name):
                    self._copy(temporary)
                undo.pop_all()
            self._temporary = temporary
        return self._temporary

    def _new_temporary(self) -> Temporary:
        try:
            return Temporary(mount_points.top_of(self._root, self._folder, self._parent))
        except PermissionError:  # we may write in the folder, but not at the top
            return Temporary(Directory(os.dup(self._parent)))

    def _link(self, directory: int, name: str) -> bool:
        """Name the unnamed file; return False if the disk does not do that."""
        try:
            syscalls.name_descriptor(self.fd, directory, name)
        except OSError as error:
            if error.errno not in _NO_LINK or _is_removed(directory):
                raise
            self._root.features.note(_LINK, error)
            return False
        return True

    def _copy(self, temporary: Temporary) -> None:
        copy, at = temporary.create(), 0
        try:
            while piece := os.pread(self.fd, COPIED, at):
                _write_all(copy, piece, at)
                at += len(piece)
            os.dup2(copy, self.fd, inheritable=False)
        finally:
            os.close(copy)
        if self._sealed is not None:
            self.seal(*self._sealed)
        self.sync()


def sync_all(files: Sequence[StagedFile], features: DiskFeatures) -> None:
    """Write files to their disks: all of a file system at once (syncfs), or one by one where that is refused."""
    one_of_each = {os.fstat(file.fd).st_dev: file for file in files}.values()
    if not all(features.attempt("sync all files at once", syscalls.sync_filesystem, one.fd) for one in one_of_each):
        for file in files:
            file.sync()


def _write_all(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        view = view[os.pwrite(fd, view, at + len(data) - len(view)) :]


def _is_removed(directory: int) -> bool:
    return not os.fstat(directory).st_nlink
