"""Restore: database → disk. Missing files are restored; with `verify` also those whose bytes differ."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..aio.streams import prefetch, run_in_order, run_unordered
from ..disk.directory import UploadsDirectory
from ..disk.exclusions import Exclusions
from ..disk.listing import Listing
from ..errors import FileChanged, NotStored, SelfHealError
from ..healing.batch_restore import LARGE_AT_ONCE, BatchRestorer, Restored, Wanted, in_batches
from ..sql.models import KeyRange, Record, Summary
from ..store import UploadStore
from .disk_files import LARGE, digest_on_disk
from .one_by_one import FAILURES, in_halves
from .outcomes import Outcome, Result, Step, done, of_error, results_of
from .process_pool import Executor, InlineExecutor
from .survey import all_present, survey

Work = Callable[[list[Wanted]], Step]
NAMES_AT_ONCE = 8192  # names in one query, without their bytes
RANGES_AT_ONCE = 16
"""Ranges of names that one process looks at, one after the other: a directory may be read once for all of them."""


async def restore(
    store: UploadStore,
    *,
    verify: bool = False,
    exclude: Iterable[str] = (),
    dry_run: bool = False,
    jobs: int = 4,
    executor: Executor | None = None,
    names_at_once: int = NAMES_AT_ONCE,
    ranges_at_once: int = RANGES_AT_ONCE,
) -> AsyncGenerator[Result, None]:
    """Restore what is missing, with `verify` also what differs; remove deleted names from the disk."""
    executor = executor or InlineExecutor(store)
    jobs = jobs // executor.worker_count or 1
    restore_files = partial(executor.run, _would_restore) if dry_run else partial(executor.run, _restore, jobs=jobs)
    heal = partial(executor.run, _heal_all, dry_run=dry_run, jobs=jobs) if verify else _keep_all
    remove = partial(executor.run, _remove_all, dry_run=dry_run)
    exclude = tuple(exclude)
    if verify or exclude:
        plans = _plan_all(store, names_at_once, Exclusions(exclude))
    else:
        plans = _plan_missing(store, executor, names_at_once, ranges_at_once)
    async with aclosing(results_of(_steps(plans, restore_files, heal, remove), executor.max_pending)) as results:
        async for result in results:
            yield result


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to do with some names, and the results for others that are known already."""

    known: list[Result]
    restore: list[Wanted] = field(default_factory=list)
    heal: list[Wanted] = field(default_factory=list)
    remove: list[Wanted] = field(default_factory=list)


async def _steps(
    plans: AsyncGenerator[_Plan, None], restore_files: Work, heal: Work, remove: Work
) -> AsyncGenerator[Step, None]:
    async with aclosing(prefetch(plans)) as prefetched:
        async for plan in prefetched:
            if plan.known:
                yield done(plan.known)
            for work, wanted in ((restore_files, plan.restore), (heal, plan.heal), (remove, plan.remove)):
                for batch in in_batches(wanted, LARGE_AT_ONCE):
                    yield work(batch)


async def _plan_all(store: UploadStore, names_at_once: int, left_out: Exclusions) -> AsyncGenerator[_Plan, None]:
    catalogue, listing = store.database.catalogue, Listing(store.disk)
    async with aclosing(prefetch(catalogue.key_ranges(names_at_once))) as key_ranges:
        async for key_range in key_ranges:
            living = await store.threads.run(survey, listing, await catalogue.names_in(key_range), left_out)
            yield _Plan(living.others, living.missing, living.present)
            yield await _plan_removal(store, Listing(store.disk), key_range, left_out)


async def _plan_missing(
    store: UploadStore, executor: Executor, names_at_once: int, ranges_at_once: int
) -> AsyncGenerator[_Plan, None]:
    """Names are looked at one by one only in ranges that are not all there."""
    limit = executor.max_pending if executor.worker_count > 1 else 1  # each has the names of some directories in memory
    looks, all_names = _looks(store, executor, names_at_once, ranges_at_once), Exclusions()
    async with aclosing(run_in_order(looks, limit)) as summarized:
        async for ranges in summarized:
            yield _Plan(_present(ranges.count, ranges.size))
            listing = Listing(store.disk)
            for key_range in ranges.incomplete:
                names = await store.database.catalogue.names_in(key_range)
                living = await store.threads.run(survey, listing, names, all_names)
                present = _present(len(living.present), sum(size for _, size in living.present))
                yield _Plan(living.others + present, living.missing)
            for key_range in ranges.with_deleted:
                yield await _plan_removal(store, listing, key_range, all_names)


async def _plan_removal(store: UploadStore, listing: Listing, key_range: KeyRange, left_out: Exclusions) -> _Plan:
    """Deleted names that are still on disk; those that cannot be looked for are reported."""
    names = await store.database.catalogue.names_in(key_range, deleted=True)
    deleted = await store.threads.run(survey, listing, [(name, max(size, 0)) for name, size in names], left_out)
    return _Plan([one for one in deleted.others if one.outcome is Outcome.FAILED], remove=deleted.present)


@dataclass(frozen=True, slots=True)
class _Ranges:
    """A look at some ranges: `count` names of `size` bytes are there in all but the `incomplete` ones."""

    count: int
    size: int
    incomplete: list[KeyRange]
    with_deleted: list[KeyRange]


