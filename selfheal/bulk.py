"""The three bulk runs, as async generators of what became of each name; nothing is printed here.

Each can be killed and run again: what is done stays done, and is only looked at.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from . import names
from .disk import Found as Entry
from .disk import UploadsDirectory
from .errors import CorruptBlob, NotStored, SchemaError, SelfHealError
from .landing import BYTES_AT_ONCE, FILES_AT_ONCE, LARGE, Landed, Landing, fault_in_database, read_small
from .outcomes import Outcome, Result, each, of_error, problem, sort, split, survey
from .records import Found, Record
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
            results += unclear
            if dry_run:
                results += await store.threads.run(_would_land, store.disk, missing)
            else:
                async with aclosing(landing.land(missing)) as landed:
                    async for one in landed:
                        yield _landed(one)
            if verify:
                async with aclosing(each(jobs, (_heal(store, one, dry_run=dry_run) for one in present))) as healed:
                    async for result in healed:
                        yield result
            else:
                results += [Result(one.name, Outcome.OK, one.size) for one in present]
            for result in results:
                yield result
    async with aclosing(_lingering(store)) as lingering:
        async for record in lingering:
            yield await _remove(store, record, dry_run=dry_run)


def _would_land(disk: UploadsDirectory, missing: Sequence[Record]) -> list[Result]:
    results = []
    for record in missing:
        try:
            _digest(disk, record.name)  # says so if something that is not a file has the name
        except (SelfHealError, OSError) as error:
            results.append(of_error(record.name, error))
        else:
            results.append(Result(record.name, Outcome.RESTORED, record.size, "would be restored"))
    return results


def _landed(one: Landed) -> Result:
    if one.error is None:
        return Result(one.record.name, Outcome.RESTORED, one.record.size)
    if isinstance(one.error, NotStored):
        return Result(one.record.name, Outcome.DELETED, 0, str(one.error))
    return of_error(one.record.name, one.error)


async def _heal(store: UploadStore, record: Record, *, dry_run: bool) -> Result:
    name = record.name
    try:
        is_same = await store.threads.run(_digest, store.disk, name) == record.sha256
        if not is_same:
            now = await store.database.find(name)
            if now is None or now.is_deleted:
                return Result(name, Outcome.DELETED, 0, "it was deleted meanwhile")
            if now.generation != record.generation:
                return await _heal(store, now, dry_run=dry_run)
            if not dry_run:
                await store.heal(record)
        if not dry_run:
            await store.check(name)
    except (SelfHealError, OSError) as error:
        return of_error(name, error)
    if is_same:
        return Result(name, Outcome.OK, record.size)
    detail = "the disk's bytes differ" if dry_run else "the disk's bytes differed; they are in quarantine"
    return Result(name, Outcome.RESTORED, record.size, detail)


async def _remove(store: UploadStore, record: Record, *, dry_run: bool) -> Result:
    try:
        if not dry_run:
            await store.check(record.name)
    except (SelfHealError, OSError) as error:
        return of_error(record.name, error)
    detail = "it was deleted; its file would be removed" if dry_run else "it was deleted; its file is removed"
    return Result(record.name, Outcome.DELETED, 0, detail)


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
            async with aclosing(_bring_in(store, new, jobs)) as brought_in:
                async for result in brought_in:
                    yield result
        for result in results:
            yield result
        compare = partial(_compare, store, prefer_disk=prefer_disk, dry_run=dry_run)
        old = [entry for entry in uploads if entry.name in known]
        work = (_settled(store, known[entry.name], partial(compare, entry)) for entry in old)
        async with aclosing(each(jobs, work)) as compared:
            async for result in compared:
                yield result


async def _known(store: UploadStore, wanted: list[str], *, dry_run: bool) -> dict[str, Found]:
    try:
        return await store.database.fetch(wanted)
    except SchemaError:
        if not dry_run:
            raise
        return {}  # the tables that a real run would make are empty


async def _bring_in(store: UploadStore, entries: Sequence[Entry], jobs: int) -> AsyncGenerator[Result, None]:
    small = [entry.name for entry in entries if entry.stat.st_size <= LARGE]
    large = [entry.name for entry in entries if entry.stat.st_size > LARGE]
    files = []
    async with aclosing(each(jobs, (store.threads.run(read_small, store.disk, name) for name in small))) as reads:
        async for one in reads:
            if one.file is not None:
                files.append(one.file)
            elif one.error is not None:
                yield of_error(one.name, one.error)
    if files:
        records = await store.database.store_many(files)
        for file in files:
            yield _migrated(file.name, file.sha256, records.get(file.name))
    async with aclosing(each(jobs, (_adopt(store, name) for name in large))) as adopted:
        async for result in adopted:
            yield result


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
    record, name, size = found.record, entry.name, entry.stat.st_size
    if record.is_deleted:
        return await _still_there(store, name)
    try:
        fault = await fault_in_database(store.database, found, store.threads)
        is_same = (entry.stat.st_mtime_ns, size) == (record.modified_ns, record.size)
        if fault or not is_same:
            is_same = await store.threads.run(_digest, store.disk, name) == record.sha256
        if is_same and not fault:
            return Result(name, Outcome.OK, record.size)
        if is_same and size != record.size:
            detail = f"it has {size} bytes, but {record.size} are recorded; delete it and save it anew"
            return problem(name, Outcome.CORRUPT_IN_DATABASE, detail)
        if not is_same and not prefer_disk:
            detail = fault or "the disk's bytes are not the recorded ones; --prefer disk takes them"
            return problem(name, Outcome.CORRUPT_IN_DATABASE if fault else Outcome.DIFFERS, detail, record.size)
        if not dry_run:
            await (store.mend(record) if is_same else store.take_over(name))
    except (SelfHealError, OSError) as error:
        return of_error(name, error)
    return Result(name, Outcome.MIGRATED, size, "mended" if is_same else "the disk's bytes were taken")


# -- verify: both sides ---------------------------------------------------------------------------------------------


async def verify(store: UploadStore, *, drill: bool = False, jobs: int = 4) -> AsyncGenerator[Result, None]:
    """Compare every byte on both sides with what was recorded; with `drill` also restore everything, elsewhere.

    Changes nothing. Raises `DatabaseUnavailable`.
    """
    async with aclosing(store.database.pages(size=FILES_AT_ONCE)) as pages:
        async for page in pages:
            valid, results = split(page)
            found = await store.database.fetch(record.name for record in valid)
            wrong = await _drill(store, valid, jobs) if drill else {}
            checks = (_settled(store, one, partial(_verify, store)) for one in found.values())
            async with aclosing(each(jobs, checks)) as verified:
                async for one in verified:
                    if one is not None:
                        yield wrong.get(one.name, one)
            for result in results:
                yield result
    async for entries in _batches_of_walk(store):
        records = await store.database.find_many(entry.name for entry in entries if _is_text(entry.name))
        uploads, results = sort(entry for entry in entries if not _is_living(records.get(entry.name)))
        for result in results:
            yield result
        for entry in uploads:
            yield await _still_there(store, entry.name) if entry.name in records else _not_backed_up(entry)


async def _verify(store: UploadStore, found: Found) -> Result | None:
    record = found.record
    if record.is_deleted:
        return None  # meanwhile: the walk finds it if it is still on disk
    try:
        fault = await fault_in_database(store.database, found, store.threads)
        if fault:
            return problem(record.name, Outcome.CORRUPT_IN_DATABASE, fault, record.size)
        digest = await store.threads.run(_digest, store.disk, record.name)
    except (SelfHealError, OSError) as error:
        return of_error(record.name, error)
    if digest is None:
        return problem(record.name, Outcome.MISSING_ON_DISK, "`selfheal restore` brings it back", record.size)
    if digest != record.sha256:
        detail = "the disk's bytes are not the recorded ones; `selfheal restore --verify` heals them"
        return problem(record.name, Outcome.DIFFERS, detail, record.size)
    return Result(record.name, Outcome.OK, record.size)


async def _drill(store: UploadStore, records: Sequence[Record], jobs: int) -> dict[str, Result]:
    """Restore records into an empty directory, compare, and throw it away; a result for each name that went wrong."""
    wrong: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="selfheal-drill-") as place:
        elsewhere = UploadsDirectory(place, threads=store.threads)
        async with aclosing(Landing(elsewhere, store.database, jobs).land(records)) as landed:
            async for one in landed:
                error = one.error or await store.threads.run(_drilled, elsewhere, one.record)
                if error is not None and not isinstance(error, NotStored):
                    wrong[one.record.name] = of_error(one.record.name, error)
    return wrong


def _drilled(elsewhere: UploadsDirectory, record: Record) -> Exception | None:
    """Compare what was restored in a drill, and throw it away."""
    if _digest(elsewhere, record.name) != record.sha256:
        return CorruptBlob(record.name, "what was restored in the drill has other bytes")
    elsewhere.remove(record.name)
    return None


def _not_backed_up(entry: Entry) -> Result:
    detail = "it is not backed up; `selfheal migrate` brings it in"
    return problem(entry.name, Outcome.MISSING_IN_DATABASE, detail, entry.stat.st_size)


def _is_living(record: Record | None) -> bool:
    return record is not None and not record.is_deleted


def _is_text(name: str) -> bool:
    """Whether a database can be asked for a name; a file's name may hold bytes that are no text."""
    return names.is_valid(name) or name.isprintable()


# -- shared ---------------------------------------------------------------------------------------------------------


R = TypeVar("R", Result, Result | None)


async def _settled(store: UploadStore, found: Found, look: Callable[[Found], Coroutine[Any, Any, R]]) -> R:
    """What `look` says; if that is a problem, once more if the record changed meanwhile: an app may be at work."""
    while True:
        result = await look(found)
        if result is None or not result.is_problem:
            return result
        now = (await store.database.fetch([found.record.name])).get(found.record.name)
        if now is None or now.record.generation == found.record.generation:
            return result
        found = now


async def _still_there(store: UploadStore, name: str) -> Result:
    """What to say of a deleted name that the walk met."""
    if await store.threads.run(store.disk.stat, name) is None:
        return Result(name, Outcome.DELETED, 0, "it was deleted meanwhile")
    return problem(name, Outcome.DELETED, "it was deleted, but is still on disk; `selfheal restore` removes it")


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


def _digest(disk: UploadsDirectory, name: str) -> str | None:
    file = disk.open(name)
    if file is None:
        return None
    with file:
        return file.sha256()
