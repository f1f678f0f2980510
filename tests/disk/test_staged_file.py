"""A name is absent or whole: the contract of a file on its way to its name, over every way of staging."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from selfheal.disk import staged_file as staging
from selfheal.disk import syscalls
from selfheal.disk.staged_file import TEMPORARY, Staged, sweep
from selfheal.disk.syscalls import Directory
from tests.conftest import needs
from tests.support import environment

OLD = b"old " * 5000
NEW = b"new! " * 7000
MODIFIED = 1_234_567_890_123_456_789
WAYS = ["unnamed-openat2", "unnamed-portable", "named-openat2", "named-portable"]
named_only = pytest.mark.parametrize("way", WAYS[2:], indirect=True)
"""For what only befalls a file that has a name before its own."""


def no_unnamed_files(directory: int) -> int:
    """What `open_unnamed` does on a file system that has no files without a name."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way of staging: with and without O_TMPFILE, with and without openat2."""
    naming, _, kernel = request.param.partition("-")
    if naming == "named":
        monkeypatch.setattr(syscalls, "open_unnamed", no_unnamed_files)
    if kernel == "portable":
        monkeypatch.setattr(syscalls, "HAS_OPENAT2", False)
    elif not syscalls.HAS_OPENAT2:
        needs("openat2", "the tests on Linux 5.6 or later, outside of sandboxes that forbid it")
    return request.param


@dataclass
class Place:
    """A root that is staged below."""

    path: Path
    root: Directory

    @property
    def fd(self) -> int:
        """The root's descriptor."""
        return self.root.fd

    def stage(self, name: str = "tom.png") -> Staged:
        """A file on its way to a name."""
        folder = name.rpartition("/")[0]
        with Directory(syscalls.open_directory(self.fd, folder)) as parent:
            return Staged(self.root, parent.fd, name)

    def put(self, data: bytes, name: str = "tom.png") -> None:
        """Stage bytes and put them at a name, whatever stands there."""
        with self.stage(name) as staged:
            staged.write(data)
            staged.seal(MODIFIED, 0o644)
            staged.replace()

    def entries(self) -> list[str]:
        """Everything below the root, ours too."""
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*"))

    def names(self) -> list[str]:
        """What a visitor or a walk could find below the root."""
        return [entry for entry in self.entries() if not entry.startswith(".")]


def descriptors() -> int:
    """How many descriptors this process holds."""
    return len(os.listdir("/proc/self/fd"))


def assert_no_more_than(before: int) -> None:
    """Fail if more descriptors are open than before, once nothing is left that only awaits the garbage collector."""
    if descriptors() > before:
        gc.collect()
    assert descriptors() <= before, "a descriptor was left open"


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    """As many descriptors are open after a test as before it."""
    before = descriptors()
    yield
    assert_no_more_than(before)


@pytest.fixture
def place(tmp_path: Path, way: str) -> Iterator[Place]:
    """An empty root."""
    root = tmp_path / "root"
    root.mkdir()
    place = Place(root, Directory(os.open(root, os.O_RDONLY | os.O_DIRECTORY)))
    yield place
    del place.root


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """A umask, for the time of the test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


# -- written, and only then named ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 4096], ids=["empty", "one byte", "1 MiB"])
@pytest.mark.parametrize("name", ["tom.png", "cats/tom.png", "Кот é [1]@2x 100%.png"])
def test_the_bytes_arrive(place: Place, name: str, data: bytes) -> None:
    """What was written in pieces is what stands at the name; size and digest are those of the whole."""
    (place.path / "cats").mkdir()
    with place.stage(name) as staged:
        for start in range(0, len(data), 100_000):
            staged.write(data[start : start + 100_000])
        staged.seal(MODIFIED, 0o644)
        staged.sync()
        assert staged.publish()
        assert (staged.size, staged.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (place.path / name).read_bytes() == data
    assert place.entries() == sorted({"cats", name})


def test_the_name_is_absent_until_the_file_is_whole(place: Place) -> None:
    """Before it is published there is nothing at the name, nor anywhere a visitor could ask for."""
    with place.stage() as staged:
        assert place.names() == []
        staged.write(NEW[:10])
        assert place.names() == []
        staged.write(NEW[10:])
        staged.seal(MODIFIED, 0o644)
        staged.sync()
        assert place.names() == []
        assert staged.publish()
        assert place.names() == ["tom.png"]
        assert (place.path / "tom.png").read_bytes() == NEW


def test_the_digest_is_that_of_what_was_written_so_far(place: Place) -> None:
    """It can be asked for at any time."""
    with place.stage() as staged:
        assert staged.sha256 == hashlib.sha256().hexdigest()
        staged.write(OLD)
        assert staged.sha256 == hashlib.sha256(OLD).hexdigest()
        staged.write(NEW)
        assert staged.sha256 == hashlib.sha256(OLD + NEW).hexdigest()


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_a_disk_that_takes_a_little_at_a_time_gets_it_all(
    place: Place, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """A write may be cut short by the system; the rest follows at its place."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:piece], offset))
    place.put(NEW[:9000])
    assert (place.path / "tom.png").read_bytes() == NEW[:9000]


