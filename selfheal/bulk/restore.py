"""Everything, database → disk: what is missing, and with `verify` what differs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..aio.single_flight import ahead, in_order
from ..disk.directory import UploadsDirectory
from ..disk.listing import Listing
from ..errors import NotStored, SelfHealError, Unsettled
from ..healing.batch_restore import LARGE_AT_ONCE, Landed, Landing, Wanted, in_batches
from ..sql.models import KeyRange, Record, Summary
from ..store import UploadStore
from .outcomes import Outcome, Result, Step, all_present, each, of_error, results_of, survey, told
from .process_pool import Alone, Workers
from .walk import NAMES_AT_ONCE, digest_of

Work = Callable[[list[Wanted]], Step]
RANGES_AT_ONCE = 16
"""Ranges of names that one process looks at, one after the other: a directory may be read once for all of them."""


async def restore(
    store: UploadStore,
    *,
    verify: bool = False,
    dry_run: bool = False,
    jobs: int = 4,
    workers: Workers | None = None,
) -> AsyncGenerator[Result, None]:
    """Bring back every living record whose file is missing; with `verify`, also heal those whose bytes differ.

    What was deleted and is still on disk is removed. Raises `DatabaseUnavailable`.
    """
    workers = workers or Alone(store)
    jobs = jobs // workers.count or 1
    land = partial(workers.run, _would_land) if dry_run else partial(workers.run, _land, jobs=jobs)
    heal = partial(workers.run, _heal_all, dry_run=dry_run, jobs=jobs)
    remove = partial(workers.run, _remove_all, dry_run=dry_run)
    todo = _everything(store) if verify else _what_is_not_there(store, workers)
    async with aclosing(results_of(_steps(todo, land, heal, remove), workers.at_once)) as results:
        async for result in results:
            yield result


@dataclass(frozen=True, slots=True)
class _Todo:
    """What there is to do about some names, and what there is only to tell of others."""

    tell: list[Result]
    land: list[Wanted] = field(default_factory=list)
    heal: list[Wanted] = field(default_factory=list)
    remove: list[Wanted] = field(default_factory=list)


async def _steps(todo: AsyncGenerator[_Todo, None], land: Work, heal: Work, remove: Work) -> AsyncGenerator[Step, None]:
    async with aclosing(ahead(todo)) as coming:
        async for one in coming:
            if one.tell:
                yield told(one.tell)
            for work, wanted in ((land, one.land), (heal, one.heal), (remove, one.remove)):
                for batch in in_batches(wanted, LARGE_AT_ONCE):
                    yield work(batch)


async def _everything(store: UploadStore) -> AsyncGenerator[_Todo, None]:
    listing = Listing(store.disk)
    async with aclosing(ahead(store.database.key_ranges(NAMES_AT_ONCE))) as key_ranges:
        async for key_range in key_ranges:
            living = await store.threads.run(survey, listing, await store.database.names_in(key_range))
            yield _Todo(living.wrong, living.missing, living.present)
            yield await _lingering(store, Listing(store.disk), key_range)


async def _what_is_not_there(store: UploadStore, workers: Workers) -> AsyncGenerator[_Todo, None]:
    """Names are looked at one by one only where not all of a range is there."""
    at_once = workers.at_once if workers.count > 1 else 1  # each holds the names in some directories
    async with aclosing(in_order(_glances(store, workers), at_once)) as glances:
        async for glance in glances:
            yield _Todo(_there(glance.count, glance.size))
            listing = Listing(store.disk)
            for key_range in glance.others:
                living = await store.threads.run(survey, listing, await store.database.names_in(key_range))
                there = _there(len(living.present), sum(size for _, size in living.present))
                yield _Todo(living.wrong + there, living.missing)
            for key_range in glance.with_deleted:
                yield await _lingering(store, listing, key_range)


async def _lingering(store: UploadStore, listing: Listing, key_range: KeyRange) -> _Todo:
    """Deleted names that are still on disk; where nobody can tell whether they are, that is told."""
    names = await store.database.names_in(key_range, deleted=True)
    dead = await store.threads.run(survey, listing, [(name, max(size, 0)) for name, size in names])
    return _Todo([one for one in dead.wrong if one.outcome is Outcome.FAILED], remove=dead.present)


@dataclass(frozen=True, slots=True)
class _Glance:
    """Of some ranges: in all but the `others` all is there, `count` names of `size` bytes; some have deleted names."""

    count: int
    size: int
    others: list[KeyRange]
    with_deleted: list[KeyRange]


async def _glances(store: UploadStore, workers: Workers) -> AsyncGenerator[Coroutine[Any, Any, _Glance], None]:
    held: list[KeyRange] = []
    async with aclosing(store.database.key_ranges(NAMES_AT_ONCE)) as key_ranges:
        async for key_range in key_ranges:
            held.append(key_range)
            if len(held) == RANGES_AT_ONCE or key_range.stop is None:
                yield workers.run(_glance, held)
                held = []


async def _glance(store: UploadStore, key_ranges: Sequence[KeyRange]) -> _Glance:
    listing = Listing(store.disk)
    count = size = 0
    others, with_deleted = list[KeyRange](), list[KeyRange]()
    async with aclosing(ahead(_summaries(store, key_ranges))) as summaries:
        async for key_range, summary in summaries:
            if summary.deleted:
                with_deleted.append(key_range)
            if await store.threads.run(all_present, listing, summary):
                count, size = count + summary.count, size + int(summary.size)
            else:
                others.append(key_range)
    return _Glance(count, size, others, with_deleted)


async def _summaries(
    store: UploadStore, key_ranges: Iterable[KeyRange]
) -> AsyncGenerator[tuple[KeyRange, Summary], None]:
    for key_range in key_ranges:
        yield key_range, await store.database.summary(key_range)


def _there(count: int, size: int) -> list[Result]:
    return [Result("", Outcome.OK, size, count=count)] if count else []


async def _land(store: UploadStore, missing: list[Wanted], *, jobs: int) -> list[Result]:
    async with aclosing(Landing(store.disk, store.database, jobs).land(missing)) as batches:
        return [_landed(one) async for batch in batches for one in batch]


async def _heal_all(store: UploadStore, present: list[Wanted], *, dry_run: bool, jobs: int) -> list[Result]:
    found = await store.database.find_many(name for name, _ in present)
    records = list(found.values())
    hashing = (store.threads.run(_as_recorded, store.disk, records[job::jobs]) for job in range(jobs))
    same = set[str]().union(*await asyncio.gather(*hashing))
    work = (_heal(store, record, dry_run=dry_run) for record in records if record.name not in same)
    async with aclosing(each(jobs, work)) as healed:
        return [Result(name, Outcome.OK, found[name].size) for name in same] + [result async for result in healed]


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


async def _would_land(store: UploadStore, missing: list[Wanted]) -> list[Result]:
    return await store.threads.run(_look_at_each, store.disk, missing)


def _look_at_each(disk: UploadsDirectory, missing: Iterable[Wanted]) -> list[Result]:
    results = []
    for name, size in missing:
        try:
            digest_of(disk, name)  # says so if something that is not a file has the name
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
        is_same = await store.threads.run(digest_of, store.disk, name) == record.sha256
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


async def _remove_all(store: UploadStore, lingering: list[Wanted], *, dry_run: bool) -> list[Result]:
    return [await _remove(store, name, dry_run=dry_run) for name, _ in lingering]


async def _remove(store: UploadStore, name: str, *, dry_run: bool) -> Result:
    try:
        if not dry_run:
            await store.check(name)
    except (SelfHealError, OSError) as error:
        return of_error(name, error)
    detail = "it was deleted; its file would be removed" if dry_run else "it was deleted; its file is removed"
    return Result(name, Outcome.DELETED, 0, detail)
