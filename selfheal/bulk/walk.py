"""What stands on the disk, and whether a name still is what was just read of it: for every bulk run."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from ..content.sources import CHUNK
from ..disk.directory import UploadsDirectory
from ..disk.listing import Entry, walk
from ..healing.batch_restore import LARGE_AT_ONCE, SMALL_AT_ONCE
from ..sql.models import Found
from ..store import UploadStore
from .outcomes import Outcome, Result, Step, problem
from .reading import LARGE

NAMES_AT_ONCE = 8192
"""Names in one query, without their bytes."""

ENTRIES_AT_ONCE = 4096
"""Files that are looked up, read and stored together: digests lie all over an index, so a commit writes most of it."""

R = TypeVar("R", Result, Result | None)


async def settled(store: UploadStore, found: Found, look: Callable[[Found], Coroutine[Any, Any, R]]) -> R:
    """What `look` says; if that is a problem, once more if the record changed meanwhile: an app may be at work."""
    while True:
        result = await look(found)
        if result is None or not result.is_problem:
            return result
        now = (await store.database.fetch([found.record.name])).get(found.record.name)
        if now is None or now.record.generation == found.record.generation:
            return result
        found = now


async def still_there(store: UploadStore, name: str) -> Result:
    """What to say of a deleted name that the walk met."""
    if await store.threads.run(store.disk.stat, name) is None:
        return Result(name, Outcome.DELETED, 0, "it was deleted meanwhile")
    return problem(name, Outcome.DELETED, "it was deleted, but is still on disk; `selfheal restore` removes it")


async def on_disk(store: UploadStore, work: Callable[[list[Entry]], Step]) -> AsyncGenerator[Step, None]:
    """What is to be done for all that stands on the disk, as many files at a time as are held in memory at once."""
    entries = walk(store.disk)
    while batch := await store.threads.run(_next_batch, entries):
        yield work(batch)


def _next_batch(entries: Iterator[Entry]) -> list[Entry]:
    batch: list[Entry] = []
    held = total = 0
    for entry in itertools.islice(entries, ENTRIES_AT_ONCE):
        batch.append(entry)
        size = entry.size
        held, total = held + (size if size <= LARGE else CHUNK), total + size
        if held > SMALL_AT_ONCE or total > LARGE_AT_ONCE:
            break
    return batch


def digest_of(disk: UploadsDirectory, name: str) -> str | None:
    """The digest of a name's file; None if there is none. Raises `NotAFile`, `OSError`."""
    file = disk.open(name)
    if file is None:
        return None
    with file:
        return file.sha256()
