"""The disk half: open, stage, publish, remove. Nothing below the root is opened through a link.

All of it may wait for a disk, except `open_cached` and `read_again`; call it in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from ..aio.threads import Threads
from ..errors import DiskUnwritable, NotAFile
from ..names import OWN_PREFIX
from . import staged_file, syscalls
from .open_file import Identity, OpenFile, close, identity_of, read_cached
from .staged_file import Staged
from .syscalls import Directory

QUARANTINE = f"{OWN_PREFIX}-quarantine"
MARKER = f"{OWN_PREFIX}-marker"
PUBLIC_DIRECTORIES = ("static", "public", "www", "html", "public_html", "htdocs", "assets", "media")
LOOK_EVERY = 1.0
"""Seconds after which it is looked again whether the path still leads to the same directory."""
REFUSED_FOR = 30.0
"""Seconds for which no write is tried after the disk said that it takes none."""

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_NOT_A_FILE = (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENODEV, errno.EXDEV)
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_FOR_GOOD = (errno.EROFS, errno.EACCES, errno.EPERM)


class _Root(Directory):
    """The root itself."""

    __slots__ = ("identity",)

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.identity = _identity(os.fstat(fd))


class Opened:
    """Directories that stay open while many files are staged. A context manager; any thread may use it."""

    def __init__(self) -> None:
        self.root: _Root | None = None
        self.folders: dict[str, int] = {}
        self._late: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (*self.folders.values(), *self._late):
            os.close(fd)

    def keep(self, folder: str, fd: int) -> int:
        """Remember a folder's descriptor; returns the one to use, if another thread was faster."""
        kept = self.folders.setdefault(folder, fd)
        if kept != fd:
            self._late.append(fd)
        return kept


