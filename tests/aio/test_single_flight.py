"""Single flight: many callers of one key share one piece of work."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from selfheal.aio.single_flight import Flights, Tasks
from tests.support.event_loop import PATIENCE, results_of, run_loop


class WaitingWork:
    """Work for keys that waits until the test sets `may_end`; `started` lists the keys for which work was started."""

    def __init__(self, tasks: Tasks) -> None:
        self.flights: Flights[str, asyncio.Future[str]] = Flights(tasks)
        self.started: list[str] = []
        self.may_end = asyncio.Event()
        self.error: Exception | None = None

    def ask(self, key: str) -> asyncio.Future[str]:
        """Start a caller of `key` in a task of its own."""
        return asyncio.ensure_future(self._ask(key))

    async def _ask(self, key: str) -> str:
        return await asyncio.shield(self.flights.join(key, self._starter(key)))

    def _starter(self, key: str) -> Callable[[], tuple[asyncio.Future[str], Coroutine[Any, Any, None]]]:
        def start() -> tuple[asyncio.Future[str], Coroutine[Any, Any, None]]:
            self.started.append(key)
            answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            return answer, self._run(f"{key} {len(self.started)}", answer)

        return start

    async def _run(self, result: str, answer: asyncio.Future[str]) -> None:
        await self.may_end.wait()
        if self.error is None:
            answer.set_result(result)
        else:
            answer.set_exception(self.error)
            answer.exception()
            raise self.error


@pytest.fixture
async def waiting_work(tasks: Tasks) -> WaitingWork:
    """Work that waits, and its callers."""
    return WaitingWork(tasks)


async def test_callers_share_one_piece_of_work(waiting_work: WaitingWork) -> None:
    """1,000 callers of one key share one piece of work and its result."""
    callers = [waiting_work.ask("a.png") for _ in range(1000)]
    await run_loop()
    assert waiting_work.started == ["a.png"]
    waiting_work.may_end.set()
    assert await results_of(callers) == ["a.png 1"] * 1000
    assert waiting_work.started == ["a.png"]


async def test_a_late_caller_shares_the_work(waiting_work: WaitingWork) -> None:
    """A caller that comes before the work ends shares it; a caller that comes later starts new work."""
    first = waiting_work.ask("a.png")
    await run_loop()
    second = waiting_work.ask("a.png")
    await run_loop()
    waiting_work.may_end.set()
    assert await results_of([first, second]) == ["a.png 1", "a.png 1"]
    await run_loop()
    assert await results_of([waiting_work.ask("a.png")]) == ["a.png 2"]


async def test_keys_do_not_wait_for_each_other(waiting_work: WaitingWork) -> None:
    """Work for different keys runs at the same time."""
    callers = [waiting_work.ask(key) for key in ("a.png", "b.png", "a.png", "b.png", "c.png")]
    await run_loop()
    assert sorted(waiting_work.started) == ["a.png", "b.png", "c.png"]
    waiting_work.may_end.set()
    assert [answer.split()[0] for answer in await results_of(callers)] == ["a.png", "b.png", "a.png", "b.png", "c.png"]


@pytest.mark.parametrize("cancelled", [[0], [1, 2], [0, 1, 2, 3]], ids=["the first", "others", "all"])
async def test_cancelled_callers(cancelled: list[int], waiting_work: WaitingWork) -> None:
    """Cancelled callers, even the first one or all, affect neither the work nor the other callers."""
    callers = [waiting_work.ask("a.png") for _ in range(4)]
    await run_loop()
    for number in cancelled:
        callers[number].cancel()
    await run_loop()
    late = waiting_work.ask("a.png")
    await run_loop()
    waiting_work.may_end.set()
    results = await results_of([*callers, late])
    assert [isinstance(result, asyncio.CancelledError) for result in results[:4]] == [n in cancelled for n in range(4)]
    assert {result for result in results if isinstance(result, str)} == {"a.png 1"}
    assert waiting_work.started == ["a.png"]


async def test_an_error_is_raised_for_all_callers(waiting_work: WaitingWork, reports: list[dict[str, Any]]) -> None:
    """All callers get the error of the work; it is not remembered, so that the next caller starts new work."""
    waiting_work.error = OSError(5, "Input/output error")
    callers = [waiting_work.ask("a.png") for _ in range(100)]
    await run_loop()
    waiting_work.may_end.set()
    assert await results_of(callers) == [waiting_work.error] * 100
    waiting_work.error = None
    assert await results_of([waiting_work.ask("a.png")]) == ["a.png 2"]
    gc.collect()
    await run_loop()
    assert reports == []


async def test_work_that_cannot_be_started(tasks: Tasks) -> None:
    """If the work cannot be started, the caller gets the error, and the next caller starts new work."""
    flights: Flights[str, str] = Flights(tasks)

    def fail() -> tuple[str, Coroutine[Any, Any, object]]:
        raise OSError(24, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        flights.join("a.png", fail)
    assert flights.join("a.png", lambda: ("flight", run_loop())) == "flight"
    await tasks.settle(PATIENCE)
