"""Runs that are interrupted or killed: only whole files, no temporary files, and the next run goes on."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from array import array
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import IO

import pytest

from selfheal.content.sources import CHUNK
from selfheal.disk.temporary import TEMPORARY
from tests.support.command_line import IMAGES, SECONDS, SLOW_DISK, Done, ForkServer, Site, environment
from tests.support.disk_files import MARKS, contents_below
from tests.support.files import noise, own_files_below, write_file
from tests.support.waiting import wait_until

MANY = 2500
LARGE = {f"large/{index}.bin": noise(CHUNK * 4 + index, index) for index in range(8)}


@cache
def crowd() -> dict[str, bytes]:
    """Return so many files that a run over them can be stopped half way."""
    return {f"{index % 10}/{index}.png": noise(40, index) for index in range(MANY)} | LARGE


@pytest.fixture(scope="module")
def crowd_database(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """A directory with a SQLite database that has recorded the crowd."""
    home = tmp_path_factory.mktemp("crowd")
    site = Site(home, home / "uploads", f"sqlite+aiosqlite:///{home}/catalogue.db", fork_server)
    for name, data in crowd().items():
        write_file(site.directory / name, data)
    assert site.run("migrate", "--json").json["counts"] == {"migrated": len(crowd())}
    shutil.rmtree(site.directory)
    return home


@pytest.fixture
def crowded_site(site: Site, crowd_database: Path) -> Site:
    """A site with many records and no file on disk."""
    for file in crowd_database.glob("catalogue.db*"):
        shutil.copy(file, site.home)
    site.directory.parent.mkdir(parents=True)
    return site


one_process_or_several = pytest.mark.parametrize("jobs", ["1", "4"])


def count_files(directory: Path) -> int:
    """Return the number of files below a directory, without the disk's mark and temporary files."""
    return sum(len(set(files) - set(MARKS)) for base, _, files in os.walk(directory) if TEMPORARY not in base)


def stop(
    site: Site, command: str, number: signal.Signals, done: Callable[[], int], after: int, jobs: str
) -> Done | None:
    """Run a command and signal it once `done()` is more than `after`; return None if it ended before that."""
    with site.start(command, *site.flags, "--json", "--jobs", jobs) as process:
        wait_until(lambda: process.poll() is not None or done() > after, SECONDS, step=0.002)
        process.send_signal(number)
        out, err = process.communicate(timeout=SECONDS)
    had_ended = process.returncode == 0 or '"ok": true' in out  # it came after the report
    return None if had_ended else Done(process.returncode, out, err)


def unread_bytes(pipe: IO[str] | None) -> int:
    """Return how many bytes in a pipe its reader has not read yet."""
    assert pipe is not None
    count = array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def are_whole(directory: Path, images: Mapping[str, bytes]) -> bool:
    """Return whether every file below a directory, but for temporary ones, is one of `images` and has all its bytes."""
    files = contents_below(directory).items()
    return all(images.get(name) == data for name, data in files if not name.startswith(TEMPORARY))


# -- interrupted ------------------------------------------------------------------------------------------------------


@one_process_or_several
def test_a_restore_that_is_stopped(crowded_site: Site, jobs: str) -> None:
    """SIGINT ends a restore with 130 and one JSON object; every file is whole, and the next run goes on."""
    images = crowd()
    for _ in range(5):
        stopped = stop(crowded_site, "restore", signal.SIGINT, lambda: count_files(crowded_site.directory), 0, jobs)
        if stopped is not None:
            break
        shutil.rmtree(crowded_site.directory)
    assert stopped is not None
    assert (stopped.code, stopped.json["ok"], stopped.json["error"]) == (130, False, "stopped by the user")
    existing = count_files(crowded_site.directory)
    assert 0 < existing <= len(images)
    assert are_whole(crowded_site.directory, images)
    assert own_files_below(crowded_site.directory) == []
    rest = crowded_site.run("restore", "--json")
    counts = {"ok": existing, "restored": len(images) - existing}
    assert (rest.code, rest.json["counts"]) == (0, {key: number for key, number in counts.items() if number})
    assert contents_below(crowded_site.directory) == images


@one_process_or_several
def test_a_migration_that_is_stopped(site: Site, jobs: str) -> None:
    """SIGINT ends a migration with 130; what was committed stays, and the next run adopts the rest."""
    images = crowd()
    for name, data in images.items():
        write_file(site.directory / name, data)
    for _ in range(5):
        stopped = stop(site, "migrate", signal.SIGINT, site.count_records, 0, jobs)
        if stopped is not None:
            break
        (site.home / "catalogue.db").unlink()
    assert stopped is not None
    assert (stopped.code, stopped.json["ok"]) == (130, False)
    existing = site.count_records()
    assert 0 < existing <= len(images)  # several processes finish their work: that may be all of it
    rest = site.run("migrate", "--json")
    counts = {"ok": existing, "migrated": len(images) - existing}
    assert (rest.code, rest.json["counts"]) == (0, {key: number for key, number in counts.items() if number})
    assert site.run("verify", "--json").json["counts"] == {"ok": len(images)}