def test_a_large_file_is_brought_to_the_disk_while_it_is_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk begins with each part once it is large enough: no byte is left out, and none is told twice."""
    begun: list[tuple[int, int, int]] = []
    monkeypatch.setattr(staging, "WRITE_BEHIND", 1000)
    monkeypatch.setattr(syscalls, "begin_writing_back", lambda *part: begun.append(part))
    with place.stage() as staged:
        for size in (999, 1, 400, 400, 400, 3000, 10):
            staged.write(NEW[:size])
        assert begun == [(staged.fd, 0, 1000), (staged.fd, 1000, 1200), (staged.fd, 2200, 3000)]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777], indirect=True)
def test_the_mode_is_the_one_given(place: Place, umask: int, mode: int) -> None:
    """The umask neither takes from the mode nor adds to it."""
    with place.stage() as staged:
        staged.seal(MODIFIED, mode)
        assert staged.publish()
    assert stat.S_IMODE(os.stat(place.path / "tom.png").st_mode) == mode


@pytest.mark.parametrize("umask", [0o000], indirect=True)
def test_nobody_else_reads_what_is_not_yet_published(place: Place, umask: int) -> None:
    """Until it is sealed a file is its owner's alone, and so is the directory that it may stand in."""
    with place.stage() as staged:
        assert stat.S_IMODE(os.fstat(staged.fd).st_mode) & 0o077 == 0
        for entry in place.path.iterdir():
            assert stat.S_IMODE(entry.lstat().st_mode) == 0o700


def test_the_time_is_the_one_given(place: Place) -> None:
    """mtime comes from the record, to the nanosecond: on every disk a file looks the same (ETag, Last-Modified)."""
    place.put(NEW)
    assert os.stat(place.path / "tom.png").st_mtime_ns == MODIFIED


ABSURD = [-(2**100), -(2**70), -(2**63), -1, 0, 2**63 - 1, 2**63, 2**70, 2**100, 253_402_300_800 * 10**9]


@pytest.mark.parametrize("modified_ns", ABSURD)
def test_an_absurd_time_is_no_failure(place: Place, modified_ns: int) -> None:
    """A time that no clock or file system knows costs nobody the file (CVE-2017-20005)."""
    with place.stage() as staged:
        staged.write(NEW)
        staged.seal(modified_ns, 0o644)
        assert staged.publish()
    assert (place.path / "tom.png").read_bytes() == NEW


# -- what was not published leaves no trace --------------------------------------------------------------------------


def write(staged: Staged) -> None:
    """Write some of it."""
    staged.write(NEW)


def seal(staged: Staged) -> None:
    """Write and seal it."""
    staged.write(NEW)
    staged.seal(MODIFIED, 0o644)


@pytest.mark.parametrize("step", [lambda staged: None, write, seal], ids=["opened", "written", "sealed"])
def test_what_is_given_up_leaves_no_trace(place: Place, step: Callable[[Staged], None]) -> None:
    """An error between opening and publishing leaves the disk as it was."""
    with contextlib.suppress(ZeroDivisionError), place.stage() as staged:
        step(staged)
        raise ZeroDivisionError
    assert place.entries() == []


def test_closing_twice_is_harmless(place: Place) -> None:
    """A descriptor that was closed belongs to somebody else by then."""
    staged = place.stage()
    staged.close()
    with open(place.path / "other", "wb") as other:
        staged.close()
        other.write(NEW)
    assert place.entries() == ["other"]


def test_a_file_with_the_first_number_is_closed(place: Place) -> None:
    """A process without standard input hands out 0 as a descriptor; it is closed like any other."""
    kept, staged = os.dup(0), place.stage()
    try:
        os.dup2(staged.fd, 0)
        os.close(staged.fd)
        staged.fd = 0
        staged.close()
        with pytest.raises(OSError):
            os.fstat(0)
    finally:
        os.dup2(kept, 0)
        os.close(kept)
    assert place.entries() == []


# -- a name that is taken --------------------------------------------------------------------------------------------


