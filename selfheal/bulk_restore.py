"""Everything, database → disk: what is missing, and with `verify` what differs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from .disk import UploadsDirectory
from .errors import NotStored, SelfHealError, Unsettled
from .flight import ahead
from .landing import FILES_AT_ONCE, Landed, Landing, Wanted
from .listing import Listing
from .outcomes import Outcome, Result, Survey, each, of_error, survey
from .records import Record
from .sides import NAMES_AT_ONCE, digest_of
from .store import UploadStore


async def restore(
    store: UploadStore, *, verify: bool = False, dry_run: bool = False, jobs: int = 4
) -> AsyncGenerator[Result, None]:
    """Bring back every living record whose file is missing; with `verify`, also heal those whose bytes differ.

    What was deleted and is still on disk is removed. Raises `DatabaseUnavailable`.
    """
    landing = Landing(store.disk, store.database, jobs)
    async with aclosing(ahead(_surveys(store))) as surveys:
        async for found in surveys:
            for result in found.wrong:
                yield result
            async with aclosing(_land(store, landing, found.missing, dry_run=dry_run)) as landed:
                async for result in landed:
                    yield result
            if verify:
                async with aclosing(_heal_all(store, found.present, jobs, dry_run=dry_run)) as healed:
                    async for result in healed:
                        yield result
            elif found.present:
                size = sum(size for _, size in found.present)
                yield Result("", Outcome.OK, size, count=len(found.present))
    async with aclosing(_remove_lingering(store, dry_run=dry_run)) as removed:
        async for result in removed:
            yield result


async def _surveys(store: UploadStore, *, deleted: bool = False) -> AsyncGenerator[Survey, None]:
    listing = Listing(store.disk)
    async with aclosing(ahead(store.database.names(deleted=deleted, size=NAMES_AT_ONCE))) as pages:
        async for page in pages:
            yield await store.threads.run(survey, listing, page)


async def _land(
    store: UploadStore, landing: Landing, missing: list[Wanted], *, dry_run: bool
) -> AsyncGenerator[Result, None]:
    if dry_run:
        for result in await store.threads.run(_would_land, store.disk, missing):
            yield result
        return
    async with aclosing(landing.land(missing)) as batches:
        async for batch in batches:
            for one in batch:
                yield _landed(one)


async def _heal_all(
    store: UploadStore, present: list[Wanted], jobs: int, *, dry_run: bool
) -> AsyncGenerator[Result, None]:
    for start in range(0, len(present), FILES_AT_ONCE):
        found = await store.database.find_many(name for name, _ in present[start : start + FILES_AT_ONCE])
        records = list(found.values())
        hashing = (store.threads.run(_as_recorded, store.disk, records[job::jobs]) for job in range(jobs))
        same = set[str]().union(*await asyncio.gather(*hashing))
        for name in same:
            yield Result(name, Outcome.OK, found[name].size)
        work = (_heal(store, record, dry_run=dry_run) for record in records if record.name not in same)
        async with aclosing(each(jobs, work)) as healed:
            async for result in healed:
                yield result


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


def _would_land(disk: UploadsDirectory, missing: Iterable[Wanted]) -> list[Result]:
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
