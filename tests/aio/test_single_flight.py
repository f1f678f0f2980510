"""Many askers, one piece of work: tasks that outlive their askers, flights by name, lookups by the handful."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import aclosing
from typing import Any

import pytest

from selfheal.aio.single_flight import Batches, Flights, Tasks, in_order, to_its_end

PATIENCE = 5.0
"""Seconds within which every asker must have been answered."""


@pytest.fixture
def tasks() -> Tasks:
    """Tasks."""
    return Tasks()


@pytest.fixture
async def complaints() -> list[dict[str, Any]]:
    """What the event loop complained about, such as failures that nobody ever asked for."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    return told


async def turns(number: int = 10) -> None:
    """Let the event loop take some turns."""
    for _ in range(number):
        await asyncio.sleep(0)


async def outcomes(askers: Iterable[asyncio.Future[Any]]) -> list[Any]:
    """What became of every asker, errors and cancellations among it; fails if one of them is never answered."""
    waiting = list(askers)
    _, hanging = await asyncio.wait(waiting, timeout=PATIENCE)
    for asker in hanging:
        asker.cancel()
    assert not hanging, f"{len(hanging)} of {len(waiting)} askers were never answered"
    return await asyncio.gather(*waiting, return_exceptions=True)


# -- to its end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
async def test_what_goes_to_its_end_holds_up_its_caller(complaints: list[dict[str, Any]], fails: bool) -> None:
    """However often the caller is cancelled: it is so once the work has ended, whatever became of that."""
    opened, done = asyncio.Event(), asyncio.Event()

    async def close() -> None:
        await opened.wait()
        done.set()
        if fails:
            raise EOFError

    closing = asyncio.create_task(to_its_end(close()))
    for _ in range(3):
        await turns()
        closing.cancel()
    await turns()
    assert not closing.done()
    opened.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert done.is_set()
    gc.collect()
    assert complaints == []


async def test_what_goes_to_its_end_undisturbed() -> None:
    """What it returns, or raises, is the caller's."""
    assert await to_its_end(asyncio.sleep(0, "closed")) == "closed"

    async def fail() -> None:
        raise EOFError

    with pytest.raises(EOFError):
        await to_its_end(fail())


# -- tasks ------------------------------------------------------------------------------------------------------------


async def test_work_outlives_its_asker(tasks: Tasks) -> None:
    """Work that must be finished goes on to its end when its asker is cancelled, and the asker hears at once."""
    opened, done = asyncio.Event(), asyncio.Event()

    async def commit() -> str:
        await opened.wait()
        done.set()
        return "committed"

    asker = asyncio.create_task(tasks.finish(commit()))
    await turns()
    asker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asker
    assert not done.is_set()
    opened.set()
    await asyncio.wait_for(done.wait(), PATIENCE)


async def test_finish_hands_back_what_came_of_it(tasks: Tasks) -> None:
    """An asker that stays gets the result, or the very error that the work raised."""
    error = OSError(28, "No space left on device")

    async def work(result: Any) -> Any:
        await turns()
        if isinstance(result, Exception):
            raise result
        return result

    assert await tasks.finish(work(5)) == 5
    with pytest.raises(OSError, match="No space left") as caught:
        await tasks.finish(work(error))
    assert caught.value is error


async def test_tasks_are_held(tasks: Tasks) -> None:
    """A task that nobody else refers to is not collected half-way, and is let go of when it has ended."""

    async def wait_for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    held = weakref.ref(tasks.start(wait_for_ever()))
    await turns()
    gc.collect()
    assert held() is not None
    await tasks.settle(0)
    await turns()
    gc.collect()
    assert held() is None


async def test_a_failure_that_nobody_asks_for(tasks: Tasks, complaints: list[dict[str, Any]]) -> None:
    """Work that fails after its asker has gone is not reported as never retrieved."""

    async def fail() -> None:
        await turns(3)
        raise OSError(5, "Input/output error")

    asker = asyncio.create_task(tasks.finish(fail()))
    await asyncio.sleep(0)
    asker.cancel()
    tasks.start(fail())
    await turns()
    await asyncio.wait([asker])
    del asker
    gc.collect()
    await turns()
    assert complaints == []