class UploadsDirectory:
    """The directory of uploads. Modes are those given, whatever the umask.

    `quarantine` is where bad copies go (mode 0700); by default beside the uploads, or beside the public directory that
    holds them. With `require_marker` nothing is written unless the marker file is there: a lost mount has none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        file_mode: int = 0o644,
        directory_mode: int = 0o755,
        quarantine: str | os.PathLike[str] | None = None,
        require_marker: bool = False,
        threads: Threads | None = None,
    ) -> None:
        self.path = Path(path).absolute()
        self.file_mode = file_mode
        self.directory_mode = directory_mode
        self.quarantine_path = Path(quarantine).absolute() if quarantine else _beside(self.path)
        self.require_marker = require_marker
        self.threads = threads or Threads()
        self._prefix = f"{self.path}/"
        self._root: _Root | None = None
        self._looked = 0.0
        self._refused = ("", -REFUSED_FOR)

    def path_of(self, name: str) -> Path:
        """The absolute path of a name's file."""
        return self.path / name

    # -- reading ---------------------------------------------------------------------------------------------------

    def open_cached(self, name: str) -> OpenFile | None:
        """As `open`, but raises `BlockingIOError` wherever a disk might have to be waited for."""
        root = self._root
        if root is None or time.monotonic() - self._looked > LOOK_EVERY:
            raise BlockingIOError
        try:
            return self._measure(syscalls.open_cached(root.fd, name), name)
        except OSError as error:
            if not _is_absent(error, name):
                raise
            return None

    def read_again(self, path: bytes, identity: Identity, start: int, stop: int) -> bytes | None:
        """The bytes from `start` up to `stop` (a piece at most) of a file that was opened before, its `path` encoded.

        None if it is not what it was, or if a disk might have to be waited for.
        """
        root = self._root
        if root is None or time.monotonic() - self._looked > LOOK_EVERY:
            return None
        fd = syscalls.open_known(root.fd, path)
        if fd < 0:
            return None
        try:
            is_same = identity_of(os.fstat(fd)) == identity
            data = read_cached(fd, start, stop - start) if is_same and start < stop else b""
        except OSError:
            return None
        finally:
            close(fd)
        return data if is_same and len(data) == stop - start else None

    def open(self, name: str) -> OpenFile | None:
        """Open a name's file; None if there is none.

        Raises `NotAFile` if something else stands at the name, `OSError` (EACCES, EMFILE, EIO, …) if nobody can tell.
        """
        root = self.root()
        if root is None:
            return None
        try:
            return self._measure(syscalls.open_file(root.fd, name), name)
        except OSError as error:
            if not _is_absent(error, name):
                raise
            return None

    def stat(self, name: str) -> os.stat_result | None:
        """The stat of a name's file, following no link anywhere; None if there is no regular file."""
        try:
            with self._parent_of(name) as parent:
                found = os.lstat(_last(name), dir_fd=parent)
        except OSError as error:
            if error.errno not in (*_ABSENT, *_NOT_A_FILE):
                raise
            return None
        return found if stat.S_ISREG(found.st_mode) else None

    def root(self) -> _Root | None:
        """The root as it is now: the path may lead elsewhere since (deleted, mounted over, a link switched)."""
        root = self._root
        self._looked = time.monotonic()
        try:
            if root is None or root.identity != _identity(os.stat(self.path)):
                root = self._root = _Root(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY))
        except (FileNotFoundError, NotADirectoryError):
            root = self._root = None
        return root

    # -- writing ---------------------------------------------------------------------------------------------------

    def stage(self, name: str) -> Staged:
        """A file on its way to `name`; directories are made. Raises `DiskUnwritable` (`OSError`: no descriptors)."""
        with Opened() as opened, self.writing():
            return self.stage_among(opened, name)

    def stage_among(self, opened: Opened, name: str) -> Staged:
        """As `stage`, for many files, in directories that stay open; what an `OSError` means tells `refusal`."""
        folder = name.rpartition("/")[0]
        why, since = self._refused
        if time.monotonic() - since < REFUSED_FOR:
            raise DiskUnwritable(why)
        root = opened.root = opened.root or self._root_to_write()
        parent = opened.folders.get(folder)
        if parent is None:
            parent = opened.keep(folder, self._make_folder(root.fd, folder))
        return Staged(root, parent, name)

    def reader(self, staged: Staged, name: str) -> OpenFile:
        """A second descriptor of a staged file, for those who read it while it grows."""
        fd = os.dup(staged.fd)
        return OpenFile(fd, self._prefix + name, os.fstat(fd), self.threads)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raise what the errors of a disk that takes no more mean (`refusal`)."""
        try:
            yield
        except OSError as error:
            refusal = self.refusal(error)
            if refusal is error:
                raise
            raise refusal from error

    def refusal(self, error: OSError) -> OSError | DiskUnwritable:
        """What an error of writing means: `DiskUnwritable`, remembered if it is for good, unless we lack resources."""
        if error.errno in _OUT_OF_RESOURCES:
            return error
        why = f"{self.path} takes no file: {error.strerror or error}"
        if error.errno in _FOR_GOOD:
            self._refused = (why, time.monotonic())
        return DiskUnwritable(why)

    def sync(self) -> None:
        """Bring everything staged and published so far to the disk, at once (syncfs)."""
        root = self.root()
        if root is not None:
            syscalls.sync_filesystem(root.fd)

    def set_modified(self, name: str, modified_ns: int) -> None:
        """Set a file's time of last modification, in ns since the epoch."""
        with self._parent_of(name) as parent, contextlib.suppress(OverflowError):
            os.utime(_last(name), ns=(modified_ns, modified_ns), dir_fd=parent, follow_symlinks=False)

    def remove(self, name: str) -> bool:
        """Unlink a name's file; False if there was none."""
        try:
            with self._parent_of(name) as parent:
                os.unlink(_last(name), dir_fd=parent)
        except OSError as error:
            if error.errno in (*_ABSENT, errno.ELOOP):
                return False
            raise
        return True

    def quarantine(self, name: str) -> Path | None:
        """Move a name's file to where nobody is served from; returns its new path, or None if there was none."""
        try:
            with self._parent_of(name) as parent:
                return self._quarantine_from(parent, name)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise

    def mark(self) -> None:
        """Make the marker file, by which a mounted uploads directory is told from an empty mount point."""
        self._make_root()
        (self.path / MARKER).touch(0o644)

    def sweep(self) -> int:
        """Remove the temporary files of processes that died; returns how many."""
        root = self.root()
        return 0 if root is None else staged_file.sweep(root.fd)

    def close(self) -> None:
        """Let go of the root and of the threads; a later call opens them anew."""
        self._root = None
        self.threads.close()

    # -- inside ----------------------------------------------------------------------------------------------------

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

    def _root_to_write(self) -> _Root:
        if self.require_marker and not (self.path / MARKER).exists():
            raise OSError(errno.EROFS, "the marker file is gone: the mount may be lost")
        root = self.root()
        if root is None:
            self._make_root()
            root = self.root()
        if root is None:
            raise syscalls.failure(errno.ENOENT)
        return root

    def _make_root(self) -> None:
        os.makedirs(self.path.parent, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path, self.directory_mode & 0o777)
            os.chmod(self.path, self.directory_mode)

    def _make_folder(self, root: int, folder: str) -> int:
        try:
            return syscalls.open_directory(root, folder)
        except FileNotFoundError:
            pass
        here = os.dup(root)
        for part in folder.split("/"):
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, self.directory_mode & 0o777, dir_fd=here)
                    os.chmod(part, self.directory_mode, dir_fd=here)
                below = syscalls.open_directory(here, part)
            finally:
                os.close(here)
            here = below
        return here

    @contextlib.contextmanager
    def _parent_of(self, name: str) -> Iterator[int]:
        root = self.root()
        if root is None:
            raise syscalls.failure(errno.ENOENT, name)
        parent = syscalls.open_directory(root.fd, name.rpartition("/")[0])
        try:
            yield parent
        finally:
            os.close(parent)

    def _quarantine_from(self, parent: int, name: str) -> Path:
        os.lstat(_last(name), dir_fd=parent)  # no directories for a file that is gone
        with contextlib.suppress(OSError):
            return _set_aside(parent, name, self.quarantine_path)
        inside = self.path / QUARANTINE
        if inside.is_symlink():
            raise syscalls.failure(errno.ELOOP, str(inside))
        return _set_aside(parent, name, inside)


def _is_absent(error: OSError, name: str) -> bool:
    if error.errno in _NOT_A_FILE:
        raise NotAFile(name) from error
    return error.errno in _ABSENT


def _identity(measured: os.stat_result) -> tuple[int, int]:
    return measured.st_dev, measured.st_ino


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _set_aside(parent: int, name: str, quarantine: Path) -> Path:
    os.makedirs(quarantine, 0o700, exist_ok=True)
    own = quarantine / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    own.mkdir(0o700)
    target = own / name
    os.makedirs(target.parent, exist_ok=True)
    os.rename(_last(name), target, src_dir_fd=parent)
    return target


def _beside(path: Path) -> Path:
    """Where a server of static files does not reach: beside the uploads, or beside the public directory above them."""
    place = path.parent
    public = next((above for above in (place, *place.parents) if above.name in PUBLIC_DIRECTORIES), None)
    if public is not None:
        place = public.parent
        while place.name in PUBLIC_DIRECTORIES:
            place = place.parent
    return place / f"{QUARANTINE}-{path.name}"
