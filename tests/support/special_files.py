"""What is at a path and is no regular file: devices and symbolic links. Each function makes one at a path."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tests.support.requirements import needs


def device(path: Path) -> None:
    """Make a character device (/dev/null)."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.close(os.open(path, os.O_RDONLY))
    except PermissionError:
        needs("the right to make devices", "the tests as root, with TMPDIR on a file system that permits devices")


def full_directory(path: Path) -> None:
    """Make a directory with a file in it."""
    path.mkdir()
    (path / "inside").write_bytes(b"a file in the way")


def link_to_a_file(path: Path) -> None:
    """Make a link to a file in the same directory."""
    (path.parent / "target.png").write_bytes(b"the target of a link")
    path.symlink_to("target.png")


def dangling_link(path: Path) -> None:
    """Make a link to a name that does not exist."""
    path.symlink_to("nowhere")


def link_to_itself(path: Path) -> None:
    """Make a link to itself."""
    path.symlink_to(path.name)
