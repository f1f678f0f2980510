"""The root: absent, deleted, replaced, a link, or mounted later; the marker shows that a mount was lost."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from selfheal.disk import syscalls
from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.listing import walk
from selfheal.disk.root import MARKER
from selfheal.errors import DiskUnwritable
from tests.support.disk_files import (
    OTHER,
    PICTURE,
    contents_below,
    mode_of,
    names_in,
    put,
    read,
    set_modified,
    write_file,
)
from tests.support.mounts import Mount
from tests.support.open_files import open_targets

Uploads = Callable[..., UploadsDirectory]
pytestmark = pytest.mark.usefixtures("kernel")


# -- a root that changes ----------------------------------------------------------------------------------------------


def wait_for(work: Callable[[], object], wanted: object, seconds: float = 5.0) -> None:
    """Wait until `work` returns `wanted`: a process looks for a new root only once a second."""
    end = time.monotonic() + seconds
    while (got := work()) != wanted:
        assert time.monotonic() < end, f"it is still {got!r}"
        time.sleep(0.05)


def beginning_of(disk: UploadsDirectory, name: str) -> bytes | None:
    """Return the first bytes that a request gets for a name."""
    data = read(disk, name)
    return None if data is None else data[:10]


def test_reading_makes_nothing(disk: UploadsDirectory, directory: Path) -> None:
    """Without an uploads directory every name is absent, and no read makes a directory."""
    assert read(disk, "tom.png") is None
    assert disk.stat("tom.png") is None
    assert list(walk(disk)) == []
    assert disk.remove("tom.png") is False
    assert disk.quarantine("tom.png") is None
    assert disk.sweep() == 0
    disk.sync([])
    set_modified(disk, "tom.png", 0)
    assert not directory.parent.exists()


def test_the_root_is_checked_every_second(
    disk: UploadsDirectory, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`open_cached` works for one second after the root was checked; then it raises until the root is checked again."""
    monkeypatch.setattr(syscalls, "open_cached", syscalls.open_file)
    put(disk, "tom.png")
    for passed in (0.0, 0.5, 0.5):
        clock.now += passed
        file = disk.open_cached("tom.png")
        assert file is not None
        file.close()
    clock.now += 0.1
    with pytest.raises(BlockingIOError):
        disk.open_cached("tom.png")
    assert read(disk, "tom.png") == PICTURE
    disk.open_cached("tom.png").close()  # type: ignore[union-attr]
    clock.now += 1.1
    with pytest.raises(BlockingIOError):
        disk.open_cached("tom.png")


def test_a_root_that_stays_is_opened_once(disk: UploadsDirectory) -> None:
    """The root is opened again only when its path leads to another directory."""
    put(disk, "tom.png")
    root = disk.root()
    assert root is not None
    put(disk, "mog.png")
    assert disk.root() is root
    disk.path.rename(disk.path.with_name("aside"))
    put(disk, "tom.png")
    assert disk.root() is not root


