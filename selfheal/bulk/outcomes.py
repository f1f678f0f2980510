"""Outcomes: what a bulk run reports about a name; a run is a stream of steps that return them."""

import os
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ..aio.streams import run_in_order
from ..errors import CorruptBlob, DatabaseUnavailable, NotAFile, SelfHealError
from .one_by_one import is_refusal


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
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome for one name; with an empty `name`, for `count` of them. `detail` is for people.

    A skipped name is no upload. One with a `detail` looks like an upload: people are warned of it. `origin` is the name
    that an imported upload had elsewhere, if that is another one.
    """

    name: str
    outcome: Outcome
    size: int = 0
    detail: str = ""
    is_problem: bool = False
    count: int = 1
    origin: str = ""


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
    """Return the result for a name that failed; an error that is not of this name alone is raised again."""
    if not (isinstance(error, OSError) or is_refusal(error)):
        raise error
    if isinstance(error, CorruptBlob):
        return problem(name, Outcome.CORRUPT_IN_DATABASE, error.why)
    if isinstance(error, NotAFile) and str(error) == name:  # it is on disk; else the error says what has the name
        return problem(name, Outcome.FAILED, "the name is taken by something that is not a file; move it away")
    if isinstance(error, PermissionError):
        user = f"this user (uid {os.geteuid()})"
        detail = f"{user} may not read it or change it; `chown` or `chmod` it, or the directory that it is in"
        return problem(name, Outcome.FAILED, detail)
    if isinstance(error, OSError | SelfHealError) and not isinstance(error, DatabaseUnavailable):
        return problem(name, Outcome.FAILED, str(error))
    cause = error.__cause__ or getattr(error, "orig", None) or error
    return problem(name, Outcome.FAILED, f"a value of it cannot be used: {str(cause).partition(chr(10))[0]}")
