"""The descriptors that this process has open."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from pathlib import Path


def open_targets() -> list[str]:
    """Return the path, or another name such as `socket:[7]`, of each descriptor of this process."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def open_below(path: Path) -> list[str]:
    """Return the open files of this process at or below a path, except one descriptor of the directory itself."""
    found = [target for target in open_targets() if target == str(path) or target.startswith(f"{path}/")]
    if path.is_dir() and str(path) in found:
        found.remove(str(path))
    return found


async def assert_nothing_open_below(path: Path) -> None:
    """Fail if something is open below a path after one garbage collection and 50 ms."""
    gc.collect()
    await asyncio.sleep(0.05)
    left = open_below(path)
    assert left == [], left
