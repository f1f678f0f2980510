"""Export: everything in the database, as files that are of use without selfheal, with a manifest to import them by."""

import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing

from .. import names
from ..content.digests import update_all
from ..db import ImageStorage
from ..errors import CorruptBlob, NotAFile
from ..sql.models import Contents, Record, Version
from . import manifest
from .export_targets import ExportTarget
from .one_by_one import FAILURES
from .outcomes import Outcome, Result, of_error, problem


async def export(database: ImageStorage, target: ExportTarget) -> AsyncGenerator[Result, None]:
    """Write every record, its history and its bytes; names that are damaged are reported, and the others go on."""
    target.check()
    database.home.settle()
    try:
        target.begin()
        target.add_line(manifest.first_line())
        exporter = _Exporter(database, target)
        async with aclosing(exporter.write_all()) as results:
            async for result in results:
                yield result
        target.add_line(manifest.last_line(exporter.lines))
        target.finish()
    finally:
        target.close()


class _Exporter:
    """Writes one record after the other."""

    def __init__(self, database: ImageStorage, target: ExportTarget) -> None:
        self._database = database
        self._target = target
        self.lines = 0

    async def write_all(self) -> AsyncGenerator[Result, None]:
        """Write every record; last, those in whose place files lie that were deleted since an earlier export."""
        taken: list[str] = []
        async with aclosing(self._database.pages(deleted=None)) as pages:
            async for page in pages:
                for record in page:
                    try:
                        result = await self._write_current(record)
                    except NotAFile:
                        taken.append(record.name)
                    else:
                        yield result
        for record in (await self._database.catalogue.find(taken)).values():
            try:
                result = await self._write_current(record)
            except NotAFile as error:
                result = of_error(record.name, error)
            yield result

    async def _write_current(self, record: Record) -> Result:
        """Write a record with its history, again if it is changed meanwhile. Raises `NotAFile`."""
        if not names.is_valid(record.name):
            return problem(record.name, Outcome.INVALID_NAME, names.fault(record.name))
        while True:
            try:
                result = await self._write(record)
            except NotAFile:
                raise
            except FAILURES as error:
                result = of_error(record.name, error)
            now = await self._database.find(record.name) if result.is_problem else None
            if now is None or now.generation == record.generation:
                return result
            record = now

    async def _write(self, record: Record) -> Result:
        history = await self._database.history(record.name)
        versions = [one for one in history if one.generation < record.generation]
        if record.is_deleted:
            await self._target.remove(record.name)
            is_new = False
        else:
            is_new = await self._target.put(record, self._read(record))
        damaged = {one: why for one in versions if (why := await self._write_version(record, one))}
        if damaged:
            kept = await self._database.history(record.name)  # others were purged meanwhile
            versions = [one for one in versions if one not in damaged or one in kept]
            damaged = {one: why for one, why in damaged.items() if one in kept}
        self._target.add_line(manifest.to_line(record, versions))
        self.lines += 1
        if damaged:
            return problem(record.name, Outcome.CORRUPT_IN_DATABASE, "; ".join(damaged.values()), record.size)
        return Result(record.name, Outcome.RESTORED if is_new else Outcome.OK, 0 if record.is_deleted else record.size)

    async def _write_version(self, record: Record, version: Version) -> str:
        """Write the bytes of a version unless the record has them; return why they are damaged."""
        if version.sha256 == record.sha256 and not record.is_deleted:
            return ""
        try:
            await self._target.put_blob(version, self._read(version))
        except CorruptBlob as error:
            return f"generation {version.generation}: {error.why}"
        return ""

    async def _read(self, one: Contents) -> AsyncGenerator[list[bytes], None]:
        """Yield the bytes of a record or a version. Raises `CorruptBlob` unless they are the recorded ones."""
        whole = hashlib.sha256()
        async with aclosing(self._database.blobs.read(one)) as batches:
            async for chunks in batches:
                update_all(whole, chunks)
                yield chunks
        if whole.hexdigest() != one.sha256:
            raise CorruptBlob(one.name, "the whole does not match its digest")
