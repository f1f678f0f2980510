"""Migrate: disk → database. New files are stored, and damaged bytes in the database are mended."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from functools import partial

from ..aio.streams import run_unordered
from ..disk.exclusions import Exclusions
from ..disk.listing import Entry
from ..errors import NewerTables, NotStored, SchemaError
from ..sql.models import Found
from ..store import UploadStore
from .disk_files import (
    LARGE,
    Known,
    deleted_on_disk,
    differs,
    digest_on_disk,
    find_records,
    for_all_files,
    raise_if_changed,
    read_small,
    sort_entries,
)
from .one_by_one import FAILURES, in_halves
from .outcomes import Outcome, Result, of_error, problem, results_of
from .process_pool import Executor, InlineExecutor
from .soundness import check_all, fault_in_database


async def migrate(
    store: UploadStore,
    *,
    prefer_disk: bool = False,
    exclude: Iterable[str] = (),
    dry_run: bool = False,
    jobs: int = 4,
    executor: Executor | None = None,
) -> AsyncGenerator[Result, None]:
    """Store every file the database does not have, and mend damaged bytes; `prefer_disk` settles differences."""
    left_out = Exclusions(exclude)
    await (store.database.refuse_foreign_tables() if dry_run else store.database.create_tables())
    executor = executor or InlineExecutor(store)
    jobs = jobs // executor.worker_count or 1
    work = partial(executor.run, _migrate, left_out=left_out, prefer_disk=prefer_disk, dry_run=dry_run, jobs=jobs)
    steps = for_all_files(store, work, settled_after=0.0 if dry_run else store.settled_after)
    async with aclosing(results_of(steps, executor.max_pending)) as results:
        async for result in results:
            yield result


async def _migrate(
    store: UploadStore, entries: list[Entry], *, left_out: Exclusions, prefer_disk: bool, dry_run: bool, jobs: int
) -> list[Result]:
    """Store the new ones of some files on disk, and compare the others with their records."""
    try:
        known = await find_records(store, entries)
    except SchemaError as error:
        if not dry_run or isinstance(error, NewerTables):
            raise
        known = Known({}, {})  # a real run makes the tables
    uploads, results = sort_entries(entries, known, store.exclusions, left_out)
    new = [entry for entry in uploads if entry.name not in known.records]
    would = (Result(entry.name, Outcome.MIGRATED, entry.size, "it would be backed up") for entry in new)
    results += would if dry_run else await _store(store, new, jobs)
    old = {entry.name: entry for entry in uploads if entry.name in known.records}
    compare = partial(_compare, store, old, prefer_disk=prefer_disk, dry_run=dry_run)
    return results + await check_all(store, ((name, known.records[name].size) for name in old), jobs, compare)


async def _store(store: UploadStore, new: list[Entry], jobs: int) -> list[Result]:
    read = await store.threads.run(read_small, store.disk, [entry for entry in new if entry.size <= LARGE])
    results = [_of_error(one.name, one.error) for one in read if one.error is not None]
    files = [one.file for one in read if one.file is not None]
    parts, refused = await in_halves(store.database.store_many, files)
    results += [of_error(file.name, error) for file, error in refused]
    stored, failed = set[str]().union(*parts), {file.name for file, _ in refused}
    for file in files:
        if file.name in stored:
            results.append(Result(file.name, Outcome.MIGRATED, file.size))
        elif file.name not in failed:
            detail = "it was saved or deleted meanwhile (run again), or the database's encoding cannot hold its name"
            results.append(problem(file.name, Outcome.FAILED, detail))
    large = (_adopt(store, entry) for entry in new if entry.size > LARGE)
    async with aclosing(run_unordered(large, jobs)) as adopted:
        return results + [result async for result in adopted]


async def _adopt(store: UploadStore, entry: Entry) -> Result:
    try:
        await _raise_if_changed(store, entry)
        record = await store.reconciler.adopt(entry.name)
    except FAILURES as error:
        return _of_error(entry.name, error)
    return Result(entry.name, Outcome.MIGRATED, record.size)


async def _compare(
    store: UploadStore, entries: dict[str, Entry], found: Found, *, prefer_disk: bool, dry_run: bool
) -> Result:
    record, entry = found.record, entries[found.record.name]
    name, size = entry.name, entry.size
    try:
        if record.is_deleted:
            return await deleted_on_disk(store, name)
        fault = await fault_in_database(store.database, found)
        is_same = await digest_on_disk(store, name) == record.sha256
        if is_same and not fault:
            return Result(name, Outcome.OK, record.size)
        await _raise_if_changed(store, entry)
        if is_same and size != record.size:
            detail = f"it has {size} bytes, but {record.size} are recorded; copy it, delete the name, and save the copy"
            return problem(name, Outcome.CORRUPT_IN_DATABASE, detail)
        if not is_same and not prefer_disk:
            damaged = problem(name, Outcome.CORRUPT_IN_DATABASE, fault, record.size)
            return damaged if fault else await differs(store, record)
        if not dry_run:
            reconciler = store.reconciler
            await (reconciler.mend(record) if is_same else reconciler.adopt(name, overwrite=True))
    except FAILURES as error:
        return _of_error(name, error)
    would = "would be " if dry_run else ""
    return Result(
        name, Outcome.MIGRATED, size, f"its bytes in the database {would}{'repaired' if is_same else 'replaced'}"
    )


async def _raise_if_changed(store: UploadStore, entry: Entry) -> None:
    raise_if_changed(entry, await store.threads.run(store.disk.stat, entry.name))


def _of_error(name: str, error: Exception) -> Result:
    """As `of_error`; a file that is gone needs no migration."""
    return Result(name, Outcome.SKIPPED) if isinstance(error, NotStored) else of_error(name, error)
