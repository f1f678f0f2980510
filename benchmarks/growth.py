"""How time and memory grow with the number of files, and with the size of one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import create_async_engine

from selfheal import ImageStorage

from .bulk import cost
from .data import KIB, MIB, files, name_of, scratch, selfheal
from .databases import databases
from .measure import BENCH, OURS, Contest, Measures, Run, Unavailable, experiment

JOBS = ("migrate", "restore", "verify")
BOTH = ("SQLite", "PostgreSQL")
EACH = "µs per name"
Samples = dict[str, list[Measures]]


@experiment("Time of each run, by number of files (1 KiB each)", plot="curves")
def time(run: Run) -> Iterator[Contest]:
    """The time of the whole process, divided by the number of names."""
    for label, by_number in by_count(run).items():
        seconds = {count: [turn["seconds"] for turn in turns] for count, turns in by_number.items()}
        *_, middle, largest = seconds
        samples = {
            count: [{EACH: each / number_of(count) * 1e6, "seconds": each} for each in turns]
            for count, turns in seconds.items()
        }
        yield Contest(label, EACH, samples, {middle: "≤ 1"}, largest, [f"{label}: {', '.join(added(seconds))}"])


def added(seconds: dict[str, list[float]]) -> Iterator[str]:
    """Yield the time per added name between two sizes. The start of the process does not count in it."""
    for few, many in itertools.pairwise(seconds):
        more = statistics.median(seconds[many]) - statistics.median(seconds[few])
        yield f"{more / (number_of(many) - number_of(few)) * 1e6:.0f} µs per added name from {few} to {many}"


def number_of(label: str) -> int:
    """Return the number in a label."""
    return int(label.replace(",", ""))


@experiment("Memory of each run, by number of files (1 KiB each)", plot="curves")
def memory(run: Run) -> Iterator[Contest]:
    """The peak memory of the whole process."""
    for label, samples in by_count(run).items():
        smallest, *_, largest = samples
        contest = Contest(label, "MB at most", samples, subject=largest)
        yield contest.seen_as(label, "MB at most", {smallest: "≤ 2"})


@experiment("Memory of each run, by the size of one file", plot="none")
def memory_of_one_file(run: Run) -> Iterator[Contest]:
    """On SQLite."""
    sizes = {"64 MiB": 64 * MIB, "1 GiB": run.pick(1024, 256) * MIB}
    with scratch() as place:
        measured = {label: chain("SQLite", files(1, size), place) for label, size in sizes.items()}
    for job in JOBS:
        samples = {label: [measured[label][job]] for label in sizes}
        yield Contest(job, "MB at most", samples, {"64 MiB": "≤ 1.2"}, "1 GiB")


@experiment("A restore that finds nothing missing, by number of records, compared with `find`", plot="curves")
def nothing_missing(run: Run) -> Iterator[Contest]:
    """Empty files in folders of 200; no file is missing, and everything is in memory."""
    for count in (1000, 10_000, 100_000, 1_000_000)[: run.pick(4, 2)]:
        directory = empty_files(count)
        with databases() as urls:
            tasks: dict[str, Callable[[], Measures]] = {}
            for kind, url in urls.items():
                asyncio.run(record_empty(url, count))
                tasks[OURS if kind == "SQLite" else f"{OURS} on {kind}"] = functools.partial(
                    cost, *selfheal("restore", directory, url)
                )
            tasks["find"] = functools.partial(cost, "find", directory, "-type", "f")
            wants = {"find": "≤ 3"} if count == 1_000_000 else {}
            yield run.contest(f"{count:,}", "seconds", tasks, turns=5, wants=wants)


@functools.cache
def by_count(run: Run) -> dict[str, Samples]:
    """Return the samples of every run, by run and database, then by number of files."""
    samples: dict[str, Samples] = {}
    counts = (1000, 10_000, 100_000)[: run.pick(3, 2)]
    with scratch() as place:
        for _ in range(run.pick(3, 1)):
            for kind in BOTH:
                for count in counts:
                    with contextlib.suppress(Unavailable):
                        for job, measures in chain(kind, files(count, KIB), place).items():
                            samples.setdefault(f"{job}, {kind}", {}).setdefault(f"{count:,}", []).append(measures)
    return samples


def chain(kind: str, source: Path, place: Path) -> dict[str, Measures]:
    """Migrate, restore and verify `source`, one after the other; return the samples of each.

    The restored files stay in `place`, because creating files is slower after many were removed (see `renew`).
    """
    out = Path(tempfile.mkdtemp(dir=place))
    with databases() as urls:
        if kind not in urls:
            raise Unavailable(kind)
        migrated = cost(*selfheal("migrate", source, urls[kind]), sync=place)
        restored = cost(*selfheal("restore", out, urls[kind]), sync=place)
        return {"migrate": migrated, "restore": restored, "verify": cost(*selfheal("verify", out, urls[kind]))}


def empty_files(count: int) -> Path:
    """Return a directory with `count` empty files, created once."""
    place = BENCH / "data" / f"{count}x0"
    if not place.exists():
        unfinished = place.with_suffix(".unfinished")
        for index in range(count):
            path = unfinished / name_of(index)
            if index % 200 == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        unfinished.rename(place)
    return place


async def record_empty(url: str, count: int) -> None:
    """Create the records of the files of `empty_files`."""
    storage = ImageStorage(url)
    await storage.create_tables()
    empty = {"sha256": hashlib.sha256().hexdigest(), "size": 0, "content_type": "image/jpeg", "modified_ns": 10**18}
    engine = create_async_engine(url)
    for start in range(0, count, 50_000):
        rows = [{"name": name_of(index), **empty} for index in range(start, min(start + 50_000, count))]
        async with engine.begin() as connection:
            await connection.execute(insert(storage.tables.records), rows)
    await engine.dispose()
    await storage.close()