def make_link(path: Path) -> None:
    """A link that leads nowhere."""
    path.symlink_to("nowhere")


@pytest.mark.parametrize("stand", [Path.touch, Path.mkdir, os.mkfifo, make_link])
def test_publishing_never_takes_a_name_from_another(place: Place, stand: Callable[[Path], None]) -> None:
    """Whatever stands at the name stays there, and publishing says so."""
    stand(place.path / "tom.png")
    before = os.lstat(place.path / "tom.png")
    with place.stage() as staged:
        staged.write(NEW)
        assert not staged.publish()
    assert os.path.samestat(os.lstat(place.path / "tom.png"), before)
    assert place.entries() == ["tom.png"]


def test_of_two_that_publish_one_name_one_wins(place: Place) -> None:
    """The first to publish has the name; the other drops its copy."""
    with place.stage() as first, place.stage() as second:
        first.write(OLD)
        second.write(NEW)
        assert [second.publish(), first.publish()] == [True, False]
    assert (place.path / "tom.png").read_bytes() == NEW
    assert place.entries() == ["tom.png"]


def test_replacing_an_absent_name_publishes(place: Place) -> None:
    """Where nothing has the name, replacing is publishing."""
    place.put(NEW)
    assert (place.path / "tom.png").read_bytes() == NEW
    assert place.entries() == ["tom.png"]


def test_replacing_a_file(place: Place) -> None:
    """The new file has the name, and nothing is left of how it came to it."""
    place.put(OLD)
    place.put(NEW)
    assert (place.path / "tom.png").read_bytes() == NEW
    assert os.stat(place.path / "tom.png").st_nlink == 1
    assert place.entries() == ["tom.png"]


def test_replacing_a_file_below_a_directory(place: Place) -> None:
    """As at the root, so below it."""
    (place.path / "cats").mkdir()
    place.put(OLD, "cats/tom.png")
    place.put(NEW, "cats/tom.png")
    assert (place.path / "cats/tom.png").read_bytes() == NEW
    assert place.entries() == ["cats", "cats/tom.png"]


def test_replacing_a_link_does_not_follow_it(place: Place, tmp_path: Path) -> None:
    """What the link leads to is left alone; the link itself gives way."""
    (tmp_path / "elsewhere").write_bytes(OLD)
    (place.path / "tom.png").symlink_to(tmp_path / "elsewhere")
    place.put(NEW)
    assert (tmp_path / "elsewhere").read_bytes() == OLD
    assert not (place.path / "tom.png").is_symlink()
    assert (place.path / "tom.png").read_bytes() == NEW


def test_a_directory_is_not_replaced(place: Place) -> None:
    """A directory at the name is an error; it stays, with all that it holds, and nothing else does."""
    (place.path / "tom.png").mkdir()
    (place.path / "tom.png" / "inside").write_bytes(OLD)
    with pytest.raises(OSError):
        place.put(NEW)
    assert place.entries() == ["tom.png", "tom.png/inside"]


def test_readers_of_the_old_file_keep_it(place: Place) -> None:
    """Whoever opened a file before it was replaced reads all of it."""
    place.put(OLD)
    with open(place.path / "tom.png", "rb") as reader:
        place.put(NEW)
        assert reader.read() == OLD


def test_readers_never_see_an_absent_or_torn_file(place: Place) -> None:
    """While a file is replaced 200 times, whoever opens its name gets one of the versions, whole."""
    versions = {bytes([number]) * (20_000 + 37 * number) for number in range(200)}
    place.put(min(versions))
    seen: set[bytes] = set()
    wrong: list[object] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                data = (place.path / "tom.png").read_bytes()
            except OSError as error:
                wrong.append(error)
            else:
                seen.add(data)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for version in sorted(versions):
        place.put(version)
    over.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert seen <= versions
    assert len(seen) > 1, "the readers saw nothing happen"
    assert place.entries() == ["tom.png"]


# -- several processes -----------------------------------------------------------------------------------------------


def in_a_process(function: str, *arguments: str, way: str, **more: Any) -> subprocess.Popen[str]:
    """A process of its own that runs a function of this module, in one way of staging."""
    code = f"import sys, {__name__} as t; t.take({way!r}); t.{function}(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **more,
    )


def take(way: str) -> None:
    """Take one way of staging, for as long as this process lives."""
    if way.startswith("named"):
        syscalls.open_unnamed = no_unnamed_files
    if way.endswith("portable"):
        syscalls.HAS_OPENAT2 = False


def place_at(path: str) -> Place:
    """The place at a path, for as long as this process lives."""
    return Place(Path(path), Directory(os.open(path, os.O_RDONLY | os.O_DIRECTORY)))


