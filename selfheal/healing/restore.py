"""Restore: database → disk, one name at a time. All callers of a name share one restore, and are answered from it."""

import errno
import logging
import os
from dataclasses import dataclass

from ..aio.single_flight import SingleFlight
from ..aio.tasks import Tasks
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.open_file import OpenFile
from ..errors import DatabaseUnavailable, DiskUnwritable, NotStored
from ..events import Events, logger
from ..sql.models import Record
from .bodies import Body, Restoring
from .disk_copies import DiskCopies
from .negative_cache import NegativeCache
from .publish import Publisher
from .restore_file import FileRestorer
from .undecided import Undecided

_BROKEN = frozenset(getattr(errno, name, errno.EIO) for name in ("EIO", "ESTALE", "EUCLEAN"))


def is_broken(error: BaseException) -> bool:
    """Whether an error says that the disk lost a file."""
    return isinstance(error, OSError) and error.errno in _BROKEN


@dataclass(eq=False)
class Restorer:
    """Opens names, and restores those that are missing on disk. `deadline`: seconds until a caller gets an answer."""

    disk: UploadsDirectory
    database: ImageStorage
    publisher: Publisher
    copies: DiskCopies
    events: Events
    tasks: Tasks
    deadline: float

    def __post_init__(self) -> None:
        self._negative_cache = NegativeCache()
        self.undecided = Undecided()
        parts = (self.disk, self.database, self.publisher, self._negative_cache, self.events, self.tasks)
        work = FileRestorer(*parts, patience=self.deadline).restore
        self._flights: SingleFlight[str, Body | None] = SingleFlight(self.tasks, work, share=_hold, release=_close)

    async def open(self, name: str) -> OpenFile | Body | None:
        """Return a file, or what restores it; None if there is no such name. The caller closes what it gets."""
        try:
            try:
                file = self.disk.open_cached(name)
            except BlockingIOError:
                file = await self.disk.threads.run(self.disk.open, name)
        except PermissionError as error:
            return await self._restore_forbidden(name, error)
        except OSError as error:
            if not is_broken(error):
                raise
            await self.set_aside_unreadable(name)
            file = None
        return await self.restore(name) if file is None else file

    async def restore(self, name: str) -> OpenFile | Body | None:
        """Restore a name that is missing on disk; None if there is no such name. Raises as `open` does."""
        if self.tasks.home.is_here:
            return await self._restore(name)
        return await self.tasks.home.run(self._restore_whole, name)

    async def _restore(self, name: str) -> Body | None:
        await self.undecided.decided(name, self.deadline)
        if name not in self._negative_cache:
            try:
                body = await self._flights.get(name, self.deadline)
            except TimeoutError:
                raise DatabaseUnavailable(f"the database gave no answer within {self.deadline:g} s") from None
            if isinstance(body, Restoring) and body.error and not isinstance(body.error, DiskUnwritable):
                body.close()
                raise body.error
            if body is not None:
                self.undecided.note_restored(name)
                return body
        await self._negative_cache.turn()
        return None

    async def _restore_whole(self, name: str) -> OpenFile | Body | None:
        """As `restore`, for a caller on another event loop, which cannot wait for what grows."""
        body = await self._restore(name)
        if not isinstance(body, Restoring):
            return body
        try:
            await body.on_disk()
        except DiskUnwritable:
            return body.rest
        finally:
            body.close()
        return await self.disk.threads.run(self.disk.open, name) or await self._restore_whole(name)

    async def restore_to_disk(self, name: str) -> bool:
        """Restore a missing name onto the disk; False if there is none. Raises `DiskUnwritable`, and as `open`."""
        body = await self.restore(name)
        if body is None:
            return False
        try:
            if not isinstance(body, OpenFile):
                await body.on_disk()
        finally:
            body.close()
        return True

    async def restore_missing(self, name: str) -> Record:
        """Restore a name onto the disk if it is missing there; return its record. Raises as `restore_to_disk`."""
        is_missing = await self.disk.threads.run(self.disk.stat, name) is None
        record = await self.database.find(name) if not is_missing or await self.restore_to_disk(name) else None
        if record is None or record.is_deleted:
            raise NotStored(f"{name!r} is not in the database")
        return record

    async def set_aside_unreadable(self, name: str) -> None:
        """Set a file aside that the disk has lost; log it if that fails too."""
        try:
            await self.tasks.home.run(self.copies.quarantine, name, "the disk copy cannot be read")
        except OSError as error:
            logger.error("%r cannot be read, nor moved away: %s", name, error)

    async def is_distrusted(self, name: str) -> bool:
        """Whether a name has a file that must not be served, and cannot be moved away."""
        return self.disk.has_distrusted and await self.disk.threads.run(self.disk.is_distrusted, name)

    async def _restore_forbidden(self, name: str, error: PermissionError) -> OpenFile | Body:
        """Answer from the database for a file that this process may not read; raises `error` if there is no record."""
        body = await self.restore(name)
        if body is None:
            raise error
        path, user = self.disk.path_of(name), os.geteuid()
        mend = f"chown it and its directory to user {user}, or chmod them"
        self.events.log_once(logging.ERROR, "forbidden", f"{path} cannot be read, the database serves it: {mend}")
        return body

    def forget(self, name: str) -> None:
        """Remove a name from the negative cache: it was saved."""
        self._negative_cache.discard(name)


def _hold(body: Body | None) -> Body | None:
    return None if body is None else body.hold()


def _close(body: Body | None) -> None:
    if body is not None:
        body.close()
