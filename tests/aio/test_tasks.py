"""Background tasks, and work that ends even if its caller is cancelled."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest

from selfheal.aio.tasks import Tasks, run_to_end
from tests.support.event_loop import PATIENCE, run_loop

# -- work that delays the cancellation of its caller ------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_caller_waits_for_the_end(reports: list[dict[str, Any]], fails: bool) -> None:
    """A cancelled caller ends only after the work, however often it is cancelled, and even if the work fails."""
    may_end, done = asyncio.Event(), asyncio.Event()

    async def close() -> None:
        await may_end.wait()
        done.set()
        if fails:
            raise EOFError

    closing = asyncio.create_task(run_to_end(close()))
    for _ in range(3):
        await run_loop()
        closing.cancel()
    await run_loop()
    assert not closing.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert done.is_set()
    gc.collect()
    assert reports == []


async def test_the_caller_gets_the_result_or_the_error() -> None:
    """The caller gets the result or the error of the work."""
    assert await run_to_end(asyncio.sleep(0, "closed")) == "closed"

    async def fail() -> None:
        raise EOFError

    with pytest.raises(EOFError):
        await run_to_end(fail())


# -- background tasks -------------------------------------------------------------------------------------------------


async def test_work_outlives_its_caller(tasks: Tasks) -> None:
    """`finish`: a cancelled caller is cancelled at once, and the work goes on to its end."""
    may_end, done = asyncio.Event(), asyncio.Event()

    async def commit() -> str:
        await may_end.wait()
        done.set()
        return "committed"

    caller = asyncio.create_task(tasks.finish(commit()))
    await run_loop()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert not done.is_set()
    may_end.set()
    await asyncio.wait_for(done.wait(), PATIENCE)


async def test_finish_returns_the_result_or_the_error(tasks: Tasks) -> None:
    """`finish` returns the result of the work or raises its error, the same object."""
    error = OSError(28, "No space left on device")

    async def work(result: Any) -> Any:
        await run_loop()
        if isinstance(result, Exception):
            raise result
        return result

    assert await tasks.finish(work(5)) == 5
    with pytest.raises(OSError, match="No space left") as caught:
        await tasks.finish(work(error))
    assert caught.value is error


async def test_tasks_are_held(tasks: Tasks) -> None:
    """A running task that nothing else refers to is not garbage-collected; after its end it is."""

    async def wait_for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    held = weakref.ref(tasks.start(wait_for_ever()))
    await run_loop()
    gc.collect()
    assert held() is not None
    await tasks.drain(0)
    await run_loop()
    gc.collect()
    assert held() is None


async def test_an_error_without_a_caller_is_not_reported(tasks: Tasks, reports: list[dict[str, Any]]) -> None:
    """An error of work whose caller was cancelled is not reported as never retrieved."""

    async def fail() -> None:
        await run_loop(3)
        raise OSError(5, "Input/output error")

    caller = asyncio.create_task(tasks.finish(fail()))
    await asyncio.sleep(0)
    caller.cancel()
    tasks.start(fail())
    await run_loop()
    await asyncio.wait([caller])
    del caller
    gc.collect()
    await run_loop()
    assert reports == []


async def test_settle_waits(tasks: Tasks) -> None:
    """`settle` waits until the running tasks have ended, not longer, and returns at once if there are none."""
    done = []

    async def work() -> None:
        await asyncio.sleep(0.05)
        done.append(True)

    await tasks.drain(0)
    for _ in range(3):
        tasks.start(work())
    async with asyncio.timeout(PATIENCE):
        await tasks.drain(1000)
    assert done == [True] * 3


async def test_settle_cancels_late_tasks(tasks: Tasks) -> None:
    """Tasks that run longer than the grace period are cancelled, and `settle` waits for their clean-up."""
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await run_loop(3)
            cleaned.append(True)

    late = [tasks.start(work()) for _ in range(3)]
    await run_loop()
    async with asyncio.timeout(PATIENCE):
        await tasks.drain(0.05)
    assert cleaned == [True] * 3
    assert all(task.cancelled() for task in late)


@pytest.mark.parametrize("grace", [0, 1000])
async def test_settle_waits_for_tasks_of_tasks(grace: float, tasks: Tasks) -> None:
    """`settle` also waits for tasks that a running task starts."""
    started: list[asyncio.Task[Any]] = []

    async def last() -> None:
        await run_loop(50)

    async def first() -> None:
        try:
            await run_loop(20)
        finally:
            started.append(tasks.start(last()))

    started.append(tasks.start(first()))
    await run_loop(2)
    async with asyncio.timeout(PATIENCE):
        await tasks.drain(grace)
    assert len(started) == 2
    assert all(task.done() for task in started)