def publish_many(path: str, letter: str) -> None:
    """Publish fifty names, at the same time as others do; print how many were won."""
    here = place_at(path)
    print("ready", flush=True)
    sys.stdin.readline()
    won = []
    for number in range(50):
        with here.stage(f"{number}.png") as staged:
            staged.write(letter.encode() * 50_000)
            staged.seal(MODIFIED, 0o644)
            if staged.publish():
                won.append(number)
    print(json.dumps(won))


def test_of_processes_that_publish_one_name_one_wins(place: Place, way: str) -> None:
    """Two processes stage the same fifty names at once: each name is won once, and has its winner's bytes, whole."""
    processes = {letter: in_a_process("publish_many", str(place.path), letter, way=way) for letter in "AB"}
    for process in processes.values():
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    said = {}
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for letter, process in processes.items():
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        said[letter] = json.loads(out)
    assert sorted(said["A"] + said["B"]) == list(range(50))
    for letter, numbers in said.items():
        for number in numbers:
            assert (place.path / f"{number}.png").read_bytes() == letter.encode() * 50_000
    assert place.entries() == sorted(f"{number}.png" for number in range(50))


def publish_once(here: Place) -> None:
    """Stage and publish."""
    with here.stage() as staged:
        staged.write(NEW)
        staged.seal(MODIFIED, 0o644)
        staged.sync()
        staged.publish()


def replace_once(here: Place) -> None:
    """Stage and replace."""
    with here.stage() as staged:
        staged.write(NEW)
        staged.seal(MODIFIED, 0o644)
        staged.sync()
        staged.replace()


def die_at(line: int, work: Callable[[], None]) -> bool:
    """Do work in a process that is killed before that many lines of the room were run; whether it was."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = itertools.count(line, -1)

    def trace(frame: Any, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != staging.__file__:
            return None
        if event == "line" and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    try:
        sys.settrace(trace)
        work()
    finally:
        os._exit(0)


def kill_at_every_line(path: str) -> None:
    """Publish at a free name, and replace what has a name: print what kills at every line left behind."""
    here = place_at(path)
    print(json.dumps([kills(here, publish_once, taken=False), kills(here, replace_once, taken=True)]))


def kills(here: Place, verb: Callable[[Place], None], *, taken: bool) -> list[dict[str, Any]]:
    """Kill a process at each line in turn; what was found at the name, and what was left after a sweep."""
    name = here.path / "tom.png"
    found: list[dict[str, Any]] = []
    killed = True
    while killed:
        if taken:
            name.write_bytes(OLD)
        killed = die_at(len(found), functools.partial(verb, here))
        data = name.read_bytes() if name.exists() else None
        litter = here.names()
        swept = sweep(here.fd)
        found.append(
            {
                "state": {None: "absent", OLD: "old", NEW: "new"}.get(data, "torn"),
                "swept": swept,
                "names": litter,
                "left": here.entries(),
            }
        )
        name.unlink(missing_ok=True)
    return found


def test_a_kill_at_any_line_leaves_a_name_absent_or_whole(place: Place, way: str) -> None:
    """SIGKILL at every single line of staging: the name is as before or as after, and a sweep leaves no litter."""
    process = in_a_process("kill_at_every_line", str(place.path), way=way)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    found = json.loads(out)
    assert [{kill["state"] for kill in case} for case in found] == [{"absent", "new"}, {"old", "new"}]
    for kill in itertools.chain(*found):
        wanted = [] if kill["state"] == "absent" else ["tom.png"]
        assert (kill["names"], kill["left"]) == (wanted, wanted)
    swept = [max(kill["swept"] for kill in case) for case in found]
    assert swept == ([0, 1] if way.startswith("unnamed") else [1, 1]), "what there is to sweep"


# -- sweeping --------------------------------------------------------------------------------------------------------


def lay_litter(place: Place, *names: str) -> None:
    """The temporary files of processes that died."""
    (place.path / TEMPORARY).mkdir(mode=0o700, exist_ok=True)
    for name in names:
        (place.path / TEMPORARY / name).write_bytes(OLD)


def test_there_may_be_nothing_to_sweep(place: Place) -> None:
    """A sweep of a root without litter removes nothing."""
    (place.path / "tom.png").write_bytes(OLD)
    assert sweep(place.fd) == 0
    assert place.entries() == ["tom.png"]


def test_the_litter_of_the_dead_is_swept(place: Place) -> None:
    """Temporary files that nobody works on are removed, and counted; nothing else is."""
    (place.path / "tom.png").write_bytes(NEW)
    lay_litter(place, "a" * 32, "b" * 32)
    assert sweep(place.fd) == 2
    assert place.entries() == ["tom.png"]


def test_the_files_of_the_living_are_not_swept(place: Place) -> None:
    """A sweep while another is staging takes nothing from it."""
    with place.stage() as staged:
        staged.write(NEW[:100])
        assert sweep(place.fd) == 0
        staged.write(NEW[100:])
        staged.seal(MODIFIED, 0o644)
        assert staged.publish()
    assert (place.path / "tom.png").read_bytes() == NEW
    assert place.entries() == ["tom.png"]


def test_the_dead_are_swept_when_the_living_have_left(place: Place) -> None:
    """What was left beside the file of somebody who is at work goes at the latest with the first sweep after that."""
    with place.stage() as staged:
        staged.write(NEW)
        lay_litter(place, "dead")
        sweep(place.fd)
        assert staged.publish()
    assert (place.path / "tom.png").read_bytes() == NEW
    sweep(place.fd)
    assert place.entries() == ["tom.png"]


@pytest.mark.parametrize("call", ["rename", "link"])
@pytest.mark.parametrize("before", [OLD, None], ids=["taken", "free"])
def test_a_sweep_in_the_middle_of_a_replacement_takes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, before: bytes | None, call: str
) -> None:
    """Another process starts, and sweeps, just before or after a file moves: the file arrives all the same."""
    if before is not None:
        place.put(before)
    real = getattr(os, call)

    def between(*arguments: Any, **more: Any) -> None:
        sweep(place.fd)
        real(*arguments, **more)
        sweep(place.fd)

    monkeypatch.setattr(os, call, between)
    place.put(NEW)
    assert (place.path / "tom.png").read_bytes() == NEW
    assert place.entries() == ["tom.png"]


@named_only
def test_a_sweep_just_after_a_temporary_file_was_made_takes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of a temporary file and its lock another process starts, and sweeps: staging goes on."""
    real = fcntl.flock
    swept = []

    def between(fd: int, operation: int) -> None:
        if not swept:
            swept.append(True)
            sweep(place.fd)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", between)
    place.put(NEW)
    assert swept
    assert (place.path / "tom.png").read_bytes() == NEW
    assert place.entries() == ["tom.png"]