async def test_settle_waits(tasks: Tasks) -> None:
    """Settling waits for what is running, for no longer than that takes, and an idle one settles at once."""
    done = []

    async def work() -> None:
        await asyncio.sleep(0.05)
        done.append(True)

    await tasks.settle(0)
    for _ in range(3):
        tasks.start(work())
    async with asyncio.timeout(PATIENCE):
        await tasks.settle(1000)
    assert done == [True] * 3


async def test_settle_loses_patience(tasks: Tasks) -> None:
    """What does not end within the grace is cancelled, and its clean-up has run when settling ends."""
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await turns(3)
            cleaned.append(True)

    late = [tasks.start(work()) for _ in range(3)]
    await turns()
    async with asyncio.timeout(PATIENCE):
        await tasks.settle(0.05)
    assert cleaned == [True] * 3
    assert all(task.cancelled() for task in late)


@pytest.mark.parametrize("grace", [0, 1000])
async def test_settle_waits_for_what_work_starts(grace: float, tasks: Tasks) -> None:
    """Work that starts more work (a restore that looks up, a save that commits) leaves nothing running either."""
    started: list[asyncio.Task[Any]] = []

    async def last() -> None:
        await turns(50)

    async def first() -> None:
        try:
            await turns(20)
        finally:
            started.append(tasks.start(last()))

    started.append(tasks.start(first()))
    await turns(2)
    async with asyncio.timeout(PATIENCE):
        await tasks.settle(grace)
    assert len(started) == 2
    assert all(task.done() for task in started)


# -- flights ----------------------------------------------------------------------------------------------------------


class Airport:
    """Flights whose work waits until the test lands it; `boarded` lists the keys for which work was started."""

    def __init__(self, tasks: Tasks) -> None:
        self.flights: Flights[str, asyncio.Future[str]] = Flights(tasks)
        self.boarded: list[str] = []
        self.landing = asyncio.Event()
        self.error: Exception | None = None

    def ask(self, key: str) -> asyncio.Future[str]:
        """An asker of `key`, as a task of its own."""
        return asyncio.ensure_future(self._ask(key))

    async def _ask(self, key: str) -> str:
        return await asyncio.shield(self.flights.join(key, self._board(key)))

    def _board(self, key: str) -> Callable[[], tuple[asyncio.Future[str], Coroutine[Any, Any, None]]]:
        def board() -> tuple[asyncio.Future[str], Coroutine[Any, Any, None]]:
            self.boarded.append(key)
            answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            return answer, self._fly(f"{key} {len(self.boarded)}", answer)

        return board

    async def _fly(self, result: str, answer: asyncio.Future[str]) -> None:
        await self.landing.wait()
        if self.error is None:
            answer.set_result(result)
        else:
            answer.set_exception(self.error)
            answer.exception()
            raise self.error


@pytest.fixture
async def airport(tasks: Tasks) -> Airport:
    """An airport."""
    return Airport(tasks)


async def test_one_flight_for_many_askers(airport: Airport) -> None:
    """A thousand askers of one name share one piece of work and one answer."""
    askers = [airport.ask("a.png") for _ in range(1000)]
    await turns()
    assert airport.boarded == ["a.png"]
    airport.landing.set()
    assert await outcomes(askers) == ["a.png 1"] * 1000
    assert airport.boarded == ["a.png"]


async def test_who_asks_late_joins(airport: Airport) -> None:
    """Who asks while the work is under way joins it, however late; who asks after its end starts anew."""
    first = airport.ask("a.png")
    await turns()
    second = airport.ask("a.png")
    await turns()
    airport.landing.set()
    assert await outcomes([first, second]) == ["a.png 1", "a.png 1"]
    await turns()
    assert await outcomes([airport.ask("a.png")]) == ["a.png 2"]


