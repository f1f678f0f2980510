"""The most similar project, django-binary-database-files: both restore a missing file when it is requested."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from .data import KIB, files, migrate, name_of, scratch, sqlite
from .measure import OURS, PROJECT, Contest, Measures, Run, experiment
from .misses import NAMES, asking, crowd
from .servers import PREFIX, Server, peer, script, uvicorn

DJANGO = "django-binary-database-files"
CLIENTS = 20


@contextlib.contextmanager
def both(source: Path) -> Iterator[tuple[dict[str, Server], dict[str, Path]]]:
    """Yield servers with `source` in their databases and nothing on disk, and the directory each restores to."""
    python = peer("django", DJANGO, "gunicorn")
    with scratch() as place, contextlib.ExitStack() as stack:
        url = sqlite(place / "uploads.db")
        migrate(source, url)
        command = [python, "-m", "benchmarks.apps.django_files", source]
        subprocess.run(command, cwd=PROJECT, env={**os.environ, "BENCH_PLACE": str(place)}, check=True)
        gunicorn = f"--workers 1 --threads {CLIENTS} --log-level warning --bind 127.0.0.1:{{port}}".split()
        servers = {
            OURS: stack.enter_context(uvicorn("ours", core=None, directory=place / "up", database=url)),
            DJANGO: stack.enter_context(
                script(
                    python, "gunicorn", *gunicorn, "benchmarks.apps.django_files:application", core=None, place=place
                )
            ),
        }
        yield servers, {OURS: place / "up", DJANGO: place / "media"}


@experiment("Restore on request, compared with django-binary-database-files")
def lazy_restore(run: Run) -> Iterator[Contest]:
    """200 KiB, one client, both on SQLite. The peer runs on gunicorn with threads, and syncs nothing."""
    source = files(NAMES, 200 * KIB)
    with both(source) as (servers, places):
        turns = {name: asking(server, source, places[name]) for name, server in servers.items()}
        for turn in turns.values():
            turn()
        yield run.contest("200 KiB", "ms", turns, turns=9, wants={DJANGO: "< 1"})


@experiment("20 clients request one missing file of 30 MB, compared with django-binary-database-files")
def twenty_clients(run: Run) -> Iterator[Contest]:
    """How many clients get the right bytes, how long the last one waits, and how much memory the server uses."""
    source = files(1, 30_000_000)
    with both(source) as (servers, places):

        def turn(name: str) -> Callable[[], Measures]:
            def ask() -> Measures:
                for left in (name_of(0), f"{name_of(0)}.hash"):
                    (places[name] / left).unlink(missing_ok=True)
                said = crowd(servers[name].port, f"{PREFIX}/{name_of(0)}", CLIENTS, source / name_of(0))
                memory = sum(map(peak, family(servers[name].pid)))
                seconds = said["seconds"][-1] if said["seconds"] else float("nan")
                return {"clients": float(said["right"]), "seconds": seconds, "MB at most": memory}

            return ask

        contest = run.contest("correct answers", "clients", {name: turn(name) for name in servers}, turns=5)
        yield contest.seen_as("correct answers", "clients", {OURS: f"≥ {CLIENTS}"})
        yield contest.seen_as("time until the last client has all bytes", "seconds", {DJANGO: "< 1"})
        yield contest.seen_as("memory of the server", "MB at most", {DJANGO: "< 1"})


def family(pid: int) -> list[int]:
    """Return a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def peak(pid: int) -> float:
    """Return the peak memory of a process, in MB."""
    return Server(0, pid).megabytes("VmHWM")
