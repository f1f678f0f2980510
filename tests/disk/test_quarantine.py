"""The quarantine: bad copies are moved to a private directory that is not served."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from selfheal.disk import quarantine as quarantine_module
from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.listing import walk
from selfheal.disk.quarantine import QUARANTINE
from tests.support.disk_files import (
    MODIFIED,
    OTHER,
    PICTURE,
    SECRET,
    contents_below,
    mode_of,
    names_in,
    put,
    read,
    write_file,
)
from tests.support.mounts import Mount
from tests.support.os_errors import fails

Uploads = Callable[..., UploadsDirectory]
pytestmark = pytest.mark.usefixtures("kernel")


# -- where it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "app/static/uploads",
        "app/public/uploads",
        "app/media",
        "app/public/media/uploads",
        "app/static/img/uploads",
        "www/html/uploads",
        "uploads",
    ],
)
def test_the_quarantine_is_not_served(uploads: Uploads, tmp_path: Path, path: str) -> None:
    """The quarantine is hidden, and neither below the uploads nor below a public directory above them."""
    served = {"static", "public", "www", "html", "media"}
    disk = uploads(tmp_path / path)
    put(disk, "cats/tom.png")
    moved = disk.quarantine("cats/tom.png")
    assert moved is not None
    assert moved.is_absolute()
    assert not moved.is_relative_to(disk.path)
    assert not served & set(moved.relative_to(tmp_path).parts)
    assert moved.relative_to(tmp_path).parts[-4].startswith(".")


def link_to_a_directory(tmp_path: Path) -> Path:
    """Make a link `quarantine` to a directory `large`."""
    (tmp_path / "large").mkdir()
    (tmp_path / "quarantine").symlink_to("large")
    return tmp_path / "quarantine"


def test_the_quarantine_may_be_a_link(uploads: Uploads, directory: Path, tmp_path: Path) -> None:
    """The quarantine given may be a link: bad copies go to its target and not into the root."""
    disk = uploads(directory, quarantine=link_to_a_directory(tmp_path))
    put(disk, "cats/tom.png")
    moved = disk.quarantine("cats/tom.png")
    assert moved is not None
    assert moved.resolve().is_relative_to(tmp_path / "large")
    assert moved.read_bytes() == PICTURE
    assert names_in(directory) == []


def block_with_a_file(path_given: Path) -> None:
    """Make a file at the quarantine's path."""
    write_file(path_given)


def block_the_parent(path_given: Path) -> None:
    """Make a file at the parent of the quarantine's path."""
    write_file(path_given.parent)


def leave_out_the_parent(path_given: Path) -> None:
    """Make nothing: the parent of the quarantine's path does not exist."""


@pytest.mark.parametrize("obstruct", [block_with_a_file, block_the_parent, leave_out_the_parent])
@pytest.mark.parametrize("name", ["tom.png", "cats/old/tom.png"])
def test_a_quarantine_that_cannot_be_made(
    uploads: Uploads, directory: Path, tmp_path: Path, obstruct: Callable[[Path], None], name: str
) -> None:
    """If the quarantine cannot be made, bad copies go to a private one inside the root, which no walk enters."""
    path_given = tmp_path / "not" / "there"
    obstruct(path_given)
    disk = uploads(directory, quarantine=path_given)
    put(disk, name)
    moved = disk.quarantine(name)
    assert moved is not None, "the bad copy counts as absent and will be overwritten"
    assert moved.is_relative_to(path_given) or moved.is_relative_to(directory / QUARANTINE)
    assert moved.read_bytes() == PICTURE
    assert disk.stat(name) is None
    assert list(walk(disk)) == []
    if moved.is_relative_to(directory):
        assert mode_of(directory / QUARANTINE) == 0o700


def test_a_quarantine_on_another_disk(uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path) -> None:
    """If the uploads are a volume of their own, bad copies stay on that volume."""
    disk = uploads(mount("size=1m").path)
    put(disk, "cats/tom.png")
    moved = disk.quarantine("cats/tom.png")
    assert moved is not None
    assert moved.read_bytes() == PICTURE
    assert disk.stat("cats/tom.png") is None
    assert list(walk(disk)) == []


