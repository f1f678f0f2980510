"""The root of the uploads: a descriptor that is checked against the path, and the directories below it."""

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ..names import OWN_PREFIX
from . import syscalls
from .syscalls import Closing, Directory

MARKER = f"{OWN_PREFIX}-marker"
CHECK_EVERY = 1.0  # seconds between two checks that the path still leads to the directory that is open


class OpenRoot(Directory):
    """The open root, and which directory it is."""

    __slots__ = ("identity",)

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.identity = _identity(os.fstat(fd))


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
    """The uploads directory: where `path` leads now, which may change (deleted, mounted over, a link switched)."""

    def __init__(self, path: Path, *, mode: int, require_marker: bool) -> None:
        self.path = path
        self.mode = mode
        self.require_marker = require_marker
        self._open: OpenRoot | None = None
        self._checked = 0.0

    def cached(self) -> OpenRoot | None:
        """Return the open root without a look at the disk; None if it must be checked first."""
        return None if time.monotonic() - self._checked > CHECK_EVERY else self._open

    def open(self) -> OpenRoot | None:
        """Return the root as it is now; None if there is none."""
        root = self._open
        self._checked = time.monotonic()
        try:
            if root is None or root.identity != _identity(os.stat(self.path)):
                root = self._open = OpenRoot(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY))
        except (FileNotFoundError, NotADirectoryError):
            root = self._open = None
        return root

    def open_for_writing(self) -> OpenRoot:
        """Return the root, made if there is none. Raises `OSError` (EROFS) if the required marker is missing."""
        if self.require_marker and not (self.path / MARKER).exists():
            raise OSError(errno.EROFS, "the marker file is gone: the mount may be lost")
        root = self.open()
        if root is None:
            self.make()
            root = self.open()
        if root is None:
            raise syscalls.failure(errno.ENOENT)
        return root

    def make(self) -> None:
        """Make the directory, and those above it, if they are missing."""
        os.makedirs(self.path.parent, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path, self.mode & 0o777)
            os.chmod(self.path, self.mode)

    def make_folder(self, root: int, folder: str) -> int:
        """Open a folder below the descriptor `root`; make what is missing of its path."""
        try:
            return syscalls.open_directory(root, folder)
        except FileNotFoundError:
            pass
        here = os.dup(root)
        for part in folder.split("/"):
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, self.mode & 0o777, dir_fd=here)
                    os.chmod(part, self.mode, dir_fd=here)
                below = syscalls.open_directory(here, part)
            finally:
                os.close(here)
            here = below
        return here

    @contextlib.contextmanager
    def parent_of(self, name: str) -> Iterator[int]:
        """Open the directory that holds a name's file; raises `OSError` (ENOENT and others) if that fails."""
        root = self.open()
        if root is None:
            raise syscalls.failure(errno.ENOENT, name)
        parent = syscalls.open_directory(root.fd, name.rpartition("/")[0])
        try:
            yield parent
        finally:
            os.close(parent)

    def mark(self) -> None:
        """Make the marker file, which distinguishes a mounted uploads directory from an empty mount point."""
        self.make()
        (self.path / MARKER).touch(0o644)

    def close(self) -> None:
        """Close the root once its last user is done; a later call opens it again."""
        self._open = None


def _identity(measured: os.stat_result) -> tuple[int, int]:
    return measured.st_dev, measured.st_ino
