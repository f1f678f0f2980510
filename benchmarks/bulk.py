"""Everything at once: restore, migrate and verify beside the tools that people use for it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .data import GIB, KIB, MIB, files, migrate, remove, selfheal, sqlite, warm
from .measure import BENCH, PROJECT, Contest, Measures, Run, Unavailable, experiment
from .postgres import postgres
from .servers import program

SETS = {
    "20,000 × 20 KiB": (20_000, 20 * KIB),
    "500 × 4 MiB": (500, 4 * MIB),
    "1 × 2 GiB": (1, 2 * GIB),
}
Task = Callable[[], Measures]


def cost(*command: object, cwd: Path = PROJECT, sync: Path | None = None) -> Measures:
    """How long a command takes, to the end of a sync where one is asked for, and its peak of memory."""
    started = time.monotonic()
    environment = {**os.environ, "RESTIC_PASSWORD": "x"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=said
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}: {last}")
    if sync is not None:
        subprocess.run(["sync", "-f", sync], check=True)
    return {"seconds": time.monotonic() - started, "MB at most": usage.ru_maxrss * 1024 / 1e6}


def after(prepare: Callable[[], Any], task: Task) -> Task:
    """A task with something before it that is not measured."""

    def run() -> Measures:
        prepare()
        return task()

    return run


def available(tasks: Mapping[str, Callable[[], Task]]) -> tuple[dict[str, Task], list[str]]:
    """The tasks that can be made here, and why the others cannot."""
    ready, missing = {}, []
    for name, make in tasks.items():
        try:
            ready[name] = make()
        except Unavailable as error:
            missing.append(f"{name} did not take part: {error}")
    return ready, missing


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty directory on the disk that is measured."""
    BENCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=BENCH) as place:
        yield Path(place)


