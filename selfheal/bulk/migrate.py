"""Everything, disk → database: what it does not know, and what is damaged there."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from functools import partial

from ..content.sources import CHUNK
from ..disk.listing import Entry
from ..errors import SchemaError, SelfHealError
from ..healing.batch_restore import SMALL_AT_ONCE, in_batches
from ..sql.models import Found, Record
from ..store import UploadStore
from .outcomes import Outcome, Result, each, of_error, problem, results_of, sort
from .process_pool import Alone, Workers
from .reading import LARGE, fault_in_database, read_small
from .walk import digest_of, on_disk, settled, still_there


async def migrate(
    store: UploadStore,
    *,
    prefer_disk: bool = False,
    dry_run: bool = False,
    jobs: int = 4,
    workers: Workers | None = None,
) -> AsyncGenerator[Result, None]:
    """Bring every file that the database does not know into it, and mend what is damaged there from good disk copies.

    Where the two sides differ nothing is changed, unless `prefer_disk`. Raises `DatabaseUnavailable`.
    """
    if not dry_run:
        await store.database.create_tables()
    workers = workers or Alone(store)
    jobs = jobs // workers.count or 1
    work = partial(workers.run, _migrate, prefer_disk=prefer_disk, dry_run=dry_run, jobs=jobs)
    async with aclosing(results_of(on_disk(store, work), workers.at_once)) as results:
        async for result in results:
            yield result


async def _migrate(
    store: UploadStore, entries: list[Entry], *, prefer_disk: bool, dry_run: bool, jobs: int
) -> list[Result]:
    """Some of the files on disk: new ones are brought in, those that the database knows are compared."""
    uploads, results = sort(entries)
    by_name = {entry.name: entry for entry in uploads}
    known = await _known(store, by_name, dry_run=dry_run)
    new = [entry for entry in uploads if entry.name not in known]
    results += map(_would_migrate, new) if dry_run else await _bring_in(store, new, jobs)
    compare = partial(_compare, store, prefer_disk=prefer_disk, dry_run=dry_run)
    for batch in in_batches(((name, min(record.size, CHUNK)) for name, record in known.items()), SMALL_AT_ONCE):
        found = await store.database.fetch(name for name, _ in batch)
        work = (settled(store, one, partial(compare, by_name[name])) for name, one in found.items())
        async with aclosing(each(jobs, work)) as compared:
            results += [result async for result in compared]
    return results


def _would_migrate(entry: Entry) -> Result:
    return Result(entry.name, Outcome.MIGRATED, entry.size, "would be migrated")


async def _known(store: UploadStore, wanted: Iterable[str], *, dry_run: bool) -> dict[str, Record]:
    try:
        return await store.database.find_many(wanted)
    except SchemaError:
        if not dry_run:
            raise
        return {}  # the tables that a real run would make are empty


async def _bring_in(store: UploadStore, new: list[Entry], jobs: int) -> list[Result]:
    small = [entry.name for entry in new if entry.size <= LARGE]
    read = await store.threads.run(read_small, store.disk, small)
    results = [of_error(one.name, one.error) for one in read if one.error is not None]
    files = [one.file for one in read if one.file is not None]
    stored = await store.database.store_many(files)
    for file in files:
        if file.name in stored:
            results.append(Result(file.name, Outcome.MIGRATED, file.size))
        else:
            results.append(problem(file.name, Outcome.FAILED, "somebody else saved or deleted it meanwhile; run again"))
    large = (_adopt(store, entry.name) for entry in new if entry.size > LARGE)
    async with aclosing(each(jobs, large)) as adopted:
        return results + [result async for result in adopted]


async def _adopt(store: UploadStore, name: str) -> Result:
    try:
        record = await store.adopt(name)
    except (SelfHealError, OSError) as error:
        return of_error(name, error)
    return Result(name, Outcome.MIGRATED, record.size)


async def _compare(store: UploadStore, entry: Entry, found: Found, *, prefer_disk: bool, dry_run: bool) -> Result:
    record, name, size = found.record, entry.name, entry.size
    if record.is_deleted:
        return await still_there(store, name)
    try:
        fault = await fault_in_database(store.database, found)
        is_same = (entry.modified_ns, size) == (record.modified_ns, record.size)
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
