"""Import from an export, or from any directory or tar file of uploads."""

import itertools
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from typing import IO, TypeVar

from .. import names
from ..aio.threads import Threads
from ..content.sources import read_chunks
from ..disk.exclusions import Exclusions
from ..errors import CorruptBlob, SettingsError
from ..sql.models import Contents, Record
from . import manifest
from .archives import Archive, Member
from .importer import Incoming, Items
from .new_uploads import in_groups, new_upload
from .one_by_one import FAILURES
from .outcomes import Outcome, Result, of_error, problem

T = TypeVar("T")

AT_ONCE = 500  # lines or members that one call of a thread reads
LONGEST_LINE = 4 * 1024 * 1024


class ArchiveSource:
    """The records of an export; without a manifest, all files, as uploads that are new."""

    at_once = 4

    def __init__(self, archive: Archive, threads: Threads) -> None:
        self._archive = archive
        self._threads = threads

    async def items(self) -> AsyncGenerator[Items, None]:
        """Yield what is there. Raises `SettingsError` for an export that was not finished, or is in a folder."""
        try:
            file = await self._threads.run(self._archive.open, f"{manifest.FOLDER}/{manifest.MANIFEST}")
        except FileNotFoundError as error:
            if await self._threads.run(self._archive.has_folder, manifest.FOLDER):
                raise SettingsError("this export was not finished; run `selfheal export` again") from error
            folder = await self._threads.run(self._archive.parent_of, manifest.FOLDER)
            if folder is not None:
                how = f"import the folder {folder!r} (of a tar file: extract it, and import the folder {folder!r})"
                raise SettingsError(f"the export in it is in a folder, which is no part of its names; {how}") from error
            items = in_groups(self._files())
        else:
            items = self._records(file)
        async with aclosing(items):
            async for item in items:
                yield item

    async def _records(self, file: IO[bytes]) -> AsyncGenerator[Items, None]:
        with file:
            lines = iter(partial(file.readline, LONGEST_LINE), b"")
            manifest.check_first_line(await self._threads.run(next, lines, b""))
            async with aclosing(self._in_threads(lines)) as each, aclosing(self._of_lines(each)) as items:
                async for item in items:
                    yield item
        if await self._threads.run(self._has_partial):
            detail = "a later export into it was not finished: what that one changed is left out; export again"
            yield problem("the manifest", Outcome.FAILED, detail)

    def _has_partial(self) -> bool:
        try:
            self._archive.open(f"{manifest.FOLDER}/{manifest.MANIFEST}{manifest.PARTIAL}").close()
        except FileNotFoundError:
            return False
        return True

    async def _of_lines(self, lines: AsyncGenerator[bytes, None]) -> AsyncGenerator[Items, None]:
        count, is_whole = 0, False
        async for line in lines:
            count += 1
            try:
                found = manifest.of_line(line)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                yield problem(f"line {count + 1} of the manifest", Outcome.FAILED, f"it cannot be read: {error}")
                continue
            if isinstance(found, int):
                is_whole = found == count - 1
            else:
                yield [Incoming(*found, partial(self._read_record, found[0]))]
        if not is_whole:
            yield problem("the manifest", Outcome.FAILED, "it is cut off, or lines of it are missing")

    async def _files(self) -> AsyncGenerator[Incoming | Result, None]:
        exclusions = Exclusions()
        async with aclosing(self._in_threads(self._archive.members())) as members:
            async for member in members:
                if isinstance(member, Result):
                    yield member
                elif exclusions.covers(member.path):
                    yield Result(member.path, Outcome.SKIPPED)
                elif not names.is_valid(member.path):
                    yield problem(member.path, Outcome.INVALID_NAME, names.fault(member.path))
                else:
                    yield await self._upload(member)

    async def _upload(self, member: Member) -> Incoming | Result:
        try:
            return await new_upload(member.path, partial(self._read, member.path), self._threads, member.modified_ns)
        except FAILURES as error:
            return of_error(member.path, error)

    async def _read_record(self, record: Record, contents: Contents) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a record or of one of its versions."""
        is_current = contents.sha256 == record.sha256 and not record.is_deleted
        blob = f"{manifest.FOLDER}/{manifest.BLOBS}/{manifest.blob_name(contents.sha256)}"
        try:
            async with aclosing(self._read(record.name if is_current else blob)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except FileNotFoundError as error:
            raise CorruptBlob(record.name, "its bytes are not in the export") from error

    async def _read(self, path: str) -> AsyncGenerator[bytes, None]:
        file = await self._threads.run(self._archive.open, path)
        try:
            async with aclosing(read_chunks(file, self._threads)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            await self._threads.run(file.close)

    async def _in_threads(self, items: Iterator[T]) -> AsyncGenerator[T, None]:
        """Yield items that a disk may have to be waited for."""
        take: Callable[[], list[T]] = lambda: list(itertools.islice(items, AT_ONCE))  # noqa: E731
        while some := await self._threads.run(take):
            for item in some:
                yield item
