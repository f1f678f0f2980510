"""The disk: open, stage, remove, set aside. Nothing below the root is opened through a link.

Every call may wait for a disk, except `open_cached` and `read_again`: make it in a thread.
"""

import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from ..aio.threads import Threads
from ..content.times import clamp_ns
from ..events import logger
from . import empty_directories, mark, mount_points, syscalls
from .features import DiskFeatures
from .open_file import OpenFile
from .quarantine import Quarantine
from .readable import ABSENT, ReadableDirectory, last_part
from .refusals import Refusals
from .root import OpenFolders, Root
from .staged_file import StagedFile, sync_all


class UploadsDirectory(ReadableDirectory):
    """The directory of uploads. What is made in it has the owner, group write and setgid of its directory.

    `file_mode` and `directory_mode` are the modes of all that is made, if they are given, whatever the umask.
    `quarantine` is the directory for copies that are set aside (mode 0700); by default it is beside the uploads, or
    beside the public directory that holds them. With `require_marker` nothing is written unless the marker file is
    there: a lost mount has none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        file_mode: int | None = None,
        directory_mode: int | None = None,
        quarantine: str | os.PathLike[str] | None = None,
        require_marker: bool = False,
        threads: Threads | None = None,
    ) -> None:
        path = Path(path).absolute()
        self._features = DiskFeatures(path)
        root = Root(path, self._features, mode=directory_mode, require_marker=require_marker)
        super().__init__(path, root, threads or Threads())
        self.file_mode = file_mode
        self.refusals = Refusals(path)
        self._quarantine = Quarantine(path, quarantine)
        self.quarantine_path = self._quarantine.path

    def conflict(self, name: str) -> str:
        """Return why a name cannot be a file as long as other files are there; empty if it can."""
        root = self._root.open()
        return "" if root is None else empty_directories.conflict(root.fd, name)

    def prepare(self) -> None:
        """Make the directory if it is missing; log it if that fails. With `require_marker`, leave it to the mount."""
        try:
            if not self._root.require_marker:
                self._root.make()
        except OSError as error:
            logger.warning("%s cannot be made: %s; files are served from the database", self.path, error.strerror)

    def stage(self, name: str) -> StagedFile:
        """Open a new file, in directories made as needed. Raises `DiskUnwritable`, or `OSError` (EMFILE)."""
        with OpenFolders() as folders, self.refusals.raised(name):
            return self.stage_among(folders, name)

    def stage_among(self, opened: OpenFolders, name: str) -> StagedFile:
        """As `stage`, for many files in `opened` directories; `refusals` tells what a raised `OSError` means."""
        folder = name.rpartition("/")[0]
        self.refusals.check(folder)
        root = opened.root = opened.root or self._root.open_for_writing()
        root.check_free(name)
        parent = opened.folders.get(folder)
        if parent is None:
            parent = opened.keep(folder, root.make_folder(folder))
        return StagedFile(root, parent, name)

    def reader(self, staged: StagedFile, name: str) -> OpenFile:
        """Open a second descriptor of a staged file, to read it while it grows."""
        fd = os.dup(staged.fd)
        return OpenFile(fd, self._prefix + name, os.fstat(fd), self.threads)

    def sync(self, files: Sequence[StagedFile]) -> None:
        """Write staged files to the disk, all at once where it can do that. Raises `OSError`: they may be lost."""
        sync_all(files, self._features)

    def kept_ns(self, modified_ns: int) -> int:
        """Return the mtime, in ns, that this disk gives back for a recorded one: some keep 100 ns, 1 s or 2 s."""
        return self._features.times.kept(modified_ns)

    def set_time(self, file: OpenFile, modified_ns: int) -> None:
        """Set the mtime of an open file, in ns since the epoch, as far as the disk can keep it."""
        wanted = clamp_ns(modified_ns)
        if self._features.attempt("set times", os.utime, file.fd, ns=(wanted, wanted)):
            self._features.times.learn(wanted, os.fstat(file.fd).st_mtime_ns)

    def remove(self, name: str) -> bool:
        """Unlink a name's file, and the directories that are empty without it; return False if there was none."""
        try:
            with self._root.parent_of(name) as parent:
                os.unlink(last_part(name), dir_fd=parent)
        except OSError as error:
            if error.errno in (*ABSENT, errno.ELOOP, errno.EISDIR):
                return False
            raise
        self._root.remove_emptied(name)
        return True

    def quarantine(self, name: str) -> Path | None:
        """Move a name's file to the quarantine; return its path there, None without a file."""
        try:
            with self._root.parent_of(name) as parent:
                moved = self._quarantine.move(parent, name)
        except OSError as error:
            if error.errno in (*ABSENT, errno.EISDIR):
                return None
            raise
        self._root.remove_emptied(name)
        return moved

    def quarantined(self, age: float, errors: list[OSError] | None = None) -> list[tuple[str, Path]]:
        """Return the name and path of every file in quarantine for at least `age` seconds.

        Why something cannot be read is added to `errors`; without them it is raised.
        """
        failed = list[OSError]() if errors is None else errors
        found = list(self._quarantine.entries(age, failed))
        if errors is None and failed:
            raise failed[0]
        return found

    def sweep_quarantine(self, age: float) -> None:
        """Remove what dead processes left in quarantine at least `age` seconds ago, except files."""
        self._quarantine.sweep(age)

    def open_quarantined(self, path: Path) -> OpenFile:
        """Open a file in quarantine."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return OpenFile(fd, str(path), os.fstat(fd), self.threads)

    def remove_quarantined(self, path: Path) -> None:
        """Remove a file in quarantine: the database has its bytes."""
        self._quarantine.remove(path)

    def marked_ns(self) -> int:
        """Return since when this disk is in use, in ns since the epoch: a file that changed earlier came with it."""
        root = self._root.open()
        return 0 if root is None else mark.marked_ns(root.fd)

    def read_followed(self) -> str:
        """Return what `write_followed` wrote on this disk."""
        root = self._root.open()
        return "" if root is None else mark.read_followed(root.fd)

    def write_followed(self, text: str) -> None:
        """Remember on this disk what was followed."""
        root = self._root.open()
        if root is not None:
            mark.write_followed(root.fd, text)

    def read_swept(self) -> tuple[tuple[int, int], str] | None:
        """Return what tells this disk from one that takes its place, and what `write_swept` wrote; None without one."""
        root = self._root.open()
        return None if root is None else (root.identity, mark.read_swept(root.fd))

    def write_swept(self, disk: tuple[int, int], text: str) -> None:
        """Remember how far a sweep is. Raises `FileNotFoundError` if another disk is here than `disk`."""
        root = self._root.open()
        if root is None or root.identity != disk:
            raise syscalls.failure(errno.ENOENT, str(self.path))
        mark.write_swept(root.fd, text)

    def only_process(self, lock: str = mark.MARK) -> contextlib.AbstractContextManager[bool]:
        """Return a context in which one process at a time is: it is given whether it is this one."""
        root = self._root.open()
        return contextlib.nullcontext(True) if root is None else mark.only_process(root.fd, lock)

    def is_marked(self) -> bool:
        """Whether the marker file is there, if `require_marker` asks for it."""
        return self._root.is_marked()

    def mark(self) -> None:
        """Make the marker file that `require_marker` asks for."""
        self._root.mark()

    def sweep(self) -> int:
        """Remove the temporary files of processes that died; return how many."""
        root = self._root.open()
        return 0 if root is None else mount_points.sweep_all(root, self.path)

    def temporary_files(self) -> int:
        """Return the number of temporary files, of running processes and of dead ones."""
        root = self._root.open()
        return 0 if root is None else mount_points.count_temporary(root, self.path)

    def close(self) -> None:
        """Close the root and the threads; a later call opens them again."""
        self._root.close()
        self.threads.close()
