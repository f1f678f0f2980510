"""Names that lead elsewhere: no symbolic link and no dots are followed (CVE-2024-23334)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from selfheal.disk.directory import UploadsDirectory
from selfheal.errors import DiskUnwritable, NotAFile
from tests.support.disk_files import OTHER, SECRET, put, read, write_file

pytestmark = pytest.mark.usefixtures("kernel")


def link_the_last_part(uploads: Path, target: Path) -> str:
    """Make a link at the name itself."""
    (uploads / "secret.png").symlink_to(target / "secret.png")
    return "secret.png"


def link_a_middle_part(uploads: Path, target: Path) -> str:
    """Make a link at a directory in the middle of the name."""
    (uploads / "cats").mkdir()
    (uploads / "cats" / "link").symlink_to(target)
    return "cats/link/secret.png"


def link_the_first_part(uploads: Path, target: Path) -> str:
    """Make a link at the first directory of the name."""
    (uploads / "link").symlink_to(target)
    return "link/secret.png"


def link_within_the_root(uploads: Path, target: Path) -> str:
    """Make a link whose target is inside the root."""
    write_file(uploads / "real" / "secret.png", SECRET)
    (uploads / "link").symlink_to("real")
    return "link/secret.png"


def climb_out(uploads: Path, target: Path) -> str:
    """Return a name with `..` at its beginning: the grammar refuses it, and the disk layer must too."""
    return os.path.relpath(target / "secret.png", uploads)


def climb_out_further_down(uploads: Path, target: Path) -> str:
    """Return a name with `..` after a directory."""
    (uploads / "cats").mkdir()
    return "cats/../" + os.path.relpath(target / "secret.png", uploads)


@pytest.fixture(
    params=[
        link_the_last_part,
        link_a_middle_part,
        link_the_first_part,
        link_within_the_root,
        climb_out,
        climb_out_further_down,
    ]
)
def trick(request: pytest.FixtureRequest, disk: UploadsDirectory, outside: Path) -> str:
    """A name that leads to the secret file if links or dots are followed."""
    disk.path.mkdir(parents=True)
    name: str = request.param(disk.path, outside)
    assert disk.path_of(name).read_bytes() == SECRET, "a plain open does not find the secret"
    return name


def test_no_trick_opens_a_file(disk: UploadsDirectory, trick: str) -> None:
    """Opening such a name finds nothing or raises `NotAFile`."""
    with contextlib.suppress(NotAFile):
        assert disk.open(trick) is None
    with contextlib.suppress(NotAFile):
        assert read(disk, trick) is None


def test_no_trick_stats_a_file(disk: UploadsDirectory, trick: str) -> None:
    """`stat` of such a name finds nothing or raises `NotAFile`."""
    with contextlib.suppress(NotAFile):
        assert disk.stat(trick) is None


def test_no_trick_changes_what_it_leads_to(disk: UploadsDirectory, trick: str, outside: Path) -> None:
    """The secret file is not removed, moved, dated or written through such a name."""
    secret = disk.path_of(trick).resolve()
    before = secret.stat()
    for change in (
        lambda: put(disk, trick, OTHER),
        lambda: disk.quarantine(trick),
        lambda: disk.remove(trick),
    ):
        with contextlib.suppress(OSError, DiskUnwritable):
            change()
        assert secret.read_bytes() == SECRET
        assert secret.stat().st_mtime_ns == before.st_mtime_ns
        assert list(secret.parent.iterdir()) == [secret]


def test_no_trick_makes_directories(disk: UploadsDirectory, trick: str, outside: Path) -> None:
    """No directory is made where the links or dots lead."""
    elsewhere = disk.path_of(trick).resolve().parent
    before = sorted(elsewhere.rglob("*"))
    for new in (f"{Path(trick).parent}/new.png", f"{Path(trick).parent}/deep/new.png"):
        if not new.startswith("."):
            with contextlib.suppress(OSError, DiskUnwritable):
                put(disk, new)
    assert sorted(elsewhere.rglob("*")) == before