def test_a_root_that_is_removed_as_soon_as_it_is_made(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the root is removed as soon as it is made, this write raises the reason; the next one makes it again."""
    with monkeypatch.context() as patch:
        for call in ("mkdir", "chmod", "makedirs"):
            patch.setattr(os, call, lambda *_, **__: None)
        with pytest.raises(DiskUnwritable, match=os.strerror(errno.ENOENT)):
            disk.stage("tom.png")
    put(disk, "tom.png")
    assert read(disk, "tom.png") == PICTURE


def test_writing_works_just_after_a_boot(disk: UploadsDirectory, clock: SimpleNamespace) -> None:
    """Writing works when the monotonic clock is 0, just after a boot."""
    clock.now = 0.0
    put(disk, "tom.png")
    assert read(disk, "tom.png") == PICTURE


def test_a_deleted_root_is_made_again(disk: UploadsDirectory) -> None:
    """After the root and its parents are deleted, names are absent, and the next write makes the root again."""
    put(disk, "cats/tom.png")
    shutil.rmtree(disk.path.parent.parent)
    assert disk.open("cats/tom.png") is None
    assert list(walk(disk)) == []
    put(disk, "cats/tom.png", OTHER)
    assert disk.path_of("cats/tom.png").read_bytes() == OTHER
    assert read(disk, "cats/tom.png") == OTHER


def test_a_root_that_a_deploy_made_again_is_seen(disk: UploadsDirectory) -> None:
    """If a deploy deletes the root and makes it again, its new files are read."""
    put(disk, "tom.png")
    assert read(disk, "tom.png") == PICTURE
    shutil.rmtree(disk.path)
    write_file(disk.path_of("tom.png"), OTHER)
    wait_for(lambda: beginning_of(disk, "tom.png"), OTHER[:10])
    assert [entry.name for entry in walk(disk)] == ["tom.png"]


def test_a_root_that_was_replaced_is_seen(disk: UploadsDirectory) -> None:
    """If another directory is moved to the root's path, reads, walks and writes use that directory."""
    put(disk, "tom.png")
    put(disk, "gone.png")
    assert read(disk, "tom.png") == PICTURE
    assert read(disk, "gone.png") == PICTURE
    aside = disk.path.with_name("aside")
    disk.path.rename(aside)
    write_file(disk.path_of("tom.png"), OTHER)
    wait_for(lambda: beginning_of(disk, "tom.png"), OTHER[:10])
    wait_for(lambda: beginning_of(disk, "gone.png"), None)
    put(disk, "new.png")
    assert disk.path_of("new.png").read_bytes() == PICTURE
    assert names_in(aside) == ["gone.png", "tom.png"]


def test_a_root_that_is_a_link_is_followed_to_each_release(uploads: Uploads, tmp_path: Path) -> None:
    """The root may be a link; when a deploy changes its target, reads and writes use the new one."""
    for release, data in (("one", PICTURE), ("two", OTHER)):
        write_file(tmp_path / release / "uploads" / "tom.png", data)
    (tmp_path / "current").symlink_to("one")
    disk = uploads(tmp_path / "current" / "uploads")
    wait_for(lambda: beginning_of(disk, "tom.png"), PICTURE[:10])
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").rename(tmp_path / "current")
    wait_for(lambda: beginning_of(disk, "tom.png"), OTHER[:10])
    put(disk, "new.png")
    assert (tmp_path / "two" / "uploads" / "new.png").read_bytes() == PICTURE
    assert not (tmp_path / "one" / "uploads" / "new.png").exists()


def test_a_root_that_comes_and_goes_costs_no_descriptors(disk: UploadsDirectory) -> None:
    """However often the root is replaced, only one descriptor of it stays open."""
    put(disk, "tom.png")
    for _ in range(20):
        shutil.rmtree(disk.path)
        assert disk.open("tom.png") is None
        put(disk, "tom.png")
        assert read(disk, "tom.png") == PICTURE
    assert [target for target in open_targets() if target.startswith(str(disk.path))] == [str(disk.path)]


def test_a_file_in_place_of_the_root_is_no_directory(disk: UploadsDirectory) -> None:
    """If the root's path is a file, names are absent, writing raises `DiskUnwritable`, and the file is kept."""
    write_file(disk.path)
    assert disk.open("tom.png") is None
    assert list(walk(disk)) == []
    with pytest.raises(DiskUnwritable):
        disk.stage("tom.png")
    assert disk.path.read_bytes() == PICTURE


def test_a_volume_mounted_later_is_seen(uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path) -> None:
    """A volume mounted over the root while the app runs is used at once, and the directory below it after `umount`."""
    disk = uploads(tmp_path / "volume" / "uploads")
    put(disk, "tom.png")
    volume = mount("size=1m")
    assert disk.open("tom.png") is None
    put(disk, "tom.png", OTHER)
    assert read(disk, "tom.png") == OTHER
    volume.unmount()
    wait_for(lambda: beginning_of(disk, "tom.png"), PICTURE[:10])


def test_it_can_be_used_after_it_was_closed(disk: UploadsDirectory) -> None:
    """`close` may be called twice, and a later call opens the root again."""
    put(disk, "tom.png")
    disk.close()
    disk.close()
    assert read(disk, "tom.png") == PICTURE


# -- the marker -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o077, 0o777], indirect=True)
def test_a_marked_root_has_the_mode_given(uploads: Uploads, tmp_path: Path, umask: int) -> None:
    """A root that `mark` makes has the mode given, whatever the umask."""
    disk = uploads(tmp_path / "uploads", directory_mode=0o755)
    disk.mark()
    assert oct(mode_of(disk.path)) == oct(0o755)


@pytest.mark.parametrize("umask", [0o000], indirect=True)
def test_a_marker_is_its_owners_to_write(uploads: Uploads, tmp_path: Path, umask: int) -> None:
    """Everybody can read the marker file and only the owner can write it, whatever the umask."""
    disk = uploads(tmp_path / "uploads")
    disk.mark()
    assert oct(mode_of(disk.path / MARKER)) == oct(0o644)


def test_without_its_marker_nothing_is_written(uploads: Uploads, directory: Path, clock: SimpleNamespace) -> None:
    """Without the marker nothing is written and the message says why; 30 s after `mark` files are written."""
    disk = uploads(directory, require_marker=True)
    for _ in range(2):
        with pytest.raises(DiskUnwritable) as caught:
            disk.stage("cats/tom.png")
        assert str(caught.value) == f"{directory} takes no file: the marker file is gone: the mount may be lost"
        assert list(directory.rglob("*")) == []
        clock.now += 31
    with pytest.raises(DiskUnwritable):
        disk.stage("cats/tom.png")
    disk.mark()
    disk.mark()
    with pytest.raises(DiskUnwritable):
        disk.stage("cats/tom.png")
    clock.now += 31
    put(disk, "cats/tom.png")
    assert read(disk, "cats/tom.png") == PICTURE
    assert [entry.name for entry in walk(disk)] == ["cats/tom.png"]


def test_a_directory_without_a_marker_is_still_read(uploads: Uploads, directory: Path) -> None:
    """Files are read without the marker."""
    disk = uploads(directory, require_marker=True)
    write_file(directory / "tom.png")
    assert read(disk, "tom.png") == PICTURE


def test_a_lost_mount_is_not_written_beneath(
    uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path, clock: SimpleNamespace
) -> None:
    """If the volume is lost, nothing is written to the empty mount point; once it is back, files are written."""
    path = tmp_path / "volume" / "uploads"
    disk = uploads(path, require_marker=True)
    volume = mount("size=1m")
    disk.mark()
    put(disk, "tom.png")
    volume.unmount()
    with pytest.raises(DiskUnwritable):
        put(disk, "mog.png")
    assert list(path.iterdir()) == []
    mount("size=1m")
    disk.mark()
    clock.now += 31
    put(disk, "mog.png")
    assert sorted(contents_below(path)) == [MARKER, "mog.png"]
