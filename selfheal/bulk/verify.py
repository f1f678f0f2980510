"""Every byte on both sides, compared with what was recorded."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from .. import names
from ..content.sources import CHUNK
from ..disk.directory import UploadsDirectory
from ..disk.listing import Entry
from ..errors import CorruptBlob, NotStored, SelfHealError
from ..healing.batch_restore import LARGE_AT_ONCE, SMALL_AT_ONCE, Landed, Landing, Wanted, in_batches
from ..sql.models import Found, Record
from ..store import UploadStore
from .outcomes import Outcome, Result, Step, each, of_error, problem, results_of, sort, split, told
from .process_pool import Alone, Workers
from .reading import fault_in_database, is_sound
from .walk import NAMES_AT_ONCE, digest_of, on_disk, settled, still_there


async def verify(
    store: UploadStore, *, drill: bool = False, jobs: int = 4, workers: Workers | None = None
) -> AsyncGenerator[Result, None]:
    """Compare every byte on both sides with what was recorded; with `drill` also restore everything, elsewhere.

    Changes nothing. Raises `DatabaseUnavailable`.
    """
    workers = workers or Alone(store)
    jobs = jobs // workers.count or 1
    compare = partial(workers.run, _compare, drill=drill, jobs=jobs)
    for steps in (_recorded(store, compare), on_disk(store, partial(workers.run, _look_for_others))):
        async with aclosing(results_of(steps, workers.at_once)) as results:
            async for result in results:
                yield result


async def _recorded(store: UploadStore, compare: Callable[[list[Wanted]], Step]) -> AsyncGenerator[Step, None]:
    async with aclosing(store.database.key_ranges(NAMES_AT_ONCE)) as key_ranges:
        async for key_range in key_ranges:
            valid, wrong = split(await store.database.names_in(key_range))
            yield told(wrong)
            for batch in in_batches(valid, LARGE_AT_ONCE):
                yield compare(batch)


async def _compare(store: UploadStore, wanted: list[Wanted], *, drill: bool, jobs: int) -> list[Result]:
    """Some living records and their files."""
    results: list[Result] = []
    for batch in in_batches(((name, min(size, CHUNK)) for name, size in wanted), SMALL_AT_ONCE):
        found = list((await store.database.fetch(name for name, _ in batch)).values())
        drilled = await _drill(store, found, jobs) if drill else {}
        looking = (store.threads.run(_well, store.disk, found[job::jobs]) for job in range(jobs))
        well = {one.name: one for some in await asyncio.gather(*looking) for one in some}
        checks = (settled(store, one, partial(_verify, store)) for one in found if one.record.name not in well)
        async with aclosing(each(jobs, checks)) as verified:
            looked_at = [one async for one in verified if one is not None]
        results += [drilled.get(one.name, one) for one in itertools.chain(well.values(), looked_at)]
    return results


def _well(disk: UploadsDirectory, found: Iterable[Found]) -> list[Result]:
    """Those of one chunk that are whole on both sides; whatever else may be the matter is looked at one by one."""
    well = []
    for one in found:
        name = one.record.name
        with contextlib.suppress(SelfHealError, OSError):
            if not one.record.is_deleted and is_sound(one) and digest_of(disk, name) == one.record.sha256:
                well.append(Result(name, Outcome.OK, one.record.size))
    return well


async def _look_for_others(store: UploadStore, entries: list[Entry]) -> list[Result]:
    """Files on disk that have no living record."""
    records = await store.database.find_many(entry.name for entry in entries if _is_text(entry.name))
    uploads, wrong = sort(entry for entry in entries if not _is_living(records.get(entry.name)))
    return wrong + [
        await still_there(store, one.name) if one.name in records else _not_backed_up(one) for one in uploads
    ]


async def _verify(store: UploadStore, found: Found) -> Result | None:
    record = found.record
    if record.is_deleted:
        return None  # meanwhile: the walk finds it if it is still on disk
    try:
        fault = await fault_in_database(store.database, found)
        if fault:
            return problem(record.name, Outcome.CORRUPT_IN_DATABASE, fault, record.size)
        digest = await store.threads.run(digest_of, store.disk, record.name)
    except (SelfHealError, OSError) as error:
        return of_error(record.name, error)
    if digest is None:
        return problem(record.name, Outcome.MISSING_ON_DISK, "`selfheal restore` brings it back", record.size)
    if digest != record.sha256:
        detail = "the disk's bytes are not the recorded ones; `selfheal restore --verify` heals them"
        return problem(record.name, Outcome.DIFFERS, detail, record.size)
    return Result(record.name, Outcome.OK, record.size)


async def _drill(store: UploadStore, found: Sequence[Found], jobs: int) -> dict[str, Result]:
    """Restore records into an empty directory, compare, and throw it away; a result for each name that went wrong."""
    wrong: dict[str, Result] = {}
    wanted = [(one.record.name, one.record.size) for one in found]
    with tempfile.TemporaryDirectory(prefix="selfheal-drill-") as place:
        elsewhere = UploadsDirectory(place, threads=store.threads)
        async with aclosing(Landing(elsewhere, store.database, jobs).land(wanted)) as batches:
            async for landed in batches:
                for one in await store.threads.run(_drilled, elsewhere, landed):
                    if one.error is not None and not isinstance(one.error, NotStored):
                        wrong[one.name] = of_error(one.name, one.error)
    return wrong


def _drilled(elsewhere: UploadsDirectory, landed: Iterable[Landed]) -> list[Landed]:
    """Compare what was restored in a drill, and throw it away."""
    return [one if one.record is None or one.error else _compared(elsewhere, one, one.record) for one in landed]


def _compared(elsewhere: UploadsDirectory, one: Landed, record: Record) -> Landed:
    if digest_of(elsewhere, record.name) != record.sha256:
        return replace(one, error=CorruptBlob(record.name, "what was restored in the drill has other bytes"))
    elsewhere.remove(record.name)
    return one


def _not_backed_up(entry: Entry) -> Result:
    detail = "it is not backed up; `selfheal migrate` brings it in"
    return problem(entry.name, Outcome.MISSING_IN_DATABASE, detail, entry.size)


def _is_living(record: Record | None) -> bool:
    return record is not None and not record.is_deleted


def _is_text(name: str) -> bool:
    """Whether a database can be asked for a name; a file's name may hold bytes that are no text."""
    return names.is_valid(name) or name.isprintable()
