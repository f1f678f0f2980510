"""Import: records, or uploads without records, from another place into the database; the disk is not touched."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from .. import names
from ..content.digests import Digests
from ..content.sources import Source
from ..db import ImageStorage
from ..errors import CorruptBlob, NewerTables, NotStored, SchemaError
from ..sql.models import Contents, Record, SmallFile, Version
from .lineage import continues, is_same
from .one_by_one import FAILURES, in_halves
from .outcomes import Outcome, Result, Step, done, of_error, problem, results_of
from .soundness import is_sound

TRIES = 3  # how often a name is tried that others change meanwhile
REASON = "imported; the name had other bytes"


@dataclass(frozen=True, slots=True)
class Incoming:
    """What a source has of a name: a `Record` with its history, or the `Contents` of an upload that has no record.

    `read` opens the bytes of one of them; `origin` is the name in the source if it had to be changed. `known` are the
    digests of an upload without a record; it is `small` if its bytes are in memory.
    """

    record: Contents
    versions: Sequence[Version]
    read: Callable[[Contents], Source]
    origin: str = ""
    known: Digests | None = None
    small: SmallFile | None = None


Items = list[Incoming] | Result


class ImportSource(Protocol):
    """Where uploads come from. `at_once` is how many lists of names may be copied at the same time."""

    at_once: int

    def items(self) -> AsyncGenerator[Items, None]:
        """Yield what is there, in an order that is the same every time, and results for what cannot be taken."""


async def import_all(
    database: ImageStorage, source: ImportSource, *, dry_run: bool = False
) -> AsyncGenerator[Result, None]:
    """Copy everything from a source that the database lacks; what differs becomes a version of its name."""
    database.home.settle()
    await (database.refuse_foreign_tables() if dry_run else database.create_tables())
    importer = Importer(database, dry_run=dry_run)

    async def steps() -> AsyncGenerator[Step, None]:
        async with aclosing(source.items()) as items:
            async for item in items:
                yield done([item]) if isinstance(item, Result) else importer.take(item)

    async with aclosing(results_of(steps(), source.at_once)) as results:
        async for result in results:
            yield result
    while not dry_run and await database.changes.number():
        pass  # nodes follow from now on


class Importer:
    """Takes names into a database: small uploads that are new many at a time, all others one after the other."""

    def __init__(self, database: ImageStorage, *, dry_run: bool) -> None:
        self._database = database
        self._dry_run = dry_run

    async def take(self, incoming: Sequence[Incoming]) -> list[Result]:
        """Copy names, or set their bytes aside if the database has other ones; the results say which."""
        stored = {} if self._dry_run else await self._store_small(incoming)
        results = []
        for one in incoming:
            result = stored.pop(one.record.name, None) or await self._result(one)  # of equal names, the first is stored
            results.append(replace(result, origin=one.origin))
        return results

    async def _store_small(self, incoming: Sequence[Incoming]) -> dict[str, Result]:
        """Store small uploads that are new in one transaction; return results for those that are whole there now."""
        first: dict[str, SmallFile | None] = {}
        for one in incoming:
            first.setdefault(one.record.name, one.small)
        files = {name: file for name, file in first.items() if file is not None and names.is_valid(name)}
        if len(files) < 2:
            return {}
        found, good = await self._look(files)
        new = {name: file for name, file in files.items() if name not in found}
        await in_halves(self._database.store_many, list(new.values()))
        _, stored = await self._look(new)
        results = {name: Result(name, Outcome.OK, files[name].size) for name in good}
        return results | {name: Result(name, Outcome.MIGRATED, new[name].size) for name in stored}

    async def _look(self, files: Mapping[str, SmallFile]) -> tuple[set[str], set[str]]:
        """Return which names have a record, and which have these bytes, each of them compared."""
        parts, _ = await in_halves(self._database.blobs.fetch, list(files))
        found = {name: one for part in parts for name, one in part.items()}
        same = (one for one in found.values() if one.record.sha256 == files[one.record.name].digests.whole)
        return set(found), {one.record.name for one in same if not one.record.is_deleted and is_sound(one)}

    async def _result(self, incoming: Incoming) -> Result:
        name = incoming.record.name
        if not names.is_valid(name):
            return problem(name, Outcome.INVALID_NAME, names.fault(name))
        try:
            for _ in range(TRIES):
                result = await self._take(incoming)
                if result is not None:
                    return result
        except FAILURES as error:
            return of_error(name, error)
        return problem(name, Outcome.FAILED, "it is changed in the database all the time; run again")

    async def _take(self, incoming: Incoming) -> Result | None:
        """Return the result; None if the name was changed meanwhile."""
        record = incoming.record
        found = await self._find(record.name)
        known = [] if found is None else await self._database.history(record.name)
        if found is not None and is_same(record, incoming.versions, found, known):
            return await self._mend(incoming)
        if found is not None and not continues(record, incoming.versions, found, known):
            return await self._set_aside(incoming, found)
        if self._dry_run:
            return Result(record.name, Outcome.MIGRATED, record.size, "it would be imported")
        incoming, damaged = await self._put_versions(incoming)
        if not await self._put(incoming, found):
            return None
        return self._checked(Outcome.MIGRATED, incoming, damaged, await self._unreadable(incoming))

    async def _find(self, name: str) -> Record | None:
        try:
            return await self._database.find(name)
        except SchemaError as error:
            if not self._dry_run or isinstance(error, NewerTables):
                raise
            return None  # a real run makes the tables

    async def _put(self, incoming: Incoming, found: Record | None) -> bool:
        record, data = incoming.record, incoming.read(incoming.record)
        if isinstance(record, Record):
            return await self._database.copies.put(record, data, incoming.versions, over=found)
        stored = await self._database.store_image(
            record.name,
            data,
            content_type=record.content_type,
            modified_ns=record.modified_ns,
            known=incoming.known,
            only_new=True,
        )
        return stored.sha256 == record.sha256 and not stored.is_deleted

    async def _put_versions(self, incoming: Incoming) -> tuple[Incoming, str]:
        """Store the bytes of the history; return it without what was purged, and what is damaged in the source."""
        damaged, purged = "", list[Version]()
        for version in incoming.versions:
            try:
                await self._database.copies.put_bytes(version, incoming.read(version))
            except CorruptBlob as error:
                damaged = f"generation {version.generation} is damaged in the source: {error.why}"
            except NotStored:
                purged.append(version)
        return replace(incoming, versions=[one for one in incoming.versions if one not in purged]), damaged

    async def _mend(self, incoming: Incoming) -> Result:
        """Compare every byte of a name that was copied before; bytes that are damaged are stored again."""
        damaged = await self._unreadable(incoming)
        if not damaged or self._dry_run:
            return self._checked(Outcome.OK, incoming, "", damaged)
        incoming, missing = await self._put_versions(incoming)
        if not _is_tombstone(incoming.record):
            await self._database.copies.put_bytes(incoming.record, incoming.read(incoming.record))
        return self._checked(Outcome.MIGRATED, incoming, missing, await self._unreadable(incoming))

    async def _unreadable(self, incoming: Incoming) -> str:
        """Return what cannot be read back from the database as it is in the source."""
        versions = self._database.versions
        for one in (*incoming.versions, incoming.record):
            if not _is_tombstone(one) and not await versions.has_bytes(one.name, one.sha256):
                generation = f"generation {one.generation}" if isinstance(one, Record | Version) else "it"
                return f"{generation} cannot be read back from the database"
        return ""

    def _checked(self, outcome: Outcome, incoming: Incoming, *damaged: str) -> Result:
        record, faults = incoming.record, "; ".join(filter(None, damaged))
        if faults:
            return problem(record.name, Outcome.CORRUPT_IN_DATABASE, faults, record.size)
        return Result(record.name, outcome, 0 if _is_tombstone(record) else record.size)

    async def _set_aside(self, incoming: Incoming, found: Record) -> Result:
        """Leave the name as it is; bytes that it never had become versions of it."""
        record = incoming.record
        for one in (*reversed(incoming.versions), record):
            is_known = _is_tombstone(one) or await self._database.versions.has_bytes(one.name, one.sha256)
            if not is_known and not self._dry_run:
                put = partial(self._database.versions.set_aside, modified_ns=one.modified_ns, reason=REASON)
                await put(one.name, incoming.read(one))
        there = f"generation {found.generation}"
        if found.is_deleted and _is_tombstone(record):
            return Result(record.name, Outcome.OK, 0, "both are deleted")
        if found.is_deleted:
            detail = f"it was deleted ({there}) and stays so; `selfheal history` shows the incoming bytes"
            return problem(record.name, Outcome.DELETED, detail, record.size)
        if _is_tombstone(record):
            detail = f"it is deleted in the source, but the database has it ({there}), and keeps it"
        else:
            detail = (
                f"the database has other bytes ({there}) and keeps them; `selfheal history` shows the incoming ones"
            )
        return problem(record.name, Outcome.DIFFERS, detail, record.size)


def _is_tombstone(one: Contents) -> bool:
    return isinstance(one, Record) and one.is_deleted