@one_process_or_several
@pytest.mark.parametrize("command", ["migrate", "migrate again", "verify", "restore", "restore --verify"])
def test_ctrl_c_in_one_large_file(site: Site, command: str, jobs: str) -> None:
    """Ctrl-C, which reaches all processes of the terminal, ends a run within seconds in the middle of a large file."""
    large = write_file(site.directory / "large.bin", noise(60 * CHUNK))
    if command != "migrate":
        assert site.run("migrate").code == 0
    if command == "restore":
        large.unlink()
    (site.home / "sitecustomize.py").write_text(SLOW_DISK)
    name, *flags = command.replace(" again", "").split()
    paths = {"SLOW": str(site.home / "slow"), "PYTHONPATH": str(site.home), "PYTHONDONTWRITEBYTECODE": "1"}
    env = environment(**paths)
    with site.start(None, name, *flags, *site.flags, "--jobs", jobs, env=env, start_new_session=True) as process:
        wait_until((site.home / "slow").exists, SECONDS)
        os.killpg(process.pid, signal.SIGINT)
        stopped = time.monotonic()
        out, err = process.communicate(timeout=SECONDS)
    seconds = time.monotonic() - stopped
    done = Done(process.returncode, out, err)
    again = "" if name == "verify" else "; run it again to go on"
    assert (done.code, done.out, done.err) == (130, "", f"selfheal: stopped after 0 files{again}\n")
    assert seconds < 4  # the file takes 4.5 s
    assert [path for path in own_files_below(site.directory) if "tmp" in path] == []


INTERRUPTED_AS_IT_CLOSES = """if True:
    import os, signal
    from selfheal.sql.engine import Engine
    from selfheal.scripts import main

    close = Engine.close

    async def close_interrupted(engine):
        os.kill(os.getpid(), signal.SIGINT)
        await close(engine)

    Engine.close = close_interrupted
    main("migrate")
"""


def test_a_migration_that_is_stopped_as_it_closes(site: Site) -> None:
    """SIGINT during the close waits for its end: connections are closed, without a traceback (see `Done`)."""
    write_file(site.directory / "a.png", b"one")
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AS_IT_CLOSES, *site.flags, "--json", "--jobs", "1"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    done = Done(stopped.returncode, stopped.stdout, stopped.stderr)
    assert (done.code, done.json["error"], done.json["counts"]) == (130, "stopped by the user", {"migrated": 1})


def test_saving_from_a_terminal_can_be_stopped(full_site: Site) -> None:
    """Ctrl-C during `selfheal save NAME -`, which waits for its input, exits with 130 and saves nothing."""
    with full_site.start(None, "save", "x.png", "-", *full_site.flags, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write("half of it")
        process.stdin.flush()
        wait_until(lambda: unread_bytes(process.stdin) == 0)  # now it waits for more
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
        process.stdin.close()
    assert contents_below(full_site.directory) == IMAGES
    assert full_site.count_records() == len(IMAGES)


# -- killed -----------------------------------------------------------------------------------------------------------


@one_process_or_several
def test_a_restore_that_is_killed(crowded_site: Site, jobs: str) -> None:
    """SIGKILL at any moment leaves only whole files; the next run finishes, and leaves no temporary file."""
    images, chance = crowd(), Random()
    for after in (-1, 0, chance.randrange(MANY // 2), chance.randrange(MANY)):
        killed = stop(crowded_site, "restore", signal.SIGKILL, lambda: count_files(crowded_site.directory), after, jobs)
        assert killed is None or (killed.code, killed.out) == (-signal.SIGKILL, "")
        assert are_whole(crowded_site.directory, images)
    done = crowded_site.run("restore", "--json")
    assert (done.code, done.json["ok"]) == (0, True)
    assert contents_below(crowded_site.directory) == images
    assert own_files_below(crowded_site.directory) == []


@one_process_or_several
def test_a_migration_that_is_killed(site: Site, jobs: str) -> None:
    """SIGKILL at any moment leaves a database whose records all have their bytes; the next run finishes."""
    images, chance = crowd(), Random()
    for name, data in images.items():
        write_file(site.directory / name, data)
    for after in (-1, 0, chance.randrange(MANY // 2), chance.randrange(MANY)):
        killed = stop(site, "migrate", signal.SIGKILL, site.count_records, after, jobs)
        assert killed is None or (killed.code, killed.out) == (-signal.SIGKILL, "")
    existing = site.count_records()
    if existing:
        counts = site.run("verify", "--json").json["counts"]
        assert counts == {
            key: number for key, number in (("ok", existing), ("missing_in_database", len(images) - existing)) if number
        }
    assert site.run("migrate", "--json").json["counts"].keys() <= {"ok", "migrated"}
    assert site.run("verify", "--json").json["counts"] == {"ok": len(images)}
    assert contents_below(site.directory) == images