def test_a_sweep_follows_no_link(place: Place, tmp_path: Path) -> None:
    """A link in place of the temporary directory, or within it, costs nobody a file."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_bytes(OLD)
    (place.path / TEMPORARY).symlink_to(tmp_path / "elsewhere")
    assert sweep(place.fd) == 0
    (place.path / TEMPORARY).unlink()
    lay_litter(place)
    (place.path / TEMPORARY / "link").symlink_to(tmp_path / "elsewhere" / "a")
    sweep(place.fd)
    assert (tmp_path / "elsewhere" / "a").read_bytes() == OLD


@pytest.mark.timeout(20)
@pytest.mark.parametrize("way", WAYS[:2], indirect=True)
@pytest.mark.parametrize("stand", [Path.mkdir, os.mkfifo, make_link])
def test_a_sweep_is_not_stopped_by_what_is_not_ours(place: Place, stand: Callable[[Path], None]) -> None:
    """A directory, FIFO or link among the temporary files neither blocks nor fails a sweep."""
    lay_litter(place, "a" * 32, "z" * 32)
    stand(place.path / TEMPORARY / "strange")
    assert sweep(place.fd) >= 2
    assert not (place.path / TEMPORARY / ("a" * 32)).exists()
    assert not (place.path / TEMPORARY / ("z" * 32)).exists()


def test_two_sweeps_at_once_do_no_harm(place: Place) -> None:
    """Workers that start together sweep together: every file is counted by one of them."""
    lay_litter(place, *(f"{number:032x}" for number in range(200)))
    swept: list[int] = []
    sweepers = [threading.Thread(target=lambda: swept.append(sweep(place.fd))) for _ in range(4)]
    for sweeper in sweepers:
        sweeper.start()
    for sweeper in sweepers:
        sweeper.join()
    assert len(swept) == 4
    assert sum(swept) == 200
    assert place.entries() == []


def test_staging_goes_on_while_others_tidy_up(place: Place) -> None:
    """The temporary directory comes and goes under those who stage, replace and sweep at once; each file arrives."""
    wrong: list[object] = []

    def work(letter: str) -> None:
        try:
            for number in range(40):
                for data in (OLD[:100], letter.encode() * 100):
                    place.put(data, f"{letter}{number}.png")
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(letter,)) for letter in "abcd"]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        sweep(place.fd)
    for worker in workers:
        worker.join()
    assert wrong == []
    assert place.entries() == sorted(f"{letter}{number}.png" for letter in "abcd" for number in range(40))
    assert {(place.path / f"{letter}39.png").read_bytes() for letter in "abcd"} == {
        letter.encode() * 100 for letter in "abcd"
    }


@named_only
def test_a_temporary_directory_that_never_stays_is_given_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever removes it as often as it is made ends in an error, not in an endless loop."""
    monkeypatch.setattr(os, "mkdir", lambda *_, **__: None)
    with pytest.raises(OSError) as caught:
        place.stage()
    assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, TEMPORARY)


