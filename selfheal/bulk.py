"""The three bulk runs, as async generators of what became of each name; nothing is printed here.

Each can be killed and run again: what is done stays done, and is only looked at.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing

from . import names
from .disk import Found as Entry
from .disk import UploadsDirectory
from .errors import CorruptBlob, NotStored, SchemaError, SelfHealError
from .landing import BYTES_AT_ONCE, FILES_AT_ONCE, LARGE, TRIES, Landed, Landing, is_sound, read_small
from .outcomes import Outcome, Result, each, of_error, problem, sort, split, survey
from .records import Found, Record
from .sources import CHUNK
from .store import UploadStore

# -- restore: database → disk ---------------------------------------------------------------------------------------


async def restore(
    store: UploadStore, *, verify: bool = False, dry_run: bool = False, jobs: int = 4
) -> AsyncGenerator[Result, None]:
    """Bring back every living record whose file is missing; with `verify`, also heal those whose bytes differ.

    What was deleted and is still on disk is removed. Raises `DatabaseUnavailable`.
    """
    landing = Landing(store.disk, store.database, jobs)
    async with aclosing(store.database.pages()) as pages:
        async for page in pages:
            valid, results = split(page)
            present, missing, unclear = await store.threads.run(survey, store.disk, valid)
            for result in results + unclear:
                yield result
            async with aclosing(_land(landing, missing, dry_run=dry_run)) as landed:
                async for result in landed:
                    yield result
            async with aclosing(_look_at(store, present, verify=verify, dry_run=dry_run, jobs=jobs)) as looked_at:
                async for result in looked_at:
                    yield result
    async with aclosing(_lingering(store)) as lingering:
        async for record in lingering:
            yield await _remove(store, record, dry_run=dry_run)


async def _land(landing: Landing, missing: Sequence[Record], *, dry_run: bool) -> AsyncGenerator[Result, None]:
    if dry_run:
        for record in missing:
            yield Result(record.name, Outcome.RESTORED, record.size, "would be restored")
        return
    async with aclosing(landing.land(missing)) as landed:
        async for one in landed:
            yield _landed(one)


def _landed(one: Landed) -> Result:
    if one.error is None:
        return Result(one.record.name, Outcome.RESTORED, one.record.size)
    if isinstance(one.error, NotStored):
        return Result(one.record.name, Outcome.DELETED, 0, str(one.error))
    return of_error(one.record.name, one.error)


async def _look_at(
    store: UploadStore, present: Sequence[Record], *, verify: bool, dry_run: bool, jobs: int
) -> AsyncGenerator[Result, None]:
    if not verify:
        for record in present:
            yield Result(record.name, Outcome.OK, record.size)
        return
    async with aclosing(each(jobs, (_heal(store, record, dry_run=dry_run) for record in present))) as healed:
        async for result in healed:
            yield result


async def _heal(store: UploadStore, record: Record, *, dry_run: bool) -> Result:
    try:
        digest = await store.threads.run(_digest, store.disk, record.name)
        if digest == record.sha256:
            if not dry_run:
                await store.check(record.name)
            return Result(record.name, Outcome.OK, record.size)
        if not dry_run:
            await store.heal(record)
    except (SelfHealError, OSError) as error:
        return of_error(record.name, error)
    detail = "the disk's bytes differed; they are in quarantine" if not dry_run else "the disk's bytes differ"
    return Result(record.name, Outcome.RESTORED, record.size, detail)


async def _remove(store: UploadStore, record: Record, *, dry_run: bool) -> Result:
    try:
        if not dry_run:
            await store.check(record.name)
    except (SelfHealError, OSError) as error:
        return of_error(record.name, error)
    return Result(record.name, Outcome.DELETED, 0, "it was deleted; its file is removed from the disk")


# -- migrate: disk → database ---------------------------------------------------------------------------------------


async def migrate(
    store: UploadStore, *, prefer_disk: bool = False, dry_run: bool = False, jobs: int = 4
) -> AsyncGenerator[Result, None]:
    """Bring every file that the database does not know into it, and mend what is damaged there from good disk copies.

    Where the two sides differ nothing is changed, unless `prefer_disk`. Raises `DatabaseUnavailable`.
    """
    if not dry_run:
        await store.database.create_tables()
    async for entries in _batches_of_walk(store):
        uploads, results = sort(entries)
        known = await _known(store, [entry.name for entry in uploads], dry_run=dry_run)
        new = [entry for entry in uploads if entry.name not in known]
        if dry_run:
            results += [Result(entry.name, Outcome.MIGRATED, entry.stat.st_size, "would be migrated") for entry in new]
        else:
            results += await _bring_in(store, new, jobs)
        old = [(entry, known[entry.name]) for entry in uploads if entry.name in known]
        results += await each(
            jobs, (_compare(store, entry, found, prefer_disk=prefer_disk, dry_run=dry_run) for entry, found in old)
        )
        for result in results:
            yield result


async def _known(store: UploadStore, wanted: list[str], *, dry_run: bool) -> dict[str, Found]:
    try:
        return await store.database.fetch(wanted)
    except SchemaError:
        if not dry_run:
            raise
        return {}  # the tables that a real run would make are empty


async def _bring_in(store: UploadStore, entries: Sequence[Entry], jobs: int) -> list[Result]:
    small = [entry.name for entry in entries if entry.stat.st_size <= LARGE]
    large = [entry.name for entry in entries if entry.stat.st_size > LARGE]
    read = await each(jobs, (store.threads.run(read_small, store.disk, name) for name in small))
    files = [one.file for one in read if one.file is not None]
    results = [of_error(one.name, one.error) for one in read if one.error is not None]
    if files:
        records = await store.database.store_many(files)
        results += [_migrated(file.name, file.sha256, records.get(file.name)) for file in files]
    return results + await each(jobs, (_adopt(store, name) for name in large))


def _migrated(name: str, sha256: str, record: Record | None) -> Result:
    if record is not None and not record.is_deleted and record.sha256 == sha256:
        return Result(name, Outcome.MIGRATED, record.size)
    return problem(name, Outcome.FAILED, "somebody else saved or deleted it meanwhile; run again")


async def _adopt(store: UploadStore, name: str) -> Result:
    try:
        record = await store.adopt(name)
    except (SelfHealError, OSError) as error:
        return of_error(name, error)
    return Result(name, Outcome.MIGRATED, record.size)


async def _compare(store: UploadStore, entry: Entry, found: Found, *, prefer_disk: bool, dry_run: bool) -> Result:
    record, name = found.record, entry.name
    if record.is_deleted:
        return problem(name, Outcome.DELETED, "it was deleted, but is still on disk; `selfheal restore` removes it")
    try:
        fault = await _fault_in_database(store, found)
        is_same = (entry.stat.st_mtime_ns, entry.stat.st_size) == (record.modified_ns, record.size)
        if fault or not is_same:
            is_same = await store.threads.run(_digest, store.disk, name) == record.sha256
        if is_same and not fault:
            return Result(name, Outcome.OK, record.size)
        if not is_same and not prefer_disk:
            detail = fault or "the disk's bytes are not the recorded ones; --prefer disk takes them"
            return problem(name, Outcome.CORRUPT_IN_DATABASE if fault else Outcome.DIFFERS, detail, record.size)
        if not dry_run:
            await (store.mend(record) if is_same else store.take_over(name))
    except (SelfHealError, OSError) as error:
        return of_error(name, error)
    return Result(name, Outcome.MIGRATED, entry.stat.st_size, "mended" if is_same else "the disk's bytes were taken")


# -- verify: both sides ---------------------------------------------------------------------------------------------


async def verify(store: UploadStore, *, drill: bool = False, jobs: int = 4) -> AsyncGenerator[Result, None]:
    """Compare every byte on both sides with what was recorded; with `drill` also restore everything, elsewhere.

    Changes nothing. Raises `DatabaseUnavailable`.
    """
    with tempfile.TemporaryDirectory(prefix="selfheal-drill-") as place:
        elsewhere = UploadsDirectory(place, threads=store.threads) if drill else None
        async with aclosing(store.database.pages(size=FILES_AT_ONCE)) as pages:
            async for page in pages:
                valid, results = split(page)
                found = await store.database.fetch(record.name for record in valid)
                checks = (_verify(store, found[record.name], elsewhere) for record in valid if record.name in found)
                for result in results + await each(jobs, checks):
                    yield result
    async for entries in _batches_of_walk(store):
        uploads, results = sort(entries)
        records = await store.database.find_many(entry.name for entry in uploads)
        for result in results + [one for entry in uploads for one in _only_on_disk(entry, records.get(entry.name))]:
            yield result


async def _verify(store: UploadStore, found: Found, elsewhere: UploadsDirectory | None) -> Result:
    record = found.record
    try:
        fault = await _fault_in_database(store, found)
        if fault:
            return problem(record.name, Outcome.CORRUPT_IN_DATABASE, fault, record.size)
        if elsewhere is not None:
            await _drill(store, record, elsewhere)
        digest = await store.threads.run(_digest, store.disk, record.name)
    except NotStored:
        return problem(record.name, Outcome.MISSING_ON_DISK, "`selfheal restore` brings it back", record.size)
    except (SelfHealError, OSError) as error:
        return of_error(record.name, error)
    if digest != record.sha256:
        detail = "the disk's bytes are not the recorded ones; `selfheal restore --verify` heals them"
        return problem(record.name, Outcome.DIFFERS, detail, record.size)
    return Result(record.name, Outcome.OK, record.size)


def _only_on_disk(entry: Entry, record: Record | None) -> Iterator[Result]:
    if record is None:
        detail = "it is not backed up; `selfheal migrate` brings it in"
        yield problem(entry.name, Outcome.MISSING_IN_DATABASE, detail, entry.stat.st_size)
    elif record.is_deleted:
        yield problem(
            entry.name, Outcome.DELETED, "it was deleted, but is still on disk; `selfheal restore` removes it"
        )


async def _drill(store: UploadStore, record: Record, elsewhere: UploadsDirectory) -> None:
    """Restore a record into an empty directory, compare, and throw it away."""
    async with aclosing(Landing(elsewhere, store.database, 1).land([record])) as landed:
        async for one in landed:
            if one.error is not None:
                raise one.error
    there = elsewhere.stat(record.name)
    if await store.threads.run(_digest, elsewhere, record.name) != record.sha256 or there is None:
        raise CorruptBlob(record.name, "what was restored in the drill has other bytes")
    elsewhere.remove(record.name)


# -- shared ---------------------------------------------------------------------------------------------------------


async def _fault_in_database(store: UploadStore, found: Found) -> str:
    """Why the recorded bytes could not be brought back; empty if they could."""
    record = found.record
    if record.size <= CHUNK and is_sound(found):
        return ""
    whole = hashlib.sha256()
    try:
        async with aclosing(store.database.read(record)) as chunks:
            async for chunk in chunks:
                await store.threads.run(whole.update, chunk)
    except CorruptBlob as error:
        return error.why
    if whole.hexdigest() != record.sha256:
        return "the whole does not match its digest"
    return "" if found.has_blob else "its blob has no row, or another size"


async def _lingering(store: UploadStore) -> AsyncGenerator[Record, None]:
    """Deleted names that are still on disk."""
    async with aclosing(store.database.pages(deleted=True)) as pages:
        async for page in pages:
            valid = [record for record in page if names.is_valid(record.name)]
            present, _, _ = await store.threads.run(survey, store.disk, valid)
            for record in present:
                yield record


async def _batches_of_walk(store: UploadStore) -> AsyncGenerator[list[Entry], None]:
    walk = store.disk.walk()
    while entries := await store.threads.run(_next_batch, walk):
        yield entries


def _next_batch(walk: Iterator[Entry]) -> list[Entry]:
    """Up to 256 entries, and about 32 MiB."""
    batch: list[Entry] = []
    size = 0
    for entry in itertools.islice(walk, FILES_AT_ONCE):
        batch.append(entry)
        size += entry.stat.st_size if entry.stat.st_size <= LARGE else 0
        if size > BYTES_AT_ONCE:
            break
    return batch


def _digest(disk: UploadsDirectory, name: str) -> str:
    file = disk.open(name)
    if file is None:
        raise NotStored(f"{name!r} is not on the disk")
    with file:
        return file.sha256()
