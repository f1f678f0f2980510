"""Directory listings: a walk over all files, and fast tests whether many names exist."""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..names import OWN_PREFIX
from . import syscalls
from .directory import UploadsDirectory
from .syscalls import Directory

LISTED_AT_MOST = 100_000  # names held in memory; in a larger directory, every name costs a stat
FOLDERS_AT_MOST = 32
"""Directories held in memory, least recently used first out: more do not fit the processor's caches."""

_NOISE = frozenset({".gitkeep", ".gitignore", ".keep", ".DS_Store", "Thumbs.db"})
_NO_DIRECTORY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENAMETOOLONG)


@dataclass(frozen=True, slots=True)
class Entry:
    """A directory entry: `size` in bytes, mtime in ns; `fault` says why it cannot be an upload."""

    name: str
    size: int
    modified_ns: int
    fault: str = ""


def walk(disk: UploadsDirectory) -> Iterator[Entry]:
    """Yield every entry below the root in the byte order of names; follow no link."""
    root = disk.root()
    if root is not None:
        yield from _walk(root, "")


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
            directory = None if root is None else Directory(syscalls.open_directory(root.fd, folder))
        except OSError as error:
            if error.errno not in _NO_DIRECTORY:
                raise
            directory = None
        if directory is None:
            return frozenset()
        with os.scandir(directory.fd) as scan:
            listed = itertools.islice(scan, LISTED_AT_MOST)
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


def _walk(root: Directory, folder: str) -> Iterator[Entry]:
    try:
        directory = Directory(syscalls.open_directory(root.fd, folder.rstrip("/")))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # it was a directory when its parent was read
            return
        raise
    with directory:
        with os.scandir(directory.fd) as scan:
            entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in scan]
        entries.sort(key=lambda entry: os.fsencode(entry[0] + "/" * (entry[1] and entry[0][0] != ".")))
        for last, is_directory in entries:
            name = folder + last
            if last in _NOISE or (not folder and last.startswith(OWN_PREFIX)):
                continue
            if is_directory and not last.startswith("."):
                yield from _walk(root, f"{name}/")
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield _entry(name, os.stat(last, dir_fd=directory.fd, follow_symlinks=False))


def _entry(name: str, measured: os.stat_result) -> Entry:
    return Entry(name, measured.st_size, measured.st_mtime_ns, _fault(measured.st_mode))


def _fault(mode: int) -> str:
    if stat.S_ISREG(mode):
        return ""
    if stat.S_ISDIR(mode):
        return "a hidden directory; nothing below it is served"
    if stat.S_ISLNK(mode):
        return "a symbolic link; links are not followed, put the file itself here"
    return "not a regular file"
