"""Everything, database → disk: what is missing, and with `verify` what differs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
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
    remove = partial(workers.run, _remove_all, dry_run=dry_run)
    found = _everything(store) if verify else _quickly(store, partial(workers.run, _look), workers.at_once)
    steps = _steps(found, land=land, heal=heal, remove=remove)
    async with aclosing(results_of(steps, workers.at_once)) as results:
        async for result in results:
            yield result


@dataclass(frozen=True, slots=True)
class _Found(Survey):
    """What there is to do: bring back what is `missing`, hash what is `present`, remove what was `deleted`."""

    deleted: list[Wanted] = field(default_factory=list)


async def _steps(
    found: AsyncGenerator[_Found, None], *, land: Work, heal: Work, remove: Work
) -> AsyncGenerator[Step, None]:
    """What is to be done for all that was found."""
    async with aclosing(ahead(found)) as coming:
        async for one in coming:
            yield told(one.told)
            for work, wanted in ((land, one.missing), (heal, one.present), (remove, one.deleted)):
                for batch in in_batches(wanted, LARGE_AT_ONCE):
                    yield work(batch)


async def _everything(store: UploadStore) -> AsyncGenerator[_Found, None]:
    """Names are looked at one by one."""
    listing = Listing(store.disk)
    async with aclosing(ahead(store.database.stretches(NAMES_AT_ONCE))) as stretches:
        async for stretch in stretches:
            living = await _survey(store, listing, stretch)
            yield _Found(living.present, living.missing, living.told)
            yield await _lingering(store, listing, stretch)


async def _quickly(store: UploadStore, look: Look, at_once: int) -> AsyncGenerator[_Found, None]:
    """Names are looked at one by one only where a stretch of them is not all there; what is there is not hashed."""
    listing = Listing(store.disk)
    async with aclosing(in_order(_looks(store, look), at_once)) as looks:
        async for looked in looks:
            yield _Found([], [], _there(looked.count, looked.size))
            for stretch in looked.others:
                living = await _survey(store, listing, stretch)
                there = _there(len(living.present), sum(size for _, size in living.present))
                yield _Found([], living.missing, living.told + there)
            for stretch in looked.with_deleted:
                yield await _lingering(store, listing, stretch)


async def _lingering(store: UploadStore, listing: Listing, stretch: Stretch) -> _Found:
    """Deleted names that are still on disk; where nobody can tell whether they are, that is told."""
    dead = await _survey(store, listing, stretch, deleted=True)
    return _Found([], [], [one for one in dead.told if one.outcome is Outcome.FAILED], dead.present)


async def _survey(store: UploadStore, listing: Listing, stretch: Stretch, *, deleted: bool = False) -> Survey:
    return await store.threads.run(survey, listing, await store.database.names_in(stretch, deleted=deleted))


@dataclass(frozen=True, slots=True)
class _Looked:
    """What a quick look at some stretches told: in all but the `others` all is there, `count` names of `size` bytes."""

    count: int
    size: int
    others: list[Stretch]
    with_deleted: list[Stretch]


Look = Callable[[Sequence[Stretch]], Coroutine[Any, Any, _Looked]]


async def _looks(store: UploadStore, look: Look) -> AsyncGenerator[Coroutine[Any, Any, _Looked], None]:
    held: list[Stretch] = []
    async with aclosing(store.database.stretches(NAMES_AT_ONCE)) as stretches:
        async for stretch in stretches:
            held.append(stretch)
            if len(held) == STRETCHES_AT_ONCE or stretch.stop is None:
                yield look(held)
                held = []


async def _look(store: UploadStore, stretches: Sequence[Stretch]) -> _Looked:
    listing = Listing(store.disk)
    count = size = 0
    others, with_deleted = list[Stretch](), list[Stretch]()
    async with aclosing(ahead(_pages(store, stretches))) as pages:
        async for stretch, page in pages:
            if page.deleted:
                with_deleted.append(stretch)
            if await store.threads.run(all_present, listing, page):
                count, size = count + page.count, size + int(page.size)
            else:
                others.append(stretch)
    return _Looked(count, size, others, with_deleted)


async def _pages(store: UploadStore, stretches: Sequence[Stretch]) -> AsyncGenerator[tuple[Stretch, Page], None]:
    for stretch in stretches:
        yield stretch, await store.database.page(stretch)


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
