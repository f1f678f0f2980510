"""Another file system below the root: files are published there without a rename from the one to the other."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selfheal.disk import syscalls
from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.listing import walk
from selfheal.disk.temporary import TEMPORARY
from tests.support.disk_files import OTHER, PICTURE, contents_below, put, write_file
from tests.support.mounts import Mount
from tests.support.os_errors import no_unnamed_files

Uploads = Callable[..., UploadsDirectory]


@pytest.fixture(params=["tmpfs", "bind"])
def disk(
    request: pytest.FixtureRequest, uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path
) -> Iterator[UploadsDirectory]:
    """An uploads directory with another file system, or a part of its own, mounted at `uploads` in it."""
    if request.param == "tmpfs":
        mount("size=1m")
    else:
        (tmp_path / "elsewhere").mkdir()
        point = tmp_path / "volume" / "uploads"
        subprocess.run(["mount", "--bind", tmp_path / "elsewhere", point], check=True, capture_output=True)
    disk = uploads(tmp_path / "volume")
    yield disk
    disk.close()
    subprocess.run(["umount", "-l", disk.path / "uploads"], check=True, capture_output=True)


@pytest.mark.parametrize("way", ["unnamed", "named"])
@pytest.mark.parametrize("name", ["uploads/tom.png", "uploads/cats/old/tom.png"])
def test_files_are_published_and_replaced_on_a_mount(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, way: str, name: str
) -> None:
    """No EXDEV: temporary files are on the file system of their target, and none is left."""
    if way == "named":
        monkeypatch.setattr(syscalls, "open_unnamed", no_unnamed_files)
    for data in (PICTURE, OTHER, PICTURE):
        put(disk, name, data)
        put(disk, "tom.png", data)
        assert contents_below(disk.path) == {name: data, "tom.png": data}
    assert [path.name for path in disk.path.rglob(".selfheal-tmp*")] == []
    assert [entry.name for entry in walk(disk)] == ["tom.png", name]


def test_litter_on_a_mount_is_swept(disk: UploadsDirectory) -> None:
    """Temporary files that a killed process left on a mount are swept with those of the root, and not walked."""
    write_file(disk.path / TEMPORARY / "killed")
    write_file(disk.path / "uploads" / TEMPORARY / "killed")
    write_file(disk.path / "uploads" / "tom.png")
    assert [entry.name for entry in walk(disk)] == ["uploads/tom.png"]
    assert [disk.sweep(), disk.sweep()] == [2, 0]
    assert contents_below(disk.path) == {"uploads/tom.png": PICTURE}


def test_a_mount_with_spaces_in_its_path(uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path) -> None:
    """Litter is also swept if the path has spaces and other letters, which the kernel lists as numbers."""
    place = tmp_path / "volume" / "uploads" / "my é\\040 photos"
    mount("size=1m")
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "selfheal-test", place], check=True, capture_output=True)
    try:
        disk = uploads(tmp_path / "volume" / "uploads")
        write_file(place / TEMPORARY / "killed")
        assert disk.sweep() == 1
        assert os.listdir(place) == []
        disk.close()
    finally:
        subprocess.run(["umount", "-l", place], check=True, capture_output=True)
