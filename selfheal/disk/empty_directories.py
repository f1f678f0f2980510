"""Directories without files: removed with the last file in them, and where a file needs their name."""

import contextlib
import errno
import os
import stat

from . import syscalls
from .syscalls import Directory


def conflict(root: int, name: str) -> str:
    """Return why a name cannot be that of a file, as long as other files are there; empty if it can."""
    folder, _, last = name.rpartition("/")
    try:
        with Directory(syscalls.open_directory(root, folder)) as parent:
            return "it is a directory, and there are files in it" if has_files(parent.fd, last) else ""
    except OSError as error:
        return "a part of its path is a file" if error.errno in (errno.ENOTDIR, errno.ELOOP) else ""


def remove_emptied(root: int, folder: str) -> None:
    """Remove a folder if it is empty, and then those above it, but never the root."""
    while folder:
        above, _, last = folder.rpartition("/")
        try:
            with Directory(syscalls.open_directory(root, above)) as directory:
                os.rmdir(last, dir_fd=directory.fd)
        except OSError:  # not empty, a mount point, gone already, or the disk takes no change now
            return
        folder = above


def remove_tree(parent: int, last: str) -> bool:
    """Remove a directory that holds nothing but directories; return whether nothing has its name now."""
    try:
        if not stat.S_ISDIR(os.lstat(last, dir_fd=parent).st_mode) or has_files(parent, last):
            return False
        with Directory(syscalls.open_directory(parent, last)) as directory:
            is_empty = all(remove_tree(directory.fd, below) for below in os.listdir(directory.fd))
        if is_empty:
            os.rmdir(last, dir_fd=parent)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return is_empty


def has_files(parent: int, last: str) -> bool:
    """Whether a name is a directory with anything but directories below it. Raises `OSError` if it cannot be read."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(last, dir_fd=parent).st_mode):
            with Directory(syscalls.open_directory(parent, last)) as directory:
                return any(_holds_file(directory.fd, below) for below in os.listdir(directory.fd))
    return False


def _holds_file(parent: int, last: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return not stat.S_ISDIR(os.lstat(last, dir_fd=parent).st_mode) or has_files(parent, last)
    return False
