"""Outcomes: what a bulk run reports about a name; a run is a stream of steps that return them."""

from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ..aio.streams import run_in_order
from ..errors import CorruptBlob, DatabaseUnavailable, NotAFile


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
    """The outcome for one name; with an empty `name`, for `count` of them. `detail` is for people."""

    name: str
    outcome: Outcome
    size: int = 0
    detail: str = ""
    is_problem: bool = False
    count: int = 1


Step = Coroutine[Any, Any, list[Result]]  # A part of a run; returns the results for some names


async def done(results: list[Result]) -> list[Result]:
    """A step whose results are known already."""
    return results


async def results_of(steps: AsyncGenerator[Step, None], limit: int) -> AsyncGenerator[Result, None]:
    """Yield the results of steps in their order; up to `limit` of them run at the same time."""
    async with aclosing(run_in_order(steps, limit)) as finished:
        async for results in finished:
            for result in results:
                yield result


def problem(name: str, outcome: Outcome, detail: str, size: int = 0) -> Result:
    """Return a result that leaves something wrong."""
    return Result(name, outcome, size, detail, is_problem=True)


def of_error(name: str, error: Exception) -> Result:
    """Return the result for a name that failed; an error of the whole database is raised again."""
    if isinstance(error, DatabaseUnavailable):
        raise error
    if isinstance(error, CorruptBlob):
        return problem(name, Outcome.CORRUPT_IN_DATABASE, error.why)
    if isinstance(error, NotAFile):
        return problem(name, Outcome.FAILED, "the name is taken by something that is not a file; move it away")
    return problem(name, Outcome.FAILED, str(error))
