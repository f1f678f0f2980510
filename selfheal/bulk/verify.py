"""Verify: is everything backed up, and can it be restored?"""

import tempfile
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from ..disk.directory import UploadsDirectory
from ..disk.exclusions import Exclusions
from ..disk.listing import Entry
from ..errors import CorruptBlob, NotStored
from ..healing.batch_restore import LARGE_AT_ONCE, BatchRestorer, Restored, Wanted, in_batches
from ..sql.models import Found
from ..store import UploadStore
from .disk_files import deleted_on_disk, differs, digest_on_disk, find_records, for_all_files, sort_entries
from .one_by_one import FAILURES, in_halves
from .outcomes import Outcome, Result, Step, done, of_error, problem, results_of
from .process_pool import Executor, InlineExecutor
from .soundness import check_all, fault_in_database
from .survey import split_valid

NAMES_AT_ONCE = 8192  # names in one query, without their bytes


async def verify(
    store: UploadStore,
    *,
    drill: bool = False,
    exclude: Iterable[str] = (),
    jobs: int = 4,
    executor: Executor | None = None,
) -> AsyncGenerator[Result, None]:
    """Compare every byte with its record; with `drill`, restore all to another place. Changes nothing."""
    executor = executor or InlineExecutor(store)
    jobs = jobs // executor.worker_count or 1
    left_out = Exclusions(exclude)
    compare = partial(executor.run, _verify_all, drill=drill, jobs=jobs)
    find_unrecorded = partial(executor.run, _find_unrecorded, left_out=left_out)
    for steps in (_recorded(store, compare, left_out), for_all_files(store, find_unrecorded)):
        async with aclosing(results_of(steps, executor.max_pending)) as results:
            async for result in results:
                yield result


async def _recorded(
    store: UploadStore, compare: Callable[[list[Wanted]], Step], left_out: Exclusions
) -> AsyncGenerator[Step, None]:
    catalogue = store.database.catalogue
    async with aclosing(catalogue.key_ranges(NAMES_AT_ONCE)) as key_ranges:
        async for key_range in key_ranges:
            valid, others = split_valid(await catalogue.names_in(key_range), left_out)
            yield done(others)
            for batch in in_batches(valid, LARGE_AT_ONCE):
                yield compare(batch)


async def _verify_all(store: UploadStore, wanted: list[Wanted], *, drill: bool, jobs: int) -> list[Result]:
    """Verify some living records and their files."""
    drilled = await _drill(store, wanted, jobs) if drill else {}
    return [drilled.get(one.name, one) for one in await check_all(store, wanted, jobs, partial(_verify, store))]


async def _find_unrecorded(store: UploadStore, entries: list[Entry], *, left_out: Exclusions) -> list[Result]:
    """Report the files on disk that have no living record."""
    known = await find_records(store, entries)
    living = {record.name for record in known.records.values() if not record.is_deleted}
    others = (entry for entry in entries if entry.name not in living)
    uploads, results = sort_entries(others, known, store.exclusions, left_out)
    for entry in uploads:
        detail = "it is not backed up; `selfheal migrate` stores it"
        unknown = problem(entry.name, Outcome.MISSING_IN_DATABASE, detail, entry.size)
        results.append(await deleted_on_disk(store, entry.name) if entry.name in known.records else unknown)
    return results


async def _verify(store: UploadStore, found: Found) -> Result | None:
    record = found.record
    if record.is_deleted:
        return None  # deleted meanwhile: the walk reports it if it is still on disk
    try:
        fault = await fault_in_database(store.database, found)
        if fault:
            return problem(record.name, Outcome.CORRUPT_IN_DATABASE, fault, record.size)
        digest = await digest_on_disk(store, record.name)
        if digest is not None and digest != record.sha256:
            return await differs(store, record)
    except FAILURES as error:
        return of_error(record.name, error)
    if digest is None:
        return problem(record.name, Outcome.MISSING_ON_DISK, "`selfheal restore` brings it back", record.size)
    return Result(record.name, Outcome.OK, record.size)


async def _drill(store: UploadStore, wanted: Sequence[Wanted], jobs: int) -> dict[str, Result]:
    """Restore records into a temporary directory and compare; return a result for each name that failed."""
    parts, refused = await in_halves(partial(_drill_once, store, jobs), wanted)
    failed = {name: result for part in parts for name, result in part.items()}
    return failed | {name: of_error(name, error) for (name, _), error in refused}


async def _drill_once(store: UploadStore, jobs: int, wanted: Sequence[Wanted]) -> dict[str, Result]:
    failed: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="selfheal-drill-") as place:
        directory = UploadsDirectory(place, threads=store.threads)
        async with aclosing(BatchRestorer(directory, store.database, jobs).restore(wanted)) as batches:
            async for restored in batches:
                for one in await store.threads.run(_compare_all, directory, restored):
                    if one.error is not None and not isinstance(one.error, NotStored):
                        failed[one.name] = of_error(one.name, one.error)
    return failed


def _compare_all(directory: UploadsDirectory, restored: Iterable[Restored]) -> list[Restored]:
    """Compare what a drill restored, and remove it."""
    compared = []
    for one in restored:
        if one.record is not None and one.error is None and directory.digest(one.name) != one.record.sha256:
            error = CorruptBlob(one.name, "what was restored in the drill has other bytes")
            compared.append(replace(one, error=error))
        else:
            directory.remove(one.name)
            compared.append(one)
    return compared
