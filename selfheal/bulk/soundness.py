"""Soundness: whether a record can be restored from what the database has."""

import hashlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ..content.digests import chunk_digest
from ..content.sources import CHUNK
from ..db import ImageStorage
from ..errors import CorruptBlob
from ..sql.models import Found
from ..store import UploadStore
from .outcomes import Result

R = TypeVar("R", Result, Result | None)


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


async def until_unchanged(store: UploadStore, found: Found, check: Callable[[Found], Coroutine[Any, Any, R]]) -> R:
    """Return the result of `check`; check again if it is a problem and the record was changed meanwhile."""
    while True:
        result = await check(found)
        if result is None or not result.is_problem:
            return result
        now = (await store.database.blobs.fetch([found.record.name])).get(found.record.name)
        if now is None or now.record.generation == found.record.generation:
            return result
        found = now
