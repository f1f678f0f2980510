"""System calls of a process, seen and changed by strace."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.disk_files import MARKS

SECONDS = 40.0
"""The longest time that an operation may take before it counts as hung."""
CHANGES = (
    "openat,openat2,write,pwrite64,pwritev,pwritev2,fsync,fdatasync,sync_file_range,syncfs,linkat,rename,renameat,"
    "renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,ftruncate,fallocate,utimensat,fchmod,fchmodat,flock,fcntl,close,sendfile,"
    "copy_file_range"
)
"""Every system call that changes or syncs what is on a disk, or that locks it."""
MESSAGES = f"{CHANGES},sendto,sendmsg"
"""The same for a database that is reached through a socket."""
READS = "read,pread64,preadv,preadv2,newfstatat,fstat,stat,lstat,statx,getdents64,dup"
"""Calls that change nothing and can fail like the others."""
ERRORS = {
    "openat": ["EMFILE", "ENFILE", "ENOMEM", "EACCES", "EIO", "ENOSPC", "EDQUOT", "EROFS", "EINTR"],
    "openat2": ["EMFILE", "ENFILE", "ENOMEM", "EACCES", "EIO", "EINTR", "EAGAIN"],
    "write": ["ENOSPC", "EIO", "EDQUOT", "EFBIG", "EINTR"],
    "fsync": ["EIO", "ENOSPC", "EDQUOT", "EROFS", "EINTR"],
    "syncfs": ["EIO", "ENOSPC", "EDQUOT"],
    "link": ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOMEM", "EMLINK"],
    "rename": ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "EPERM"],
    "unlink": ["EIO", "EROFS", "EACCES", "EPERM", "EBUSY"],
    "mkdir": ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "EMLINK"],
    "ftruncate": ["EIO", "EINTR", "EPERM"],
    "fchmod": ["EIO", "EPERM", "EROFS"],
    "flock": ["ENOLCK", "EINTR"],
    "F_DUPFD": ["EMFILE"],
    "F_SETLK": ["EAGAIN", "EACCES", "EIO", "ENOLCK", "EINTR"],
    "close": ["EIO", "ENOSPC", "EDQUOT"],
    "read": ["EIO", "EINTR"],
    "stat": ["EIO", "EACCES", "ENOMEM"],
    "getdents64": ["EIO"],
}
"""The errors of a call on a machine that is broken, full, read-only or busy."""
_SAME_ERRORS = {
    "pwrite64": "write", "pwritev": "write", "pwritev2": "write", "fdatasync": "fsync", "linkat": "link",
    "renameat": "rename", "renameat2": "rename", "unlinkat": "unlink", "rmdir": "unlink", "mkdirat": "mkdir",
    "fallocate": "ftruncate", "utimensat": "fchmod", "fchmodat": "fchmod", "pread64": "read", "preadv": "read",
    "preadv2": "read", "newfstatat": "stat", "fstat": "stat", "lstat": "stat", "statx": "stat",
}  # fmt: skip
FREQUENT = frozenset({"pwrite64", "write", "fcntl", "close", "openat", "openat2", "pread64", "read", "fstat"})
"""Frequent calls: a kill between two of the other calls seldom finds anything new."""
_LINE = re.compile(r"^(\d+) +(\w+)\((.*)$")


@dataclass(frozen=True)
class Call:
    """A system call of an operation: number `nth` (from 1) with its name in thread number `thread` (from 0)."""

    thread: int
    nth: int
    name: str
    arguments: str = ""

    @property
    def errors(self) -> list[str]:
        """The errors that it can return."""
        if self.name == "fcntl":
            return next((errors for command, errors in ERRORS.items() if command in self.arguments), [])
        return ERRORS.get(_SAME_ERRORS.get(self.name, self.name), [])

    def __str__(self) -> str:
        return f"{self.name}({self.arguments[:120]} [call {self.nth} of thread {self.thread}]"


def read_calls(log: Path, threads: list[int]) -> list[Call]:
    """Return the calls in a log of strace, in the order in which they began; fail for a thread that is not known."""
    found, counts = [], Counter[tuple[int, str]]()
    for line in log.read_text(errors="replace").splitlines():
        if match := _LINE.match(line):
            assert int(match[1]) in threads, f"a thread that was created after the start: {line}"
            thread = threads.index(int(match[1]))
            counts[thread, match[2]] += 1
            found.append(Call(thread, counts[thread, match[2]], match[2], match[3]))
    return found


@contextlib.contextmanager
def attached(*options: str, process: int) -> Iterator[None]:
    """Run strace on a process or on one thread: it sees every call inside the block."""
    tracer = subprocess.Popen(["strace", *options, "-p", str(process)], stderr=subprocess.PIPE)
    assert tracer.stderr is not None
    try:
        first = tracer.stderr.readline()
        assert b"attached" in first, first + tracer.stderr.read()
        yield
        tracer.wait(SECONDS)
    finally:
        tracer.kill()
        tracer.communicate()


_WRITES = ("write", "pwrite64", "pwritev", "pwritev2")
_FILE_WITH_PATH = re.compile(r"(\d+)<([^>]+)>")
_LAST_PATH = re.compile(r'.*"([^"]+)"')


def named_before_synced(calls: list[Call], directory: Path) -> list[Call]:
    """Return the calls that give an upload below a directory its name while some of its bytes are not synced."""
    unsynced: set[str] = set()
    paths: dict[str, str] = {}
    found = []
    for call in calls:
        match = _FILE_WITH_PATH.match(call.arguments)
        fd, path = match.groups() if match else ("", "")
        paths[fd] = path
        if call.name in _WRITES and path.startswith(f"{directory}/"):
            unsynced.add(path)
        elif call.name in ("fsync", "fdatasync"):
            unsynced.discard(path)
        elif call.name == "syncfs":
            unsynced.clear()
        elif call.name in ("linkat", "renameat", "renameat2"):
            first = call.arguments.split('"')[1]
            source = paths.get(first.rpartition("/")[2]) if first.startswith("/proc/self/fd/") else f"{path}/{first}"
            if source in unsynced and not _last_path(call).startswith(MARKS):
                found.append(call)
    return found


def names_at(calls: list[Call], name: str) -> list[int]:
    """Return the positions of the calls that create, move or remove a name."""
    kinds = ("linkat", "renameat", "renameat2", "unlinkat")
    last = name.rpartition("/")[2]
    return [
        number
        for number, call in enumerate(calls)
        if call.name in kinds and (_last_path(call) == last or f'>, "{last}"' in call.arguments)
    ]


def _last_path(call: Call) -> str:
    """Return the last path in the arguments of a call."""
    match = _LAST_PATH.match(call.arguments)
    return match[1] if match else ""


def commits_at(calls: list[Call]) -> list[int]:
    """Return the positions of the calls with which SQLite commits: it removes its journal, or syncs its log."""
    return [
        number
        for number, call in enumerate(calls)
        if (call.name == "unlink" and '-journal"' in call.arguments)
        or (call.name == "fdatasync" and "-wal>" in call.arguments)
    ]
