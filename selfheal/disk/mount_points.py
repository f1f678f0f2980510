"""File systems that are mounted below the root: no file is renamed or linked from one to another."""

import contextlib
import os
import re
from collections.abc import Callable

from . import syscalls, temporary
from .syscalls import Directory


def top_of(root: Directory, folder: str, directory: int) -> Directory:
    """Return the highest directory above `folder` that is on the same mount as it; `directory` is its descriptor."""
    mount = _mount_of(directory)
    if _mount_of(root.fd) == mount:
        return root
    parts = folder.split("/")
    for depth in range(1, len(parts)):
        top = Directory(syscalls.open_directory(root.fd, "/".join(parts[:depth])))
        if _mount_of(top.fd) == mount:
            return top
    return Directory(os.dup(directory))


def sweep_all(root: Directory, path: str | os.PathLike[str]) -> int:
    """Remove what dead processes left at the top of each file system of the root at `path`; return how many files."""
    return _total(temporary.sweep, root, path)


def count_temporary(root: Directory, path: str | os.PathLike[str]) -> int:
    """Return the number of temporary files on all file systems of the root at `path`."""
    return _total(temporary.count, root, path)


def file_system_of(path: str | os.PathLike[str]) -> str:
    """Return the type of the file system that a path is on (Linux; elsewhere it is empty)."""
    found, best = os.path.realpath(path), (-1, "")
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            point, _, rest = _unescaped(line.split(b" ")[4]), *line.partition(b" - ")[1:]
            if found == point or found.startswith(point.rstrip("/") + "/"):  # a later mount covers an earlier one
                best = max(best, (len(point), rest.split(b" ")[0].decode()), key=lambda one: one[0])
    return best[1]


def _total(function: Callable[[int], int], root: Directory, path: str | os.PathLike[str]) -> int:
    total = function(root.fd)
    for folder in _mounts_below(path):
        with contextlib.suppress(OSError), Directory(syscalls.open_directory(root.fd, folder)) as top:
            total += function(top.fd)
    return total


def _mounts_below(path: str | os.PathLike[str]) -> list[str]:
    """Return the paths, relative to `path`, at which something is mounted (Linux; elsewhere none is known)."""
    above = os.path.realpath(path) + "/"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as lines:
        points = (_unescaped(line.split(b" ")[4]) for line in lines)
        return sorted({point[len(above) :] for point in points if point.startswith(above)})
    return []


def _mount_of(fd: int) -> tuple[int, bytes]:
    """Return what two directories have in common if one mount holds them: a bind mount has its own number."""
    number = b""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{fd}", "rb") as lines:
        number = next((line for line in lines if line.startswith(b"mnt_id:")), b"")
    return os.fstat(fd).st_dev, number


def _unescaped(path: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), path))
