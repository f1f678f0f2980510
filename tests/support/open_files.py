"""What this process has open: which files, what is new since a moment, and how to run out of descriptors."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.support.waiting import eventually


def open_targets() -> list[str]:
    """Return the path, or another name such as `socket:[7]`, of each descriptor of this process."""
    return [target for _, target in _descriptors()]


def open_now() -> Counter[tuple[int, int]]:
    """Return what is open, by device and inode: paths change."""
    return Counter(identity for identity, _ in _descriptors())


def opened_since(before: Counter[tuple[int, int]]) -> list[str]:
    """Return what is open and was not before, after a garbage collection. What closes may be another test's."""
    gc.collect()
    known, found = before.copy(), list[str]()
    for identity, target in _descriptors():
        if known[identity]:
            known[identity] -= 1
        else:
            found.append(target)
    return found


def _descriptors() -> Iterator[tuple[tuple[int, int], str]]:
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            status = os.fstat(int(fd))
            yield (status.st_dev, status.st_ino), os.readlink(f"/proc/self/fd/{fd}")


def descriptors_of(path: Path) -> int:
    """Return how many descriptors of this process are open on a file."""
    return open_targets().count(str(path))


def open_below(path: Path) -> list[str]:
    """Return the open files of this process at or below a path, except one descriptor of the directory itself."""
    found = [target for target in open_targets() if target == str(path) or target.startswith(f"{path}/")]
    if path.is_dir() and str(path) in found:
        found.remove(str(path))
    return found


async def assert_nothing_open_below(path: Path) -> None:
    """Fail if something stays open below a path."""
    gc.collect()
    await eventually(lambda: open_below(path) == [])


@contextlib.contextmanager
def few_descriptors(left: int) -> Iterator[None]:
    """Let this process open only `left` more descriptors; the next one fails with EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_next_numbers(left + 1)[left], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _next_numbers(count: int) -> list[int]:
    """Return the numbers that the next `count` descriptors will get."""
    numbers = [os.dup(0) for _ in range(count)]
    for fd in numbers:
        os.close(fd)
    return numbers
