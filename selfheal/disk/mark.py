"""The mark: a file of ours below the root that says since when this disk is in use, what this node has followed, and
how far its sweep is.

A copy of a disk (a container's image, a backup) brings the mark with it: it holds its own inode number, which a copy
does not have. It also holds the time by this machine's clock: a mark that a wrong clock dated in the future is
replaced once the clock is right. The disk's own clock (a server of files) may always differ from it.
"""

import contextlib
import os
import time
from collections.abc import Iterator

from ..names import OWN_PREFIX
from .file_lock import try_lock
from .syscalls import Directory
from .temporary import Temporary

MARK = f"{OWN_PREFIX}-disk"
FOLLOWED = f"{OWN_PREFIX}-followed"
SWEPT = f"{OWN_PREFIX}-swept"

AHEAD_NS = 2 * 10**9  # a clock that was ahead by less was right
_STARTED_NS = time.time_ns()


def marked_ns(root: int) -> int:
    """Return when the mark was made, in ns since the epoch by the disk's clock; make it if there is none.

    On a disk that takes no file it is the start of this process.
    """
    try:
        return _read_mark(root) or _make_mark(root)
    except OSError:
        return _STARTED_NS


def read_followed(root: int) -> str:
    """Return what `write_followed` wrote last; empty if there is nothing."""
    try:
        return _read(root, FOLLOWED)[0]
    except OSError:
        return ""


def write_followed(root: int, text: str) -> None:
    """Remember a text on this disk; a disk that takes no file forgets it."""
    with contextlib.suppress(OSError):
        _write(root, FOLLOWED, text)


def read_swept(root: int) -> str:
    """Return what `write_swept` wrote last; empty if there is nothing."""
    try:
        return _read(root, SWEPT)[0]
    except OSError:
        return ""


def write_swept(root: int, text: str) -> None:
    """Remember how far a sweep is, in place: the file is locked meanwhile, and another file would not be."""
    with contextlib.suppress(OSError):
        fd = os.open(SWEPT, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644, dir_fd=root)
        try:
            os.truncate(fd, os.pwrite(fd, text.encode(), 0))
        finally:
            os.close(fd)


@contextlib.contextmanager
def only_process(root: int, lock: str = MARK) -> Iterator[bool]:
    """Yield whether no other process is in this block for the same disk and lock; true on a disk without locks."""
    fd = -1
    try:
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | (0 if lock == MARK else os.O_CREAT)
            fd = os.open(lock, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644, dir_fd=root)
        yield fd < 0 or try_lock(fd)
    finally:
        if fd >= 0:
            os.close(fd)


def _read_mark(root: int) -> int | None:
    try:
        text, found = _read(root, MARK)
    except FileNotFoundError:
        return None
    inode, _, made_ns = text.partition(" ")
    is_of_the_future = made_ns.isdecimal() and int(made_ns) > time.time_ns() + AHEAD_NS
    return found.st_mtime_ns if inode == str(found.st_ino) and not is_of_the_future else None


def _make_mark(root: int) -> int:
    _write(root, MARK, None)
    return _read_mark(root) or _STARTED_NS


def _read(root: int, name: str) -> tuple[str, os.stat_result]:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=root)
    try:
        return os.read(fd, 65536).decode(errors="replace"), os.fstat(fd)
    finally:
        os.close(fd)


def _write(root: int, name: str, text: str | None) -> None:
    """Write a file of ours and give it its name; without a text, its inode number and the time."""
    with Directory(os.dup(root)) as top, Temporary(top) as temporary:
        fd = temporary.create()
        try:
            with contextlib.suppress(OSError):  # a disk without modes
                os.fchmod(fd, 0o644)
            os.write(fd, (f"{os.fstat(fd).st_ino} {time.time_ns()}" if text is None else text).encode())
        finally:
            os.close(fd)
        temporary.rename(root, name)
