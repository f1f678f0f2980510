"""Fixtures of the disk layer: an uploads directory, kernels, ways of staging, mounts, and a check for leaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfheal.disk import refusals as refusals_module
from selfheal.disk import root as root_module
from selfheal.disk import syscalls
from selfheal.disk.directory import UploadsDirectory
from tests.support.disk_files import SECRET
from tests.support.mounts import Mount, mounts
from tests.support.open_files import open_now, opened_since
from tests.support.os_errors import no_unnamed_files
from tests.support.requirements import needs
from tests.support.staging import WAYS, Root, open_root


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    """Fail if more descriptors are open after a test than before it."""
    before = open_now()
    yield
    assert opened_since(before) == []


def use_kernel(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Use openat2 (skip the test if there is none), or open paths part by part (`portable`)."""
    if kernel == "portable":
        monkeypatch.setattr(syscalls, "HAS_OPENAT2", False)
    elif not syscalls.HAS_OPENAT2:
        needs("openat2", "the tests on Linux 5.6 or later, outside of sandboxes that forbid it")


@pytest.fixture(params=["openat2", "portable"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel with openat2, and one on which a path is opened part by part."""
    use_kernel(monkeypatch, request.param)
    return request.param


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way of staging: with and without O_TMPFILE, with and without openat2."""
    naming, _, kernel = request.param.partition("-")
    if naming == "named":
        monkeypatch.setattr(syscalls, "open_unnamed", no_unnamed_files)
    use_kernel(monkeypatch, kernel)
    return request.param


@pytest.fixture
def root(tmp_path: Path, way: str) -> Iterator[Root]:
    """An empty uploads directory, for every way of staging."""
    path = tmp_path / "root"
    path.mkdir()
    root = open_root(path)
    yield root
    root.directory.close()


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """A umask that holds during the test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Mount]]:
    """A function that mounts a small real file system, with the options given, at `volume/uploads`."""
    (tmp_path / "volume").mkdir()
    yield from mounts(request.node, tmp_path / "volume" / "uploads")


@pytest.fixture
def uploads() -> Iterator[Callable[..., UploadsDirectory]]:
    """A function that makes an `UploadsDirectory`, which is closed after the test."""
    made: list[UploadsDirectory] = []

    def make(*arguments: Any, **options: Any) -> UploadsDirectory:
        made.append(UploadsDirectory(*arguments, **options))
        return made[-1]

    yield make
    for disk in made:
        disk.close()


@pytest.fixture
def disk(uploads: Callable[..., UploadsDirectory], directory: Path) -> UploadsDirectory:
    """An uploads directory that does not exist yet."""
    return uploads(directory)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory outside the uploads, with one secret file."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(SECRET)
    return outside


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The monotonic clock of the disk layer, stopped at `now` seconds."""
    clock = SimpleNamespace(now=1000.0)
    for module in (root_module, refusals_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock
