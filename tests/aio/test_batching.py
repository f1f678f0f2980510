"""Batching: keys that are asked for at the same time are looked up in one query."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterable
from typing import Any

import pytest

from selfheal.aio.batching import Batcher
from selfheal.aio.tasks import Tasks
from tests.support.event_loop import PATIENCE, results_of, run_loop


class Database:
    """Knows the square of every even number; queries wait while `go` is not set."""

    def __init__(self) -> None:
        self.queries: list[list[int]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.error: BaseException | None = None
        self.running = self.most = 0

    async def ask(self, keys: list[int]) -> dict[int, int]:
        """Answer one query for many keys."""
        self.queries.append(keys)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.go.wait()
            await run_loop(3)
            if self.error is not None:
                raise self.error
            return {key: key * key for key in keys if key % 2 == 0}
        finally:
            self.running -= 1


@pytest.fixture
async def database() -> Database:
    """A database that answers at once."""
    return Database()


def ask(batches: Batcher[int, int], keys: Iterable[int]) -> list[asyncio.Task[int | None]]:
    """Start a caller for each of `keys`, each in a task of its own."""
    return [asyncio.create_task(batches.get(key)) for key in keys]


async def test_one_query_for_many_keys(database: Database, tasks: Tasks) -> None:
    """Keys asked for at the same time are in one query, each once; an unknown key is None."""
    batches = Batcher(database.ask, tasks, size=1000, limit=1)
    keys = [*range(100)] * 5
    assert await results_of(ask(batches, keys)) == [key * key if key % 2 == 0 else None for key in keys]
    assert [sorted(query) for query in database.queries] == [list(range(100))]


async def test_a_caller_of_the_next_iteration_is_in_the_first_query(database: Database, tasks: Tasks) -> None:
    """A caller that asks one iteration of the loop after the first one is in the same query."""
    batches = Batcher(database.ask, tasks, size=1000, limit=1)

    async def an_iteration_later(key: int) -> int | None:
        await asyncio.sleep(0)
        return await batches.get(key)

    callers = [*ask(batches, [0]), *(asyncio.create_task(an_iteration_later(key)) for key in (2, 4))]
    assert await results_of(callers) == [0, 4, 16]
    assert database.queries == [[0, 2, 4]]


async def test_keys_asked_for_during_a_query_wait(database: Database, tasks: Tasks) -> None:
    """Keys asked for during a query are all in the next one."""
    batches = Batcher(database.ask, tasks, size=1000, limit=1)
    database.go.clear()
    first = ask(batches, [0])
    await run_loop()
    later = ask(batches, [2, 4])
    await run_loop()
    later += ask(batches, [6, 2])
    await run_loop()
    assert database.queries == [[0]]
    database.go.set()
    assert await results_of([*first, *later]) == [0, 4, 16, 36, 4]
    assert database.queries == [[0], [2, 4, 6]]


async def test_a_result_is_not_older_than_its_request(database: Database, tasks: Tasks) -> None:
    """A key asked for during a query for it is in the next query too: it may have changed since."""
    batches = Batcher(database.ask, tasks, size=1000, limit=1)
    database.go.clear()
    first = ask(batches, [2])
    await run_loop()
    second = ask(batches, [2])
    await run_loop()
    database.go.set()
    assert await results_of([*first, *second]) == [4, 4]
    assert database.queries == [[2], [2]]


@pytest.mark.parametrize(("size", "at_once"), [(1, 1), (7, 1), (7, 3), (100, 2)])
async def test_bounds(size: int, at_once: int, database: Database, tasks: Tasks) -> None:
    """No query has more than `size` keys, no more than `at_once` queries run, and every caller gets its result."""
    batches = Batcher(database.ask, tasks, size=size, limit=at_once)
    callers: list[asyncio.Task[int | None]] = []
    for start in range(0, 100, 10):
        callers += ask(batches, range(start, start + 10))
        await run_loop(2)
    assert await results_of(callers) == [key * key if key % 2 == 0 else None for key in range(100)]
    assert max(len(query) for query in database.queries) <= size
    assert 1 <= database.most <= at_once
    assert sorted(key for query in database.queries for key in query) == list(range(100))
    assert await results_of(ask(batches, [8])) == [64]


async def test_a_second_query_during_a_slow_one(database: Database, tasks: Tasks) -> None:
    """With `limit=2` a caller does not wait for a slow query."""
    batches = Batcher(database.ask, tasks, size=1000, limit=2)
    database.go.clear()
    first = ask(batches, [0])
    await run_loop()
    second = ask(batches, [2])
    await run_loop()
    assert database.queries == [[0], [2]]
    third = ask(batches, [4])
    await run_loop()
    assert database.queries == [[0], [2]]
    database.go.set()
    assert await results_of([*first, *second, *third]) == [0, 4, 16]


async def test_an_error_is_raised_for_all_callers_of_its_query(
    database: Database, tasks: Tasks, reports: list[dict[str, Any]]
) -> None:
    """All callers of a query that fails get its error; the next query is made again."""
    batches = Batcher(database.ask, tasks, size=1000, limit=1)
    database.error = OSError(5, "Input/output error")
    assert await results_of(ask(batches, range(50))) == [database.error] * 50
    database.error = None
    assert await results_of(ask(batches, [2])) == [4]
    assert len(database.queries) == 2
    gc.collect()
    await run_loop()
    assert reports == []


async def test_an_error_does_not_reach_the_next_query(database: Database, tasks: Tasks) -> None:
    """Callers of the next query do not get the error of the one before."""

    async def flaky(keys: list[int]) -> dict[int, int]:
        if 0 in keys:
            raise OSError(5, "Input/output error")
        return await database.ask(keys)

    batches = Batcher(flaky, tasks, size=2, limit=1)
    results = await results_of(ask(batches, [0, 2, 4, 6]))
    assert [type(result) for result in results] == [OSError, OSError, int, int]
    assert results[2:] == [16, 36]


async def test_a_cancelled_caller(database: Database, tasks: Tasks, reports: list[dict[str, Any]]) -> None:
    """A cancelled caller affects neither the query nor other callers of the same key or of others."""
    batches = Batcher(database.ask, tasks, size=1000, limit=1)
    database.go.clear()
    callers = ask(batches, [2, 2, 4])
    await run_loop()
    callers[0].cancel()
    await run_loop()
    database.go.set()
    results = await results_of(callers)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [4, 16]
    assert len(database.queries) == 1
    database.error = OSError(5, "Input/output error")
    alone = ask(batches, [6])
    await run_loop(2)
    alone[0].cancel()
    await results_of(alone)
    await tasks.drain(PATIENCE)
    del alone, callers, results
    gc.collect()
    await run_loop()
    assert reports == []


@pytest.mark.parametrize("started", [1, 10], ids=["before its query", "in its query"])
async def test_a_cancelled_query_ends_every_caller(started: int, database: Database, tasks: Tasks) -> None:
    """If the query is cancelled, every caller ends, those of the next query too; a later caller gets its result."""
    batches = Batcher(database.ask, tasks, size=1, limit=1)
    database.go.clear()
    callers = ask(batches, [2, 4, 6])
    await run_loop(started)
    await tasks.drain(0)
    results = await results_of(callers)
    assert all(isinstance(result, BaseException) for result in results)
    database.go.set()
    assert await results_of(ask(batches, [2, 4, 6, 8])) == [4, 16, 36, 64]


@pytest.mark.parametrize("started", range(1, 5))
def test_a_loop_that_ends_during_a_query(started: int) -> None:
    """A loop that ends during a query, as a test client's does, does not affect queries in the next loop."""

    async def lookup(keys: list[int]) -> dict[int, int]:
        await run_loop(3)
        return {key: key * key for key in keys}

    batches = Batcher(lookup, Tasks(), size=1, limit=1)

    async def leave() -> None:
        callers = ask(batches, [2, 4])
        await run_loop(started)
        del callers

    async def stay() -> list[Any]:
        return await results_of(ask(batches, [2, 4, 6]))

    asyncio.run(leave())
    assert asyncio.run(stay()) == [4, 16, 36]
