"""Soundness: whether a record can be restored from what the database has, and its file is the recorded one."""

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Coroutine, Iterable
from contextlib import aclosing
from typing import Any

from ..aio.streams import run_unordered
from ..content.digests import chunk_digest
from ..content.sources import CHUNK
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..errors import CorruptBlob, SelfHealError
from ..healing.batch_restore import SMALL_AT_ONCE, Wanted, in_batches
from ..sql.models import Found
from ..store import UploadStore
from .one_by_one import in_halves
from .outcomes import Outcome, Result, of_error

Check = Callable[[Found], Coroutine[Any, Any, Result | None]]


async def check_all(store: UploadStore, wanted: Iterable[Wanted], jobs: int, check: Check) -> list[Result]:
    """Hash records in the database and their files; return the results of `check` for all that are not plainly good."""
    results: list[Result] = []
    for batch in in_batches(((name, min(size, CHUNK)) for name, size in wanted), SMALL_AT_ONCE):
        parts, refused = await in_halves(store.database.blobs.fetch, [name for name, _ in batch])
        results += [of_error(name, error) for name, error in refused]
        found = [one for part in parts for one in part.values()]
        looks = (store.threads.run(_good, store.disk, found[job::jobs]) for job in range(jobs))
        good = {one.name: one for some in await asyncio.gather(*looks) for one in some}
        checks = (_until_unchanged(store, one, check) for one in found if one.record.name not in good)
        async with aclosing(run_unordered(checks, jobs)) as checked:
            results += [one async for one in checked if one is not None]
        results += good.values()
    return results


async def fault_in_database(database: ImageStorage, found: Found) -> str:
    """Return why the recorded bytes cannot be restored; empty if they can."""
    record = found.record
    if is_sound(found):
        return ""
    try:
        whole = await database.digest(record)
    except CorruptBlob as error:
        return error.why
    if whole != record.sha256:
        return "the whole does not match its digest"
    return "" if found.has_blob else "its blob has no row, or another size"


def is_sound(found: Found) -> bool:
    """Whether a record has one chunk at most, and that is the recorded one; False if it takes a look at more."""
    record, first = found.record, found.first
    if not found.has_blob or record.size > CHUNK:
        return False
    if first is None:
        return record.size == 0 and record.sha256 == hashlib.sha256().hexdigest()
    same = len(first) == record.size and hashlib.sha256(first).hexdigest() == record.sha256
    return same and chunk_digest(0, first) == found.digest


def _good(disk: UploadsDirectory, found: Iterable[Found]) -> list[Result]:
    """Return results for the records of one chunk that are good on disk and in the database; no others."""
    good = []
    for one in found:
        name = one.record.name
        with contextlib.suppress(SelfHealError, OSError):
            if not one.record.is_deleted and is_sound(one) and disk.digest(name) == one.record.sha256:
                good.append(Result(name, Outcome.OK, one.record.size))
    return good


async def _until_unchanged(store: UploadStore, found: Found, check: Check) -> Result | None:
    """Return the result of `check`; check again if it is a problem and the record was changed meanwhile."""
    while True:
        result = await check(found)
        if result is None or not result.is_problem:
            return result
        now = (await store.database.blobs.fetch([found.record.name])).get(found.record.name)
        if now is None or now.record.generation == found.record.generation:
            return result
        found = now