async def _looks(
    store: UploadStore, executor: Executor, names_at_once: int, ranges_at_once: int
) -> AsyncGenerator[Coroutine[Any, Any, _Ranges], None]:
    ranges: list[KeyRange] = []
    async with aclosing(store.database.catalogue.key_ranges(names_at_once)) as key_ranges:
        async for key_range in key_ranges:
            ranges.append(key_range)
            if len(ranges) == ranges_at_once or key_range.stop is None:
                yield executor.run(_look_at, ranges)
                ranges = []


async def _look_at(store: UploadStore, key_ranges: Sequence[KeyRange]) -> _Ranges:
    listing = Listing(store.disk)
    count = size = 0
    incomplete, with_deleted = list[KeyRange](), list[KeyRange]()
    async with aclosing(prefetch(_summaries(store, key_ranges))) as summaries:
        async for key_range, summary in summaries:
            if summary.deleted:
                with_deleted.append(key_range)
            if await store.threads.run(all_present, listing, summary):
                count, size = count + summary.count, size + int(summary.size)
            else:
                incomplete.append(key_range)
    return _Ranges(count, size, incomplete, with_deleted)


async def _summaries(
    store: UploadStore, key_ranges: Iterable[KeyRange]
) -> AsyncGenerator[tuple[KeyRange, Summary], None]:
    for key_range in key_ranges:
        yield key_range, await store.database.catalogue.summary(key_range)


def _present(count: int, size: int) -> list[Result]:
    return [Result("", Outcome.OK, size, count=count)] if count else []


async def _keep_all(present: list[Wanted]) -> list[Result]:
    return _present(len(present), sum(size for _, size in present))


async def _restore(store: UploadStore, missing: list[Wanted], *, jobs: int) -> list[Result]:
    parts, refused = await in_halves(partial(_restore_once, store, jobs), missing)
    return [one for part in parts for one in part] + [of_error(name, error) for (name, _), error in refused]


async def _restore_once(store: UploadStore, jobs: int, missing: Sequence[Wanted]) -> list[Result]:
    async with aclosing(BatchRestorer(store.disk, store.database, jobs).restore(missing)) as batches:
        return [_restored(one) async for batch in batches for one in batch]


def _restored(one: Restored) -> Result:
    if one.record is not None and one.error is None:
        return Result(one.name, Outcome.RESTORED, one.record.size)
    if isinstance(one.error, NotStored):
        return Result(one.name, Outcome.DELETED, 0, str(one.error))
    return of_error(one.name, one.error or FileChanged("it changed while it was restored"))


async def _would_restore(store: UploadStore, missing: list[Wanted]) -> list[Result]:
    results = []
    for name, size in missing:
        try:
            await store.threads.run(store.disk.digest, name)  # raises if the name is taken by what is not a file
            results.append(Result(name, Outcome.RESTORED, size, "it would be restored"))
        except (SelfHealError, OSError) as error:
            results.append(of_error(name, error))
    return results


async def _heal_all(store: UploadStore, present: list[Wanted], *, dry_run: bool, jobs: int) -> list[Result]:
    parts, refused = await in_halves(store.database.catalogue.find, [name for name, _ in present])
    found = {name: record for part in parts for name, record in part.items()}
    results, records = [of_error(name, error) for name, error in refused], list(found.values())
    hashing = (store.threads.run(_as_recorded, store.disk, records[job::jobs]) for job in range(jobs))
    same = set[str]().union(*await asyncio.gather(*hashing))
    work = (_heal(store, record, dry_run=dry_run) for record in records if record.name not in same)
    results += (Result(name, Outcome.OK, found[name].size) for name in same)
    async with aclosing(run_unordered(work, jobs)) as healed:
        return results + [result async for result in healed]


def _as_recorded(disk: UploadsDirectory, records: Iterable[Record]) -> set[str]:
    """Return the names whose file is what its record says; others, and large ones, are looked at one by one."""
    same = set()
    for record in records:
        with contextlib.suppress(SelfHealError, OSError):
            file = None if record.is_deleted or record.size > LARGE else disk.open(record.name)
            if file is not None:
                with file:
                    if record.matches(file.modified_ns, file.size) and file.sha256() == record.sha256:
                        same.add(record.name)
    return same


async def _heal(store: UploadStore, record: Record, *, dry_run: bool) -> Result:
    name = record.name
    try:
        is_same = await digest_on_disk(store, name) == record.sha256
        if not is_same:
            now = await store.database.find(name)
            if now is None or now.is_deleted:
                return Result(name, Outcome.DELETED, 0, "it was deleted meanwhile")
            if now.generation != record.generation:
                return await _heal(store, now, dry_run=dry_run)
            if not dry_run:
                await store.reconciler.heal(record)
        if not dry_run:
            await store.reconciler.check(name)
    except FAILURES as error:
        return of_error(name, error)
    if is_same:
        return Result(name, Outcome.OK, record.size)
    kept = "would be" if dry_run else "are"
    detail = f"the disk's bytes differ; they {kept} replaced, and kept as a version"
    return Result(name, Outcome.RESTORED, record.size, detail)


async def _remove_all(store: UploadStore, deleted: list[Wanted], *, dry_run: bool) -> list[Result]:
    results = []
    detail = "it was deleted; its file would be removed" if dry_run else "it was deleted; its file is removed"
    for name, _ in deleted:
        try:
            if not dry_run:
                await store.reconciler.check(name)
            results.append(Result(name, Outcome.DELETED, 0, detail))
        except FAILURES as error:
            results.append(of_error(name, error))
    return results
