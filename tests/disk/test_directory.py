"""The disk half: what is opened, what is refused, what is made, what is set aside, and what a walk meets."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import pwd
import random
import re
import resource
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfheal.disk import directory as room
from selfheal.disk import syscalls
from selfheal.disk.directory import MARKER, QUARANTINE, Opened, UploadsDirectory
from selfheal.disk.listing import walk
from selfheal.disk.open_file import OpenFile, identity_of
from selfheal.disk.staged_file import TEMPORARY
from selfheal.errors import DiskUnwritable, NotAFile
from tests.conftest import make_socket, needs
from tests.disk.test_staged_file import (
    ABSURD,
    Mount,
    assert_no_more_than,
    descriptors,
    fails,
    mounts,
    no_unnamed_files,
    numbers_of_the_next_descriptors,
)

PICTURE = b"a picture " * 1000
OTHER = b"another picture " * 900
SECRET = b"not for visitors"
MODIFIED = 1_234_567_890_123_456_789
Uploads = Callable[..., UploadsDirectory]


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    """As many descriptors are open after a test as before it."""
    before = descriptors()
    yield
    assert_no_more_than(before)


@pytest.fixture(autouse=True, params=["openat2", "portable"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel that opens beneath a directory in one call, and one that must be asked part by part."""
    if request.param == "portable":
        monkeypatch.setattr(syscalls, "HAS_OPENAT2", False)
    elif not syscalls.HAS_OPENAT2:
        needs("openat2", "the tests on Linux 5.6 or later, outside of sandboxes that forbid it")
    return request.param


@pytest.fixture
def uploads(no_leak: None) -> Iterator[Uploads]:
    """Makes the disk half over a path; what it holds is let go of at the end."""
    made: list[UploadsDirectory] = []

    def make(*arguments: Any, **options: Any) -> UploadsDirectory:
        made.append(UploadsDirectory(*arguments, **options))
        return made[-1]

    yield make
    for disk in made:
        disk.close()


@pytest.fixture
def disk(uploads: Uploads, directory: Path) -> UploadsDirectory:
    """An uploads directory that is not there yet."""
    return uploads(directory)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory outside of the uploads, with a secret in it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(SECRET)
    return outside


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The room's clock, which stands still unless `now` is set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """A umask, for the time of the test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Mount]]:
    """Mounts a small real file system where the uploads are to be."""
    (tmp_path / "volume").mkdir()
    yield from mounts(request.node, tmp_path / "volume" / "uploads")


@pytest.fixture
def ground() -> Iterator[Path]:
    """A directory of an ordinary user, as whom the test runs: root may read and write everything."""
    path = Path(tempfile.mkdtemp(prefix="selfheal-test-"))
    is_root = os.geteuid() == 0
    try:
        if is_root:
            nobody = pwd.getpwnam("nobody").pw_uid
            try:
                os.chown(path, nobody, -1)
                os.seteuid(nobody)
            except OSError:
                needs("a second user", "the tests as an ordinary user, or as the real root")
        yield path
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(path)


def put(disk: UploadsDirectory, name: str, data: bytes = PICTURE) -> None:
    """Put bytes at a name, as a restore does."""
    with disk.writing(), disk.stage(name) as staged:
        staged.write(data)
        staged.seal(MODIFIED, disk.file_mode)
        staged.sync()
        staged.replace()


def read(disk: UploadsDirectory, name: str) -> bytes | None:
    """What a visitor gets for a name from this disk: from memory if it can be had there, else waited for."""
    try:
        file = disk.open_cached(name)
    except BlockingIOError:
        file = disk.open(name)
    if file is None:
        return None
    with file:
        return file.read_waiting(0, file.size + 1)


def lay(path: Path, data: bytes = PICTURE) -> Path:
    """Put bytes at a path, as a deploy or a person does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def below(path: Path) -> dict[str, bytes]:
    """Every file below a path."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def mode_of(path: Path) -> int:
    """The permission bits of a path."""
    return stat.S_IMODE(path.lstat().st_mode)


# -- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tom.png", "cats/old/tom.png", "Кот é [1]@2x 100%.png", "x" * 255])
def test_a_file_is_opened_and_measured(disk: UploadsDirectory, name: str) -> None:
    """The bytes, the size and the time of what stands at the name."""
    put(disk, name)
    file = disk.open(name)
    assert file is not None
    with file:
        assert file.read_waiting(0, file.size + 1) == PICTURE
        assert (file.size, file.modified_ns) == (len(PICTURE), MODIFIED)
        assert Path(file.path) == disk.path_of(name)
        assert file.identity == identity_of(os.stat(file.path))
        assert file.threads is disk.threads


def test_what_is_in_memory_is_opened_without_waiting(uploads: Uploads, disk: UploadsDirectory) -> None:
    """A file that was just used is the same file however it is opened; before the first use nobody can tell."""
    put(disk, "tom.png")
    fresh = uploads(disk.path)
    with pytest.raises(BlockingIOError):
        fresh.open_cached("tom.png")
    waited = disk.open("tom.png")
    assert waited is not None
    with waited, contextlib.suppress(BlockingIOError):
        cached = disk.open_cached("tom.png")
        assert cached is not None
        with cached:
            assert (cached.identity, cached.path) == (waited.identity, waited.path)


