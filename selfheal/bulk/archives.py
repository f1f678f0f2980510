"""Archives to import from: a directory or a tar file. Only regular files with names below the root are opened."""

import math
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Protocol

from ..disk.directory import UploadsDirectory
from ..disk.listing import walk
from ..disk.syscalls import Directory, open_file
from ..errors import NotAFile, SettingsError
from .outcomes import Outcome, Result, problem

_NOT_BELOW = re.compile(r"^/|(?:^|/)\.\.(?:/|$)")
_DAMAGES = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)
"""What `tarfile` raises for a header that makes no sense: not always an error of its own."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive: its path, and its mtime in ns since the epoch."""

    path: str
    modified_ns: int


class Archive(Protocol):
    """The files of a directory or of a tar file. Every call may wait for a disk."""

    def members(self) -> Iterator[Member | Result]:
        """Yield all files, and results for what is no file, or has a path that leads out."""

    def open(self, path: str) -> IO[bytes]:
        """Open a file. Raises `FileNotFoundError`, `NotAFile`."""

    def has_folder(self, name: str) -> bool:
        """Whether there is a folder of this name."""

    def parent_of(self, name: str) -> str | None:
        """Return a folder that has a folder of this name in it: a directory is looked through at its top only."""

    def close(self) -> None:
        """Close the archive."""


def open_archive(path: Path) -> Archive:
    """Open a directory or a tar file. Raises `SettingsError` if it is neither."""
    if path.is_dir():
        return DirectoryArchive(path)
    if not path.exists():
        raise SettingsError(f"there is no directory or tar file {path} to import from")
    return TarArchive(path)


class DirectoryArchive(Archive):
    """A directory; no link in it is followed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._root = Directory(os.open(path, os.O_RDONLY | os.O_DIRECTORY))

    def members(self) -> Iterator[Member | Result]:
        for entry in walk(UploadsDirectory(self._path)):
            if entry.fault:
                yield problem(entry.name, Outcome.FAILED, entry.fault)
            else:
                yield Member(entry.name, entry.identity[0])

    def open(self, path: str) -> IO[bytes]:
        file = os.fdopen(open_file(self._root.fd, path), "rb")
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise NotAFile(f"{path!r} is no file")
        return file

    def has_folder(self, name: str) -> bool:
        return (self._path / name).is_dir()

    def parent_of(self, name: str) -> str | None:
        return next((path.parent.name for path in self._path.glob(f"*/{name}")), None)

    def close(self) -> None:
        self._root.close()


class TarArchive(Archive):
    """An uncompressed tar file, of which nothing is extracted (CVE-2007-4559). The last of equal paths counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._refused: list[Result] = []
        self._places: dict[str, tuple[int, int, int]] = {}
        self._file = open(path, "rb")  # noqa: SIM115 - closed in `close`
        try:
            self._read_index()
        except BaseException:
            self._file.close()
            raise

    def members(self) -> Iterator[Member | Result]:
        yield from self._refused
        for path, (_, _, modified_ns) in self._places.items():
            yield Member(path, modified_ns)

    def open(self, path: str) -> IO[bytes]:
        if path not in self._places:
            raise FileNotFoundError(f"{path!r} is not in {self._path}")
        start, size, _ = self._places[path]
        return BufferedReader(_Part(self._file.fileno(), start, size))

    def has_folder(self, name: str) -> bool:
        return any(path.startswith(f"{name}/") for path in self._places)

    def parent_of(self, name: str) -> str | None:
        parts = (path.partition(f"/{name}/") for path in self._places)
        return next((folder for folder, found, _ in parts if found), None)

    def close(self) -> None:
        self._file.close()

    def _read_index(self) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            with tarfile.open(fileobj=self._file, mode="r:", errors="surrogateescape") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                    if member.size < 0 or tar.offset <= member.offset:  # it would go round for ever (CVE-2025-8194)
                        raise tarfile.ReadError("a size is negative")
                    self._add(member, end)
                last = os.pread(self._file.fileno(), tarfile.BLOCKSIZE, tar.offset)
        except _DAMAGES as error:
            if not self._places and not self._refused:
                raise SettingsError(
                    f"{self._path} is no tar file ({error}); a compressed one cannot be read"
                ) from error
            last = b""
        if last != bytes(tarfile.BLOCKSIZE):
            detail = "the tar file is damaged or cut off: what follows is not imported"
            self._refused.append(problem(str(self._path), Outcome.FAILED, detail))

    def _add(self, member: tarfile.TarInfo, end: int) -> None:
        path = member.name.removeprefix("./")
        if member.isdir():
            return
        if _NOT_BELOW.search(path):
            self._refused.append(problem(path, Outcome.INVALID_NAME, "its path leads out of the archive"))
        elif not member.isreg() or member.issparse():
            self._refused.append(problem(path, Outcome.FAILED, "it is a link, a device or sparse, and not imported"))
        elif member.offset_data + member.size > end:
            self._refused.append(problem(path, Outcome.FAILED, "the tar file ends in the middle of it"))
        else:
            self._places[path] = (member.offset_data, member.size, _to_ns(member.mtime))


def _to_ns(seconds: float) -> int:
    return int(seconds * 10**9) if math.isfinite(seconds) else 0


class _Part(RawIOBase):
    """A part of an open file; many can be read at the same time."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd = fd
        self._at = start
        self._end = start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]
        data = os.pread(self._fd, min(len(buffer), self._end - self._at), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