async def test_names_do_not_wait_for_each_other(airport: Airport) -> None:
    """Every name has a flight of its own, under way at the same time."""
    askers = [airport.ask(key) for key in ("a.png", "b.png", "a.png", "b.png", "c.png")]
    await turns()
    assert sorted(airport.boarded) == ["a.png", "b.png", "c.png"]
    airport.landing.set()
    assert [answer.split()[0] for answer in await outcomes(askers)] == ["a.png", "b.png", "a.png", "b.png", "c.png"]


@pytest.mark.parametrize("gone", [[0], [1, 2], [0, 1, 2, 3]], ids=["the first", "others", "all"])
async def test_askers_that_go_away(gone: list[int], airport: Airport) -> None:
    """Askers that go away, even the one that started the work or all of them, take neither it nor the others down."""
    askers = [airport.ask("a.png") for _ in range(4)]
    await turns()
    for number in gone:
        askers[number].cancel()
    await turns()
    late = airport.ask("a.png")
    await turns()
    airport.landing.set()
    results = await outcomes([*askers, late])
    assert [isinstance(result, asyncio.CancelledError) for result in results[:4]] == [n in gone for n in range(4)]
    assert {result for result in results if isinstance(result, str)} == {"a.png 1"}
    assert airport.boarded == ["a.png"]


async def test_a_failure_is_handed_to_all(airport: Airport, complaints: list[dict[str, Any]]) -> None:
    """A failure is the answer of everybody who waits; it is not remembered: the next asker tries anew."""
    airport.error = OSError(5, "Input/output error")
    askers = [airport.ask("a.png") for _ in range(100)]
    await turns()
    airport.landing.set()
    assert await outcomes(askers) == [airport.error] * 100
    airport.error = None
    assert await outcomes([airport.ask("a.png")]) == ["a.png 2"]
    gc.collect()
    await turns()
    assert complaints == []