@named_only
def test_a_temporary_directory_that_another_removes_is_made_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that leaves takes the empty directory with it, just before it is opened here: staging goes on."""
    real, made = os.mkdir, list[str]()

    def too_late(path: str, mode: int, *, dir_fd: int) -> None:
        real(path, mode, dir_fd=dir_fd)
        made.append(path)
        if len(made) == 1:
            os.rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", too_late)
    place.put(NEW)
    assert made == [TEMPORARY, TEMPORARY]
    assert (place.path / "tom.png").read_bytes() == NEW
    assert place.entries() == ["tom.png"]


@named_only
def test_a_temporary_directory_that_cannot_be_opened_is_not_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made for a file that then cannot be staged (descriptors run out), it goes again."""
    monkeypatch.setattr(syscalls, "open_directory", fails(errno.EMFILE))
    with pytest.raises(OSError) as caught:
        Staged(place.root, place.fd, "tom.png")
    assert caught.value.errno == errno.EMFILE
    assert place.entries() == []


@named_only
@pytest.mark.parametrize("stand", [Path.touch, os.mkfifo, "link"], ids=["file", "fifo", "link"])
def test_only_a_directory_of_our_own_is_staged_in(
    place: Place, tmp_path: Path, stand: Callable[[Path], None] | str
) -> None:
    """Where a link or a file stands in place of the temporary directory, staging fails, and writes nowhere else."""
    (tmp_path / "elsewhere").mkdir()
    if isinstance(stand, str):
        (place.path / TEMPORARY).symlink_to(tmp_path / "elsewhere")
    else:
        stand(place.path / TEMPORARY)
    with pytest.raises(OSError):
        place.put(NEW)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert place.names() == []


# -- disks that take no more -----------------------------------------------------------------------------------------


def fails(code: int) -> Callable[..., Any]:
    """A call that fails."""

    def fail(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("pwrite", errno.ENOSPC),
        ("pwrite", errno.EDQUOT),
        ("pwrite", errno.EFBIG),
        ("pwrite", errno.EIO),
        ("fchmod", errno.EPERM),
        ("utime", errno.EROFS),
        ("fsync", errno.EIO),
        ("fsync", errno.ENOSPC),
    ],
)
@pytest.mark.parametrize("before", [OLD, None], ids=["taken", "free"])
def test_a_disk_that_fails_leaves_everything_as_it_was(
    place: Place, monkeypatch: pytest.MonkeyPatch, before: bytes | None, call: str, code: int
) -> None:
    """Whatever fails on the way is told by its errno; the name is as it was, and there is no litter."""
    if before is not None:
        (place.path / "tom.png").write_bytes(before)
    expected = place.entries()
    monkeypatch.setattr(os, call, fails(code))
    with pytest.raises(OSError) as caught:
        replace_once(place)
    assert caught.value.errno == code
    assert place.entries() == expected
    assert before is None or (place.path / "tom.png").read_bytes() == before


def test_after_a_failed_fsync_the_file_is_thrown_away(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be said of its bytes any more: it is not synced a second time, and never named."""
    asked = []

    def fail(fd: int) -> None:
        asked.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        publish_once(place)
    assert len(asked) == 1
    assert place.entries() == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.EACCES])
def test_litter_that_cannot_be_removed_hides_no_error_and_leaks_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A disk turns read-only under a staged file: what is told is the first failure, and every descriptor is closed."""
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails(errno.ENOSPC))
        patch.setattr(os, "unlink", fails(code))
        with pytest.raises(OSError) as caught:
            place.put(NEW)
    assert (caught.value.errno, descriptors()) == (errno.ENOSPC, before)
    sweep(place.fd)
    assert place.entries() == []


def numbers_of_the_next_descriptors(count: int) -> list[int]:
    """The numbers that the next descriptors will have."""
    taken = [os.dup(0) for _ in range(count)]
    for fd in taken:
        os.close(fd)
    return taken


