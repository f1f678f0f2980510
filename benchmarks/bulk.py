"""Restore, migrate and verify, compared with the usual tools for backups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from selfheal.content.sources import CHUNK

from .data import GIB, KIB, MIB, files, migrate, name_of, remove, scratch, selfheal, sqlite, warm
from .databases import postgres
from .measure import PROJECT, Contest, Measures, Run, Unavailable, experiment
from .servers import program

SETS = {
    "20,000 files of 20 KiB": (20_000, 20 * KIB),
    "500 files of 4 MiB": (500, 4 * MIB),
    "1 file of 2 GiB": (1, 2 * GIB),
}
LEAST = "plain Python"
FEW = 1000
"""Number of files that can be removed without making later file creation slower."""
Task = Callable[[], Measures]


def cost(*command: object, cwd: Path = PROJECT, sync: Path | None = None) -> Measures:
    """Return the time, CPU time and peak memory of a command. With `sync`, the time includes a sync of that disk."""
    clock = [sys.executable, "-I", "-S", str(Path(__file__).with_name("clock.py"))]
    environment = {**os.environ, "RESTIC_PASSWORD": "x"}
    done = subprocess.run([*clock, *map(str, command)], cwd=cwd, env=environment, capture_output=True, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {last}")
    result: Measures = json.loads(done.stdout)
    if sync is not None:
        started = time.monotonic()
        subprocess.run(["sync", "-f", sync], check=True)
        result["seconds"] += time.monotonic() - started
    return result


def after(prepare: Callable[[], Any], task: Task) -> Task:
    """Return a task that first calls `prepare`, which is not measured."""

    def run() -> Measures:
        prepare()
        return task()

    return run


def renew(target: Path) -> None:
    """Replace the restored files with an empty directory.

    Many small files are only moved away until the contest is over. ext4 without a journal skips the inodes of removed
    files for some minutes, one by one for each new file. That took longer than any contestant.
    """
    if len(list(target.rglob("*"))) > FEW:
        target.rename(Path(tempfile.mkdtemp(prefix="old-", dir=target.parent)) / target.name)
        os.sync()
    else:
        remove(target)
    target.mkdir()


def available(tasks: Mapping[str, Callable[[], Task]]) -> tuple[dict[str, Task], list[str]]:
    """Return the tasks that can run here, and the reasons why the others cannot."""
    ready, missing = {}, []
    for name, make in tasks.items():
        try:
            ready[name] = make()
        except Unavailable as error:
            missing.append(f"{name} was not measured: {error}")
    return ready, missing


def sizes(run: Run) -> Iterator[tuple[str, Path]]:
    """Yield the label and directory of each set of files; a tenth of the files in a quick run."""
    for label, (count, size) in SETS.items():
        directory = files(max(count // run.pick(1, 10), 1), size // run.pick(1, 10 if count == 1 else 1))
        yield label if not run.quick else f"a tenth of {label}", directory


@experiment("Restore everything: database → empty directory, every byte checked and synced")
def restore(run: Run) -> Iterator[Contest]:
    """Each contestant restores from its own backup of the same files, and ends with a sync."""
    bounds = iter(("≤ 2", "≤ 1.3", "≤ 1.3"))
    for label, source in sizes(run):
        with scratch() as place:
            tasks, missing = available(restoring(source, place))
            wants = {"tar": next(bounds), "restic": "< 1", "rsync": "< 1"}
            contest = run.contest(label, "seconds", tasks, turns=5, wants=wants)
            contest.notes += missing
            assert same(source, place / "out-selfheal"), "the restored files differ from the migrated ones"
        yield contest


def restoring(source: Path, place: Path) -> dict[str, Callable[[], Task]]:
    """Return how each contestant backs up `source` below `place` and then restores it."""

    def to(name: str, *command: object, cwd: Path = PROJECT) -> Task:
        target = place / f"out-{name}"
        return after(lambda: renew(target), lambda: cost(*command, cwd=cwd, sync=target))

    def ours() -> Task:
        url = sqlite(place / "uploads.db")
        migrate(source, url)
        return to("selfheal", *selfheal("restore", place / "out-selfheal", url))

    def tar() -> Task:
        subprocess.run(["tar", "cf", place / "a.tar", "."], cwd=source, check=True)
        return to("tar", "tar", "xf", place / "a.tar", cwd=place / "out-tar")

    def sqlar() -> Task:
        sqlite3 = archiver(source)
        subprocess.run([sqlite3, place / "a.sqlar", "-Ac", "."], cwd=source, check=True)
        return to("sqlite3 -A", sqlite3, place / "a.sqlar", "-Ax", cwd=place / "out-sqlite3 -A")

    def restic() -> Task:
        command = [program("restic"), "--no-cache", "-q", "-r", str(place / "repo")]
        for step in (["init"], ["backup", "."]):
            subprocess.run([*command, *step], cwd=source, check=True, env={**os.environ, "RESTIC_PASSWORD": "x"})
        return to("restic", *command, "restore", "latest", "--target", place / "out-restic")

    def rsync() -> Task:
        return to("rsync", program("rsync"), "-a", f"{source}/", f"{place / 'out-rsync'}/")

    def least() -> Task:
        return to(LEAST, *plain_python("restore", source), place / f"out-{LEAST}", place / "uploads.db")

    return {"selfheal": ours, "tar": tar, "sqlite3 -A": sqlar, "restic": restic, "rsync": rsync, LEAST: least}


@experiment("Migrate everything: directory → empty database, synced")
def backup(run: Run) -> Iterator[Contest]:
    """Each contestant makes its own backup, and ends with a sync."""
    for label, source in sizes(run):
        with scratch() as place:
            tasks, missing = available(storing(source, place))
            wants = {"tar": "≤ 2.5", "restic": "< 1"}
            contest = run.contest(label, "seconds", tasks, turns=5, wants=wants)
            contest.notes += missing
        yield contest


def storing(source: Path, place: Path) -> dict[str, Callable[[], Task]]:
    """Return how each contestant stores `source` below `place`."""

    def ours() -> Task:
        database = place / "uploads.db"
        command = selfheal("migrate", source, f"sqlite+aiosqlite:///{database}")
        return after(lambda: remove(database), lambda: cost(*command, sync=place))

    def tar() -> Task:
        return after(
            lambda: remove(place / "a.tar"), lambda: cost("tar", "cf", place / "a.tar", ".", cwd=source, sync=place)
        )

    def sqlar() -> Task:
        command = [archiver(source), place / "a.sqlar", "-Ac", "."]
        return after(lambda: remove(place / "a.sqlar"), lambda: cost(*command, cwd=source, sync=place))

    def restic() -> Task:
        command = [program("restic"), "--no-cache", "-q", "-r", str(place / "repo")]

        def prepare() -> None:
            remove(place / "repo")
            cost(*command, "init")

        return after(prepare, lambda: cost(*command, "backup", ".", cwd=source, sync=place))

    def least() -> Task:
        database, nothing = place / "least.db", place / "nothing"
        nothing.mkdir(exist_ok=True)
        command = plain_python("migrate", source)
        prepare = lambda: (remove(database), migrate(nothing, sqlite(database)))  # noqa: E731 - it creates the tables
        return after(prepare, lambda: cost(*command, source, database, sync=place))

    return {"selfheal": ours, "tar": tar, "sqlite3 -A": sqlar, "restic": restic, LEAST: least}


@experiment("Migrate and restore: PostgreSQL compared with SQLite", plot="none")
def on_postgres(run: Run) -> Iterator[Contest]:
    """The small files, through asyncpg, to a server with default settings on the same machine."""
    label, source = next(sizes(run))
    with scratch() as place, postgres() as url:
        sqlite_url = sqlite(place / "uploads.db")
        first = {"PostgreSQL": lambda: cost(*selfheal("migrate", source, url))}
        yield run.contest(f"migrate {label}", "seconds", first, turns=1, subject="PostgreSQL")
        migrate(source, sqlite_url)
        target = place / "out"

        def restoring_from(where: str) -> Task:
            return after(lambda: renew(target), lambda: cost(*selfheal("restore", target, where), sync=place))

        tasks = {"PostgreSQL": restoring_from(url), "SQLite": restoring_from(sqlite_url)}
        yield run.contest(f"restore {label}", "seconds", tasks, turns=5, subject="PostgreSQL")


@experiment("Verify: compare every file on disk with its record")
def verify(run: Run) -> Iterator[Contest]:
    """2 GiB in 20,000 files, in memory. `verify` reads disk and database, `restore --verify --dry-run` the disk."""
    count = 20_000 // run.pick(1, 10)
    source = files(count, 2 * GIB // 20_000)
    with scratch() as place:
        url = sqlite(place / "uploads.db")
        migrate(source, url)
        warm(source)
        cores = os.cpu_count() or 1
        hashing = f"find . -type f -print0 | xargs -0 -P {cores} -n 64 sha256sum"
        jobs = ["--jobs", str(cores)]
        tasks: dict[str, Task] = {
            "disk only": lambda: cost(*selfheal("restore", source, url, "--verify", "--dry-run", *jobs)),
            "disk and database": lambda: cost(*selfheal("verify", source, url, *jobs)),
            "sha256sum": lambda: cost("sh", "-c", hashing, cwd=source),
        }
        yield run.contest(
            f"{count:,} files", "seconds", tasks, turns=5, wants={"sha256sum": "< 1"}, subject="disk only"
        )


def plain_python(run: str, source: Path) -> list[object]:
    """Return the command of the minimal version of a run. It supports only files of one chunk."""
    if (source / name_of(0)).stat().st_size > CHUNK:
        raise Unavailable("it supports only files of one chunk")
    return [sys.executable, "-m", "benchmarks.least", run]


def archiver(source: Path) -> str:
    """Return the path of sqlite3. Raise `Unavailable` for files of 1 GB or more, which it does not archive."""
    if any(path.stat().st_size >= 10**9 for path in source.rglob("*")):
        raise Unavailable("it refuses files of 1 GB or more")
    return program("sqlite3")


def same(one: Path, other: Path) -> bool:
    """Return whether two directories hold the same bytes under the same names."""
    return subprocess.run(["diff", "-rq", one, other], check=False).returncode == 0
