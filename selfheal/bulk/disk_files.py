"""Files on disk, a batch at a time: listed, sorted, and read whole if they are small."""

import asyncio
import itertools
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass

from .. import names
from ..content.digests import Digests
from ..content.sources import CHUNK
from ..disk.directory import UploadsDirectory
from ..disk.exclusions import Exclusions
from ..disk.listing import Entry, walk
from ..disk.open_file import OpenFile, identity_of
from ..errors import FileChanged, NotStored, SelfHealError
from ..healing.batch_restore import LARGE_AT_ONCE, SMALL_AT_ONCE
from ..sql.models import Record, SmallFile
from ..store import UploadStore
from .one_by_one import in_halves
from .outcomes import Outcome, Result, Step, of_error, problem

ENTRIES_AT_ONCE = 4096
"""Files that are compared, read and stored together: a commit writes most pages of the indexes of digests."""
YOUNG_AT_ONCE = 16_384  # files that wait in memory until they are old enough
LARGE = 4 * 1024 * 1024  # bytes from which on a file is streamed instead of read whole


@dataclass(frozen=True, slots=True)
class Read:
    """A file that was read, or the error of reading it."""

    name: str
    file: SmallFile | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What the database says of names: the records that there are, and the errors of names that it refuses."""

    records: dict[str, Record]
    refused: dict[str, Exception]


async def for_all_files(
    store: UploadStore, work: Callable[[list[Entry]], Step], *, settled_after: float = 0.0
) -> AsyncGenerator[Step, None]:
    """Yield the steps of `work` for all files on disk, as many at a time as fit in memory.

    Files that were changed less than `settled_after` seconds ago may still be written. They come last, or whenever
    there are too many of them, after a wait of at most these seconds.
    """
    entries, young = walk(store.disk), list[Entry]()
    while batch := await store.threads.run(_next_batch, entries):
        old, new = _by_age(batch, settled_after)
        young += new
        if old:
            yield work(old)
        if len(young) >= YOUNG_AT_ONCE:
            async for step in _settled(young, work, settled_after):
                yield step
            young = []
    async for step in _settled(young, work, settled_after):
        yield step


async def _settled(
    young: list[Entry], work: Callable[[list[Entry]], Step], settled_after: float
) -> AsyncGenerator[Step, None]:
    """Yield the steps of `work` for young files when all of them are old enough."""
    if young:
        youngest = (time.time_ns() - max(entry.changed_ns for entry in young)) / 1e9
        await asyncio.sleep(min(settled_after, settled_after - youngest))  # less than 0: a disk's clock is ahead
    left = iter(young)
    while batch := _next_batch(left):
        yield work(batch)


async def find_records(store: UploadStore, entries: Iterable[Entry]) -> Known:
    """Ask for the records of files; a name that the database refuses spoils no other."""
    wanted = [entry.name for entry in entries if _is_text(entry.name)]
    parts, refused = await in_halves(store.database.catalogue.find, wanted)
    return Known({name: record for part in parts for name, record in part.items()}, dict(refused))


def sort_entries(
    entries: Iterable[Entry], known: Known, exclusions: Exclusions, left_out: Exclusions
) -> tuple[list[Entry], list[Result]]:
    """Return the entries that can be uploads, and results for the others: litter is an upload if it is recorded."""
    uploads: list[Entry] = []
    results: list[Result] = []
    for entry in entries:
        name, is_recorded = entry.name, entry.name in known.records
        if left_out.match(name) or (not is_recorded and exclusions.covers(name)):
            results.append(Result(name, Outcome.SKIPPED))
        elif entry.is_link and not is_recorded:
            results.append(Result(name, Outcome.SKIPPED, detail=entry.fault))
        elif not names.is_valid(name):
            results.append(problem(name, Outcome.INVALID_NAME, names.fault(name)))
        elif entry.fault:
            results.append(problem(name, Outcome.FAILED, entry.fault))
        elif name in known.refused:
            results.append(of_error(name, known.refused[name]))
        else:
            uploads.append(entry)
    return uploads, results


async def deleted_on_disk(store: UploadStore, name: str) -> Result:
    """Return the result for a deleted name that was met on the disk."""
    if await store.threads.run(store.disk.stat, name) is None:
        return Result(name, Outcome.DELETED, 0, "it was deleted meanwhile")
    return problem(name, Outcome.DELETED, "it was deleted, but is still on disk; `selfheal restore` removes it")


async def differs(store: UploadStore, record: Record) -> Result:
    """Return the result for a file of other bytes than the recorded ones, with the command that keeps the newer ones.

    Whichever side loses, its bytes become a version of the name.
    """
    if await store.reconciler.is_newer_on_disk(record):
        detail = "the disk's bytes are newer than the recorded ones; `selfheal migrate --prefer disk` stores them"
    else:
        detail = "the recorded bytes are newer than the disk's; `selfheal restore --verify` restores them"
    return problem(record.name, Outcome.DIFFERS, detail, record.size)


async def digest_on_disk(store: UploadStore, name: str) -> str | None:
    """Return the SHA-256 of a name's file in hex; None if there is no file. Raises as `UploadsDirectory.open` does."""
    file = await store.threads.run(store.disk.open, name)
    if file is None:
        return None
    with file:
        return await file.digest()


def _is_text(name: str) -> bool:
    """Whether a database can be asked for a file's name, which may have bytes that are not text."""
    return names.is_valid(name) or name.isprintable()


def read_small(disk: UploadsDirectory, wanted: Iterable[Entry]) -> list[Read]:
    """Read files whole; one that is not as it was measured any more is an error."""
    return [_read_small(disk, entry) for entry in wanted]


def raise_if_changed(entry: Entry, now: os.stat_result | None) -> None:
    """Raise `FileChanged` if a file is not as it was measured any more, `NotStored` if it is gone."""
    if now is None:
        raise NotStored("it was removed meanwhile")
    if identity_of(now) != entry.identity:  # the ctime shows a rename, too
        raise FileChanged("it is still being written; it is left for the next run")


def _read_small(disk: UploadsDirectory, entry: Entry) -> Read:
    try:
        file = disk.open(entry.name)
        if file is None:
            raise NotStored("it was removed meanwhile")
        with file:
            return Read(entry.name, _read_whole(entry, file))
    except (SelfHealError, OSError) as error:
        return Read(entry.name, error=error)


def _read_whole(entry: Entry, file: OpenFile) -> SmallFile:
    size, data = entry.size, b""
    while len(data) <= size and (more := file.read_waiting(len(data), size + 1 - len(data))):
        data += more
    raise_if_changed(entry, os.fstat(file.fd))
    if len(data) != size:
        raise FileChanged(f"it has {size} bytes, but its disk reads another number")
    chunks = [data[at : at + CHUNK] for at in range(0, size, CHUNK)] if size > CHUNK else [data] if data else []
    return SmallFile(entry.name, size, file.modified_ns, chunks, Digests.of(chunks))


def _by_age(entries: Iterable[Entry], settled_after: float) -> tuple[list[Entry], list[Entry]]:
    """Return the files that were not changed in the last `settled_after` seconds, and the others."""
    before = time.time_ns() - int(settled_after * 1e9)
    old, young = list[Entry](), list[Entry]()
    for entry in entries:
        (old if entry.changed_ns <= before else young).append(entry)
    return old, young


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
