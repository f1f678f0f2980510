"""Disks that ignore case: `A.png` opens `a.png` there. A name counts only as a directory lists it."""

import itertools
import os

from . import syscalls
from .syscalls import Directory
from .temporary import TEMPORARY, Temporary

_LOOKED_AT = 1000  # entries of the root, to find one that has a letter
TRIES = 3  # a name that appears or changes while its directory is read may be left out


def minds_case(root: int) -> bool | None:
    """Whether a disk tells `A` from `a`; None if the root is empty, or has no letter and takes no file."""
    with Directory(syscalls.open_directory(root, "")) as directory, os.scandir(directory.fd) as scan:
        some = [entry.name for entry in itertools.islice(scan, _LOOKED_AT)]
    for name in some:
        other = name.swapcase()
        if name.isascii() and name != other:
            if _exists(root, other):
                return is_listed(root, other)
            if _exists(root, name):  # it was not removed meanwhile
                return True
    return minds_case_of_new_files(root) if some else None


def minds_case_of_new_files(root: int) -> bool | None:
    """As `minds_case`, for a root without any name that has a letter: with a temporary one."""
    try:
        with Directory(os.dup(root)) as top, Temporary(top):
            return not _exists(root, TEMPORARY.upper())
    except OSError:
        return None


def is_listed(root: int, name: str) -> bool | None:
    """Whether directories list all parts of a name as it is spelled; None if it is not there in any spelling."""
    parts = name.split("/")
    for depth, part in enumerate(parts):
        with Directory(syscalls.open_directory(root, "/".join(parts[:depth]))) as directory:
            found = _is_in(directory.fd, part)
        if not found:
            return found
    return True


def _is_in(directory: int, part: str) -> bool | None:
    for _ in range(TRIES):
        if part in os.listdir(directory):
            return True
        if not _exists(directory, part):
            return None
    return False


def _exists(directory: int, last: str) -> bool:
    try:
        os.lstat(last, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True
