"""A directory in which files are staged, every way to stage one, and processes that stage at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from selfheal.disk import syscalls
from selfheal.disk.features import DiskFeatures
from selfheal.disk.root import OpenRoot
from selfheal.disk.staged_file import StagedFile
from selfheal.disk.syscalls import Directory
from tests.support import environment
from tests.support.disk_files import paths_below
from tests.support.os_errors import no_unnamed_files

OLD = b"old " * 5000
NEW = b"new! " * 7000
MODIFIED = 1_234_567_890_123_456_789
"""A time of last modification, in ns since the epoch."""
WAYS = ["unnamed-openat2", "unnamed-portable", "named-openat2", "named-portable"]
"""With O_TMPFILE or with a temporary name; with openat2 or without."""
named_only = pytest.mark.parametrize("way", WAYS[2:], indirect=True)
"""Runs a test only for files that have a temporary name."""


@dataclass
class Root:
    """An uploads directory, open."""

    path: Path
    directory: OpenRoot

    @property
    def fd(self) -> int:
        """The descriptor of the directory."""
        return self.directory.fd

    def stage(self, name: str = "tom.png") -> StagedFile:
        """Return a staged file for a name whose folder exists."""
        folder = name.rpartition("/")[0]
        with Directory(syscalls.open_directory(self.fd, folder)) as parent:
            return StagedFile(self.directory, parent.fd, name)

    def put(self, data: bytes, name: str = "tom.png") -> None:
        """Stage bytes and give them the name, in place of any file that has it."""
        with self.stage(name) as staged:
            staged.write(data)
            staged.seal(MODIFIED, 0o644)
            while not staged.publish():
                os.unlink(name, dir_fd=self.fd)

    def entries(self) -> list[str]:
        """Return every path below the directory, temporary files too."""
        return [str(path.relative_to(self.path)) for path in paths_below(self.path)]

    def names(self) -> list[str]:
        """Return the paths that a request or a walk can find."""
        return [entry for entry in self.entries() if not entry.startswith(".")]


def open_root(path: str | Path) -> Root:
    """Open the directory at a path."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    return Root(Path(path), OpenRoot(fd, DiskFeatures(path), None))


def publish_once(root: Root) -> None:
    """Stage `NEW` and publish it as `tom.png`."""
    with root.stage() as staged:
        staged.write(NEW)
        staged.seal(MODIFIED, 0o644)
        staged.sync()
        staged.publish()


def in_a_process(function: Callable[..., None], *arguments: str, way: str) -> subprocess.Popen[str]:
    """Start a process that stages files in one of the `WAYS` and calls a function of a test module."""
    code = (
        f"import sys; from {__name__} import choose; choose({way!r}); "
        f"from {function.__module__} import {function.__name__} as work; work(*sys.argv[1:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def choose(way: str) -> None:
    """Make this process use one of the `WAYS`."""
    if way.startswith("named"):
        syscalls.open_unnamed = no_unnamed_files
    if way.endswith("portable"):
        syscalls.HAS_OPENAT2 = False
