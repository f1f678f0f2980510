"""Migrate: disk → database. New files are stored, and damaged bytes in the database are mended."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from functools import partial

from ..aio.streams import run_unordered
from ..content.sources import CHUNK
from ..disk.listing import Entry
from ..errors import SchemaError, SelfHealError
from ..healing.batch_restore import SMALL_AT_ONCE, in_batches
from ..sql.models import Found, Record
from ..store import UploadStore
from .disk_files import LARGE, deleted_on_disk, for_all_files, read_small, sort_entries
from .outcomes import Outcome, Result, of_error, problem, results_of
from .process_pool import Executor, InlineExecutor
from .soundness import fault_in_database, until_unchanged


async def migrate(
    store: UploadStore,
    *,
    prefer_disk: bool = False,
    dry_run: bool = False,
    jobs: int = 4,
    executor: Executor | None = None,
) -> AsyncGenerator[Result, None]:
    """Store every file the database does not have, and mend damaged bytes; `prefer_disk` settles differences."""
    if not dry_run:
        await store.database.create_tables()
    executor = executor or InlineExecutor(store)
    jobs = jobs // executor.worker_count or 1
    work = partial(executor.run, _migrate, prefer_disk=prefer_disk, dry_run=dry_run, jobs=jobs)
    async with aclosing(results_of(for_all_files(store, work), executor.max_pending)) as results:
        async for result in results:
            yield result


async def _migrate(
    store: UploadStore, entries: list[Entry], *, prefer_disk: bool, dry_run: bool, jobs: int
) -> list[Result]:
    """Store the new ones of some files on disk, and compare the others with their records."""
    uploads, results = sort_entries(entries)
    by_name = {entry.name: entry for entry in uploads}
    known = await _known(store, by_name, dry_run=dry_run)
    new = [entry for entry in uploads if entry.name not in known]
    would = (Result(entry.name, Outcome.MIGRATED, entry.size, "would be migrated") for entry in new)
    results += would if dry_run else await _store(store, new, jobs)
    compare = partial(_compare, store, prefer_disk=prefer_disk, dry_run=dry_run)
    for batch in in_batches(((name, min(record.size, CHUNK)) for name, record in known.items()), SMALL_AT_ONCE):
        found = await store.database.blobs.fetch(name for name, _ in batch)
        checks = (until_unchanged(store, one, partial(compare, by_name[name])) for name, one in found.items())
        async with aclosing(run_unordered(checks, jobs)) as compared:
            results += [result async for result in compared]
    return results


async def _known(store: UploadStore, wanted: Iterable[str], *, dry_run: bool) -> dict[str, Record]:
    try:
        return await store.database.catalogue.find(wanted)
    except SchemaError:
        if not dry_run:
            raise
        return {}  # a real run makes the tables


async def _store(store: UploadStore, new: list[Entry], jobs: int) -> list[Result]:
    small = [entry.name for entry in new if entry.size <= LARGE]
    read = await store.threads.run(read_small, store.disk, small)
    results = [of_error(one.name, one.error) for one in read if one.error is not None]
    files = [one.file for one in read if one.file is not None]
    stored = await store.database.store_many(files)
    for file in files:
        if file.name in stored:
            results.append(Result(file.name, Outcome.MIGRATED, file.size))
        else:
            results.append(problem(file.name, Outcome.FAILED, "it was saved or deleted meanwhile; run again"))
    large = (_adopt(store, entry.name) for entry in new if entry.size > LARGE)
    async with aclosing(run_unordered(large, jobs)) as adopted:
        return results + [result async for result in adopted]


async def _adopt(store: UploadStore, name: str) -> Result:
    try:
        record = await store.reconciler.adopt(name)
    except (SelfHealError, OSError) as error:
        return of_error(name, error)
    return Result(name, Outcome.MIGRATED, record.size)


async def _compare(store: UploadStore, entry: Entry, found: Found, *, prefer_disk: bool, dry_run: bool) -> Result:
    record, name, size = found.record, entry.name, entry.size
    if record.is_deleted:
        return await deleted_on_disk(store, name)
    try:
        fault = await fault_in_database(store.database, found)
        is_same = record.matches(entry.modified_ns, size)
        if fault or not is_same:
            is_same = await store.threads.run(store.disk.digest, name) == record.sha256
        if is_same and not fault:
            return Result(name, Outcome.OK, record.size)
        if is_same and size != record.size:
            detail = f"it has {size} bytes, but {record.size} are recorded; delete it and save it again"
            return problem(name, Outcome.CORRUPT_IN_DATABASE, detail)
        if not is_same and not prefer_disk:
            detail = fault or "the disk's bytes are not the recorded ones; --prefer disk takes them"
            return problem(name, Outcome.CORRUPT_IN_DATABASE if fault else Outcome.DIFFERS, detail, record.size)
        if not dry_run:
            reconciler = store.reconciler
            await (reconciler.mend(record) if is_same else reconciler.adopt(name, overwrite=True))
    except (SelfHealError, OSError) as error:
        return of_error(name, error)
    return Result(name, Outcome.MIGRATED, size, "mended" if is_same else "the disk's bytes were taken")
