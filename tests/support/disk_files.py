"""Files of an uploads directory: stored by selfheal, written by others, and read back."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.mark import FOLLOWED, MARK, SWEPT

MARKS = (MARK, FOLLOWED, SWEPT)
PICTURE = b"a picture " * 1000
OTHER = b"another picture " * 900
SECRET = b"a file outside of the uploads"
MODIFIED = 1_234_567_890_123_456_789
"""A time of last modification, in ns since the epoch."""
ABSURD_TIMES = [-(2**100), -(2**70), -(2**63), -1, 0, 2**63 - 1, 2**63, 2**70, 2**100, 253_402_300_800 * 10**9]
"""Times of last modification that a clock or a file system cannot have, in ns since the epoch (CVE-2017-20005)."""


def put(disk: UploadsDirectory, name: str, data: bytes = PICTURE) -> None:
    """Store bytes under a name, as a restore does."""
    with disk.refusals.raised(), disk.stage(name) as staged:
        staged.write(data)
        staged.seal(MODIFIED, disk.file_mode)
        staged.sync()
        while not staged.publish():
            disk.remove(name)


def set_modified(disk: UploadsDirectory, name: str, modified_ns: int) -> None:
    """Set the mtime of a name's file, if there is one."""
    file = disk.open(name)
    if file is not None:
        with file:
            disk.set_time(file, modified_ns)


def read(disk: UploadsDirectory, name: str) -> bytes | None:
    """Return what a request gets from this disk: from the page cache if that is possible, else after a wait."""
    try:
        file = disk.open_cached(name)
    except BlockingIOError:
        file = disk.open(name)
    if file is None:
        return None
    with file:
        return file.read_waiting(0, file.size + 1)


def write_file(path: Path, data: bytes = PICTURE) -> Path:
    """Write a file without selfheal, as a deploy or a person does; directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def paths_below(top: Path) -> list[Path]:
    """Return every path below a directory, sorted; what another process removes meanwhile may be missing."""
    return sorted(Path(path, name) for path, folders, files in os.walk(top) for name in (*folders, *files))


def contents_below(top: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a directory, by its relative path, but not the mark of the disk."""
    found = {}
    for path in paths_below(top):
        if path.is_file() and path.name not in MARKS:
            with suppress(FileNotFoundError):  # removed meanwhile
                found[str(path.relative_to(top))] = path.read_bytes()
    return found


def names_in(path: Path) -> list[str]:
    """Return the names in a directory, but not the mark of the disk."""
    return sorted(entry.name for entry in path.iterdir() if entry.name not in MARKS)


def mode_of(path: Path) -> int:
    """Return the permission bits of a path."""
    return stat.S_IMODE(path.lstat().st_mode)
