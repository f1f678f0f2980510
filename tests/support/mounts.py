"""Small real file systems for tests: full, without inodes, read-only, unmounted.

Root may mount them here. For an ordinary user the test runs again in a namespace of its own (`unshare -Urm`).
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.requirements import needs


class Mount:
    """A tmpfs that is mounted at a path."""

    def __init__(self, path: Path, options: str) -> None:
        self.path = path
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "selfheal-test", path], check=True, capture_output=True)

    def remount(self, option: str) -> None:
        """Make it read-only (`ro`) or writable (`rw`)."""
        subprocess.run(["mount", "-o", f"remount,{option}", self.path], check=True, capture_output=True)

    def unmount(self) -> None:
        """Detach it, even while files on it are open."""
        subprocess.run(["umount", "-l", self.path], check=True, capture_output=True)


def mounts(item: Any, point: Path) -> Iterator[Callable[[str], Mount]]:
    """Yield a function that mounts a file system at `point`; `item` is the test, which may have to run elsewhere."""
    point.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "selfheal-test", point], capture_output=True, check=False).returncode:
        if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
            needs("the right to mount a tmpfs", "the tests as root")
        item.obj = _in_a_namespace(item)
        yield lambda options: pytest.fail("not permitted here")
        return
    subprocess.run(["umount", point], check=True)
    yield functools.partial(Mount, point)
    while point.is_mount():
        subprocess.run(["umount", "-l", point], check=True)


def _in_a_namespace(item: pytest.Item) -> Callable[..., None]:
    """Return a replacement for a test's function: it passes if the test passed in the namespace."""

    def passes(**_: object) -> None:
        output = _run_in_a_namespace(item.session)
        assert f"PASSED {item.nodeid}" in output.splitlines(), output

    return passes


@functools.cache
def _run_in_a_namespace(session: pytest.Session) -> str:
    """Run all tests that mount something where an unprivileged user may mount; return pytest's output."""
    wanted = [item.nodeid for item in session.items if "mount" in getattr(item, "fixturenames", ())]
    command = ["unshare", "-Urm", sys.executable, "-X", "dev", "-m", "pytest", "-q", "-rp", "-p", "no:randomly"]
    return subprocess.run(
        [*command, *wanted],
        cwd=session.config.rootpath,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    ).stdout
