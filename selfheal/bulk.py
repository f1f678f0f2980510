"""The three bulk runs, as async generators of what became of each name; nothing is printed here.

Each can be killed and run again: what is done stays done, and is only looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from . import names
from .disk import UploadsDirectory
from .errors import CorruptBlob, NotStored, SchemaError, SelfHealError, Unsettled
from .flight import ahead
from .gathering import LARGE, Read, fault_in_database, read_small
from .landing import FILES_AT_ONCE, SMALL_AT_ONCE, Landed, Landing, Wanted, in_batches
from .listing import Entry, Listing, walk
from .outcomes import Outcome, Result, Survey, each, of_error, problem, sort, split, survey
from .records import Found, Record
from .sources import CHUNK
from .store import UploadStore

NAMES_AT_ONCE = 4096
"""Names in one query, without their bytes."""
ENTRIES_AT_ONCE = 1024
"""Files that are looked up, read and stored together."""

# -- restore: database → disk ---------------------------------------------------------------------------------------


async def restore(
    store: UploadStore, *, verify: bool = False, dry_run: bool = False, jobs: int = 4
) -> AsyncGenerator[Result, None]:
    """Bring back every living record whose file is missing; with `verify`, also heal those whose bytes differ.

    What was deleted and is still on disk is removed. Raises `DatabaseUnavailable`.
    """
    landing = Landing(store.disk, store.database, jobs)
    async with aclosing(ahead(_surveys(store))) as surveys:
        async for found in surveys:
            for result in found.wrong:
                yield result
            async with aclosing(_land(store, landing, found.missing, dry_run=dry_run)) as landed:
                async for result in landed:
                    yield result
            if verify:
                async with aclosing(_heal_all(store, found.present, jobs, dry_run=dry_run)) as healed:
                    async for result in healed:
                        yield result
            elif found.present:
                size = sum(size for _, size in found.present)
                yield Result("", Outcome.OK, size, count=len(found.present))
    async with aclosing(_remove_lingering(store, dry_run=dry_run)) as removed:
        async for result in removed:
            yield result


async def _surveys(store: UploadStore, *, deleted: bool = False) -> AsyncGenerator[Survey, None]:
    listing = Listing(store.disk)
    async with aclosing(ahead(store.database.names(deleted=deleted, size=NAMES_AT_ONCE))) as pages:
        async for page in pages:
            yield await store.threads.run(survey, listing, page)


async def _land(
    store: UploadStore, landing: Landing, missing: list[Wanted], *, dry_run: bool
) -> AsyncGenerator[Result, None]:
    if dry_run:
        for result in await store.threads.run(_would_land, store.disk, missing):
            yield result
        return
    async with aclosing(landing.land(missing)) as batches:
        async for batch in batches:
            for one in batch:
                yield _landed(one)


async def _heal_all(
    store: UploadStore, present: list[Wanted], jobs: int, *, dry_run: bool
) -> AsyncGenerator[Result, None]:
    for start in range(0, len(present), FILES_AT_ONCE):
        found = await store.database.find_many(name for name, _ in present[start : start + FILES_AT_ONCE])
        records = list(found.values())
        hashing = (store.threads.run(_as_recorded, store.disk, records[job::jobs]) for job in range(jobs))
        same = set[str]().union(*await asyncio.gather(*hashing))
        for name in same:
            yield Result(name, Outcome.OK, found[name].size)
        work = (_heal(store, record, dry_run=dry_run) for record in records if record.name not in same)
        async with aclosing(each(jobs, work)) as healed:
            async for result in healed:
                yield result


def _as_recorded(disk: UploadsDirectory, records: Iterable[Record]) -> set[str]:
    """Names whose file is what its record says; whatever else may be the matter is looked at one by one."""
    same = set()
    for record in records:
        with contextlib.suppress(SelfHealError, OSError):
            file = None if record.is_deleted else disk.open(record.name)
            if file is not None:
                with file:
                    stamp = file.modified_ns, file.size
                    if stamp == (record.modified_ns, record.size) and file.sha256() == record.sha256:
                        same.add(record.name)
    return same


def _would_land(disk: UploadsDirectory, missing: Iterable[Wanted]) -> list[Result]:
    results = []
    for name, size in missing:
        try:
            _digest(disk, name)  # says so if something that is not a file has the name
        except (SelfHealError, OSError) as error:
            results.append(of_error(name, error))
        else:
            results.append(Result(name, Outcome.RESTORED, size, "would be restored"))
    return results


def _landed(one: Landed) -> Result:
    if one.record is not None and one.error is None:
        return Result(one.name, Outcome.RESTORED, one.record.size)
    if isinstance(one.error, NotStored):
        return Result(one.name, Outcome.DELETED, 0, str(one.error))
    return of_error(one.name, one.error or Unsettled("it changed while it was restored"))


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


async def _remove_lingering(store: UploadStore, *, dry_run: bool) -> AsyncGenerator[Result, None]:
    """Deleted names that are still on disk go; where nobody can tell whether they are, that is told."""
    async with aclosing(_surveys(store, deleted=True)) as surveys:
        async for found in surveys:
            for result in found.wrong:
                if result.outcome is Outcome.FAILED:
                    yield result
            for name, _ in found.present:
                yield await _remove(store, name, dry_run=dry_run)


async def _remove(store: UploadStore, name: str, *, dry_run: bool) -> Result:
    try:
        if not dry_run:
            await store.check(name)
    except (SelfHealError, OSError) as error:
        return of_error(name, error)
    detail = "it was deleted; its file would be removed" if dry_run else "it was deleted; its file is removed"
    return Result(name, Outcome.DELETED, 0, detail)


# -- migrate: disk → database ---------------------------------------------------------------------------------------


async def migrate(
    store: UploadStore, *, prefer_disk: bool = False, dry_run: bool = False, jobs: int = 4
) -> AsyncGenerator[Result, None]:
    """Bring every file that the database does not know into it, and mend what is damaged there from good disk copies.

    Where the two sides differ nothing is changed, unless `prefer_disk`. Raises `DatabaseUnavailable`.
    """
    if not dry_run:
        await store.database.create_tables()
    compare = partial(_compare, store, prefer_disk=prefer_disk, dry_run=dry_run)
    async with aclosing(ahead(_gather(store, dry_run=dry_run))) as batches:
        async for batch in batches:
            for result in batch.results:
                yield result
            async with aclosing(_bring_in(store, batch, jobs)) as brought_in:
                async for result in brought_in:
                    yield result
            work = (_settled(store, batch.known[entry.name], partial(compare, entry)) for entry in batch.old)
            async with aclosing(each(jobs, work)) as compared:
                async for result in compared:
                    yield result


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some of the files on disk: those that the database knows, new ones as they were read, and names of large ones."""

    results: list[Result]
    known: dict[str, Found]
    old: list[Entry]
    small: list[Read]
    large: list[str]


