"""Hits: requests per second for files that are on disk, alone and under other load."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .data import KIB, MIB, migrate, sqlite, warm
from .measure import Contest, Measures, Run, Unavailable, experiment
from .servers import PREFIX, Server, granian, loading, nginx, peer, script, uvicorn, wrk

SIZES = {"4 KiB": 4 * KIB, "100 KiB": 100 * KIB, "5 MiB": 5 * MIB}
COUNT = 20
SLOW = 64

Serving = Callable[[Path, str], contextlib.AbstractContextManager[Server]]
CONTESTANTS: dict[str, Serving] = {
    "selfheal": lambda directory, database: uvicorn("ours", directory=directory, database=database),
    "StaticFiles": lambda directory, _: uvicorn("staticfiles", directory=directory),
    "ServeStatic": lambda directory, _: uvicorn(
        "servestatic", python=peer("servestatic", "servestatic", "uvicorn", "uvloop", "httptools"), directory=directory
    ),
    "aiohttp": lambda directory, _: script(
        peer("aiohttp", "aiohttp", "uvloop"), "benchmarks.apps.aiohttp_static", "{port}", directory=directory
    ),
    "nginx": lambda directory, _: nginx(directory),
    "from memory": lambda directory, _: uvicorn("memory", directory=directory),
    "from disk": lambda directory, _: uvicorn("from_disk", directory=directory),
    "selfheal on granian": lambda directory, database: granian("ours", directory=directory, database=database),
    "StaticFiles on granian": lambda directory, _: granian("staticfiles", directory=directory),
}


@contextlib.contextmanager
def uploads() -> Iterator[tuple[Path, str]]:
    """Yield a directory with some files of each size (and of 4 KiB below `slow/`), and the URL of their database."""
    with tempfile.TemporaryDirectory(prefix="selfheal-bench-") as place:
        directory = Path(place, "uploads")
        for folder, size in {**SIZES, "slow": 4 * KIB}.items():
            (directory / folder.replace(" ", "")).mkdir(parents=True)
            for index in range(SLOW if folder == "slow" else COUNT):
                data = index.to_bytes(4, "big") * (size // 4)
                (directory / folder.replace(" ", "") / f"{index}.jpg").write_bytes(data)
        Path(place).chmod(0o755)
        database = sqlite(Path(place, "uploads.db"))
        migrate(directory, database)
        yield directory, database


@contextlib.contextmanager
def contestants(*wanted: str) -> Iterator[tuple[dict[str, Server], list[str]]]:
    """Yield servers of the same files, checked and warmed up, and the reasons why others are missing."""
    missing = []
    with contextlib.ExitStack() as stack:
        directory, database = stack.enter_context(uploads())
        servers = {}
        for name in wanted:
            try:
                servers[name] = stack.enter_context(CONTESTANTS[name](directory, database))
            except Unavailable as error:
                missing.append(f"{name} was not measured: {error}")
        for server in servers.values():
            for size in SIZES:
                assert server.get(path_of(size))[1] == (directory / f"{path_of(size)[len(PREFIX) + 1 :]}").read_bytes()
                wrk(server.url(path_of(size)), seconds=1)
        yield servers, missing


def path_of(size: str, index: int = 1) -> str:
    """Return the path of one file of a size."""
    return f"{PREFIX}/{size.replace(' ', '')}/{index}.jpg"


def compare(run: Run, wants: dict[str, dict[str, str]], *names: str) -> Iterator[Contest]:
    """Yield one contest per size; `wants` is by size."""
    with contestants(*names) as (servers, missing):
        for size in SIZES:
            turns = {
                name: lambda server=server, size=size: wrk(server.url(path_of(size)), seconds=run.pick(5, 1))
                for name, server in servers.items()
            }
            contest = run.contest(size, "requests/s", turns, wants=wants[size], subject=names[0])
            contest.notes += missing
            yield contest


@experiment("Hits on uvicorn, 64 connections, compared with other servers of static files")
def on_uvicorn(run: Run) -> Iterator[Contest]:
    """One process each: the server on one core, wrk on another."""
    ahead = {"ServeStatic": "> 1", "aiohttp": "> 1"}
    yield from compare(
        run,
        {
            "4 KiB": {"StaticFiles": "≥ 12", "nginx": "≥ 0.4", **ahead},
            "100 KiB": {"StaticFiles": "≥ 7", "nginx": "≥ 0.4", **ahead},
            "5 MiB": {"StaticFiles": "≥ 3", "nginx": "≥ 0.8", **ahead},
        },
        "selfheal", "StaticFiles", "ServeStatic", "aiohttp", "nginx", "from memory", "from disk",
    )  # fmt: skip


@experiment("Hits on granian, 64 connections")
def on_granian(run: Run) -> Iterator[Contest]:
    """One worker each."""
    wants = {size: {"StaticFiles on granian": "≥ 5" if size == "4 KiB" else "> 1"} for size in SIZES}
    yield from compare(run, wants, "selfheal on granian", "StaticFiles on granian")


@experiment("Hits while 64 other requests wait for a slow disk")
def beside_a_slow_disk(run: Run) -> Iterator[Contest]:
    """Every open and every read for the other requests takes that long; a hook in the server simulates it."""
    with uploads() as (directory, database):
        for milliseconds in (20, 200):
            hooks = f"slow={milliseconds / 1000}"
            with uvicorn("ours", directory=directory, database=database, hooks=hooks) as server:
                yield run.contest(
                    f"{milliseconds} ms per open and read",
                    "p50 ms",
                    beside(run, server, f"{PREFIX}/slow/0.jpg", "with slow requests"),
                    wants={"alone": "≤ 2"},
                    subject="with slow requests",
                )


@experiment("Hits during a flood of requests for names that do not exist, 64 connections each")
def beside_a_flood(run: Run) -> Iterator[Contest]:
    """Only the database can tell that these names do not exist.

    "Flood outside the prefix": the same flood of paths that the wrapped app answers with a 404. Both clients share a
    core; "low-priority flood" means that the client of the flood has the lower priority there.
    """
    lua = str(Path(__file__).with_name("flood.lua"))
    with uploads() as (directory, database), uvicorn("ours", directory=directory, database=database) as server:
        turns = (
            beside(run, server, PREFIX, "with the flood", lua)
            | beside(run, server, PREFIX, "with a low-priority flood", lua, nice=10)
            | beside(run, server, "/none", "with a flood outside the prefix", lua)
        )
        yield run.contest("4 KiB hits", "p99 ms", turns, wants={"alone": "≤ 2"}, subject="with the flood")


@experiment("Hits while 10 clients download a file of 1.5 GB as fast as they can")
def beside_large_files(run: Run) -> Iterator[Contest]:
    """The file has no bytes on the disk, and is in the page cache."""
    with uploads() as (directory, database):
        with (directory / "large.mp4").open("wb") as large:
            large.truncate(1_500_000_000)
        warm(directory)
        with uvicorn("ours", directory=directory, database=database, adopt=0) as server:
            yield run.contest(
                "4 KiB hits",
                "p99 ms",
                beside(run, server, f"{PREFIX}/large.mp4", "with downloads", connections=10),
                subject="with downloads",
            )


def beside(
    run: Run, server: Server, path: str, name: str, lua: str | None = None, nice: int = 0, connections: int = 64
) -> dict[str, Callable[[], Measures]]:
    """Return two tasks: hits alone, and (under `name`) hits during another load."""
    seconds = run.pick(5, 2)

    def alone() -> Measures:
        return wrk(server.url(path_of("4 KiB")), seconds=seconds)

    def together() -> Measures:
        with loading(server.url(path), seconds=seconds + 60, connections=connections, lua=lua, nice=nice):
            return alone()

    alone()
    return {"alone": alone, name: together}


@experiment("A request outside the prefix: with the middleware, and to the bare app", plot="none")
def not_ours(run: Run) -> Iterator[Contest]:
    """The app answers 13 bytes, the minimum of work for a request. "Empty middleware" only passes the request on."""
    with (
        uploads() as (directory, database),
        uvicorn("ours", directory=directory, database=database) as ours,
        uvicorn("plain") as bare,
        uvicorn("passing") as passing,
    ):
        turns = {
            "selfheal": lambda: wrk(ours.url("/"), seconds=run.pick(3, 1)),
            "bare app": lambda: wrk(bare.url("/"), seconds=run.pick(3, 1)),
            "empty middleware": lambda: wrk(passing.url("/"), seconds=run.pick(3, 1)),
        }
        for measure in turns.values():
            measure()
        yield run.contest("GET /", "requests/s", turns, turns=15, wants={"bare app": "≥ 0.98"})
