"""Directory listings: a walk over all files, and fast tests whether many names exist."""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import os
import shlex
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..names import MAX_NAME_BYTES, OWN_PREFIX
from . import syscalls
from .directory import UploadsDirectory
from .open_file import Identity, identity_of
from .root import OpenRoot
from .syscalls import Directory

LISTED_AT_MOST = 100_000  # names held in memory; in a larger directory, every name costs a stat
FOLDERS_AT_MOST = 32
"""Directories held in memory, least recently used first out: more do not fit the processor's caches."""

_NO_DIRECTORY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENAMETOOLONG)
_UNKNOWN: Identity = (0, 0, 0, 0)
_FAULTS = {
    stat.S_IFREG: "",
    stat.S_IFDIR: "a directory whose names are all too long or hidden",
    stat.S_IFLNK: "a symbolic link; links are not followed, put the file itself here",
}
_OTHER_FAULT = "not a regular file"


@dataclass(frozen=True, slots=True)
class Entry:
    """A directory entry as it was measured; `fault` says why it cannot be an upload, `is_link` that it is a link."""

    name: str
    identity: Identity
    fault: str = ""
    is_link: bool = False

    @property
    def size(self) -> int:
        """In bytes."""
        return self.identity[1]

    @property
    def changed_ns(self) -> int:
        """The last change of its bytes, its name or its mode, in ns since the epoch; `touch` sets only one of them."""
        return max(self.identity[0], self.identity[3])


def walk(disk: UploadsDirectory) -> Iterator[Entry]:
    """Yield every entry below the root in the byte order of names; follow no link.

    A directory that cannot be read is yielded with a fault, and the walk goes on; only the root raises `OSError`.
    """
    root = disk.root()
    if root is None:
        return
    folders = [_Folder(root, "")]
    while folders:
        folder = folders[-1]
        for last, is_directory in folder.entries:
            name = folder.prefix + last
            try:
                if is_directory and _can_hold_names(name):
                    folders.append(_Folder(root, name))
                    break
                yield folder.measure(last)
            except OSError as error:
                if error.errno not in _NO_DIRECTORY:  # it was there when its directory was read
                    yield Entry(name, _UNKNOWN, _unreadable(disk, name, error))
        else:
            folders.pop()


class Listing:
    """Which names have a regular file. Each directory is read once if names are asked for in order."""

    def __init__(self, disk: UploadsDirectory) -> None:
        self._disk = disk
        self._folders: dict[str, frozenset[str] | _LargeFolder] = {}
        self._held = 0

    def has(self, name: str) -> bool:
        """Whether a regular file has this name; follows no link. Raises `OSError` if that cannot be found out."""
        folder, _, last = name.rpartition("/")
        return last in self._files(folder)

    def has_all(self, names: Iterable[str]) -> bool:
        """As `has`, for many names; fast where the names below a folder are all directly in it."""
        ordered = sorted(names)
        start = 0
        while start < len(ordered):
            folder = _folder_of(ordered[start])
            # names below `folder/` sort before `folder0`, for 0 is the character after /
            stop = bisect.bisect_left(ordered, f"{folder}0", start) if folder else len(ordered)
            below, cut = ordered[start:stop], len(folder) + 1 if folder else 0
            if not self._files(folder).issuperset([name[cut:] for name in below]) and not all(map(self.has, below)):
                return False
            start = stop
        return True

    def _files(self, folder: str) -> frozenset[str] | _LargeFolder:
        files = self._folders.pop(folder, None)
        if files is None:
            files = self._read(folder)
            self._held += len(files)
            self._make_room(folder)
        self._folders[folder] = files  # now the most recently used
        return files

    def _make_room(self, folder: str) -> None:
        """Drop the least recently used folders; keep those above `folder`, which are asked for again."""
        while folder:
            folder = _folder_of(folder)
            if folder in self._folders:
                self._folders[folder] = self._folders.pop(folder)
        while self._folders and (self._held > LISTED_AT_MOST or len(self._folders) >= FOLDERS_AT_MOST):
            self._held -= len(self._folders.pop(next(iter(self._folders))))

    def _read(self, folder: str) -> frozenset[str] | _LargeFolder:
        root = self._disk.root()
        try:
            if root is None:
                return frozenset()
            directory = root.open_listed(folder)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY:
                raise
            return frozenset()
        with os.scandir(directory.fd) as scan:
            listed = itertools.islice(scan, LISTED_AT_MOST if root.minds_case else None)
            files = frozenset([entry.name for entry in listed if entry.is_file(follow_symlinks=False)])
            is_large = next(scan, None) is not None
        if is_large:
            return _LargeFolder(directory)
        directory.close()
        return files


class _LargeFolder:
    """A directory with more files than are held in memory."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def __len__(self) -> int:
        return 0  # none in memory

    def __contains__(self, last: str) -> bool:
        try:
            found = os.stat(last, dir_fd=self._directory.fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return stat.S_ISREG(found.st_mode)

    def issuperset(self, wanted: Iterable[str]) -> bool:
        return all("/" not in last and last in self for last in wanted)  # a path to a deeper name may go through a link


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


class _Folder:
    """A directory during a walk: its open descriptor, and its entries in the byte order of names."""

    def __init__(self, root: OpenRoot, name: str) -> None:
        self.prefix = f"{name}/" if name else ""
        self._directory = Directory(syscalls.open_directory(root.fd, name))
        try:
            self._stat(".")  # raises if entries can be listed, but not measured
            with os.scandir(self._directory.fd) as scan:
                entries = [(entry.name, _is_directory(entry)) for entry in scan]
        except OSError:
            self._directory.close()
            raise
        entries.sort(key=lambda entry: os.fsencode(entry[0] + "/" * (entry[1] and entry[0][0] != ".")))
        self.entries = iter([entry for entry in entries if not self._is_foreign(entry[0])])

    def measure(self, last: str) -> Entry:
        measured = self._stat(last)
        kind = stat.S_IFMT(measured.st_mode)
        return Entry(self.prefix + last, identity_of(measured), _FAULTS.get(kind, _OTHER_FAULT), stat.S_ISLNK(kind))

    def _stat(self, last: str) -> os.stat_result:
        return os.stat(last, dir_fd=self._directory.fd, follow_symlinks=False)

    def _is_foreign(self, last: str) -> bool:
        """Whether an entry is selfheal's own, or the file system's."""
        if self.prefix or last != "lost+found":
            return last.startswith(OWN_PREFIX)
        with contextlib.suppress(OSError):
            measured = self._stat(last)
            return measured.st_uid == 0 and stat.S_IMODE(measured.st_mode) == 0o700  # as mkfs makes it
        return False


def _is_directory(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):
        return entry.is_dir(follow_symlinks=False)
    return False


def _can_hold_names(folder: str) -> bool:
    """Whether a name below a folder can be valid; this also limits how deep a walk goes."""
    return folder[folder.rfind("/") + 1] != "." and len(os.fsencode(folder)) <= MAX_NAME_BYTES - len("/x")


def _unreadable(disk: UploadsDirectory, name: str, error: OSError) -> str:
    if not isinstance(error, PermissionError):
        return f"it cannot be read: {error.strerror}"
    path, user = shlex.quote(str(disk.path_of(name))), os.geteuid()
    return f"this user may not read it; `chown -R {user} {path}` or `chmod -R a+rX {path}` mends that"