async def _gather(store: UploadStore, *, dry_run: bool) -> AsyncGenerator[_Batch, None]:
    async with aclosing(_entries(store)) as batches:
        async for entries in batches:
            uploads, results = sort(entries)
            known = await _known(store, [entry.name for entry in uploads], dry_run=dry_run)
            old = [entry for entry in uploads if entry.name in known]
            new = [entry for entry in uploads if entry.name not in known]
            if dry_run:
                results += [_would_migrate(entry) for entry in new]
                new = []
            small = [entry.name for entry in new if entry.stat.st_size <= LARGE]
            read = await store.threads.run(read_small, store.disk, small)
            yield _Batch(results, known, old, read, [entry.name for entry in new if entry.stat.st_size > LARGE])


def _would_migrate(entry: Entry) -> Result:
    return Result(entry.name, Outcome.MIGRATED, entry.stat.st_size, "would be migrated")


async def _known(store: UploadStore, wanted: list[str], *, dry_run: bool) -> dict[str, Found]:
    try:
        return await store.database.fetch(wanted)
    except SchemaError:
        if not dry_run:
            raise
        return {}  # the tables that a real run would make are empty


async def _bring_in(store: UploadStore, batch: _Batch, jobs: int) -> AsyncGenerator[Result, None]:
    for one in batch.small:
        if one.error is not None:
            yield of_error(one.name, one.error)
    files = [one.file for one in batch.small if one.file is not None]
    stored = await store.database.store_many(files)
    for file in files:
        if file.name in stored:
            yield Result(file.name, Outcome.MIGRATED, file.size)
        else:
            yield problem(file.name, Outcome.FAILED, "somebody else saved or deleted it meanwhile; run again")
    async with aclosing(each(jobs, (_adopt(store, name) for name in batch.large))) as adopted:
        async for result in adopted:
            yield result


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
    async with aclosing(ahead(_fetch_all(store))) as pages:
        async for found, wrong in pages:
            for result in wrong:
                yield result
            drilled = await _drill(store, found, jobs) if drill else {}
            checks = (_settled(store, one, partial(_verify, store)) for one in found)
            async with aclosing(each(jobs, checks)) as verified:
                async for one in verified:
                    if one is not None:
                        yield drilled.get(one.name, one)
    async with aclosing(ahead(_entries(store))) as batches:
        async for entries in batches:
            records = await store.database.find_many(entry.name for entry in entries if _is_text(entry.name))
            uploads, wrong = sort(entry for entry in entries if not _is_living(records.get(entry.name)))
            for result in wrong:
                yield result
            for entry in uploads:
                yield await _still_there(store, entry.name) if entry.name in records else _not_backed_up(entry)