@pytest.mark.parametrize("headroom", range(6))
def test_too_many_open_files(place: Place, headroom: int) -> None:
    """When descriptors run out, at whichever of them, EMFILE is told, and those already taken are given back."""
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = numbers_of_the_next_descriptors(headroom + 1)[headroom]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    code = 0
    try:
        place.put(NEW)
    except OSError as error:
        code = error.errno or 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert descriptors() == before, "a descriptor was left open"
    assert code == errno.EMFILE or headroom >= 1
    sweep(place.fd)  # needs a descriptor itself
    assert place.entries() == ([] if code else ["tom.png"])


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(place: Place, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Some network file systems have no flock: files arrive all the same, and no sweep takes them from the living."""
    monkeypatch.setattr(fcntl, "flock", fails(code))
    place.put(OLD)
    with place.stage() as staged:
        staged.write(NEW)
        assert sweep(place.fd) == 0
        staged.seal(MODIFIED, 0o644)
        staged.replace()
    assert (place.path / "tom.png").read_bytes() == NEW
    assert place.entries() == ["tom.png"]


def write_past_the_limit(path: str) -> None:
    """Restrict the size of files, and stage one that is larger."""
    here = place_at(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        replace_once(here)
    except OSError as error:
        print(json.dumps([error.errno, here.entries()]))


def test_a_file_larger_than_the_limit(place: Place, way: str) -> None:
    """RLIMIT_FSIZE ends in EFBIG, not in a signal; there is no file and no litter."""
    process = in_a_process("write_past_the_limit", str(place.path), way=way)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out) == [errno.EFBIG, []]


@functools.cache
def passed_in_a_namespace(session: pytest.Session) -> str:
    """What pytest says of all tests that mount something, run where an unprivileged user may mount."""
    wanted = [item.nodeid for item in session.items if "mount" in getattr(item, "fixturenames", ())]
    command = ["unshare", "-Urm", sys.executable, "-X", "dev", "-m", "pytest", "-q", "-rp", "-p", "no:randomly"]
    there = session.config.rootpath
    return subprocess.run(
        [*command, *wanted], cwd=there, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    ).stdout


def in_a_namespace(item: pytest.Item) -> Callable[..., None]:
    """The test, run in a namespace instead of here."""

    def passes(**_: object) -> None:
        said = passed_in_a_namespace(item.session)
        assert f"PASSED {item.nodeid}" in said.splitlines(), said

    return passes


class Mount:
    """A small file system of its own."""

    def __init__(self, path: Path, options: str) -> None:
        self.path = path
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "selfheal-test", path], check=True, capture_output=True)

    def remount(self, option: str) -> None:
        """Make it read-only (`ro`) or writable (`rw`)."""
        subprocess.run(["mount", "-o", f"remount,{option}", self.path], check=True, capture_output=True)

    def unmount(self) -> None:
        """Take it away, whoever still has something of it open."""
        subprocess.run(["umount", "-l", self.path], check=True, capture_output=True)


def mounts(item: Any, point: Path) -> Iterator[Callable[[str], Mount]]:
    """Mounts file systems at a path; where only a namespace permits it, the test is run in one instead."""
    point.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "selfheal-test", point], capture_output=True, check=False).returncode:
        if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
            needs("the right to mount a tmpfs", "the tests as root")
        item.obj = in_a_namespace(item)
        yield lambda options: pytest.fail("not permitted here")
        return
    subprocess.run(["umount", point], check=True)
    yield functools.partial(Mount, point)
    while point.is_mount():
        subprocess.run(["umount", "-l", point], check=True)


@pytest.fixture
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Mount]]:
    """Mounts a small real file system with given options."""
    yield from mounts(request.node, tmp_path / "mount")


@pytest.mark.parametrize("before", [OLD, None], ids=["taken", "free"])
def test_a_full_disk(mount: Callable[[str], Mount], way: str, before: bytes | None) -> None:
    """ENOSPC of a real file system: the name is as it was, nothing is left, and all space is given back."""
    small = mount("size=256k")
    here = place_at(str(small.path))
    try:
        if before is not None:
            here.put(before)
        entries, free = here.entries(), os.statvfs(small.path).f_bfree
        with pytest.raises(OSError) as caught:
            here.put(NEW * 100)
        assert caught.value.errno == errno.ENOSPC
        assert (here.entries(), os.statvfs(small.path).f_bfree) == (entries, free)
        assert before is None or (here.path / "tom.png").read_bytes() == before
        here.put(NEW)
        assert (here.path / "tom.png").read_bytes() == NEW
    finally:
        del here.root


def test_a_disk_without_inodes(mount: Callable[[str], Mount], way: str) -> None:
    """A disk can be full of files while bytes are free: ENOSPC at once, and nothing is left."""
    here = place_at(str(mount("size=1m,nr_inodes=3").path))
    try:
        for name in ("a", "b"):
            (here.path / name).touch()
        with pytest.raises(OSError) as caught:
            here.put(NEW)
        assert caught.value.errno == errno.ENOSPC
        assert here.entries() == ["a", "b"]
    finally:
        del here.root


def test_a_read_only_disk(mount: Callable[[str], Mount], way: str) -> None:
    """EROFS of a real file system; once it is writable again, staging goes on."""
    small = mount("size=1m")
    here = place_at(str(small.path))
    try:
        here.put(OLD)
        small.remount("ro")
        with pytest.raises(OSError) as caught:
            here.put(NEW)
        assert caught.value.errno == errno.EROFS
        assert (here.path / "tom.png").read_bytes() == OLD
        small.remount("rw")
        here.put(NEW)
        assert (here.path / "tom.png").read_bytes() == NEW
        assert here.entries() == ["tom.png"]
    finally:
        del here.root


# -- file systems that lack something --------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_without_unnamed_files_a_file_is_staged_under_a_name(
    place: Place, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """However a kernel or file system says that it has no O_TMPFILE, the file arrives."""
    monkeypatch.setattr(syscalls, "open_unnamed", fails(code))
    place.put(NEW)
    assert (place.path / "tom.png").read_bytes() == NEW
    assert place.entries() == ["tom.png"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE])
def test_another_failure_is_not_taken_for_a_lack_of_unnamed_files(
    place: Place, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A disk that takes nothing is not asked twice."""
    monkeypatch.setattr(syscalls, "open_unnamed", fails(code))
    with pytest.raises(OSError) as caught:
        place.stage()
    assert caught.value.errno == code
    assert place.entries() == []


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP])
def without_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links, as FAT is (EPERM), or some that are mounted by FUSE (EOPNOTSUPP)."""
    monkeypatch.setattr(os, "link", fails(request.param))


@named_only
def test_without_links_a_file_is_moved_to_its_name(without_links: None, place: Place) -> None:
    """Where no second name can be made, the temporary one is exchanged for the final one."""
    publish_once(place)
    assert (place.path / "tom.png").read_bytes() == NEW
    assert place.entries() == ["tom.png"]


@named_only
@pytest.mark.parametrize("stand", [Path.touch, Path.mkdir, os.mkfifo, make_link])
def test_without_links_no_name_is_taken_from_another(
    without_links: None, place: Place, stand: Callable[[Path], None]
) -> None:
    """Whatever stands at the name stays there, without links too."""
    stand(place.path / "tom.png")
    before = os.lstat(place.path / "tom.png")
    publish_once(place)
    assert os.path.samestat(os.lstat(place.path / "tom.png"), before)
    assert place.entries() == ["tom.png"]


@named_only
def test_without_links_a_file_is_replaced(without_links: None, place: Place) -> None:
    """Replacing needs no links."""
    (place.path / "tom.png").write_bytes(OLD)
    place.put(NEW)
    assert (place.path / "tom.png").read_bytes() == NEW
    assert place.entries() == ["tom.png"]


@named_only
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMLINK])
def test_a_link_that_fails_is_no_lack_of_links(place: Place, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A disk that fails while it gives a name is told as it is."""
    monkeypatch.setattr(os, "link", fails(code))
    with pytest.raises(OSError) as caught:
        publish_once(place)
    assert caught.value.errno == code
    assert place.entries() == []


# -- a root that goes away -------------------------------------------------------------------------------------------


def test_a_root_that_was_deleted_takes_nothing(place: Place) -> None:
    """Staging below a directory that is gone fails, and makes nothing anywhere."""
    place.path.rmdir()
    with pytest.raises(OSError):
        place.put(NEW)
    assert not place.path.exists()


def test_a_file_system_that_calls_a_deleted_directory_forbidden(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """ext4 says EPERM where a directory is gone: that is no lack of rights, for which writing would stop altogether."""
    monkeypatch.setattr(syscalls, "open_unnamed", fails(errno.EPERM))
    with pytest.raises(PermissionError):
        place.stage()
    place.path.rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        place.stage()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "tom.png")


def test_a_root_that_is_deleted_while_staging(place: Place) -> None:
    """A name that has no place any more is an error, not a file elsewhere."""
    with place.stage() as staged:
        staged.write(NEW)
        shutil.rmtree(place.path)
        for give_name in (staged.publish, staged.replace):
            with pytest.raises(FileNotFoundError):
                give_name()
    assert not place.path.exists()
