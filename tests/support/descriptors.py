"""The file descriptors of this process: how many are open, which ones belong to a path, and how to run out of them."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path


def open_descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def assert_no_more_than(before: int) -> None:
    """Fail if more than `before` descriptors are open, after a garbage collection if there seem to be more."""
    if open_descriptors() > before:
        gc.collect()
    assert open_descriptors() <= before, "a descriptor was left open"


def descriptors_of(path: Path) -> int:
    """Return how many descriptors of this process are open on a file."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link) == str(path) for link in links if os.path.lexists(link))


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