async def _fetch_all(store: UploadStore) -> AsyncGenerator[tuple[list[Found], list[Result]], None]:
    """The living records with their first chunks, and what is wrong with others."""
    async with aclosing(store.database.names(size=NAMES_AT_ONCE)) as pages:
        async for page in pages:
            valid, wrong = split(page)
            yield [], wrong
            for wanted in in_batches(((name, min(size, CHUNK)) for name, size in valid), SMALL_AT_ONCE):
                yield list((await store.database.fetch(wanted)).values()), []


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


async def _drill(store: UploadStore, found: Sequence[Found], jobs: int) -> dict[str, Result]:
    """Restore records into an empty directory, compare, and throw it away; a result for each name that went wrong."""
    wrong: dict[str, Result] = {}
    wanted = [(one.record.name, one.record.size) for one in found]
    with tempfile.TemporaryDirectory(prefix="selfheal-drill-") as place:
        elsewhere = UploadsDirectory(place, threads=store.threads)
        async with aclosing(Landing(elsewhere, store.database, jobs).land(wanted)) as batches:
            async for landed in batches:
                for one in await store.threads.run(_drilled, elsewhere, landed):
                    if one.error is not None and not isinstance(one.error, NotStored):
                        wrong[one.name] = of_error(one.name, one.error)
    return wrong


def _drilled(elsewhere: UploadsDirectory, landed: Iterable[Landed]) -> list[Landed]:
    """Compare what was restored in a drill, and throw it away."""
    return [one if one.record is None or one.error else _compared(elsewhere, one, one.record) for one in landed]


def _compared(elsewhere: UploadsDirectory, one: Landed, record: Record) -> Landed:
    if _digest(elsewhere, record.name) != record.sha256:
        return replace(one, error=CorruptBlob(record.name, "what was restored in the drill has other bytes"))
    elsewhere.remove(record.name)
    return one


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


async def _entries(store: UploadStore) -> AsyncGenerator[list[Entry], None]:
    """What stands on the disk, some of it at a time."""
    entries = walk(store.disk)
    while batch := await store.threads.run(_next_batch, entries):
        yield batch


def _next_batch(entries: Iterator[Entry]) -> list[Entry]:
    """As many entries as are read, or looked up with their first chunks, at once."""
    batch: list[Entry] = []
    held = 0
    for entry in itertools.islice(entries, ENTRIES_AT_ONCE):
        batch.append(entry)
        held += entry.stat.st_size if entry.stat.st_size <= LARGE else CHUNK
        if held > SMALL_AT_ONCE:
            break
    return batch


def _digest(disk: UploadsDirectory, name: str) -> str | None:
    file = disk.open(name)
    if file is None:
        return None
    with file:
        return file.sha256()
