"""Verify: is everything backed up, and can it be restored?"""

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from .. import names
from ..aio.streams import run_unordered
from ..content.sources import CHUNK
from ..disk.directory import UploadsDirectory
from ..disk.listing import Entry
from ..errors import CorruptBlob, NotStored, SelfHealError
from ..healing.batch_restore import LARGE_AT_ONCE, SMALL_AT_ONCE, BatchRestorer, Restored, Wanted, in_batches
from ..sql.models import Found
from ..store import UploadStore
from .disk_files import deleted_on_disk, for_all_files, sort_entries
from .outcomes import Outcome, Result, Step, done, of_error, problem, results_of
from .process_pool import Executor, InlineExecutor
from .soundness import fault_in_database, is_sound, until_unchanged
from .survey import split_valid

NAMES_AT_ONCE = 8192  # names in one query, without their bytes


async def verify(
    store: UploadStore, *, drill: bool = False, jobs: int = 4, executor: Executor | None = None
) -> AsyncGenerator[Result, None]:
    """Compare every byte with its record; with `drill`, restore all to another place. Changes nothing."""
    executor = executor or InlineExecutor(store)
    jobs = jobs // executor.worker_count or 1
    compare = partial(executor.run, _verify_all, drill=drill, jobs=jobs)
    for steps in (_recorded(store, compare), for_all_files(store, partial(executor.run, _find_unrecorded))):
        async with aclosing(results_of(steps, executor.max_pending)) as results:
            async for result in results:
                yield result


async def _recorded(store: UploadStore, compare: Callable[[list[Wanted]], Step]) -> AsyncGenerator[Step, None]:
    catalogue = store.database.catalogue
    async with aclosing(catalogue.key_ranges(NAMES_AT_ONCE)) as key_ranges:
        async for key_range in key_ranges:
            valid, wrong = split_valid(await catalogue.names_in(key_range))
            yield done(wrong)
            for batch in in_batches(valid, LARGE_AT_ONCE):
                yield compare(batch)


async def _verify_all(store: UploadStore, wanted: list[Wanted], *, drill: bool, jobs: int) -> list[Result]:
    """Verify some living records and their files."""
    results: list[Result] = []
    for batch in in_batches(((name, min(size, CHUNK)) for name, size in wanted), SMALL_AT_ONCE):
        found = list((await store.database.blobs.fetch(name for name, _ in batch)).values())
        drilled = await _drill(store, found, jobs) if drill else {}
        looks = (store.threads.run(_good, store.disk, found[job::jobs]) for job in range(jobs))
        good = {one.name: one for some in await asyncio.gather(*looks) for one in some}
        checks = (until_unchanged(store, one, partial(_verify, store)) for one in found if one.record.name not in good)
        async with aclosing(run_unordered(checks, jobs)) as verified:
            others = [one async for one in verified if one is not None]
        results += [drilled.get(one.name, one) for one in itertools.chain(good.values(), others)]
    return results


def _good(disk: UploadsDirectory, found: Iterable[Found]) -> list[Result]:
    """Return results for the records of one chunk that are good on disk and in the database; no others."""
    good = []
    for one in found:
        name = one.record.name
        with contextlib.suppress(SelfHealError, OSError):
            if not one.record.is_deleted and is_sound(one) and disk.digest(name) == one.record.sha256:
                good.append(Result(name, Outcome.OK, one.record.size))
    return good


async def _find_unrecorded(store: UploadStore, entries: list[Entry]) -> list[Result]:
    """Report the files on disk that have no living record."""
    records = await store.database.catalogue.find(entry.name for entry in entries if _is_text(entry.name))
    living = {record.name for record in records.values() if not record.is_deleted}
    uploads, results = sort_entries(entry for entry in entries if entry.name not in living)
    for entry in uploads:
        detail = "it is not backed up; `selfheal migrate` stores it"
        unknown = problem(entry.name, Outcome.MISSING_IN_DATABASE, detail, entry.size)
        results.append(await deleted_on_disk(store, entry.name) if entry.name in records else unknown)
    return results


async def _verify(store: UploadStore, found: Found) -> Result | None:
    record = found.record
    if record.is_deleted:
        return None  # deleted meanwhile: the walk reports it if it is still on disk
    try:
        fault = await fault_in_database(store.database, found)
        if fault:
            return problem(record.name, Outcome.CORRUPT_IN_DATABASE, fault, record.size)
        digest = await store.threads.run(store.disk.digest, record.name)
    except (SelfHealError, OSError) as error:
        return of_error(record.name, error)
    if digest is None:
        return problem(record.name, Outcome.MISSING_ON_DISK, "`selfheal restore` brings it back", record.size)
    if digest != record.sha256:
        detail = "the disk's bytes are not the recorded ones; `selfheal restore --verify` heals them"
        return problem(record.name, Outcome.DIFFERS, detail, record.size)
    return Result(record.name, Outcome.OK, record.size)


async def _drill(store: UploadStore, found: Sequence[Found], jobs: int) -> dict[str, Result]:
    """Restore records into a temporary directory and compare; return a result for each name that failed."""
    failed: dict[str, Result] = {}
    wanted = [(one.record.name, one.record.size) for one in found]
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


def _is_text(name: str) -> bool:
    """Whether a database can be asked for a file's name, which may have bytes that are not text."""
    return names.is_valid(name) or name.isprintable()
