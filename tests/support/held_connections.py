"""Connections of another program, which a server with few of them lacks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg


@asynccontextmanager
async def held_connections(url: str, count: int) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Hold `count` connections to a database inside the block; yields a function that closes them earlier."""
    held = [await asyncpg.connect(url.replace("+asyncpg", "")) for _ in range(count)]

    async def give_back() -> None:
        while held:
            await held.pop().close()

    try:
        yield give_back
    finally:
        await give_back()
