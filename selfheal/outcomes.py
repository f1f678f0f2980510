"""What a bulk run says of a name, and how it goes through many of them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Coroutine, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from . import names
from .disk import Found as Entry
from .disk import UploadsDirectory
from .errors import CorruptBlob, DatabaseUnavailable, NotAFile, SelfHealError
from .records import Record

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
    """What became of one name: `size` in bytes, `detail` for people, and whether something is wrong still."""

    name: str
    outcome: Outcome
    size: int = 0
    detail: str = ""
    is_problem: bool = False


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
        if why := names.fault(entry.name):
            results.append(problem(entry.name, Outcome.INVALID_NAME, why))
        elif entry.fault:
            results.append(problem(entry.name, Outcome.FAILED, entry.fault))
        else:
            uploads.append(entry)
    return uploads, results


def split(records: Iterable[Record]) -> tuple[list[Record], list[Result]]:
    """Records that can be restored, and results for those that somebody else must have written."""
    valid: list[Record] = []
    results: list[Result] = []
    for record in records:
        if not names.is_valid(record.name):
            results.append(problem(record.name, Outcome.INVALID_NAME, names.fault(record.name)))
        elif record.size < 0:
            results.append(problem(record.name, Outcome.CORRUPT_IN_DATABASE, f"its size is {record.size}"))
        else:
            valid.append(record)
    return valid, results


def survey(disk: UploadsDirectory, records: Iterable[Record]) -> tuple[list[Record], list[Record], list[Result]]:
    """Records whose file is on the disk, records whose file is not, and results where nobody can tell."""
    present: list[Record] = []
    missing: list[Record] = []
    results: list[Result] = []
    for record in records:
        try:
            (missing if disk.stat(record.name) is None else present).append(record)
        except (SelfHealError, OSError) as error:
            results.append(of_error(record.name, error))
    return present, missing, results


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
