"""Many files read at once on their way into the database, and whether what the database holds is sound."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

from ..content.digests import Digests, chunk_digest
from ..content.sources import CHUNK
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.open_file import OpenFile, identity_of
from ..errors import CorruptBlob, NotStored, SelfHealError, Unsettled
from ..sql.models import Found, SmallFile

LARGE = 4 * 1024 * 1024
"""Bytes from which a file is better streamed than held in memory."""


@dataclass(frozen=True, slots=True)
class Read:
    """What became of a file that was to be read: the file, or why it could not be."""

    name: str
    file: SmallFile | None = None
    error: Exception | None = None


def read_small(disk: UploadsDirectory, names: Iterable[str]) -> list[Read]:
    """Read files whole; what changed while it was read is not taken."""
    return [_read_small(disk, name) for name in names]


def _read_small(disk: UploadsDirectory, name: str) -> Read:
    try:
        file = disk.open(name)
        if file is None:
            return Read(name, error=NotStored("it vanished while it was read"))
        with file:
            return Read(name, _whole(name, file))
    except (SelfHealError, OSError) as error:
        return Read(name, error=error)


def _whole(name: str, file: OpenFile) -> SmallFile:
    data = file.read_waiting(0, min(file.size, LARGE) + 1)
    if len(data) != file.size or identity_of(os.fstat(file.fd)) != file.identity:  # its ctime tells a rename, too
        raise Unsettled("it changed while it was read; run again")
    chunks = [data] if len(data) <= CHUNK else [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    chunks = chunks if data else []
    return SmallFile(name, file.size, file.modified_ns, chunks, Digests.of(chunks))


async def fault_in_database(database: ImageStorage, found: Found) -> str:
    """Why the recorded bytes could not be brought back; empty if they could."""
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
    """Whether a record is one of one chunk at most, and, as it was fetched, whole in the database."""
    record, first = found.record, found.first
    if not found.has_blob or record.size > CHUNK:
        return False
    if first is None:
        return record.size == 0 and record.sha256 == hashlib.sha256().hexdigest()
    same = isinstance(first, bytes) and len(first) == record.size and hashlib.sha256(first).hexdigest() == record.sha256
    return same and chunk_digest(0, first) == found.digest