def test_a_quarantine_that_may_not_be_written(uploads: Uploads, ordinary_directory: Path) -> None:
    """With a real EACCES beside the uploads, bad copies go to the quarantine inside the root."""
    (ordinary_directory / "app").mkdir()
    disk = uploads(ordinary_directory / "app" / "uploads")
    put(disk, "cats/tom.png")
    (ordinary_directory / "app").chmod(0o555)
    try:
        moved = disk.quarantine("cats/tom.png")
    finally:
        (ordinary_directory / "app").chmod(0o755)
    assert moved is not None
    assert moved.is_relative_to(disk.path / QUARANTINE)
    assert moved.read_bytes() == PICTURE


def test_no_link_leads_out_of_quarantine(uploads: Uploads, directory: Path, tmp_path: Path, outside: Path) -> None:
    """A link in place of the quarantine inside the root is not followed: ELOOP is raised, and the file stays."""
    write_file(tmp_path / "file")
    disk = uploads(directory, quarantine=tmp_path / "file" / "quarantine")
    put(disk, "tom.png")
    (directory / QUARANTINE).symlink_to(outside)
    with pytest.raises(OSError) as caught:
        disk.quarantine("tom.png")
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, str(directory / QUARANTINE))
    assert read(disk, "tom.png") == PICTURE
    assert contents_below(outside) == {"secret.png": SECRET}


def move_and_remove(disk: UploadsDirectory, name: str) -> list[Path]:
    """Move a file to the quarantine and remove it there, many times; return its paths there."""
    paths = []
    for _ in range(200):
        put(disk, name)
        path = disk.quarantine(name)
        assert path is not None
        disk.remove_quarantined(path)
        paths.append(path)
    return paths


def test_many_use_the_quarantine_at_once(disk: UploadsDirectory) -> None:
    """The quarantine, which goes with the last file in it, is made again: no copy goes to the one inside the root."""

    with ThreadPoolExecutor(4) as pool:
        moves = [pool.submit(move_and_remove, disk, f"{number}/tom.png") for number in range(4)]
    assert [path for move in moves for path in move.result() if not path.is_relative_to(disk.quarantine_path)] == []
    assert not disk.quarantine_path.exists()


# -- what is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tom.png", "cats/old/tom.png", "Кот é [1]@2x 100%.png", "/".join(["a"] * 256)])
@pytest.mark.parametrize("umask", [0o000, 0o077], indirect=True)
def test_a_bad_copy_is_set_aside(disk: UploadsDirectory, umask: int, name: str) -> None:
    """The name is absent, and the same file, with its bytes and mtime, is where only the owner can read it."""
    put(disk, name)
    before = disk.stat(name)
    assert before is not None
    moved = disk.quarantine(name)
    assert moved is not None
    assert disk.stat(name) is None
    assert os.path.samestat(moved.stat(), before)
    assert (moved.read_bytes(), moved.stat().st_mtime_ns) == (PICTURE, MODIFIED)
    assert str(moved).endswith(f"/{name}")
    assert mode_of(disk.quarantine_path) == 0o700
    assert moved.is_relative_to(disk.quarantine_path)


