"""Everything, disk → database: what it does not know, and what is damaged there."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from .errors import SchemaError, SelfHealError
from .flight import ahead
from .gathering import LARGE, Read, fault_in_database, read_small
from .listing import Entry
from .outcomes import Outcome, Result, each, of_error, problem, sort
from .records import Found
from .sides import digest_of, entries_of, settled, still_there
from .store import UploadStore


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
            work = (settled(store, batch.known[entry.name], partial(compare, entry)) for entry in batch.old)
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
    async with aclosing(entries_of(store)) as batches:
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
        return await still_there(store, name)
    try:
        fault = await fault_in_database(store.database, found, store.threads)
        is_same = (entry.stat.st_mtime_ns, size) == (record.modified_ns, record.size)
        if fault or not is_same:
            is_same = await store.threads.run(digest_of, store.disk, name) == record.sha256
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
