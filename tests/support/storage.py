"""The database half alone: opened over a URL or an engine, and every call of it, for tests of what all calls do."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from selfheal import ImageStorage, UploadStore
from selfheal.aio.tasks import Tasks
from selfheal.content.digests import Digests
from selfheal.content.sources import CHUNK
from selfheal.sql.models import Record, SmallFile

TIMEOUT = 1.0
"""Seconds that a call may wait for the database."""
LARGE = bytes(20 * CHUNK)


def a_record() -> Record:
    """Return a record as a caller may have read it earlier."""
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    return Record("a.png", hashlib.sha256(b"x").hexdigest(), 1, "image/png", 1, 1, moment, moment)


async def read_all(images: ImageStorage) -> bytes:
    """Return the bytes of a record that may not be in the database."""
    return b"".join([chunk async for chunk in images.read(a_record())])


async def all_pages(images: ImageStorage) -> list[Any]:
    """Return every page of the catalogue."""
    return [page async for page in images.pages()]


READS: dict[str, Callable[[ImageStorage], Awaitable[Any]]] = {
    "find": lambda images: images.find("a.png"),
    "find_many": lambda images: images.catalogue.find(["a.png", "b.png"]),
    "fetch": lambda images: images.blobs.fetch(["a.png"]),
    "read": read_all,
    "history": lambda images: images.history("a.png"),
    "pages": all_pages,
    "count": lambda images: images.count(),
}
WRITES: dict[str, Callable[[ImageStorage], Awaitable[Any]]] = {
    "store_image": lambda images: images.store_image("a.png", b"new"),
    "store a large image": lambda images: images.store_image("a.png", LARGE),
    "store_many": lambda images: images.store_many([SmallFile("a.png", 1, 1, [b"x"], Digests.of([b"x"]))]),
    "mend": lambda images: images.versions.mend(a_record(), b"x"),
    "bury": lambda images: images.bury("a.png"),
    "undo": lambda images: images.undo("a.png"),
    "purge": lambda images: images.purge(timedelta(days=30)),
}
CALLS = READS | WRITES
CREATE: dict[str, Callable[[ImageStorage], Awaitable[Any]]] = {"create_tables": lambda images: images.create_tables()}


@asynccontextmanager
async def opened_storage(url: Any, timeout: float = TIMEOUT) -> AsyncIterator[ImageStorage]:
    """Open the database half over a URL or an engine; wait for its background work before it is closed."""
    tasks = Tasks()
    tasks.home.settle()  # tests use what is inside of it
    images = ImageStorage(url, timeout=timeout, tasks=tasks)
    try:
        yield images
    finally:
        await tasks.drain(20)
        await images.close()


@asynccontextmanager
async def prepared_storage(url: str, timeout: float = TIMEOUT) -> AsyncIterator[ImageStorage]:
    """Open the database half, create its tables, and store `a.png`."""
    async with opened_storage(url, timeout) as images:
        await images.create_tables()
        await images.store_image("a.png", b"one")
        yield images


async def assert_all_raise(
    images: ImageStorage, calls: dict[str, Callable[[ImageStorage], Awaitable[Any]]], error: type[Exception]
) -> list[Exception]:
    """Call every one of these methods, and return the errors; fail if one of them does not raise this error."""
    caught: list[Exception] = []
    for name, call in calls.items():
        try:
            result = await call(images)
        except error as problem:
            caught.append(problem)
        except Exception as problem:
            pytest.fail(f"{name} raised {problem!r}")
        else:
            pytest.fail(f"{name} returned {result!r}")
    return caught


async def settle(store: UploadStore) -> None:
    """Let a store live on the running loop, as one that is open: tests use what is inside of it."""
    store.home.settle()
