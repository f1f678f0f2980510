"""Changes that a measurement makes inside the process of a server: `BENCH_HOOKS="slow=0.02 nosync count"`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from typing import Any

from selfheal.blobs import Blobs
from selfheal.disk import UploadsDirectory
from selfheal.files import OpenFile

COUNTS: Counter[str] = Counter()


def install(hooks: str) -> None:
    """Install what is named."""
    for hook in hooks.split():
        name, _, value = hook.partition("=")
        if name == "slow":
            make_slow(float(value))
        elif name == "nosync":
            os.fsync = lambda _fd: None
        elif name == "count":
            count_blob_reads()


def make_slow(seconds: float) -> None:
    """A disk that takes so long for every open and read below `slow/`, of which nothing is in memory."""

    def never_cached(real: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        def refuse(self: Any, *arguments: Any) -> Any:
            if "slow/" in name_of(self, *arguments):
                raise BlockingIOError
            return real(self, *arguments)

        return refuse

    def waiting(real: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        def wait(self: Any, *arguments: Any) -> Any:
            if "slow/" in name_of(self, *arguments):
                time.sleep(seconds)
            return real(self, *arguments)

        return wait

    def own_path(file: OpenFile, *_: Any) -> str:
        return file.path

    def given_name(_disk: UploadsDirectory, name: str) -> str:
        return name

    UploadsDirectory.open_cached = never_cached(UploadsDirectory.open_cached, given_name)
    UploadsDirectory.open = waiting(UploadsDirectory.open, given_name)
    OpenFile.read_cached = never_cached(OpenFile.read_cached, own_path)
    OpenFile.read_waiting = waiting(OpenFile.read_waiting, own_path)


def count_blob_reads() -> None:
    """Count how often the bytes of a blob are read from the database."""
    real = Blobs.read

    def read(self: Blobs, *arguments: Any) -> AsyncGenerator[bytes, None]:
        COUNTS["blob reads"] += 1
        return real(self, *arguments)

    Blobs.read = read
