"""The disk: open, stage, remove, set aside. Nothing below the root is opened through a link.

Every call may wait for a disk, except `open_cached` and `read_again`: make it in a thread.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path

from ..aio.threads import Threads
from ..errors import NotAFile
from . import quarantine as quarantine_directory
from . import staged_file, syscalls
from .open_file import Identity, OpenFile, close, identity_of, read_cached
from .refusals import Refusals
from .root import OpenFolders, OpenRoot, Root
from .staged_file import StagedFile

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_NOT_A_FILE = (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENODEV, errno.EXDEV)


class UploadsDirectory:
    """The directory of uploads. Files and directories get the given modes, whatever the umask.

    `quarantine` is the directory for copies that are set aside (mode 0700); by default it is beside the uploads, or
    beside the public directory that holds them. With `require_marker` nothing is written unless the marker file is
    there: a lost mount has none.
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
        self.quarantine_path = (
            Path(quarantine).absolute() if quarantine else quarantine_directory.default_path(self.path)
        )
        self.threads = threads or Threads()
        self._prefix = f"{self.path}/"
        self._root = Root(self.path, mode=directory_mode, require_marker=require_marker)
        self.refusals = Refusals(self.path)

    def path_of(self, name: str) -> Path:
        """Return the absolute path of a name's file."""
        return self.path / name

    def open_cached(self, name: str) -> OpenFile | None:
        """As `open`, but raises `BlockingIOError` rather than wait for a disk."""
        root = self._root.cached()
        if root is None:
            raise BlockingIOError
        try:
            return self._measure(syscalls.open_cached(root.fd, name), name)
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
            is_same = identity_of(os.fstat(fd)) == identity
            data = read_cached(fd, start, stop - start) if is_same and start < stop else b""
        except OSError:
            return None
        finally:
            close(fd)
        return data if is_same and len(data) == stop - start else None

    def open(self, name: str) -> OpenFile | None:
        """Open a name's file; None if there is none. Raises `NotAFile`, `OSError` (EACCES, EMFILE, EIO, …)."""
        root = self._root.open()
        if root is None:
            return None
        try:
            return self._measure(syscalls.open_file(root.fd, name), name)
        except OSError as error:
            if not _is_absent(error, name):
                raise
            return None

    def stat(self, name: str) -> os.stat_result | None:
        """Return the stat of a name's regular file; None if there is none. Follows no link."""
        try:
            with self._root.parent_of(name) as parent:
                found = os.lstat(_last(name), dir_fd=parent)
        except OSError as error:
            if error.errno not in (*_ABSENT, *_NOT_A_FILE):
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

    def root(self) -> OpenRoot | None:
        """Return the open root as it is now; None if there is no uploads directory."""
        return self._root.open()

    def stage(self, name: str) -> StagedFile:
        """Open a new file, in directories made as needed. Raises `DiskUnwritable`, or `OSError` (EMFILE)."""
        with OpenFolders() as folders, self.refusals.raised():
            return self.stage_among(folders, name)

    def stage_among(self, opened: OpenFolders, name: str) -> StagedFile:
        """As `stage`, for many files in `opened` directories; `refusals` tells what a raised `OSError` means."""
        folder = name.rpartition("/")[0]
        self.refusals.check()
        root = opened.root = opened.root or self._root.open_for_writing()
        parent = opened.folders.get(folder)
        if parent is None:
            parent = opened.keep(folder, self._root.make_folder(root.fd, folder))
        return StagedFile(root, parent, name)

    def reader(self, staged: StagedFile, name: str) -> OpenFile:
        """Open a second descriptor of a staged file, to read it while it grows."""
        fd = os.dup(staged.fd)
        return OpenFile(fd, self._prefix + name, os.fstat(fd), self.threads)

    def sync(self) -> None:
        """Write all staged and published files to the disk at once (syncfs)."""
        root = self._root.open()
        if root is not None:
            syscalls.sync_filesystem(root.fd)

    def set_modified(self, name: str, modified_ns: int) -> None:
        """Set a file's mtime, in ns since the epoch."""
        with self._root.parent_of(name) as parent, contextlib.suppress(OverflowError):
            os.utime(_last(name), ns=(modified_ns, modified_ns), dir_fd=parent, follow_symlinks=False)

    def remove(self, name: str) -> bool:
        """Unlink a name's file; return False if there was none."""
        try:
            with self._root.parent_of(name) as parent:
                os.unlink(_last(name), dir_fd=parent)
        except OSError as error:
            if error.errno in (*_ABSENT, errno.ELOOP):
                return False
            raise
        return True

    def quarantine(self, name: str) -> Path | None:
        """Move a name's file to the quarantine, or to a hidden directory; return its path, None without a file."""
        try:
            with self._root.parent_of(name) as parent:
                os.lstat(_last(name), dir_fd=parent)  # makes no directories for a file that is gone
                with contextlib.suppress(OSError):
                    return quarantine_directory.move(parent, name, self.quarantine_path)
                inside = self.path / quarantine_directory.QUARANTINE
                if inside.is_symlink():
                    raise syscalls.failure(errno.ELOOP, str(inside))
                return quarantine_directory.move(parent, name, inside)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise

    def mark(self) -> None:
        """Make the marker file that `require_marker` asks for."""
        self._root.mark()

    def sweep(self) -> int:
        """Remove the temporary files of processes that died; return how many."""
        root = self._root.open()
        return 0 if root is None else staged_file.sweep(root.fd)

    def close(self) -> None:
        """Close the root and the threads; a later call opens them again."""
        self._root.close()
        self.threads.close()

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


def _is_absent(error: OSError, name: str) -> bool:
    if error.errno in _NOT_A_FILE:
        raise NotAFile(name) from error
    return error.errno in _ABSENT


def _last(name: str) -> str:
    return name.rpartition("/")[2]