async def test_a_flight_that_cannot_start(tasks: Tasks) -> None:
    """A flight that could not even be made is the first asker's error, and stands in nobody's way."""
    flights: Flights[str, str] = Flights(tasks)

    def fail() -> tuple[str, Coroutine[Any, Any, object]]:
        raise OSError(24, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        flights.join("a.png", fail)
    assert flights.join("a.png", lambda: ("flight", turns())) == "flight"
    await tasks.settle(PATIENCE)


# -- batches ----------------------------------------------------------------------------------------------------------


class Database:
    """Knows every even number as its square; a query waits until the test lets it go."""

    def __init__(self) -> None:
        self.queries: list[list[int]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.error: BaseException | None = None
        self.running = self.most = 0

    async def ask(self, keys: list[int]) -> dict[int, int]:
        """One query for many keys."""
        self.queries.append(keys)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.go.wait()
            await turns(3)
            if self.error is not None:
                raise self.error
            return {key: key * key for key in keys if key % 2 == 0}
        finally:
            self.running -= 1


@pytest.fixture
async def database() -> Database:
    """A database."""
    return Database()


def ask(batches: Batches[int, int], keys: Iterable[int]) -> list[asyncio.Task[int | None]]:
    """An asker for each of `keys`, each a task of its own."""
    return [asyncio.create_task(batches.get(key)) for key in keys]


async def test_one_query_for_many_names(database: Database, tasks: Tasks) -> None:
    """What is asked at the same time is asked in one query, each name once; what is not known is None."""
    batches = Batches(database.ask, tasks, size=1000, at_once=1)
    keys = [*range(100)] * 5
    assert await outcomes(ask(batches, keys)) == [key * key if key % 2 == 0 else None for key in keys]
    assert [sorted(query) for query in database.queries] == [list(range(100))]


async def test_who_is_ready_joins_the_first_query(database: Database, tasks: Tasks) -> None:
    """Who is about to ask when the first one does (they came in the same turn) is asked for in the same query."""
    batches = Batches(database.ask, tasks, size=1000, at_once=1)

    async def a_turn_later(key: int) -> int | None:
        await asyncio.sleep(0)
        return await batches.get(key)

    askers = [*ask(batches, [0]), *(asyncio.create_task(a_turn_later(key)) for key in (2, 4))]
    assert await outcomes(askers) == [0, 4, 16]
    assert database.queries == [[0, 2, 4]]


async def test_what_is_asked_meanwhile_waits(database: Database, tasks: Tasks) -> None:
    """What is asked while a query runs waits for the next one, and all of it is asked together."""
    batches = Batches(database.ask, tasks, size=1000, at_once=1)
    database.go.clear()
    first = ask(batches, [0])
    await turns()
    later = ask(batches, [2, 4])
    await turns()
    later += ask(batches, [6, 2])
    await turns()
    assert database.queries == [[0]]
    database.go.set()
    assert await outcomes([*first, *later]) == [0, 4, 16, 36, 4]
    assert database.queries == [[0], [2, 4, 6]]


async def test_an_answer_is_never_older_than_its_question(database: Database, tasks: Tasks) -> None:
    """Who asks for a name while a query for it runs is answered by the next query: the name may have changed since."""
    batches = Batches(database.ask, tasks, size=1000, at_once=1)
    database.go.clear()
    first = ask(batches, [2])
    await turns()
    second = ask(batches, [2])
    await turns()
    database.go.set()
    assert await outcomes([*first, *second]) == [4, 4]
    assert database.queries == [[2], [2]]


@pytest.mark.parametrize(("size", "at_once"), [(1, 1), (7, 1), (7, 3), (100, 2)])
async def test_bounds(size: int, at_once: int, database: Database, tasks: Tasks) -> None:
    """No query asks for more names than it may, no more of them run at once than may, and everybody is answered."""
    batches = Batches(database.ask, tasks, size=size, at_once=at_once)
    askers: list[asyncio.Task[int | None]] = []
    for start in range(0, 100, 10):
        askers += ask(batches, range(start, start + 10))
        await turns(2)
    assert await outcomes(askers) == [key * key if key % 2 == 0 else None for key in range(100)]
    assert max(len(query) for query in database.queries) <= size
    assert 1 <= database.most <= at_once
    assert sorted(key for query in database.queries for key in query) == list(range(100))
    assert await outcomes(ask(batches, [8])) == [64]


async def test_a_second_query_beside_a_slow_one(database: Database, tasks: Tasks) -> None:
    """Where two queries may run at once, who asks during a slow one does not wait for it."""
    batches = Batches(database.ask, tasks, size=1000, at_once=2)
    database.go.clear()
    first = ask(batches, [0])
    await turns()
    second = ask(batches, [2])
    await turns()
    assert database.queries == [[0], [2]]
    third = ask(batches, [4])
    await turns()
    assert database.queries == [[0], [2]]
    database.go.set()
    assert await outcomes([*first, *second, *third]) == [0, 4, 16]


async def test_an_error_is_handed_to_all_of_its_query(
    database: Database, tasks: Tasks, complaints: list[dict[str, Any]]
) -> None:
    """A query that fails is the error of everybody whom it asked for; the next query is asked anew."""
    batches = Batches(database.ask, tasks, size=1000, at_once=1)
    database.error = OSError(5, "Input/output error")
    assert await outcomes(ask(batches, range(50))) == [database.error] * 50
    database.error = None
    assert await outcomes(ask(batches, [2])) == [4]
    assert len(database.queries) == 2
    gc.collect()
    await turns()
    assert complaints == []


async def test_an_error_does_not_reach_the_next_query(database: Database, tasks: Tasks) -> None:
    """Who waits for the next query is not told of the failure of the one before it."""

    async def flaky(keys: list[int]) -> dict[int, int]:
        if 0 in keys:
            raise OSError(5, "Input/output error")
        return await database.ask(keys)

    batches = Batches(flaky, tasks, size=2, at_once=1)
    results = await outcomes(ask(batches, [0, 2, 4, 6]))
    assert [type(result) for result in results] == [OSError, OSError, int, int]
    assert results[2:] == [16, 36]


async def test_an_asker_that_goes_away(database: Database, tasks: Tasks, complaints: list[dict[str, Any]]) -> None:
    """An asker that goes away takes neither the query down nor others that asked for the same or for another name."""
    batches = Batches(database.ask, tasks, size=1000, at_once=1)
    database.go.clear()
    askers = ask(batches, [2, 2, 4])
    await turns()
    askers[0].cancel()
    await turns()
    database.go.set()
    results = await outcomes(askers)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [4, 16]
    assert len(database.queries) == 1
    database.error = OSError(5, "Input/output error")
    alone = ask(batches, [6])
    await turns(2)
    alone[0].cancel()
    await outcomes(alone)
    await tasks.settle(PATIENCE)
    del alone, askers, results
    gc.collect()
    await turns()
    assert complaints == []


@pytest.mark.parametrize("started", [1, 10], ids=["before its query", "in its query"])
async def test_work_that_is_stopped_leaves_nobody_waiting(started: int, database: Database, tasks: Tasks) -> None:
    """When the work is cancelled (the store closes, the loop ends), every asker hears of it, also who waits for the
    next query; and whoever asks for the same name later is answered.
    """
    batches = Batches(database.ask, tasks, size=1, at_once=1)
    database.go.clear()
    askers = ask(batches, [2, 4, 6])
    await turns(started)
    await tasks.settle(0)
    results = await outcomes(askers)
    assert all(isinstance(result, BaseException) for result in results)
    database.go.set()
    assert await outcomes(ask(batches, [2, 4, 6, 8])) == [4, 16, 36, 64]


@pytest.mark.parametrize("started", range(1, 5))
def test_a_loop_that_ends_leaves_nothing_behind(started: int) -> None:
    """A loop that ends at any moment of a query (a test client's does) does not spoil the lookups of the next one."""

    async def lookup(keys: list[int]) -> dict[int, int]:
        await turns(3)
        return {key: key * key for key in keys}

    batches = Batches(lookup, Tasks(), size=1, at_once=1)

    async def leave() -> None:
        askers = ask(batches, [2, 4])
        await turns(started)
        del askers

    async def stay() -> list[Any]:
        return await outcomes(ask(batches, [2, 4, 6]))

    asyncio.run(leave())
    assert asyncio.run(stay()) == [4, 16, 36]


# -- some of many at once ---------------------------------------------------------------------------------------------


async def works(
    stop: int, make: Callable[[int], Coroutine[Any, Any, int]], given: list[int]
) -> AsyncGenerator[Coroutine[Any, Any, int], None]:
    """What makes something of the numbers from 0 on; `given` are those that were asked for."""
    for number in range(stop):
        given.append(number)
        yield make(number)


async def test_some_are_made_at_once_and_come_in_their_order() -> None:
    """So many are in the making as was said, neither more nor fewer, and who is slow holds its place."""
    making, most = 0, 0

    async def make(number: int) -> int:
        nonlocal making, most
        making += 1
        most = max(most, making)
        await asyncio.sleep(0.02 if number % 3 == 0 else 0)
        making -= 1
        return number * number

    made = [square async for square in in_order(works(10, make, []), 2)]
    assert made == [number * number for number in range(10)]
    assert (making, most) == (0, 2)


async def test_when_one_fails_nothing_goes_on() -> None:
    """The failure of one is raised in its turn; what is in the making ends, and no more is asked for."""
    given: list[int] = []
    ended: list[int] = []

    async def make(number: int) -> int:
        try:
            await asyncio.sleep(0 if number < 2 else 10)
        finally:
            ended.append(number)
        if number == 1:
            raise LookupError
        return number

    before = asyncio.all_tasks()
    made = in_order(works(10, make, given), 3)
    assert await anext(made) == 0
    with pytest.raises(LookupError):
        await anext(made)
    assert asyncio.all_tasks() == before
    assert {0, 1, 2} <= set(ended) <= set(given)
    assert len(given) < 6


async def test_who_stops_early_leaves_nothing_running() -> None:
    """Whoever needs no more ends what is in the making."""
    ended: list[int] = []

    async def make(number: int) -> int:
        try:
            await asyncio.sleep(0 if number == 0 else 10)
        finally:
            ended.append(number)
        return number

    async with aclosing(in_order(works(10, make, []), 2)) as made:
        async for number in made:
            assert number == 0
            break
    assert sorted(ended) == [0, 1]
