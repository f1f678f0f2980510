"""A real file system of 2 MiB, which a test can fill and remount."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.requirements import needs
from tests.support.store_state import files_below


class SmallDisk:
    """A file system with an uploads directory on it."""

    def __init__(self, mounted: Path) -> None:
        self.mounted = mounted
        self.uploads = mounted / "static" / "uploads"
        self.uploads.mkdir(parents=True)

    def fill(self) -> None:
        """Use up all free space."""
        with (self.mounted / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass

    def free(self) -> None:
        """Give the space back that `fill` has used."""
        (self.mounted / "filler").unlink()

    def remount(self, how: str) -> None:
        """Mount it again, as `ro` or as `rw`."""
        subprocess.run(["mount", "-o", f"remount,{how}", self.mounted], check=True)

    def files(self) -> list[str]:
        """Return the paths of all files on it."""
        return [name for name in files_below(self.mounted) if name != "filler"]


@contextlib.contextmanager
def mounted_disk(path: Path) -> Iterator[SmallDisk]:
    """Mount a tmpfs at a path; skip the test if this process must not mount."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=755", "none", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        needs("permission to mount a tmpfs", "sudo -E make test")
    yield SmallDisk(path)
    subprocess.run(["umount", "-l", path], check=True)
