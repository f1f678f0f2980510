"""Single flight: many callers of one key share one piece of work."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from selfheal.aio.single_flight import Call, SingleFlight
from selfheal.aio.tasks import Tasks
from tests.support.event_loop import PATIENCE, results_of, run_loop


class WaitingWork:
    """Work for keys that waits until the test sets `may_end`; `started` lists the keys for which work was started."""

    def __init__(self, tasks: Tasks) -> None:
        self.flights: SingleFlight[str, str] = SingleFlight(
            tasks, self._run, share=lambda value: value, release=self.released_append
        )
        self.started: list[str] = []
        self.released: list[str] = []
        self.may_end = asyncio.Event()
        self.early: str | None = None
        self.error: Exception | None = None

    def released_append(self, value: str) -> None:
        """Note a value that was given back."""
        self.released.append(value)

    def ask(self, key: str, timeout: float = PATIENCE) -> asyncio.Task[str]:
        """Start a caller of `key` in a task of its own."""
        return asyncio.ensure_future(self.flights.get(key, timeout))

    async def _run(self, key: str, call: Call[str]) -> None:
        self.started.append(key)
        result = f"{key} {len(self.started)}"
        if self.early is not None:
            call.answer(self.early)
        await self.may_end.wait()
        if self.error is not None:
            raise self.error
        call.answer(result)


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


async def test_an_answer_before_the_work_ends(waiting_work: WaitingWork) -> None:
    """Work may answer before it ends: all callers get that answer at once, also those that come while it goes on."""
    waiting_work.early = "early"
    first = waiting_work.ask("a.png")
    assert await first == "early"
    assert await waiting_work.ask("a.png") == "early"
    waiting_work.error = OSError(5, "Input/output error")
    waiting_work.may_end.set()
    await run_loop()
    assert waiting_work.started == ["a.png"]


async def test_a_caller_waits_no_longer_than_its_timeout(waiting_work: WaitingWork) -> None:
    """A caller whose time is over gets a TimeoutError; the work and the other callers go on."""
    patient, hurried = waiting_work.ask("a.png"), waiting_work.ask("a.png", 0.01)
    with pytest.raises(TimeoutError):
        await hurried
    waiting_work.may_end.set()
    assert await patient == "a.png 1"


async def test_a_share_of_a_cancelled_caller_is_released(waiting_work: WaitingWork) -> None:
    """A caller that is cancelled in the moment of the answer gives its share back; no other one does."""
    waiting_work.early = "early"
    caller, other = waiting_work.ask("a.png"), waiting_work.ask("a.png")
    await asyncio.sleep(0)  # both wait
    await asyncio.sleep(0)  # the work has answered, and the callers have not run yet
    caller.cancel()
    results = await results_of([caller, other])
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1] == "early"
    assert waiting_work.released == ["early"]


async def test_work_that_is_cancelled_before_it_starts(tasks: Tasks) -> None:
    """If the task of the work is cancelled before its first step, its callers end, and the next one starts it again."""
    answered: list[str] = []

    async def work(key: str, call: Call[str]) -> None:
        answered.append(key)
        call.answer(key)

    flights: SingleFlight[str, str] = SingleFlight(tasks, work)
    caller = asyncio.ensure_future(flights.get("a.png", PATIENCE))
    await asyncio.sleep(0)
    await tasks.drain(0)
    assert isinstance((await results_of([caller]))[0], asyncio.CancelledError) or answered
    assert await flights.get("a.png", PATIENCE) == "a.png"
