"""A value that the database refuses fails alone; an error of the whole database fails all."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import pytest
from sqlalchemy.exc import DataError

from selfheal import DatabaseUnavailable, SchemaError
from selfheal.bulk.one_by_one import in_halves, is_refusal


class _DriverError(Exception):
    sqlstate = "22P05"  # PostgreSQL: no equivalent in the encoding


def _caused_by(cause: Exception) -> DatabaseUnavailable:
    error = DatabaseUnavailable("the database gave no answer")
    error.__cause__ = cause
    return error


REFUSALS = (
    OverflowError("Python int too large to convert to SQLite INTEGER"),
    UnicodeEncodeError,
    DataError("INSERT", {}, Exception("out of range")),
    _caused_by(_DriverError()),
    _caused_by(sqlite3.IntegrityError("datatype mismatch")),
)
OUTAGES = (
    DatabaseUnavailable("down"),
    SchemaError("no tables"),
    _caused_by(ConnectionRefusedError()),
    _caused_by(sqlite3.OperationalError("database is locked")),
    OSError(5, "Input/output error"),
)


def _error(what: object) -> Exception:
    if isinstance(what, Exception):
        return what
    try:
        "\udcff".encode()
    except UnicodeEncodeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("what", REFUSALS, ids=repr)
async def test_refused_values_fail_alone(what: object) -> None:
    """All other items are done, each once, in as few calls as halving takes."""
    error, calls = _error(what), list[int]()

    async def work(items: Sequence[int]) -> list[int]:
        calls.append(len(items))
        if {3, 800} & set(items):
            raise error
        return list(items)

    parts, refused = await in_halves(work, range(1000))
    assert sorted(item for part in parts for item in part) == [item for item in range(1000) if item not in (3, 800)]
    assert refused == [(3, error), (800, error)]
    assert len(calls) < 50


@pytest.mark.parametrize("error", OUTAGES, ids=repr)
async def test_an_outage_fails_all(error: Exception) -> None:
    """An error that no single value caused is raised at once, without a second question."""
    calls = 0

    async def work(items: Sequence[int]) -> None:
        nonlocal calls
        calls += 1
        raise error

    with pytest.raises(type(error)):
        await in_halves(work, range(1000))
    assert (calls, is_refusal(error)) == (1, False)


async def test_nothing_to_ask() -> None:
    """No items are one call with no items."""

    async def work(items: Sequence[int]) -> int:
        return len(items)

    assert await in_halves(work, []) == ([0], [])
