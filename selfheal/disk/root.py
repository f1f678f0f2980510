"""The root of the uploads: a descriptor that is checked against the path, and the directories below it."""

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ..names import OWN_PREFIX
from . import empty_directories, mark, spelling, syscalls
from .features import DiskFeatures
from .idle_watch import IdleWatch
from .permissions import first_mode, settle_directory
from .syscalls import Closing, Directory

MARKER = f"{OWN_PREFIX}-marker"
CHECK_EVERY = 1.0  # seconds between two checks that the path still leads to the directory that is open
CLOSED_AFTER = 5.0  # seconds without use after which it is closed
TRIES = 100  # how often something is made that others remove meanwhile


class OpenRoot(Directory):
    """The open root: which directory it is, and what its disk can do."""

    __slots__ = ("features", "identity", "minds_case", "mode")

    def __init__(self, fd: int, features: DiskFeatures, mode: int | None) -> None:
        super().__init__(fd)
        self.identity = _identity(os.fstat(fd))
        self.features = features
        self.mode = mode
        self.minds_case = spelling.minds_case(fd)

    def check_listed(self, name: str) -> None:
        """Raise `FileNotFoundError` unless a name is on the disk as it is spelled. A disk that minds case does that."""
        if not self.minds_case and not spelling.is_listed(self.fd, name):
            raise syscalls.failure(errno.ENOENT, name)

    def check_free(self, name: str) -> None:
        """Raise `FileExistsError` if a part of a name is on a disk that ignores case, in another spelling."""
        if not self.minds_case and spelling.is_listed(self.fd, name) is False:
            raise FileExistsError(errno.EEXIST, f"{name!r} is there in another case, and the disk ignores case")

    def open_listed(self, folder: str) -> Directory:
        """Open a folder; raise `FileNotFoundError` if it is not there as it is spelled."""
        if folder:
            self.check_listed(folder)
        return Directory(syscalls.open_directory(self.fd, folder))

    def make_folder(self, folder: str) -> int:
        """Open a folder; make what is missing of its path. Others may remove it while it is empty."""
        for _ in range(TRIES):
            with contextlib.suppress(FileNotFoundError):
                return syscalls.open_directory(self.fd, folder)
            with contextlib.suppress(FileNotFoundError):
                return self._make_folder(folder)
        raise syscalls.failure(errno.ENOENT, folder)

    def _make_folder(self, folder: str) -> int:
        here = os.dup(self.fd)
        for part in folder.split("/"):
            try:
                below = self._make_part(here, part)
            finally:
                os.close(here)
            here = below
        return here

    def _make_part(self, here: int, part: str) -> int:
        try:
            os.mkdir(part, first_mode(self.mode), dir_fd=here)
        except FileExistsError:
            return syscalls.open_directory(here, part)
        below = syscalls.open_directory(here, part)
        settle_directory(below, os.fstat(here), self.mode, self.features)
        return below


class OpenFolders(Closing):
    """Directories that stay open while many files are staged. A context manager; safe to use from many threads."""

    def __init__(self) -> None:
        self.root: OpenRoot | None = None
        self.folders: dict[str, int] = {}
        self._duplicates: list[int] = []

    def close(self) -> None:
        for fd in (*self.folders.values(), *self._duplicates):
            os.close(fd)

    def keep(self, folder: str, fd: int) -> int:
        """Keep a folder's descriptor; return the one to use, which is another thread's if that was faster."""
        kept = self.folders.setdefault(folder, fd)
        if kept != fd:
            self._duplicates.append(fd)
        return kept


class Root:
    """The uploads directory: where `path` leads now, which may change (deleted, mounted over, a link switched).

    It is closed after some idle seconds: a file system of which a directory is open cannot be unmounted.
    """

    def __init__(self, path: Path, features: DiskFeatures, *, mode: int | None, require_marker: bool) -> None:
        self.path = path
        self.features = features
        self.require_marker = require_marker
        self._mode = mode
        self._open: OpenRoot | None = None
        self._cached: OpenRoot | None = None
        self._checked = 0.0
        self._idle = IdleWatch(self._close_if_idle)

    def cached(self) -> OpenRoot | None:
        """Return the open root without a look at the disk; None if it must be checked first, or it ignores case."""
        return None if time.monotonic() - self._checked > CHECK_EVERY else self._cached

    def open(self) -> OpenRoot | None:
        """Return the root as it is now; None if there is none."""
        root = self._open
        self._checked = time.monotonic()
        try:
            if root is None or root.identity != _identity(os.stat(self.path)):
                root = OpenRoot(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY), self.features, self._mode)
            elif root.minds_case is None:
                root.minds_case = spelling.minds_case(root.fd)
        except (FileNotFoundError, NotADirectoryError):
            root = None
        return self._keep(root)

    def open_for_writing(self) -> OpenRoot:
        """Return the root, made if there is none. Raises `OSError` (EROFS) if the required marker is missing."""
        if not self.is_marked():
            raise OSError(errno.EROFS, "the marker file is gone: the mount may be lost")
        root = self.open()
        if root is None:
            self.make()
            root = self.open()
        if root is None:
            raise syscalls.failure(errno.ENOENT)
        if root.minds_case is None:
            root.minds_case = spelling.minds_case_of_new_files(root.fd)
            self._keep(root)
        return root

    def make(self) -> None:
        """Make the directory, and those above it, if they are missing."""
        missing = itertools.takewhile(lambda path: not path.exists(), (self.path, *self.path.parents))
        for path in reversed(list(missing)):
            mode = self._mode if path == self.path else None
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, first_mode(mode))
                with Directory(os.open(path, os.O_RDONLY | os.O_DIRECTORY)) as made:
                    settle_directory(made.fd, os.stat(path.parent), mode, self.features)
                    if path == self.path:
                        mark.marked_ns(made.fd)

    @contextlib.contextmanager
    def parent_of(self, name: str) -> Iterator[int]:
        """Open the directory that holds a name's file; raises `OSError` (ENOENT and others) if that fails."""
        root = self.open()
        if root is None:
            raise syscalls.failure(errno.ENOENT, name)
        root.check_listed(name)
        parent = syscalls.open_directory(root.fd, name.rpartition("/")[0])
        try:
            yield parent
        finally:
            os.close(parent)

    def remove_emptied(self, name: str) -> None:
        """Remove the directories above a name that are empty."""
        root = self.open()
        if root is not None:
            empty_directories.remove_emptied(root.fd, name.rpartition("/")[0])

    def is_marked(self) -> bool:
        """Whether the marker file is there, if it is required."""
        return not self.require_marker or (self.path / MARKER).exists()

    def mark(self) -> None:
        """Make the marker file, which distinguishes a mounted uploads directory from an empty mount point."""
        self.make()
        (self.path / MARKER).touch(0o644)

    def close(self) -> None:
        """Close the root once its last user is done; a later call opens it again."""
        self._idle.stop()
        self._keep(None)

    def _keep(self, root: OpenRoot | None) -> OpenRoot | None:
        self._open = root
        self._cached = root if root is not None and root.minds_case else None
        if root is not None:
            self._idle.start()
        return root

    def _close_if_idle(self) -> bool:
        """Close the root if nothing used it lately; return whether it is closed. Hits check it every second."""
        if time.monotonic() - self._checked > CLOSED_AFTER:
            self._keep(None)
        return self._open is None


def _identity(measured: os.stat_result) -> tuple[int, int]:
    return measured.st_dev, measured.st_ino