def sizes(run: Run) -> Iterator[tuple[str, Path]]:
    """Every set of files by its label; a tenth of them in a quick run."""
    for label, (count, size) in SETS.items():
        directory = files(max(count // run.pick(1, 10), 1), size // run.pick(1, 10 if count == 1 else 1))
        yield label if not run.quick else f"a tenth of {label}", directory


@experiment("Restore everything: database → empty directory, every byte checked and synced")
def restore(run: Run) -> Iterator[Contest]:
    """The others restore from what they themselves made of the same files; each ends with a sync."""
    bounds = iter(("≤ 2", "≤ 1.3", "≤ 1.3"))
    for label, source in sizes(run):
        with scratch() as place:
            tasks, missing = available(restoring(source, place))
            wants = {"tar": next(bounds), "restic": "< 1", "rsync": "< 1"}
            contest = run.contest(label, "seconds", tasks, turns=5, wants=wants)
            contest.notes += missing
            assert same(source, place / "out-selfheal"), "what was restored is not what was migrated"
        yield contest


def restoring(source: Path, place: Path) -> dict[str, Callable[[], Task]]:
    """How each contestant restores `source`, after it has stored it below `place`."""

    def to(name: str, *command: object, cwd: Path = PROJECT) -> Task:
        target = place / f"out-{name}"
        return after(lambda: (remove(target), target.mkdir()), lambda: cost(*command, cwd=cwd, sync=target))

    def ours() -> Task:
        url = sqlite(place / "uploads.db")
        migrate(source, url)
        return to("selfheal", *selfheal("restore", place / "out-selfheal", url))

    def tar() -> Task:
        subprocess.run(["tar", "cf", place / "a.tar", "."], cwd=source, check=True)
        return to("tar", "tar", "xf", place / "a.tar", cwd=place / "out-tar")

    def sqlar() -> Task:
        sqlite3 = program("sqlite3")
        subprocess.run([sqlite3, place / "a.sqlar", "-Ac", "."], cwd=source, check=True)
        return to("sqlite3 -A", sqlite3, place / "a.sqlar", "-Ax", cwd=place / "out-sqlite3 -A")

    def restic() -> Task:
        command = [program("restic"), "--no-cache", "-q", "-r", str(place / "repo")]
        for step in (["init"], ["backup", "."]):
            subprocess.run([*command, *step], cwd=source, check=True, env={**os.environ, "RESTIC_PASSWORD": "x"})
        return to("restic", *command, "restore", "latest", "--target", place / "out-restic")

    def rsync() -> Task:
        return to("rsync", program("rsync"), "-a", f"{source}/", f"{place / 'out-rsync'}/")

    return {"selfheal": ours, "tar": tar, "sqlite3 -A": sqlar, "restic": restic, "rsync": rsync}


@experiment("Migrate everything: directory → empty database, synced")
def backup(run: Run) -> Iterator[Contest]:
    """The others make what they would restore from; each ends with a sync."""
    for label, source in sizes(run):
        with scratch() as place:
            tasks, missing = available(storing(source, place))
            wants = {"tar": "≤ 2.5", "restic": "< 1"}
            contest = run.contest(label, "seconds", tasks, turns=5, wants=wants)
            contest.notes += missing
        yield contest


def storing(source: Path, place: Path) -> dict[str, Callable[[], Task]]:
    """How each contestant stores `source` below `place`."""

    def ours() -> Task:
        database = place / "uploads.db"
        command = selfheal("migrate", source, f"sqlite+aiosqlite:///{database}")
        return after(lambda: remove(database), lambda: cost(*command, sync=place))

    def tar() -> Task:
        return after(
            lambda: remove(place / "a.tar"), lambda: cost("tar", "cf", place / "a.tar", ".", cwd=source, sync=place)
        )

    def sqlar() -> Task:
        command = [program("sqlite3"), place / "a.sqlar", "-Ac", "."]
        return after(lambda: remove(place / "a.sqlar"), lambda: cost(*command, cwd=source, sync=place))

    def restic() -> Task:
        command = [program("restic"), "--no-cache", "-q", "-r", str(place / "repo")]

        def prepare() -> None:
            remove(place / "repo")
            cost(*command, "init")

        return after(prepare, lambda: cost(*command, "backup", ".", cwd=source, sync=place))

    return {"selfheal": ours, "tar": tar, "sqlite3 -A": sqlar, "restic": restic}


@experiment("The same beside itself on PostgreSQL", plot="none")
def on_postgres(run: Run) -> Iterator[Contest]:
    """20,000 × 20 KiB, through asyncpg to a server with default settings on the same machine."""
    label, source = next(sizes(run))
    with scratch() as place, postgres() as url:
        sqlite_url = sqlite(place / "uploads.db")
        first = {"PostgreSQL": lambda: cost(*selfheal("migrate", source, url))}
        yield run.contest(f"migrate {label}", "seconds", first, turns=1, subject="PostgreSQL")
        migrate(source, sqlite_url)
        target = place / "out"
        tasks = {
            name: after(lambda: remove(target) if target.exists() else None, lambda where=where: cost(*selfheal("restore", target, where), sync=place))
            for name, where in (("PostgreSQL", url), ("SQLite", sqlite_url))
        }
        yield run.contest(f"restore {label}", "seconds", tasks, turns=5, subject="PostgreSQL")


@experiment("Verify: is everything on disk what was recorded?")
def verify(run: Run) -> Iterator[Contest]:
    """2 GiB in 20,000 files in memory. `verify` reads both sides; `restore --verify --dry-run` hashes the disk alone."""
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
            "disk side": lambda: cost(*selfheal("restore", source, url, "--verify", "--dry-run", *jobs)),
            "both sides": lambda: cost(*selfheal("verify", source, url, *jobs)),
            "sha256sum": lambda: cost("sh", "-c", hashing, cwd=source),
        }
        yield run.contest(f"{count:,} files", "seconds", tasks, turns=5, wants={"sha256sum": "< 1"}, subject="disk side")


def same(one: Path, other: Path) -> bool:
    """Whether two directories hold the same bytes under the same names."""
    return subprocess.run(["diff", "-rq", one, other], check=False).returncode == 0
