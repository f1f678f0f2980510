"""Everything, database → disk: what is missing, and with `verify` what differs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from .disk import UploadsDirectory
from .errors import NotStored, SelfHealError, Unsettled
from .flight import ahead, in_order
from .landing import LARGE_AT_ONCE, Landed, Landing, Wanted, in_batches
from .listing import Listing
from .outcomes import Outcome, Result, Step, Survey, all_present, each, of_error, results_of, survey, told
from .records import Page, Record, Stretch
from .sides import NAMES_AT_ONCE, digest_of
from .store import UploadStore
from .workers import Alone, Workers

Work = Callable[[list[Wanted]], Step]
Looked = tuple[int, int, list[Stretch]]
"""How many names, of how many bytes, are all there in some stretches; and the other stretches."""
Look = Callable[[Sequence[Stretch]], Coroutine[Any, Any, Looked]]
STRETCHES_AT_ONCE = 16
"""Stretches that one process looks at, one after the other: a directory may be read once for all of them."""


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
    look = partial(workers.run, _look)
    surveys = _surveys(store) if verify else _quick_surveys(store, look, workers.at_once)
    async with aclosing(results_of(_steps(surveys, land, heal), workers.at_once)) as results:
        async for result in results:
            yield result
    async with aclosing(_remove_lingering(store, dry_run=dry_run)) as removed:
        async for result in removed:
            yield result


async def _steps(surveys: AsyncGenerator[Survey, None], land: Work, heal: Work) -> AsyncGenerator[Step, None]:
    """What is to be done for all that was found."""
    async with aclosing(ahead(surveys)) as found:
        async for one in found:
            yield told(one.wrong)
            for batch in in_batches(one.missing, LARGE_AT_ONCE):
                yield land(batch)
            for batch in in_batches(one.present, LARGE_AT_ONCE):
                yield heal(batch)


async def _quick_surveys(store: UploadStore, look: Look, at_once: int) -> AsyncGenerator[Survey, None]:
    """Names are looked at one by one only where a stretch of them is not all there."""
    listing = Listing(store.disk)
    async with aclosing(in_order(_looks(store, look), at_once)) as looks:
        async for count, size, others in looks:
            yield Survey([], [], _there(count, size))
            for stretch in others:
                found = await store.threads.run(survey, listing, await store.database.names_in(stretch))
                present = _there(len(found.present), sum(size for _, size in found.present))
                yield Survey([], found.missing, found.wrong + present)


async def _looks(store: UploadStore, look: Look) -> AsyncGenerator[Coroutine[Any, Any, Looked], None]:
    held: list[Stretch] = []
    async with aclosing(store.database.stretches(NAMES_AT_ONCE)) as stretches:
        async for stretch in stretches:
            held.append(stretch)
            if len(held) == STRETCHES_AT_ONCE or stretch.stop is None:
                yield look(held)
                held = []


async def _look(store: UploadStore, stretches: Sequence[Stretch]) -> Looked:
    listing = Listing(store.disk)
    count, size, others = 0, 0, []
    async with aclosing(ahead(_pages(store, stretches))) as pages:
        async for stretch, page in pages:
            if await store.threads.run(all_present, listing, page):
                count, size = count + page.count, size + int(page.size)
            else:
                others.append(stretch)
    return count, size, others


async def _pages(store: UploadStore, stretches: Sequence[Stretch]) -> AsyncGenerator[tuple[Stretch, Page], None]:
    for stretch in stretches:
        yield stretch, await store.database.page(stretch)


def _there(count: int, size: int) -> list[Result]:
    return [Result("", Outcome.OK, size, count=count)] if count else []


async def _surveys(store: UploadStore, *, deleted: bool = False) -> AsyncGenerator[Survey, None]:
    listing = Listing(store.disk)
    async with aclosing(ahead(store.database.names(deleted=deleted, size=NAMES_AT_ONCE))) as pages:
        async for page in pages:
            yield await store.threads.run(survey, listing, page)


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
