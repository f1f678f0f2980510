"""Changes of the server process for a measurement: `BENCH_HOOKS="slow=0.02 nosync count"`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

from selfheal.blobs.database import DatabaseBlobs
from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.open_file import OpenFile

COUNTS: Counter[str] = Counter()


def install(hooks: str) -> None:
    """Install the named hooks."""
    for hook in hooks.split():
        name, _, value = hook.partition("=")
        if name == "slow":
            make_slow(float(value))
        elif name == "nosync":
            os.fsync = lambda _fd: None
        elif name == "count":
            count_blob_reads()


def make_slow(seconds: float) -> None:
    """Make every open and read below `slow/` take `seconds`, as on a slow disk with an empty page cache."""
    opened, opened_cached, read_again = UploadsDirectory.open, UploadsDirectory.open_cached, UploadsDirectory.read_again
    read, read_waiting = OpenFile.read, OpenFile.read_waiting

    def never_cached(disk: UploadsDirectory, name: str) -> OpenFile | None:
        if "slow/" in name:
            raise BlockingIOError
        return opened_cached(disk, name)

    def never_again(disk: UploadsDirectory, path: bytes, *arguments: Any) -> bytes | None:
        return None if b"slow/" in path else read_again(disk, path, *arguments)

    async def never_at_once(file: OpenFile, *arguments: Any) -> bytes:
        return await (
            file.threads.run(file.read_waiting, *arguments) if "slow/" in file.path else read(file, *arguments)
        )

    def open_slowly(disk: UploadsDirectory, name: str) -> OpenFile | None:
        time.sleep(seconds if "slow/" in name else 0)
        return opened(disk, name)

    def read_slowly(file: OpenFile, *arguments: Any) -> bytes:
        time.sleep(seconds if "slow/" in file.path else 0)
        return read_waiting(file, *arguments)

    UploadsDirectory.open, UploadsDirectory.open_cached = open_slowly, never_cached
    UploadsDirectory.read_again = never_again
    OpenFile.read, OpenFile.read_waiting = never_at_once, read_slowly


def count_blob_reads() -> None:
    """Count how often a blob is read from the database."""
    real = DatabaseBlobs.read

    def read(self: DatabaseBlobs, *arguments: Any) -> AsyncGenerator[bytes, None]:
        COUNTS["blob reads"] += 1
        return real(self, *arguments)

    DatabaseBlobs.read = read
