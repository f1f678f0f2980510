"""Misses: how long the first client of a missing file waits, and what many clients at once cost."""

from __future__ import annotations

import contextlib
import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .data import GIB, KIB, MIB, files, migrate, name_of, scratch
from .databases import databases
from .measure import OURS, PROJECT, Contest, Run, experiment
from .servers import PREFIX, Server, uvicorn

SIZES = {"10 KiB": 10 * KIB, "200 KiB": 200 * KIB, "5 MiB": 5 * MIB}
NAMES = 20
SYNCED = "selfheal with its fsync"
LEAST = "plain Python"


@experiment("First request for a missing file, up to the last byte")
def first_request(run: Run) -> Iterator[Contest]:
    """One client requests one file after the other; each sample is the median of 20.

    The bare driver (sqlite3 in a thread, or asyncpg) reads the same chunks from the same tables and sends them. It
    checks nothing and writes nothing to the disk. The cost of the fsync of the restored file is measured separately.
    "Plain Python" is the bare driver that also restores the file, without an fsync.
    """
    for label, size in SIZES.items():
        yield from _first_request(run, label, files(NAMES, size))


def _first_request(run: Run, label: str, source: Path) -> Iterator[Contest]:
    with databases() as urls:
        for kind, url in urls.items():
            migrate(source, url)
            with scratch() as place, contextlib.ExitStack() as stack:
                turns: dict[str, Callable[[], float]] = {}
                for name, hooks in ((OURS, "nosync"), (SYNCED, "")):
                    directory = place / name.replace(" ", "-")
                    server = stack.enter_context(
                        uvicorn("ours", core=None, directory=directory, database=url, hooks=hooks)
                    )
                    turns[name] = asking(server, source, directory)
                bare = stack.enter_context(uvicorn("bare", core=None, database=url))
                turns["bare driver"] = asking(bare, source, None)
                directory = place / LEAST.replace(" ", "-")
                plain = stack.enter_context(uvicorn("bare", core=None, database=url, directory=directory))
                turns[LEAST] = asking(plain, source, directory)
                for turn in turns.values():
                    turn()
                yield run.contest(f"{label}, {kind}", "ms", turns, turns=9, wants={"bare driver": "≤ 2"})


def asking(server: Server, source: Path, directory: Path | None) -> Callable[[], float]:
    """Return a task: request every name, after removing it from `directory`. Its result is the median in ms."""

    def turn() -> float:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        took = []
        with contextlib.closing(connection):
            for name in map(name_of, range(NAMES)):
                if directory is not None:
                    (directory / name).unlink(missing_ok=True)
                started = time.perf_counter()
                connection.request("GET", f"{PREFIX}/{name}")
                body = connection.getresponse().read()
                took.append(time.perf_counter() - started)
                assert body == (source / name).read_bytes(), "wrong bytes"
        return statistics.median(took) * 1000

    return turn


@experiment("First byte of a missing file of 1 GiB, and its complete restore")
def first_byte(run: Run) -> Iterator[Contest]:
    """The answer starts while the file is restored. The restore ends when the file has its name on disk."""
    size = GIB // run.pick(1, 8)
    with databases() as urls:
        for kind, url in urls.items():
            migrate(files(1, size), url)
            with scratch() as place, uvicorn("ours", core=None, directory=place / "up", database=url) as server:
                samples: dict[str, list[dict[str, float]]] = {"first byte": [], "complete restore": []}
                for _ in range(run.pick(5, 2)):
                    first, whole = stream(server, place / "up" / name_of(0), size)
                    samples["first byte"].append({"seconds": first})
                    samples["complete restore"].append({"seconds": whole})
                contest = Contest(kind, "seconds", samples, {"complete restore": "≤ 0.02"}, subject="first byte")
                contest.notes.append(f"{kind}: memory of the server at most {server.megabytes('VmHWM'):.0f} MB")
                yield contest


def stream(server: Server, path: Path, size: int) -> tuple[float, float]:
    """Return the seconds until the first byte, and until the file is on disk."""
    path.unlink(missing_ok=True)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    with contextlib.closing(connection):
        started = time.perf_counter()
        connection.request("GET", f"{PREFIX}/{name_of(0)}")
        answer = connection.getresponse()
        got = len(answer.read(1))
        first = time.perf_counter() - started
        buffer = bytearray(MIB)
        while count := answer.readinto(buffer):
            got += count
        while not path.exists():
            time.sleep(0.002)
        whole = time.perf_counter() - started
    assert got == size, f"{got} bytes came"
    return first, whole


@experiment("1,000 clients request one missing file of 30 MB at once", plot="none")
def one_thousand(run: Run) -> Iterator[Contest]:
    """The bytes of every answer are compared. The clients run on the other core of the same machine."""
    clients, size = run.pick(1000, 100), 30_000_000
    source = files(1, size)
    with databases() as urls:
        for kind, url in urls.items():
            migrate(source, url)
            right, reads, memory, seconds = [], [], [], []
            for _ in range(run.pick(3, 1)):
                with scratch() as place, uvicorn("ours", directory=place / "up", database=url, hooks="count") as server:
                    server.get("/")
                    base = server.megabytes("VmRSS")
                    said = crowd(server.port, f"{PREFIX}/{name_of(0)}", clients, source / name_of(0))
                    right.append({"clients": float(said["right"])})
                    seconds.append({"seconds": said["seconds"][-1]})
                    memory.append({"MB": server.megabytes("VmHWM") - base})
                    reads.append({"reads": float(server.state()["blob reads"])})
            for label, unit, samples, want in (
                ("correct answers", "clients", right, f"≥ {clients}"),
                ("blob reads", "reads", reads, "≤ 1"),
                ("memory above that of the idle server", "MB", memory, "≤ 64"),
                ("time until the last client has all bytes", "seconds", seconds, None),
            ):
                yield Contest(f"{kind}: {label}", unit, {OURS: samples}, {OURS: want} if want else {})


def crowd(port: int, path: str, clients: int, expected: Path) -> dict[str, list[float]]:
    """Run many clients at once, in a process of their own; return their results."""
    command = [sys.executable, "-m", "benchmarks.crowd", str(port), path, str(clients), str(expected)]
    said: dict[str, list[float]] = json.loads(subprocess.check_output(command, cwd=PROJECT))
    return said
