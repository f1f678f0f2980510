"""Async generators: prefetch, batches, and many coroutines at the same time."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")


async def prefetch(source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Yield the items of `source`; the next one is made while the caller uses one: reading and writing overlap."""
    async with aclosing(source):
        following = asyncio.create_task(next_item(source))
        try:
            while item := await following:
                following = asyncio.create_task(next_item(source))
                yield item[0]
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def next_item(source: AsyncGenerator[T, None]) -> tuple[T] | None:
    """Return the next item in a tuple; None at the end."""
    async for item in source:
        return (item,)
    return None


async def in_batches(source: AsyncGenerator[T, None], size: int) -> AsyncGenerator[list[T], None]:
    """Yield the items of `source` in lists of `size`; the last one may be shorter."""
    batch: list[T] = []
    async with aclosing(source):
        async for item in source:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


async def run_in_order(source: AsyncGenerator[Coroutine[Any, Any, T], None], limit: int) -> AsyncGenerator[T, None]:
    """Yield what the coroutines of `source` return, in their order; up to `limit` of them run at the same time."""
    running = deque[asyncio.Task[T]]()
    async with aclosing(source):
        try:
            async for work in source:
                running.append(asyncio.create_task(work))
                if len(running) == limit:
                    yield await running.popleft()
            while running:
                yield await running.popleft()
        finally:
            await _cancel(running)


async def run_unordered(work: Iterable[Coroutine[Any, Any, T]], limit: int) -> AsyncGenerator[T, None]:
    """Yield what coroutines return, as they end; up to `limit` of them run at the same time."""
    left = iter(work)
    running: set[asyncio.Task[T]] = set()
    try:
        while True:
            running |= {asyncio.create_task(one) for one in itertools.islice(left, limit - len(running))}
            if not running:
                return
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                running.discard(task)
                yield task.result()
    finally:
        await _cancel(running)


async def _cancel(running: Iterable[asyncio.Task[Any]]) -> None:
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
