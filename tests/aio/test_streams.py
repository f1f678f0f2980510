"""Streams: the results of several coroutines at once, in their order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from selfheal.aio.streams import run_in_order


async def coroutines(
    stop: int, make: Callable[[int], Coroutine[Any, Any, int]], given: list[int]
) -> AsyncGenerator[Coroutine[Any, Any, int], None]:
    """Yield coroutines for the numbers from 0 on; `given` lists the numbers that were asked for."""
    for number in range(stop):
        given.append(number)
        yield make(number)


async def test_results_come_in_order() -> None:
    """Exactly as many coroutines as allowed run at once, and results come in order even if one is slow."""
    running, most = 0, 0

    async def make(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02 if number % 3 == 0 else 0)
        running -= 1
        return number * number

    made = [square async for square in run_in_order(coroutines(10, make, []), 2)]
    assert made == [number * number for number in range(10)]
    assert (running, most) == (0, 2)


async def test_an_error_stops_everything() -> None:
    """An error is raised in its place in the order; running coroutines are cancelled and no more are asked for."""
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
    made = run_in_order(coroutines(10, make, given), 3)
    assert await anext(made) == 0
    with pytest.raises(LookupError):
        await anext(made)
    assert asyncio.all_tasks() == before
    assert {0, 1, 2} <= set(ended) <= set(given)
    assert len(given) < 6


async def test_a_caller_that_stops_early() -> None:
    """If the caller stops early, running coroutines are cancelled."""
    ended: list[int] = []

    async def make(number: int) -> int:
        try:
            await asyncio.sleep(0 if number == 0 else 10)
        finally:
            ended.append(number)
        return number

    async with aclosing(run_in_order(coroutines(10, make, []), 2)) as made:
        async for number in made:
            assert number == 0
            break
    assert sorted(ended) == [0, 1]