def test_a_file_that_cannot_be_measured(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may have lost it since it was opened: that is told, and leaves nothing open."""
    put(disk, "tom.png")
    disk.root()
    before = descriptors()
    monkeypatch.setattr(os, "fstat", fails(errno.ESTALE))
    with pytest.raises(OSError) as caught:
        disk.open("tom.png")
    monkeypatch.undo()
    assert caught.value.errno == errno.ESTALE
    assert_no_more_than(before)


def test_the_root_is_looked_at_every_second(
    disk: UploadsDirectory, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a second what is in memory is opened at once; then the path may lead elsewhere, and the disk is asked."""
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


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_what_memory_knows_to_be_absent_is_none(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Some file systems remember that there is no such name: then nobody waits for the disk to say so again."""
    put(disk, "tom.png")
    monkeypatch.setattr(syscalls, "open_cached", fails(code))
    assert disk.open_cached("mog.png") is None


@pytest.mark.parametrize("code", [errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENODEV, errno.EXDEV])
def test_what_memory_knows_to_be_no_file_is_told(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Links, devices and directories are refused by name, without waiting for the disk."""
    put(disk, "tom.png")
    monkeypatch.setattr(syscalls, "open_cached", fails(code))
    with pytest.raises(NotAFile, match=r"^cats/mog\.png$"):
        disk.open_cached("cats/mog.png")


@pytest.mark.parametrize(
    "name", ["missing.png", "missing/tom.png", "tom.png/tom.png", "x" * 256, "x" * 256 + "/tom.png", "cats/missing"]
)
def test_an_absent_name_is_none(disk: UploadsDirectory, name: str) -> None:
    """No file, no directory of it, a file in place of the directory, a part that no disk can hold: absent, no error."""
    put(disk, "tom.png")
    put(disk, "cats/tom.png")
    assert read(disk, name) is None
    assert disk.open(name) is None
    assert disk.stat(name) is None
    assert disk.remove(name) is False
    assert disk.quarantine(name) is None


def test_asking_leaves_no_garbage(disk: UploadsDirectory, kernel: str) -> None:
    """An open that must wait, or finds nothing, is too common to leave work for the garbage collector."""
    put(disk, "tom.png")
    read(disk, "missing.png")
    gc.collect()
    gc.disable()
    try:
        for number in range(50):
            assert read(disk, f"missing{number}.png") is None
        assert gc.collect() < 50
    finally:
        gc.enable()


def test_what_was_opened_is_what_is_read(disk: UploadsDirectory) -> None:
    """A file that is deleted, replaced or set aside after it was opened is read whole by those who opened it."""
    for forget in (disk.remove, disk.quarantine, lambda name: put(disk, name, OTHER)):
        put(disk, "tom.png")
        file = disk.open("tom.png")
        assert file is not None
        with file:
            forget("tom.png")
            assert file.read_waiting(0, file.size + 1) == PICTURE


def test_an_identity_changes_with_the_file(disk: UploadsDirectory) -> None:
    """The same bytes put anew, and other bytes of the same size and time, are another file."""
    identities = set()
    held: list[OpenFile] = []
    for data in (PICTURE, PICTURE, PICTURE[::-1]):
        put(disk, "tom.png", data)
        file = disk.open("tom.png")
        assert file is not None
        held.append(file)
        identities.add(file.identity)
    for file in held:
        file.close()
    assert len(identities) == 3


def device(path: Path) -> None:
    """A device that would swallow or feed whoever opens it."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.close(os.open(path, os.O_RDONLY))
    except PermissionError:
        needs("the right to make devices", "the tests as root, with TMPDIR on a file system that permits devices")


def link_to_a_file(path: Path) -> None:
    """A link to a picture beside it."""
    lay(path.parent / "target.png")
    path.symlink_to("target.png")


def link_to_nothing(path: Path) -> None:
    """A link that leads nowhere."""
    path.symlink_to("nowhere")


def link_to_itself(path: Path) -> None:
    """A link that never ends."""
    path.symlink_to(path.name)


STRANGE = [Path.mkdir, os.mkfifo, make_socket, device, link_to_a_file, link_to_nothing, link_to_itself]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["strange.png", "cats/strange.png"])
@pytest.mark.parametrize("stand", STRANGE)
def test_what_is_no_file_is_not_opened(disk: UploadsDirectory, name: str, stand: Callable[[Path], None]) -> None:
    """A directory, FIFO, socket, device or link never blocks, and is taken neither for a file nor for absent."""
    path = disk.path_of(name)
    path.parent.mkdir(parents=True)
    stand(path)
    for ask in (disk.open, functools.partial(read, disk)):
        with pytest.raises(NotAFile) as caught:
            ask(name)
        assert str(caught.value) == name
    assert disk.stat(name) is None


@pytest.mark.parametrize("stand", [Path.mkdir, os.mkfifo, make_socket, link_to_a_file, link_to_nothing])
def test_what_is_no_file_does_not_give_way(disk: UploadsDirectory, stand: Callable[[Path], None]) -> None:
    """Publishing onto whatever stands at a name changes nothing, and what a link leads to is never written."""
    path = disk.path_of("strange.png")
    path.parent.mkdir(parents=True)
    stand(path)
    before, expected = path.lstat(), below(disk.path)
    with disk.stage("strange.png") as staged:
        staged.write(OTHER)
        assert not staged.publish()
    assert os.path.samestat(path.lstat(), before)
    assert below(disk.path) == expected


def test_removing_leaves_directories_alone(disk: UploadsDirectory) -> None:
    """A directory at a name is no file of it: with all that it holds it stays."""
    put(disk, "cats/tom.png")
    with contextlib.suppress(OSError):
        assert disk.remove("cats") is False
    assert below(disk.path) == {"cats/tom.png": PICTURE}


# -- links and tricks of naming --------------------------------------------------------------------------------------


def link_the_last_part(uploads: Path, target: Path) -> str:
    """A link at the name itself."""
    (uploads / "secret.png").symlink_to(target / "secret.png")
    return "secret.png"


def link_a_middle_part(uploads: Path, target: Path) -> str:
    """A link at a directory of the name."""
    (uploads / "cats").mkdir()
    (uploads / "cats" / "link").symlink_to(target)
    return "cats/link/secret.png"


def link_the_first_part(uploads: Path, target: Path) -> str:
    """A link at the first directory of the name."""
    (uploads / "link").symlink_to(target)
    return "link/secret.png"


def link_within_the_root(uploads: Path, target: Path) -> str:
    """A link that does not even leave the root."""
    lay(uploads / "real" / "secret.png", SECRET)
    (uploads / "link").symlink_to("real")
    return "link/secret.png"


def climb_out(uploads: Path, target: Path) -> str:
    """A name that climbs out of the root; the grammar refuses it, and so does the disk."""
    return os.path.relpath(target / "secret.png", uploads)


def climb_out_further_down(uploads: Path, target: Path) -> str:
    """A name that goes down before it climbs out."""
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
    """A name that leads to the secret if a link is followed, or dots are believed (CVE-2024-23334)."""
    disk.path.mkdir(parents=True)
    name: str = request.param(disk.path, outside)
    assert disk.path_of(name).read_bytes() == SECRET, "the trick would work"
    return name


def test_no_trick_opens_a_file(disk: UploadsDirectory, trick: str) -> None:
    """Whoever asks for it gets nothing: absent or refused, never the secret."""
    with contextlib.suppress(NotAFile):
        assert disk.open(trick) is None
    with contextlib.suppress(NotAFile):
        assert read(disk, trick) is None


def test_no_trick_measures_a_file(disk: UploadsDirectory, trick: str) -> None:
    """What may not be opened is not measured either: there is no such file."""
    with contextlib.suppress(NotAFile):
        assert disk.stat(trick) is None


def test_no_trick_changes_what_it_leads_to(disk: UploadsDirectory, trick: str, outside: Path) -> None:
    """Not removed, not moved, not dated, not written: the secret is as it was."""
    secret = disk.path_of(trick).resolve()
    before = secret.stat()
    for change in (
        lambda: disk.set_modified(trick, MODIFIED),
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
    """Nothing is made where a link or dots lead to, for a new file either."""
    elsewhere = disk.path_of(trick).resolve().parent
    before = sorted(elsewhere.rglob("*"))
    for new in (f"{Path(trick).parent}/new.png", f"{Path(trick).parent}/deep/new.png"):
        if not new.startswith("."):
            with contextlib.suppress(OSError, DiskUnwritable):
                put(disk, new)
    assert sorted(elsewhere.rglob("*")) == before


# -- unreadable is not absent ----------------------------------------------------------------------------------------


def test_an_unreadable_file_is_not_taken_for_missing(uploads: Uploads, ground: Path) -> None:
    """EACCES is told as it is: nobody is to restore over a file that only cannot be read."""
    disk = uploads(ground / "uploads")
    put(disk, "tom.png")
    disk.path_of("tom.png").chmod(0)
    with pytest.raises(PermissionError):
        disk.open("tom.png")
    with pytest.raises(PermissionError):
        read(disk, "tom.png")


def test_a_file_in_an_unreadable_directory_is_not_taken_for_missing(uploads: Uploads, ground: Path) -> None:
    """As for the file, so for each directory above it, up to the root's own."""
    disk = uploads(ground / "uploads")
    put(disk, "cats/old/tom.png")
    for locked in (disk.path / "cats" / "old", disk.path / "cats", disk.path, ground):
        mode = mode_of(locked)
        locked.chmod(0)
        try:
            for ask in (disk.open, disk.stat, disk.remove, disk.quarantine):
                with pytest.raises(PermissionError):
                    ask("cats/old/tom.png")
        finally:
            locked.chmod(mode)
    assert read(disk, "cats/old/tom.png") == PICTURE


def test_an_unreadable_directory_is_not_walked_past(uploads: Uploads, ground: Path) -> None:
    """A walk that cannot see everything says so; it never lets the rest look missing."""
    disk = uploads(ground / "uploads")
    put(disk, "cats/tom.png")
    (disk.path / "cats").chmod(0)
    try:
        found = []
        with contextlib.suppress(PermissionError):
            found = list(walk(disk))
            assert any(entry.fault for entry in found), "the unreadable directory was passed over in silence"
        assert "cats/tom.png" not in [entry.name for entry in found]
    finally:
        (disk.path / "cats").chmod(0o755)


@pytest.mark.parametrize("headroom", range(9))
def test_too_many_open_files(disk: UploadsDirectory, headroom: int) -> None:
    """Running out of descriptors is neither a missing file nor a bad disk, wherever it happens; none is lost."""
    put(disk, "cats/tom.png")
    before = descriptors()
    limit = numbers_of_the_next_descriptors(headroom + 1)[headroom]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    outcomes: list[object] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        for work in (
            lambda: read(disk, "cats/tom.png"),
            lambda: put(disk, "cats/old/mog.png"),
            lambda: list(walk(disk)),
            lambda: disk.quarantine("cats/tom.png"),
        ):
            try:
                outcomes.append(work())
            except OSError as error:
                outcomes.append(error.errno)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert descriptors() == before, "a descriptor was left open"
    assert None not in outcomes[:1]
    assert errno.EMFILE in outcomes or headroom > 3
    put(disk, "dogs/rex.png")
    assert read(disk, "dogs/rex.png") == PICTURE


@pytest.mark.parametrize("modified_ns", [*ABSURD, -(2**40) * 10**9, 2**40 * 10**9])
def test_an_absurd_time_on_disk_is_no_failure(disk: UploadsDirectory, modified_ns: int) -> None:
    """A file from another age is set, opened, measured and walked like any other (CVE-2017-20005)."""
    put(disk, "tom.png")
    disk.set_modified("tom.png", modified_ns)
    with contextlib.suppress(OverflowError):
        os.utime(disk.path_of("tom.png"), ns=(modified_ns, modified_ns))
    assert read(disk, "tom.png") == PICTURE
    measured = disk.stat("tom.png")
    assert measured is not None
    assert [entry.modified_ns for entry in walk(disk)] == [measured.st_mtime_ns]


def test_a_time_can_be_set(disk: UploadsDirectory) -> None:
    """To the nanosecond; a missing file is told."""
    put(disk, "cats/tom.png")
    disk.set_modified("cats/tom.png", 42)
    measured = disk.stat("cats/tom.png")
    assert measured is not None
    assert measured.st_mtime_ns == 42
    for missing in ("cats/mog.png", "dogs/rex.png"):
        with pytest.raises(FileNotFoundError):
            disk.set_modified(missing, 42)


def test_a_file_can_be_removed(disk: UploadsDirectory) -> None:
    """True the first time, False from then on."""
    put(disk, "cats/tom.png")
    assert [disk.remove("cats/tom.png"), disk.remove("cats/tom.png")] == [True, False]
    assert read(disk, "cats/tom.png") is None


# -- the root --------------------------------------------------------------------------------------------------------


def test_reading_makes_nothing(disk: UploadsDirectory, directory: Path) -> None:
    """Where there is no uploads directory there is nothing, and nothing is made by asking."""
    assert read(disk, "tom.png") is None
    assert disk.stat("tom.png") is None
    assert list(walk(disk)) == []
    assert disk.remove("tom.png") is False
    assert disk.quarantine("tom.png") is None
    assert disk.sweep() == 0
    disk.sync()
    with pytest.raises(FileNotFoundError):
        disk.set_modified("tom.png", 0)
    assert not directory.parent.exists()


def test_a_root_that_stays_is_opened_once(disk: UploadsDirectory) -> None:
    """As long as the path leads to the same directory, no other descriptor of it is opened."""
    put(disk, "tom.png")
    root = disk.root()
    assert root is not None
    put(disk, "mog.png")
    assert disk.root() is root
    disk.path.rename(disk.path.with_name("aside"))
    put(disk, "tom.png")
    assert disk.root() is not root


def test_a_root_that_goes_as_soon_as_it_is_made(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody removes it just then: this file is refused with the reason, the next one makes it anew."""
    with monkeypatch.context() as patch:
        for call in ("mkdir", "chmod", "makedirs"):
            patch.setattr(os, call, lambda *_, **__: None)
        with pytest.raises(DiskUnwritable, match=os.strerror(errno.ENOENT)):
            disk.stage("tom.png")
    put(disk, "tom.png")
    assert read(disk, "tom.png") == PICTURE


def test_a_machine_that_just_started_writes_at_once(disk: UploadsDirectory, clock: SimpleNamespace) -> None:
    """Its clock begins at 0; nothing was refused before that."""
    clock.now = 0.0
    put(disk, "tom.png")
    assert read(disk, "tom.png") == PICTURE


def test_a_deleted_root_is_made_anew(disk: UploadsDirectory) -> None:
    """Somebody deletes the uploads directory, and all above it: names are absent, and the next file makes it anew."""
    put(disk, "cats/tom.png")
    shutil.rmtree(disk.path.parent.parent)
    assert disk.open("cats/tom.png") is None
    assert list(walk(disk)) == []
    put(disk, "cats/tom.png", OTHER)
    assert disk.path_of("cats/tom.png").read_bytes() == OTHER
    assert read(disk, "cats/tom.png") == OTHER


def within_seconds(work: Callable[[], object], wanted: object, seconds: float = 5.0) -> None:
    """Wait until work gives what is wanted; a process may look for a new root only every so often."""
    end = time.monotonic() + seconds
    while (got := work()) != wanted:
        assert time.monotonic() < end, f"it stays at {got!r}"
        time.sleep(0.05)


def short_of(disk: UploadsDirectory, name: str) -> bytes | None:
    """The beginning of what a visitor gets."""
    data = read(disk, name)
    return None if data is None else data[:10]


def test_a_root_that_another_made_anew_is_seen(disk: UploadsDirectory) -> None:
    """Deleted and laid anew by a deploy: what is answered is what stands there now."""
    put(disk, "tom.png")
    assert read(disk, "tom.png") == PICTURE
    shutil.rmtree(disk.path)
    lay(disk.path_of("tom.png"), OTHER)
    within_seconds(lambda: short_of(disk, "tom.png"), OTHER[:10])
    assert [entry.name for entry in walk(disk)] == ["tom.png"]


def test_a_root_that_was_replaced_is_seen(disk: UploadsDirectory) -> None:
    """Another directory moved into its place: what is answered, walked and written is below that one."""
    put(disk, "tom.png")
    put(disk, "gone.png")
    assert read(disk, "tom.png") == PICTURE
    assert read(disk, "gone.png") == PICTURE
    aside = disk.path.with_name("aside")
    disk.path.rename(aside)
    lay(disk.path_of("tom.png"), OTHER)
    within_seconds(lambda: short_of(disk, "tom.png"), OTHER[:10])
    within_seconds(lambda: short_of(disk, "gone.png"), None)
    put(disk, "new.png")
    assert disk.path_of("new.png").read_bytes() == PICTURE
    assert sorted(path.name for path in aside.iterdir()) == ["gone.png", "tom.png"]


def test_a_root_that_is_a_link_is_followed_to_each_release(uploads: Uploads, tmp_path: Path) -> None:
    """The root itself may be a link; when a deploy switches it, the new release's files are answered and written."""
    for release, data in (("one", PICTURE), ("two", OTHER)):
        lay(tmp_path / release / "uploads" / "tom.png", data)
    (tmp_path / "current").symlink_to("one")
    disk = uploads(tmp_path / "current" / "uploads")
    within_seconds(lambda: short_of(disk, "tom.png"), PICTURE[:10])
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").rename(tmp_path / "current")
    within_seconds(lambda: short_of(disk, "tom.png"), OTHER[:10])
    put(disk, "new.png")
    assert (tmp_path / "two" / "uploads" / "new.png").read_bytes() == PICTURE
    assert not (tmp_path / "one" / "uploads" / "new.png").exists()


def test_a_root_that_comes_and_goes_costs_no_descriptors(disk: UploadsDirectory) -> None:
    """However often the directory is replaced, only the last one is held open."""
    put(disk, "tom.png")
    before = descriptors()
    for _ in range(20):
        shutil.rmtree(disk.path)
        assert disk.open("tom.png") is None
        put(disk, "tom.png")
        assert read(disk, "tom.png") == PICTURE
    assert descriptors() == before


def test_a_file_in_place_of_the_root_is_no_directory(disk: UploadsDirectory) -> None:
    """Where a file stands in place of the uploads directory there is nothing to read, and nothing can be written."""
    lay(disk.path)
    assert disk.open("tom.png") is None
    assert list(walk(disk)) == []
    with pytest.raises(DiskUnwritable):
        disk.stage("tom.png")
    assert disk.path.read_bytes() == PICTURE


def test_a_volume_mounted_later_is_seen(uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path) -> None:
    """A volume that is mounted over the directory while the app runs is what is read and written from then on."""
    disk = uploads(tmp_path / "volume" / "uploads")
    put(disk, "tom.png")
    volume = mount("size=1m")
    assert disk.open("tom.png") is None
    put(disk, "tom.png", OTHER)
    assert read(disk, "tom.png") == OTHER
    volume.unmount()
    within_seconds(lambda: short_of(disk, "tom.png"), PICTURE[:10])


def test_it_can_be_used_after_it_was_closed(disk: UploadsDirectory) -> None:
    """Closing lets go of the root; a later call opens it anew."""
    put(disk, "tom.png")
    disk.close()
    disk.close()
    assert read(disk, "tom.png") == PICTURE


def test_everything_is_synced_at_once(disk: UploadsDirectory) -> None:
    """A bulk run brings all it staged to the disk with one call."""
    put(disk, "tom.png")
    disk.sync()
    assert read(disk, "tom.png") == PICTURE


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_what_does_not_reach_the_disk_is_told(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A bulk run must not record as safe what the disk failed to write."""
    put(disk, "tom.png")
    monkeypatch.setattr(syscalls, "sync_filesystem", fails(code))
    with pytest.raises(OSError) as caught:
        disk.sync()
    assert caught.value.errno == code


def test_what_the_dead_left_is_swept(disk: UploadsDirectory) -> None:
    """The temporary files of killed processes are removed and counted; uploads are not."""
    put(disk, "tom.png")
    lay(disk.path / TEMPORARY / "dead")
    assert [disk.sweep(), disk.sweep()] == [1, 0]
    assert below(disk.path) == {"tom.png": PICTURE}


# -- directories are made --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o2775])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777], indirect=True)
def test_directories_have_the_mode_given(uploads: Uploads, tmp_path: Path, umask: int, mode: int) -> None:
    """Each directory that is made, the root too, has the mode asked for, whatever the umask (CVE-2020-24583)."""
    disk = uploads(tmp_path / "uploads", directory_mode=mode, file_mode=0o640)
    put(disk, "a/b/c/tom.png")
    made = [disk.path, *(disk.path / part for part in ("a", "a/b", "a/b/c"))]
    assert [oct(mode_of(path)) for path in made] == [oct(mode)] * 4
    assert mode_of(disk.path_of("a/b/c/tom.png")) == 0o640


@pytest.mark.parametrize("umask", [0o000, 0o077], indirect=True)
def test_uploads_can_be_read_by_a_web_server(disk: UploadsDirectory, umask: int) -> None:
    """Unless another mode is asked for, everybody reads and only the owner writes."""
    put(disk, "cats/tom.png")
    modes = [mode_of(path) for path in (disk.path, disk.path / "cats", disk.path / "cats" / "tom.png")]
    assert [oct(mode) for mode in modes] == [oct(0o755), oct(0o755), oct(0o644)]


@pytest.mark.parametrize("umask", [0o077, 0o777], indirect=True)
def test_a_marked_root_has_the_mode_given(uploads: Uploads, tmp_path: Path, umask: int) -> None:
    """A root that is made to be marked has the mode of every other."""
    disk = uploads(tmp_path / "uploads", directory_mode=0o755)
    disk.mark()
    assert oct(mode_of(disk.path)) == oct(0o755)


@pytest.mark.parametrize("umask", [0o000], indirect=True)
def test_a_marker_is_its_owners_to_write(uploads: Uploads, tmp_path: Path, umask: int) -> None:
    """Others may read it, nobody else may write it, not even under the most open umask."""
    disk = uploads(tmp_path / "uploads")
    disk.mark()
    assert oct(mode_of(disk.path / MARKER)) == oct(0o644)


@pytest.mark.parametrize("umask", [0o000], indirect=True)
def test_directories_are_never_more_open_than_asked(
    uploads: Uploads, tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even between being made and getting their mode: a private directory is its owner's from its beginning."""
    disk = uploads(tmp_path / "uploads", directory_mode=0o700)
    real = os.mkdir
    modes = []

    def observed(path: str, *arguments: int, dir_fd: int | None = None) -> None:
        real(path, *arguments, dir_fd=dir_fd)
        modes.append(stat.S_IMODE(os.stat(path, dir_fd=dir_fd).st_mode))

    monkeypatch.setattr(os, "mkdir", observed)
    put(disk, "a/b/tom.png")
    assert [oct(mode) for mode in modes] == [oct(0o700)] * 3


def test_directories_that_are_there_are_left_as_they_are(disk: UploadsDirectory) -> None:
    """A mode that somebody else has set stays."""
    (disk.path / "cats").mkdir(parents=True)
    (disk.path / "cats").chmod(0o711)
    disk.path.chmod(0o751)
    put(disk, "cats/old/tom.png")
    assert [mode_of(disk.path), mode_of(disk.path / "cats"), mode_of(disk.path / "cats/old")] == [0o751, 0o711, 0o755]


def test_many_make_the_same_directories_at_once(disk: UploadsDirectory) -> None:
    """Eight threads put files below the same new directories: all arrive, and each directory has its mode."""
    wrong: list[object] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            barrier.wait()
            for batch in range(10):
                put(disk, f"{batch}/b/c/{number}.png")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sorted(below(disk.path)) == sorted(f"{batch}/b/c/{number}.png" for batch in range(10) for number in range(8))
    assert {mode_of(path) for path in disk.path.rglob("*") if path.is_dir()} == {0o755}


def test_many_are_staged_among_directories_that_stay_open(disk: UploadsDirectory) -> None:
    """A directory is opened once for all its files, and those of each directory arrive in it."""
    names = [f"{folder}{number}.png" for folder in ("", "cats/", "cats/old/") for number in range(3)]
    disk.stage("tom.png").close()
    before = descriptors()
    with Opened() as opened:
        for name in names:
            with disk.stage_among(opened, name) as staged:
                staged.write(name.encode())
                assert staged.publish()
        assert sorted(opened.folders) == ["", "cats", "cats/old"]
        assert descriptors() == before + 3
    assert below(disk.path) == {name: name.encode() for name in names}


def test_of_two_who_open_a_directory_at_once_one_is_used(tmp_path: Path) -> None:
    """The later thread gets the earlier one's descriptor; its own stays open until all are let go of, and no longer."""
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    with Opened() as opened:
        assert [opened.keep("cats", fd) for fd in (first, second, first)] == [first, first, first]
        assert all(stat.S_ISDIR(os.fstat(fd).st_mode) for fd in (first, second))
    for fd in (first, second):
        with pytest.raises(OSError):
            os.fstat(fd)


def test_the_deepest_name(disk: UploadsDirectory) -> None:
    """A name of 512 bytes and 256 parts is put, opened, walked and removed like any other."""
    name = "/".join(["a"] * 255 + ["bc"])
    put(disk, name)
    assert read(disk, name) == PICTURE
    assert [entry.name for entry in walk(disk)] == [name]
    assert disk.remove(name)


def test_a_directory_removed_while_it_is_staged_in(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody removes the directory at the worst moment: this file is refused, the next one is not."""
    real = room.Staged

    def too_late(root: int, parent: int, name: str) -> object:
        shutil.rmtree(disk.path)
        return real(root, parent, name)

    disk.path.mkdir(parents=True)
    with monkeypatch.context() as patch, contextlib.suppress(DiskUnwritable):
        patch.setattr(room, "Staged", too_late)
        put(disk, "cats/tom.png")
    put(disk, "cats/tom.png")
    assert read(disk, "cats/tom.png") == PICTURE


@pytest.mark.parametrize("way", ["unnamed", "named"])
def test_a_staged_file_is_read_while_it_grows(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Whoever follows a restore reads what was written so far, and goes on when the writer has closed its own."""
    if way == "named":
        monkeypatch.setattr(syscalls, "open_unnamed", no_unnamed_files)
    with disk.stage("cats/tom.png") as staged:
        reader = disk.reader(staged, "cats/tom.png")
        staged.write(PICTURE[:100])
        assert reader.read_waiting(0, 1000) == PICTURE[:100]
        staged.write(PICTURE[100:])
    with reader:
        assert Path(reader.path) == disk.path_of("cats/tom.png")
        assert reader.read_waiting(0, len(PICTURE) + 1) == PICTURE
        assert reader.identity[2] == os.fstat(reader.fd).st_ino
        assert reader.threads is disk.threads
    assert below(disk.path) == {}


def test_readers_never_see_an_absent_or_torn_file(disk: UploadsDirectory) -> None:
    """While a name is replaced 200 times, each reader gets one of the versions, whole, and as long as was measured."""
    versions = [bytes([number]) * (30_000 + 41 * number) for number in range(200)]
    put(disk, "cats/tom.png", versions[0])
    seen: set[bytes] = set()
    wrong: list[object] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            try:
                data = read(disk, "cats/tom.png")
            except BaseException as error:
                wrong.append(error)
            else:
                seen.add(b"" if data is None else data)

    reader = threading.Thread(target=look)
    reader.start()
    for version in versions:
        put(disk, "cats/tom.png", version)
    over.set()
    reader.join()
    assert wrong == []
    assert seen <= set(versions)
    assert len(seen) > 1, "the reader saw nothing happen"


# -- a disk that takes no file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.ENOENT,
    ],
)
def test_a_disk_that_takes_no_file_says_why(disk: UploadsDirectory, code: int) -> None:
    """Whatever it fails with, the message names the directory and the reason."""
    with pytest.raises(DiskUnwritable) as caught, disk.writing():
        raise OSError(code, os.strerror(code))
    assert str(disk.path) in str(caught.value)
    assert os.strerror(code) in str(caught.value)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_machine_that_runs_out_is_no_bad_disk(disk: UploadsDirectory, code: int) -> None:
    """Too many open files, or too little memory, is told as it is (503), and writing is tried again at once."""
    with pytest.raises(OSError) as caught, disk.writing():
        raise OSError(code, os.strerror(code))
    assert caught.value.errno == code
    put(disk, "tom.png")


def test_other_errors_pass(disk: UploadsDirectory) -> None:
    """What does not come from the disk is nobody's business here."""
    with pytest.raises(ZeroDivisionError), disk.writing():
        raise ZeroDivisionError


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_disk_that_takes_none_is_left_in_peace(
    disk: UploadsDirectory, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Read-only or not permitted: for 30 seconds no write is tried; after them it is."""
    with pytest.raises(DiskUnwritable) as first, disk.writing():
        raise OSError(code, os.strerror(code))
    clock.now += 29.9
    with pytest.raises(DiskUnwritable) as second:
        disk.stage("cats/tom.png")
    assert str(second.value) == str(first.value)
    assert not disk.path.exists()
    clock.now = 1030.0
    put(disk, "cats/tom.png")
    assert read(disk, "cats/tom.png") == PICTURE


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOTDIR])
def test_a_full_disk_is_tried_again_at_once(disk: UploadsDirectory, clock: SimpleNamespace, code: int) -> None:
    """A disk that was full for one file may have room for the next."""
    with pytest.raises(DiskUnwritable), disk.writing():
        raise OSError(code, os.strerror(code))
    put(disk, "tom.png")
    assert read(disk, "tom.png") == PICTURE


def test_a_file_in_place_of_a_directory_stops_only_what_is_below_it(disk: UploadsDirectory) -> None:
    """Where a file has a directory's name, the file stays, and every other name is written."""
    put(disk, "cats")
    with pytest.raises(DiskUnwritable):
        disk.stage("cats/tom.png")
    with pytest.raises(DiskUnwritable):
        disk.stage("cats/old/tom.png")
    put(disk, "dogs/rex.png")
    assert below(disk.path) == {"cats": PICTURE, "dogs/rex.png": PICTURE}


def test_a_directory_that_may_not_be_written(uploads: Uploads, ground: Path, clock: SimpleNamespace) -> None:
    """A real EACCES: what is there is served, nothing is written, and after 30 seconds it is tried again."""
    disk = uploads(ground / "uploads")
    put(disk, "tom.png")
    disk.path.chmod(0o555)
    try:
        for name in ("mog.png", "cats/mog.png", "tom.png"):
            with pytest.raises(DiskUnwritable):
                put(disk, name, OTHER)
            clock.now += 31
    finally:
        disk.path.chmod(0o755)
    assert below(disk.path) == {"tom.png": PICTURE}
    put(disk, "mog.png")
    assert read(disk, "mog.png") == PICTURE


@pytest.mark.parametrize("way", ["unnamed", "named"])
def test_a_full_disk(
    uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """ENOSPC of a real file system: what was there stays and is served; no litter, and all space comes back."""
    if way == "named":
        monkeypatch.setattr(syscalls, "open_unnamed", no_unnamed_files)
    disk = uploads(mount("size=256k").path)
    put(disk, "tom.png")
    free = os.statvfs(disk.path).f_bfree
    for name in ("tom.png", "mog.png"):
        with pytest.raises(DiskUnwritable, match=os.strerror(errno.ENOSPC)):
            put(disk, name, OTHER * 100)
    assert below(disk.path) == {"tom.png": PICTURE}
    assert os.statvfs(disk.path).f_bfree == free
    put(disk, "cats/mog.png", OTHER)
    assert below(disk.path) == {"tom.png": PICTURE, "cats/mog.png": OTHER}


def test_a_read_only_disk(uploads: Uploads, mount: Callable[[str], Mount], clock: SimpleNamespace) -> None:
    """EROFS of a real file system: what is there is served; 30 seconds after it was last asked it is asked again."""
    volume = mount("size=1m")
    disk = uploads(volume.path)
    put(disk, "tom.png")
    volume.remount("ro")
    for name in ("mog.png", "cats/mog.png", "tom.png"):
        with pytest.raises(DiskUnwritable, match=os.strerror(errno.EROFS)):
            put(disk, name, OTHER)
        clock.now += 31
    assert read(disk, "tom.png") == PICTURE
    for change in (lambda: disk.remove("tom.png"), lambda: disk.set_modified("tom.png", 0)):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    volume.remount("rw")
    put(disk, "cats/mog.png", OTHER)
    assert below(disk.path) == {"tom.png": PICTURE, "cats/mog.png": OTHER}


# -- a mount that is lost --------------------------------------------------------------------------------------------


def test_without_its_marker_nothing_is_written(uploads: Uploads, directory: Path, clock: SimpleNamespace) -> None:
    """No marker, no mount: no file, no directory; the message says what is missing. Marked, it is soon written."""
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
    """The marker guards what is written, not what is read."""
    disk = uploads(directory, require_marker=True)
    lay(directory / "tom.png")
    assert read(disk, "tom.png") == PICTURE


def test_a_lost_mount_is_not_written_beneath(
    uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path, clock: SimpleNamespace
) -> None:
    """The volume goes away while the app runs: the empty mount point stays empty; the volume comes back and is used."""
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
    assert sorted(below(path)) == [MARKER, "mog.png"]


# -- quarantine ------------------------------------------------------------------------------------------------------


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
def test_quarantine_is_where_nobody_is_served_from(uploads: Uploads, tmp_path: Path, path: str) -> None:
    """Below neither the uploads nor any public directory above them, and hidden should it be served all the same."""
    served = {"static", "public", "www", "html", "media"}
    disk = uploads(tmp_path / path)
    put(disk, "cats/tom.png")
    moved = disk.quarantine("cats/tom.png")
    assert moved is not None
    assert moved.is_absolute()
    assert not moved.is_relative_to(disk.path)
    assert not served & set(moved.relative_to(tmp_path).parts)
    assert moved.relative_to(tmp_path).parts[-4].startswith(".")


@pytest.mark.parametrize("name", ["tom.png", "cats/old/tom.png", "Кот é [1]@2x 100%.png", "/".join(["a"] * 256)])
@pytest.mark.parametrize("umask", [0o000, 0o077], indirect=True)
def test_a_bad_copy_is_set_aside(disk: UploadsDirectory, umask: int, name: str) -> None:
    """The name is absent, and the same file, bytes, time and all, is where only its owner gets at it."""
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


def test_a_bad_copy_tells_when_it_was_set_aside(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory it stands in begins with the time in UTC, wherever the machine believes to be."""
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
def test_a_bad_copy_is_private_in_an_open_place(disk: UploadsDirectory, umask: int) -> None:
    """Where somebody made the quarantine for all to enter, what is set aside in it is still its owner's alone."""
    disk.quarantine_path.mkdir(parents=True)
    disk.quarantine_path.chmod(0o755)
    put(disk, "cats/old/tom.png")
    moved = disk.quarantine("cats/old/tom.png")
    assert moved is not None
    assert oct(mode_of(disk.quarantine_path / moved.relative_to(disk.quarantine_path).parts[0])) == oct(0o700)


def test_a_link_is_set_aside_as_a_link(disk: UploadsDirectory) -> None:
    """Also one that leads nowhere: it is not taken for absent, and what is moved is the link itself."""
    disk.path.mkdir(parents=True)
    disk.path_of("strange.png").symlink_to("nowhere")
    moved = disk.quarantine("strange.png")
    assert moved is not None
    assert os.readlink(moved) == "nowhere"
    assert list(disk.path.iterdir()) == []


def test_the_place_may_be_a_link(uploads: Uploads, directory: Path, tmp_path: Path) -> None:
    """Who gives a quarantine may have it where it fits: there, and not in the root, is what was set aside."""
    (tmp_path / "roomy").mkdir()
    (tmp_path / "quarantine").symlink_to("roomy")
    disk = uploads(directory, quarantine=tmp_path / "quarantine")
    put(disk, "cats/tom.png")
    moved = disk.quarantine("cats/tom.png")
    assert moved is not None
    assert moved.resolve().is_relative_to(tmp_path / "roomy")
    assert moved.read_bytes() == PICTURE
    assert list(directory.iterdir()) == [directory / "cats"]


def test_each_bad_copy_of_a_name_is_set_aside(disk: UploadsDirectory) -> None:
    """A name may go bad several times in one second: all copies are kept, each by itself."""
    copies = [bytes([number]) * 100 for number in range(5)]
    moved = []
    for data in copies:
        put(disk, "cats/tom.png", data)
        moved.append(disk.quarantine("cats/tom.png"))
    assert [path.read_bytes() for path in moved if path is not None] == copies


def test_nothing_in_quarantine_is_overwritten(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bad copy of a name is kept, however many there are, and however they come to be numbered."""
    monkeypatch.setattr(room.secrets, "token_hex", lambda size: "0" * 2 * size)
    kept: dict[Path, bytes] = {}
    for number in range(4):
        data = bytes([number]) * 100
        lay(disk.path_of("cats/tom.png"), data)
        try:
            moved = disk.quarantine("cats/tom.png")
        except OSError:
            assert disk.path_of("cats/tom.png").read_bytes() == data, "refused, and lost"
            continue
        assert moved is not None
        assert moved not in kept
        kept[moved] = data
    assert kept
    assert {path: path.read_bytes() for path in kept} == kept


def test_quarantine_makes_nothing_for_what_is_absent(disk: UploadsDirectory) -> None:
    """No file, no directories."""
    put(disk, "cats/tom.png")
    for absent in ("cats/mog.png", "dogs/rex.png", "cats/tom.png/x"):
        assert disk.quarantine(absent) is None
    assert not disk.quarantine_path.exists()
    assert below(disk.path) == {"cats/tom.png": PICTURE}


def place_is_a_file(place: Path) -> None:
    """A file has its name."""
    lay(place)


def place_is_below_a_file(place: Path) -> None:
    """A file has the name of the directory that it should be in."""
    lay(place.parent)


def place_has_no_parent(place: Path) -> None:
    """The directory that it should be in is not there (yet)."""


@pytest.mark.parametrize("hinder", [place_is_a_file, place_is_below_a_file, place_has_no_parent])
@pytest.mark.parametrize("name", ["tom.png", "cats/old/tom.png"])
def test_where_the_other_place_cannot_be_made(
    uploads: Uploads, directory: Path, tmp_path: Path, hinder: Callable[[Path], None], name: str
) -> None:
    """The bad copy is set aside all the same, inside the root where nobody is served from, and no walk meets it."""
    place = tmp_path / "not" / "there"
    hinder(place)
    disk = uploads(directory, quarantine=place)
    put(disk, name)
    moved = disk.quarantine(name)
    assert moved is not None, "the bad copy was taken for absent, and will be lost when it is replaced"
    assert moved.is_relative_to(place) or moved.is_relative_to(directory / QUARANTINE)
    assert moved.read_bytes() == PICTURE
    assert disk.stat(name) is None
    assert list(walk(disk)) == []
    if moved.is_relative_to(directory):
        assert mode_of(directory / QUARANTINE) == 0o700


def test_where_the_other_place_is_on_another_disk(
    uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path
) -> None:
    """Uploads on a volume of their own: nothing can be moved off it, so it is set aside on it."""
    disk = uploads(mount("size=1m").path)
    put(disk, "cats/tom.png")
    moved = disk.quarantine("cats/tom.png")
    assert moved is not None
    assert moved.read_bytes() == PICTURE
    assert disk.stat("cats/tom.png") is None
    assert list(walk(disk)) == []


def test_where_the_other_place_may_not_be_written(uploads: Uploads, ground: Path) -> None:
    """A real EACCES beside the uploads: it is set aside inside the root."""
    (ground / "app").mkdir()
    disk = uploads(ground / "app" / "uploads")
    put(disk, "cats/tom.png")
    (ground / "app").chmod(0o555)
    try:
        moved = disk.quarantine("cats/tom.png")
    finally:
        (ground / "app").chmod(0o755)
    assert moved is not None
    assert moved.is_relative_to(disk.path / QUARANTINE)
    assert moved.read_bytes() == PICTURE


def test_no_link_leads_out_of_quarantine(uploads: Uploads, directory: Path, tmp_path: Path, outside: Path) -> None:
    """A link inside the root in place of the quarantine is not followed to where somebody may be served from."""
    lay(tmp_path / "file")
    disk = uploads(directory, quarantine=tmp_path / "file" / "quarantine")
    put(disk, "tom.png")
    (directory / QUARANTINE).symlink_to(outside)
    with pytest.raises(OSError) as caught:
        disk.quarantine("tom.png")
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, str(directory / QUARANTINE))
    assert read(disk, "tom.png") == PICTURE
    assert below(outside) == {"secret.png": SECRET}


def test_a_bad_copy_that_cannot_be_set_aside_stays(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it cannot be moved anywhere that is told, and nothing is lost."""
    put(disk, "tom.png")
    monkeypatch.setattr(os, "rename", fails(errno.EROFS))
    with pytest.raises(OSError) as caught:
        disk.quarantine("tom.png")
    assert caught.value.errno == errno.EROFS
    assert read(disk, "tom.png") == PICTURE


def test_a_bad_copy_that_vanishes_is_absent(disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process is first to remove it: there is nothing to set aside."""
    put(disk, "tom.png")
    real = os.rename

    def too_late(*arguments: object, **more: object) -> None:
        disk.path_of("tom.png").unlink(missing_ok=True)
        real(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", too_late)
    assert disk.quarantine("tom.png") is None


# -- walking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_walk_is_in_the_order_of_bytes(disk: UploadsDirectory, seed: int) -> None:
    """Every file is met once, in the order of the bytes of its whole name, directories and dots and all."""
    chance = random.Random(seed)
    parts = ["a", "b", "a-b", "a.b", "a b", "A", "é", "e\u0301", "Я", "字", "a0", "~", "!", "a.png", ".h", ".h-1", "0"]
    for _ in range(200):
        path = disk.path.joinpath(*chance.choices(parts, k=chance.randint(1, 4)))
        with contextlib.suppress(OSError):
            lay(path, b"x")
    names = [entry.name for entry in walk(disk)]
    assert names == sorted(names, key=os.fsencode)
    files = {name for name in below(disk.path) if not any(part.startswith(".") for part in name.split("/")[:-1])}
    assert files <= set(names)
    assert len(names) == len(set(names))


def test_a_walk_measures_what_it_meets(disk: UploadsDirectory) -> None:
    """An ordinary file is told with its size and time, and has no fault."""
    put(disk, "cats/tom.png")
    [entry] = walk(disk)
    assert (entry.name, entry.fault) == ("cats/tom.png", "")
    assert (entry.size, entry.modified_ns) == (len(PICTURE), MODIFIED)


def test_a_walk_follows_no_link(disk: UploadsDirectory, outside: Path) -> None:
    """Links to files, to directories, to nowhere and in circles are told, each once, with why they are no uploads."""
    put(disk, "cats/tom.png")
    for name, target in {
        "file": outside / "secret.png",
        "directory": outside,
        "nowhere": outside / "nowhere",
        "circle": disk.path,
        "cats/up": "..",
        "within": "cats",
    }.items():
        disk.path_of(name).symlink_to(target)
    found = {entry.name: entry.fault for entry in walk(disk)}
    assert sorted(found) == ["cats/tom.png", "cats/up", "circle", "directory", "file", "nowhere", "within"]
    assert [name for name, fault in found.items() if not fault] == ["cats/tom.png"]
    assert all("link" in fault for name, fault in found.items() if fault)


@pytest.mark.parametrize("stand", [os.mkfifo, make_socket, device])
@pytest.mark.timeout(20)
def test_a_walk_tells_what_is_no_file(disk: UploadsDirectory, stand: Callable[[Path], None]) -> None:
    """A FIFO, socket or device is told as such; it never blocks."""
    disk.path.mkdir(parents=True)
    stand(disk.path / "strange.png")
    assert [(entry.name, bool(entry.fault)) for entry in walk(disk)] == [("strange.png", True)]


def test_a_walk_tells_a_hidden_directory_once(disk: UploadsDirectory) -> None:
    """What nobody is served from is named once, not file by file."""
    for name in (".git/objects/1", ".git/objects/2", ".git/HEAD", "cats/.thumbs/tom.png", "cats/.thumbs/mog.png"):
        lay(disk.path_of(name))
    put(disk, "cats/tom.png")
    found = {entry.name: entry.fault for entry in walk(disk)}
    assert sorted(found) == [".git", "cats/.thumbs", "cats/tom.png"]
    assert found["cats/tom.png"] == ""
    assert "hidden" in found[".git"]
    assert "hidden" in found["cats/.thumbs"]


def test_a_walk_passes_over_noise_and_over_what_is_ours(disk: UploadsDirectory) -> None:
    """Files that systems and repositories leave everywhere, and our own, are no finding."""
    put(disk, "tom.png")
    for name in (
        ".gitkeep",
        "cats/.gitignore",
        "cats/.keep",
        ".DS_Store",
        "cats/Thumbs.db",
        MARKER,
        f"{TEMPORARY}/dead",
        f"{QUARANTINE}/20200101T000000-00000000/tom.png",
    ):
        lay(disk.path_of(name))
    assert [entry.name for entry in walk(disk)] == ["tom.png"]


@pytest.mark.parametrize("name", [b"\xff.png", b"caf\xe9.png", b"\xc3(.png", b"\xed\xa0\x80.png", b"a\nb.png"])
def test_a_name_that_is_no_text_is_met(disk: UploadsDirectory, name: bytes) -> None:
    """A file name that no encoding carries does not stop a walk, in a file's name or in a directory's."""
    raw = os.fsencode(disk.path) + b"/"
    os.makedirs(raw + b"dir" + name)
    for path in (raw + name, raw + b"dir" + name + b"/tom.png", raw + b"zebra.png"):
        with open(path, "wb") as file:
            file.write(PICTURE)
    names = sorted(os.fsencode(entry.name) for entry in walk(disk))
    assert names == sorted([name, b"dir" + name + b"/tom.png", b"zebra.png"])
    for entry in walk(disk):
        assert read(disk, entry.name) == PICTURE


def test_what_vanishes_during_a_walk_is_not_met(disk: UploadsDirectory) -> None:
    """Files and directories that go while a walk is under way do not stop it."""
    for name in ("a.png", "b.png", "c/1.png", "d/1.png", "e.png"):
        put(disk, name)
    walking = walk(disk)
    assert next(walking).name == "a.png"
    disk.remove("b.png")
    shutil.rmtree(disk.path / "c")
    assert [entry.name for entry in walking] == ["d/1.png", "e.png"]


@pytest.mark.parametrize("stand", [Path.touch, "link", os.mkfifo], ids=["file", "link", "fifo"])
@pytest.mark.timeout(20)
def test_what_becomes_something_else_during_a_walk_does_not_stop_it(
    disk: UploadsDirectory, outside: Path, stand: Callable[[Path], None] | str
) -> None:
    """A directory that turns into a file, link or FIFO meanwhile is not walked into, and the rest is met."""
    for name in ("a.png", "c/1.png", "e.png"):
        put(disk, name)
    walking = walk(disk)
    assert next(walking).name == "a.png"
    shutil.rmtree(disk.path / "c")
    if isinstance(stand, str):
        (disk.path / "c").symlink_to(outside)
    else:
        stand(disk.path / "c")
    names = [entry.name for entry in walking]
    assert [name for name in names if name != "c"] == ["e.png"]


def test_a_walk_that_is_given_up_leaves_nothing_open(disk: UploadsDirectory) -> None:
    """Whoever stops in the middle lets go of every directory."""
    put(disk, "a/b/c/1.png")
    put(disk, "a/b/c/2.png")
    before = descriptors()
    walking = walk(disk)
    next(walking)
    del walking
    assert descriptors() == before


def test_a_walk_of_many(disk: UploadsDirectory) -> None:
    """Two thousand files in one directory are met, each once."""
    disk.path.mkdir(parents=True)
    wanted = [f"{number:04}.png" for number in range(2_000)]
    for name in wanted:
        (disk.path / name).touch()
    assert [entry.name for entry in walk(disk)] == wanted