def test_the_path_of_a_bad_copy_has_the_time(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory of a bad copy begins with the time in UTC, whatever the time zone of the machine."""
    put(disk, "cats/tom.png")
    try:
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("TZ", "LINT-14")
            time.tzset()
            before = datetime.now(UTC).replace(microsecond=0)
            moved = disk.quarantine("cats/tom.png")
            after = datetime.now(UTC)
    finally:
        time.tzset()
    assert moved is not None
    stamp, _, token = moved.relative_to(disk.quarantine_path).parts[0].partition("-")
    assert before <= datetime.strptime(f"{stamp}Z", "%Y%m%dT%H%M%S%z") <= after
    assert re.fullmatch("[0-9a-f]{8}", token)


@pytest.mark.parametrize("umask", [0o000], indirect=True)
def test_a_bad_copy_is_private_in_an_open_quarantine(disk: UploadsDirectory, umask: int) -> None:
    """In a quarantine that everybody can enter, the directory of each bad copy is private."""
    disk.quarantine_path.mkdir(parents=True)
    disk.quarantine_path.chmod(0o755)
    put(disk, "cats/old/tom.png")
    moved = disk.quarantine("cats/old/tom.png")
    assert moved is not None
    assert oct(mode_of(disk.quarantine_path / moved.relative_to(disk.quarantine_path).parts[0])) == oct(0o700)


def test_a_link_is_set_aside_as_a_link(disk: UploadsDirectory) -> None:
    """A dangling link is not absent: the link itself is moved."""
    disk.path.mkdir(parents=True)
    disk.path_of("special.png").symlink_to("nowhere")
    moved = disk.quarantine("special.png")
    assert moved is not None
    assert os.readlink(moved) == "nowhere"
    assert names_in(disk.path) == []


def test_all_bad_copies_of_a_name_are_kept(disk: UploadsDirectory) -> None:
    """Several bad copies of one name within one second are all kept."""
    copies = [bytes([number]) * 100 for number in range(5)]
    moved = []
    for data in copies:
        put(disk, "cats/tom.png", data)
        moved.append(disk.quarantine("cats/tom.png"))
    assert [path.read_bytes() for path in moved if path is not None] == copies


def test_nothing_in_quarantine_is_overwritten(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the random part of a directory's name repeats, a bad copy is kept or the move is refused; none is lost."""
    monkeypatch.setattr(quarantine_module.secrets, "token_hex", lambda size: "0" * 2 * size)
    kept: dict[Path, bytes] = {}
    for number in range(4):
        data = bytes([number]) * 100
        write_file(disk.path_of("cats/tom.png"), data)
        try:
            moved = disk.quarantine("cats/tom.png")
        except OSError:
            assert disk.path_of("cats/tom.png").read_bytes() == data, "the move was refused and the file is lost"
            continue
        assert moved is not None
        assert moved not in kept
        kept[moved] = data
    assert kept
    assert {path: path.read_bytes() for path in kept} == kept


def test_what_is_in_quarantine_is_found_wherever_it_is(uploads: Uploads, directory: Path, tmp_path: Path) -> None:
    """Copies are found behind a link to the quarantine, and in the one inside the root, but not behind a link there."""
    disk = uploads(directory, quarantine=link_to_a_directory(tmp_path))
    put(disk, "cats/tom.png")
    moved = disk.quarantine("cats/tom.png")
    assert moved is not None
    assert disk.quarantined(0.0) == [("cats/tom.png", moved)]
    inside = directory / QUARANTINE / "20200101T000000-00000000/cats/mog.png"
    write_file(inside)
    assert disk.quarantined(0.0) == [("cats/mog.png", inside), ("cats/tom.png", moved)]
    (directory / QUARANTINE).rename(tmp_path / "elsewhere")
    (directory / QUARANTINE).symlink_to(tmp_path / "elsewhere")
    assert disk.quarantined(0.0) == [("cats/tom.png", moved)]


def test_a_quarantine_that_others_empty_can_be_listed(disk: UploadsDirectory) -> None:
    """A look into the quarantine, and a sweep, never fail on what is removed meanwhile."""

    with ThreadPoolExecutor(3) as pool:
        moves = [pool.submit(move_and_remove, disk, f"{number}/tom.png") for number in range(3)]
        while not all(move.done() for move in moves):
            disk.quarantined(0.0)
            disk.sweep_quarantine(60.0)
        for move in moves:
            move.result()
    assert disk.quarantined(0.0) == []


def test_what_dead_processes_left_is_swept(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves that never happened leave links and empty directories: they go a while later, and every file stays."""
    put(disk, "cats/tom.png")
    moved = disk.quarantine("cats/tom.png")
    assert moved is not None
    put(disk, "cats/old/mog.png")
    with monkeypatch.context() as dying:
        dying.setattr(os, "rename", fails(errno.EIO))
        dying.setattr(Path, "unlink", fails(errno.EIO))
        with pytest.raises(OSError):
            disk.quarantine("cats/old/mog.png")
    (disk.quarantine_path / "20200101T000000-00000000" / "cats").mkdir(parents=True)
    disk.sweep_quarantine(60.0)
    assert len(names_in(disk.quarantine_path)) == 3
    disk.sweep_quarantine(0.0)
    assert names_in(disk.quarantine_path) == [moved.parents[1].name]
    assert disk.quarantined(0.0) == [("cats/tom.png", moved)]
    disk.remove_quarantined(moved)
    assert not disk.quarantine_path.exists()
    disk.quarantine_path.mkdir()
    disk.sweep_quarantine(60.0)
    assert not disk.quarantine_path.exists()


def test_two_directories_share_a_quarantine(uploads: Uploads, tmp_path: Path) -> None:
    """A copy is found by the uploads directory that it is from, and by others once that is gone: it may be renamed."""
    paths = [tmp_path / "static" / tenant / "uploads" for tenant in ("a", "b")]
    one, other = (uploads(path) for path in paths)
    assert one.quarantine_path == other.quarantine_path
    for disk, data in ((one, PICTURE), (other, OTHER)):
        put(disk, "tom.png", data)
    moved, others = one.quarantine("tom.png"), other.quarantine("tom.png")
    assert moved is not None
    assert others is not None
    assert one.quarantined(0.0) == [("tom.png", moved)]
    assert other.quarantined(0.0) == [("tom.png", others)]
    one.sweep_quarantine(0.0)
    assert other.quarantined(0.0) == [("tom.png", others)]
    paths[1].rename(tmp_path / "static" / "c")
    assert sorted(one.quarantined(0.0)) == sorted([("tom.png", moved), ("tom.png", others)])
    for path in (moved, others):
        one.remove_quarantined(path)
    assert not one.quarantine_path.exists()


def test_what_is_not_ours_stays_in_quarantine(uploads: Uploads, directory: Path, tmp_path: Path) -> None:
    """Files and empty directories of others in the directory that the app gives are neither found nor removed."""
    theirs = tmp_path / "var"
    write_file(theirs / "cats" / "tom.png")
    (theirs / "empty").mkdir()
    disk = uploads(directory, quarantine=theirs)
    put(disk, "cats/mog.png")
    moved = disk.quarantine("cats/mog.png")
    assert moved is not None
    assert disk.quarantined(0.0) == [("cats/mog.png", moved)]
    disk.remove_quarantined(moved)
    disk.sweep_quarantine(0.0)
    assert names_in(theirs) == ["cats", "empty"]
    assert contents_below(theirs) == {"cats/tom.png": PICTURE}


def test_a_quarantine_of_another_user(uploads: Uploads, ordinary_directory: Path) -> None:
    """A quarantine that another user made, in which nothing can be seen, hides no copy inside the root."""
    disk = uploads(ordinary_directory / "uploads")
    disk.quarantine_path.mkdir(0o000)
    put(disk, "tom.png")
    moved = disk.quarantine("tom.png")
    assert moved is not None
    errors = list[OSError]()
    assert disk.quarantined(0.0, errors) == [("tom.png", moved)]
    assert [error.errno for error in errors] == [errno.EACCES]
    with pytest.raises(PermissionError):
        disk.quarantined(0.0)


def test_a_copy_of_another_user(uploads: Uploads, ordinary_directory: Path) -> None:
    """A copy that another user moved, which cannot be read, hides no other one."""
    disk = uploads(ordinary_directory / "uploads")
    moved = []
    for name in ("a.png", "b.png", "c.png"):
        put(disk, name)
        moved.append(disk.quarantine(name))
    found = [path for _, path in disk.quarantined(0.0)]
    found[1].parent.chmod(0o000)
    try:
        errors = list[OSError]()
        assert [path for _, path in disk.quarantined(0.0, errors)] == [found[0], found[2]]
        assert [error.errno for error in errors] == [errno.EACCES]
        with pytest.raises(PermissionError):
            disk.quarantined(0.0)
        disk.sweep_quarantine(0.0)
    finally:
        found[1].parent.chmod(0o700)
    assert [path for _, path in disk.quarantined(0.0)] == found


def test_a_directory_that_is_a_link_now(uploads: Uploads, directory: Path, tmp_path: Path) -> None:
    """A copy is found when the uploads have moved behind a link, but nothing behind a link in the quarantine is."""
    aside = tmp_path / "aside"
    disk = uploads(directory, quarantine=aside)
    put(disk, "tom.png")
    moved = disk.quarantine("tom.png")
    assert moved is not None
    directory.rename(tmp_path / "volume")
    directory.symlink_to(tmp_path / "volume")
    write_file(tmp_path / "theirs" / "mog.png")
    (aside / "20200101T000000-00000000").symlink_to(tmp_path / "theirs")
    assert uploads(directory, quarantine=aside).quarantined(0.0) == [("tom.png", moved)]


def test_a_rename_that_fails_although_it_was_done(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was moved although the disk reports an error (NFS) stays in quarantine."""
    put(disk, "cats/tom.png")
    real = os.rename

    def fails_late(*arguments: object, **more: object) -> None:
        real(*arguments, **more)  # type: ignore[arg-type]
        raise OSError(errno.ENOENT, "no such file")

    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", fails_late)
        assert disk.quarantine("cats/tom.png") is None
    assert [(name, path.read_bytes()) for name, path in disk.quarantined(0.0)] == [("cats/tom.png", PICTURE)]


def test_a_file_that_takes_its_place_while_it_is_swept(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep by another clock removes no file that is moved at this moment."""
    place = disk.quarantine_path / "20200101T000000-00000000" / "tom.png"
    place.parent.mkdir(parents=True)
    place.symlink_to(quarantine_module.PLACEHOLDER)
    write_file(disk.path_of("tom.png"))
    real = os.readlink

    def readlink_before_the_move(path: Path) -> str:
        found = real(path)
        if disk.path_of("tom.png").exists():
            disk.path_of("tom.png").rename(place)
        return found

    with monkeypatch.context() as racing:
        racing.setattr(os, "readlink", readlink_before_the_move)
        disk.sweep_quarantine(0.0)
    assert disk.quarantined(0.0) == [("tom.png", place)]
    assert place.read_bytes() == PICTURE


def test_a_quarantine_above_the_uploads(uploads: Uploads, tmp_path: Path) -> None:
    """What leaves the quarantine inside the root takes no directory above the root with it."""
    disk = uploads(tmp_path / "a" / "b" / "uploads", quarantine=tmp_path / "a")
    inside = disk.path / QUARANTINE / "20200101T000000-00000000" / "tom.png"
    write_file(inside)
    disk.remove_quarantined(inside)
    assert disk.path.is_dir()
    assert list(disk.path.iterdir()) == []


# -- files that are not moved -----------------------------------------------------------------------------------------


def test_quarantine_makes_nothing_for_what_is_absent(disk: UploadsDirectory) -> None:
    """For an absent name no directory is made."""
    put(disk, "cats/tom.png")
    for absent in ("cats/mog.png", "dogs/rex.png", "cats/tom.png/x"):
        assert disk.quarantine(absent) is None
    assert not disk.quarantine_path.exists()
    assert contents_below(disk.path) == {"cats/tom.png": PICTURE}


def test_a_bad_copy_that_cannot_be_set_aside_stays(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a bad copy cannot be moved, the error is raised and the file stays."""
    put(disk, "tom.png")
    monkeypatch.setattr(os, "rename", fails(errno.EROFS))
    with pytest.raises(OSError) as caught:
        disk.quarantine("tom.png")
    assert caught.value.errno == errno.EROFS
    assert read(disk, "tom.png") == PICTURE


def test_a_bad_copy_that_vanishes_is_absent(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another process removes the file first, `quarantine` returns None."""
    put(disk, "tom.png")
    real = os.rename

    def rename_after_removal(*arguments: object, **more: object) -> None:
        disk.path_of("tom.png").unlink(missing_ok=True)
        real(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", rename_after_removal)
    assert disk.quarantine("tom.png") is None


def test_a_directory_that_takes_the_name_is_not_moved(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a directory with files takes the name just before the move, it stays, and nothing is left in quarantine."""
    put(disk, "cats")
    real = os.rename

    def rename_after_exchange(*arguments: object, **more: object) -> None:
        if disk.path_of("cats").is_file():
            disk.path_of("cats").unlink()
            write_file(disk.path_of("cats/tom.png"))
        real(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", rename_after_exchange)
    assert disk.quarantine("cats") is None
    assert contents_below(disk.path) == {"cats/tom.png": PICTURE}
    assert not disk.quarantine_path.exists()
