"""Files on disk, a batch at a time: listed, sorted, and read whole if they are small."""

import itertools
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass

from .. import names
from ..content.digests import Digests
from ..content.sources import CHUNK
from ..disk.directory import UploadsDirectory
from ..disk.listing import Entry, walk
from ..disk.open_file import OpenFile, identity_of
from ..errors import FileChanged, NotStored, SelfHealError
from ..healing.batch_restore import LARGE_AT_ONCE, SMALL_AT_ONCE
from ..sql.models import SmallFile
from ..store import UploadStore
from .outcomes import Outcome, Result, Step, problem

ENTRIES_AT_ONCE = 4096
"""Files that are compared, read and stored together: a commit writes most pages of the indexes of digests."""
LARGE = 4 * 1024 * 1024  # bytes from which on a file is streamed instead of read whole


@dataclass(frozen=True, slots=True)
class Read:
    """A file that was read, or the error of reading it."""

    name: str
    file: SmallFile | None = None
    error: Exception | None = None


async def for_all_files(store: UploadStore, work: Callable[[list[Entry]], Step]) -> AsyncGenerator[Step, None]:
    """Yield the steps of `work` for all files on disk, as many at a time as fit in memory."""
    entries = walk(store.disk)
    while batch := await store.threads.run(_next_batch, entries):
        yield work(batch)


def sort_entries(entries: Iterable[Entry]) -> tuple[list[Entry], list[Result]]:
    """Return the entries that can be uploads, and results for the others."""
    uploads: list[Entry] = []
    results: list[Result] = []
    for entry in entries:
        if not names.is_valid(entry.name):
            results.append(problem(entry.name, Outcome.INVALID_NAME, names.fault(entry.name)))
        elif entry.fault:
            results.append(problem(entry.name, Outcome.FAILED, entry.fault))
        else:
            uploads.append(entry)
    return uploads, results


async def deleted_on_disk(store: UploadStore, name: str) -> Result:
    """Return the result for a deleted name that was met on the disk."""
    if await store.threads.run(store.disk.stat, name) is None:
        return Result(name, Outcome.DELETED, 0, "it was deleted meanwhile")
    return problem(name, Outcome.DELETED, "it was deleted, but is still on disk; `selfheal restore` removes it")


def read_small(disk: UploadsDirectory, wanted: Iterable[str]) -> list[Read]:
    """Read files whole; a file that changes meanwhile is an error."""
    return [_read_small(disk, name) for name in wanted]


def _read_small(disk: UploadsDirectory, name: str) -> Read:
    try:
        file = disk.open(name)
        if file is None:
            return Read(name, error=NotStored("it vanished while it was read"))
        with file:
            return Read(name, _read_whole(name, file))
    except (SelfHealError, OSError) as error:
        return Read(name, error=error)


def _read_whole(name: str, file: OpenFile) -> SmallFile:
    data = file.read_waiting(0, min(file.size, LARGE) + 1)
    if len(data) != file.size or identity_of(os.fstat(file.fd)) != file.identity:  # the ctime shows a rename, too
        raise FileChanged("it changed while it was read; run again")
    chunks = [data] if len(data) <= CHUNK else [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    chunks = chunks if data else []
    return SmallFile(name, file.size, file.modified_ns, chunks, Digests.of(chunks))


def _next_batch(entries: Iterator[Entry]) -> list[Entry]:
    batch: list[Entry] = []
    in_memory = total = 0
    for entry in itertools.islice(entries, ENTRIES_AT_ONCE):
        batch.append(entry)
        size = entry.size
        in_memory, total = in_memory + (size if size <= LARGE else CHUNK), total + size
        if in_memory > SMALL_AT_ONCE or total > LARGE_AT_ONCE:
            break
    return batch
