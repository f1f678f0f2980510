"""Reading: what an app reads of its uploads itself, restored first if it is missing."""

import contextlib
import os
import tempfile
from collections.abc import Coroutine, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.open_file import OpenFile
from ..errors import DatabaseUnavailable, DiskUnwritable, NotStored
from .background import BackgroundChecks
from .bodies import Body
from .reconcile import Reconciler
from .restore import Restorer


class Opening:
    """A file that is being opened: `await` returns it; `async with` closes it at the end."""

    def __init__(self, work: Coroutine[Any, Any, BinaryIO]) -> None:
        self._work = work

    def __await__(self) -> Generator[Any, None, BinaryIO]:
        return self._work.__await__()

    async def __aenter__(self) -> BinaryIO:
        self._file = await self._work
        return self._file

    async def __aexit__(self, *_: object) -> None:
        self._file.close()


@dataclass(frozen=True, slots=True)
class Reader:
    """Gives an app its files. Raises `NotStored`, `CorruptBlob`, `DatabaseUnavailable`, `OSError`."""

    disk: UploadsDirectory
    database: ImageStorage
    restorer: Restorer
    reconciler: Reconciler
    background: BackgroundChecks

    async def ensure(self, name: str) -> Path:
        """Return the path of a name's file, which is there then. Raises also `DiskUnwritable`."""
        body = await self._open(name)
        with contextlib.closing(body):
            if not isinstance(body, OpenFile):
                await body.on_disk()
        return self.disk.path_of(name)

    async def open(self, name: str) -> BinaryIO:
        """Return a name's file, open to be read; a file without a name if the uploads directory takes none."""
        body = await self._open(name)
        with contextlib.closing(body):
            if isinstance(body, OpenFile):
                return _file_of(body)
            with contextlib.suppress(DiskUnwritable, OSError):
                await body.on_disk()
                file = await self.disk.threads.run(self.disk.open, name)
                if file is not None:
                    with file:
                        return _file_of(file)
            return await self._copy(body)

    async def _open(self, name: str) -> OpenFile | Body:
        body = await self.restorer.open(name)
        if isinstance(body, OpenFile) and await self._is_wrong(name, body):
            body.close()
            with contextlib.suppress(DatabaseUnavailable):
                await self.background.compare(name)
            body = await self.restorer.open(name)
        if body is None:
            raise NotStored(f"{name!r} is neither on the disk nor in the database")
        return body

    async def _is_wrong(self, name: str, file: OpenFile) -> bool:
        """Whether a file is to be replaced or removed first: it is deleted, or older than its record, or damaged.

        What the app itself has just written is right; it is stored in the background, as after a hit.
        """
        if self.background.judged(name, file.identity) is not None:
            return False
        with contextlib.suppress(DatabaseUnavailable):  # the disk serves without the database
            agreed = await self.reconciler.agrees(name, file.identity)
            record = await self.database.find(name) if agreed is None else None
            if record is not None and not await self.reconciler.is_newer_on_disk(record):
                return True
        self.background.hit(name, file.identity, adopt=True)
        return False

    async def _copy(self, body: Body) -> BinaryIO:
        copy = await self.disk.threads.run(tempfile.TemporaryFile)
        try:
            async with contextlib.aclosing(body.pieces(0, body.size)) as pieces:
                async for piece in pieces:
                    await self.disk.threads.run(copy.write, piece)
            copy.seek(0)
        except BaseException:
            copy.close()
            raise
        return copy


def _file_of(file: OpenFile) -> BinaryIO:
    return os.fdopen(os.dup(file.fd), "rb")
