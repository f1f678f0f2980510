"""Files on disk: written, damaged and compared without selfheal."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from random import Random
from typing import Any

from selfheal.names import OWN_PREFIX
from tests.support.disk_files import MARKS, paths_below

MODIFIED_NS = 1_500_000_000_123_456_789
"""The mtime in ns that `write_file` gives: older than every process and every record."""


def noise(size: int, seed: object = 0) -> bytes:
    """Return `size` bytes without a pattern; the same size and seed give the same bytes."""
    return Random(ascii((seed, size))).randbytes(size)


def write_file(path: Path, data: bytes, *, modified_ns: int = MODIFIED_NS) -> Path:
    """Write a file as another program does, with its directories, mode 0644 and an mtime; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o644)
    os.utime(path, ns=(modified_ns, modified_ns))
    return path


def flip_a_bit(path: Path) -> None:
    """Flip one bit in the middle of a file and keep its size and mtime, as a failing disk does."""
    measured = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(measured.st_mtime_ns, measured.st_mtime_ns))


def snapshot_of(base: Path) -> dict[str, tuple[Any, ...]]:
    """Return mode, inode, mtime, size and digest of everything below a directory, by path, but not the disk's mark.

    Links are not followed; the mtime of a directory says no more than the names in it.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for path in [base, *paths_below(base)] if base.exists() else []:
        if path.name in MARKS:
            continue
        measured = path.lstat()
        seen: tuple[Any, ...] = (measured.st_mode, measured.st_ino)
        if not stat.S_ISDIR(measured.st_mode):
            seen += (measured.st_mtime_ns,)
        if stat.S_ISREG(measured.st_mode):
            seen += (measured.st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        found[str(path)] = seen
    return found


def own_files_below(directory: Path) -> list[str]:
    """Return the files of selfheal itself below a directory, for instance temporary files that a run left."""
    return [str(path) for path in paths_below(directory) if path.name.startswith(OWN_PREFIX) and path.name not in MARKS]
