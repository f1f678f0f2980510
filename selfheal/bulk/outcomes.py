"""What a bulk run says of a name, and how it goes through many of them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from .. import names
from ..aio.single_flight import in_order
from ..disk.listing import Entry, Listing
from ..errors import CorruptBlob, DatabaseUnavailable, NotAFile
from ..sql.models import Summary

T = TypeVar("T")


class Outcome(StrEnum):
    """What a run found of a name, or did about it."""

    OK = "ok"
    RESTORED = "restored"
    MIGRATED = "migrated"
    MISSING_ON_DISK = "missing_on_disk"
    MISSING_IN_DATABASE = "missing_in_database"
    DIFFERS = "differs"
    CORRUPT_IN_DATABASE = "corrupt_in_database"
    DELETED = "deleted"
    INVALID_NAME = "invalid_name"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one name: `size` in bytes, `detail` for people, and whether something is wrong still.

    Names of which there is nothing to say but how many they are come together: `name` is empty, `count` their number.
    """

    name: str
    outcome: Outcome
    size: int = 0
    detail: str = ""
    is_problem: bool = False
    count: int = 1


Step = Coroutine[Any, Any, list[Result]]
"""A piece of a bulk run, which ends with what became of some names."""


async def told(results: list[Result]) -> list[Result]:
    """A step that is done already."""
    return results


async def results_of(steps: AsyncGenerator[Step, None], at_once: int) -> AsyncGenerator[Result, None]:
    """What steps tell, in their order, so many of them at work at once."""
    async with aclosing(in_order(steps, at_once)) as done:
        async for results in done:
            for result in results:
                yield result


def problem(name: str, outcome: Outcome, detail: str, size: int = 0) -> Result:
    """A result that leaves something wrong."""
    return Result(name, outcome, size, detail, is_problem=True)


def of_error(name: str, error: Exception) -> Result:
    """What an error says of a name. What says something of the whole database is raised again."""
    if isinstance(error, DatabaseUnavailable):
        raise error
    if isinstance(error, CorruptBlob):
        return problem(name, Outcome.CORRUPT_IN_DATABASE, error.why)
    if isinstance(error, NotAFile):
        return problem(name, Outcome.FAILED, "something that is not a file stands at its name; move it away")
    return problem(name, Outcome.FAILED, str(error))


def sort(entries: Iterable[Entry]) -> tuple[list[Entry], list[Result]]:
    """Entries that can be uploads, and results for those that cannot."""
    uploads: list[Entry] = []
    results: list[Result] = []
    for entry in entries:
        if not names.is_valid(entry.name):
            results.append(problem(entry.name, Outcome.INVALID_NAME, names.fault(entry.name)))
        elif entry.fault:
            results.append(problem(entry.name, Outcome.FAILED, entry.fault))
        else:
            uploads.append(entry)
    return uploads, results


@dataclass(frozen=True, slots=True)
class Survey:
    """Which of some names (with the sizes of their records) are on the disk, and what is wrong with the others."""

    present: list[tuple[str, int]]
    missing: list[tuple[str, int]]
    wrong: list[Result]


def all_present(listing: Listing, summary: Summary) -> bool:
    """Whether all living records of a range are sound, their names valid, and their files on the disk."""
    if not summary.count:
        return True
    lines = summary.lines.split("\n")
    if summary.unsound or len(lines) != summary.count or not names.are_valid(summary.lines):
        return False
    try:
        return listing.has_all(lines)
    except OSError:  # of which names nobody can tell is told by a look at each
        return False


def split(wanted: Iterable[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[Result]]:
    """Names that can be restored, and results for those whose record somebody else must have written."""
    valid: list[tuple[str, int]] = []
    wrong: list[Result] = []
    for one in wanted:
        name, size = one
        if not names.is_valid(name):
            wrong.append(problem(name, Outcome.INVALID_NAME, names.fault(name)))
        elif size < 0:
            wrong.append(problem(name, Outcome.CORRUPT_IN_DATABASE, f"its size is {size}"))
        else:
            valid.append(one)
    return valid, wrong


def survey(listing: Listing, wanted: Iterable[tuple[str, int]]) -> Survey:
    """Look for names on the disk."""
    valid, wrong = split(wanted)
    found = Survey([], [], wrong)
    for one in valid:
        try:
            (found.present if listing.has(one[0]) else found.missing).append(one)
        except OSError as error:
            wrong.append(of_error(one[0], error))
    return found


async def each(jobs: int, work: Iterable[Coroutine[Any, Any, T]]) -> AsyncGenerator[T, None]:
    """The results of many coroutines, `jobs` of them at once, as they end."""
    left = iter(work)
    running: set[asyncio.Task[T]] = set()
    try:
        while True:
            running |= {asyncio.create_task(one) for one in itertools.islice(left, jobs - len(running))}
            if not running:
                return
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                running.discard(task)
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
