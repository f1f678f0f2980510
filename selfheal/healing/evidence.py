"""Evidence: when a file and its record differ, whether the app overwrote the file, or the file is old or damaged."""

import hashlib
import time
from contextlib import aclosing
from dataclasses import dataclass

from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.open_file import PIECE, Identity, OpenFile
from ..errors import CorruptBlob
from ..sql.models import Record, Version

SAME_CLOCK_NS = 2 * 10**9
"""Clocks that differ by less count as the same; so do the two times of a file whose writer set neither."""


NEVER = 2**63  # ns since the epoch: later than any file


@dataclass(eq=False)
class Evidence:
    """What speaks for the disk, and what for the database.

    `watching_from_ns`: since when this process has been watching the disk, in ns since the epoch.
    """

    disk: UploadsDirectory
    database: ImageStorage
    watching_from_ns: int = NEVER

    def is_watched(self, identity: Identity) -> bool:
        """Whether a file was written, moved or touched while this process was watching."""
        return identity[3] >= self.watching_from_ns

    async def is_overwrite(self, file: OpenFile, digest: str, record: Record) -> bool:
        """Whether a file of other bytes than the recorded ones is newer than the record, and whole: it is adopted."""
        return await self.is_newer(file, digest, record) and not await self.is_torn(file, digest, record)

    async def is_newer(self, file: OpenFile, digest: str, record: Record) -> bool:
        """Whether a file is newer than its record, which has other bytes or is a tombstone.

        What the app does while it is watched holds. Else bytes of a version were laid by a deploy; a file older than
        the disk's mark came with the disk; a deleted name stays deleted. In all of these the database is right.
        """
        history = await self.database.history(record.name)
        if await self._is_written_now(file, digest, record, history):
            return True
        if record.is_deleted or any(version.sha256 == digest for version in history):
            return False
        if file.identity[3] < await self.disk.threads.run(self.disk.marked_ns):
            return False
        return await self._is_newer_by_time(file, record)

    async def _is_written_now(self, file: OpenFile, digest: str, record: Record, history: list[Version]) -> bool:
        """Whether the app has written a watched file since its record was changed, whatever its bytes and mtime are.

        The copies that selfheal writes have a recorded mtime.
        """
        if not self.is_watched(file.identity):
            return False
        own = [record, *(version for version in history if version.sha256 == digest)]
        if any(file.modified_ns == self.disk.kept_ns(one.modified_ns) for one in own):
            return False
        return file.identity[3] + await self._behind_ns() > _changed_ns(record)

    async def _is_newer_by_time(self, file: OpenFile, record: Record) -> bool:
        """Compare times of one clock: the file's with the record's, or this node's with the database's.

        The ctime tells when the bytes were laid here, unless their writer kept an older mtime (rsync, tar, a clone).
        """
        changed_ns = file.identity[3]
        behind_ns = await self._behind_ns()
        if file.modified_ns == self.disk.kept_ns(record.modified_ns):
            return False  # no writer: the bytes of our own copy were damaged
        is_live = abs(changed_ns - file.modified_ns) < SAME_CLOCK_NS
        if file.modified_ns > record.modified_ns and (not is_live or not behind_ns):
            return True
        return is_live and changed_ns + behind_ns > _changed_ns(record)

    async def _behind_ns(self) -> int:
        """Return by how much this node's clock is behind the database's, in ns; 0 if they are the same.

        SQLite tells whole seconds.
        """
        before = time.time_ns()
        now = await self.database.changes.now()
        behind_ns = int(now.timestamp() * 10**9) - (before + time.time_ns()) // 2
        return 0 if abs(behind_ns) < SAME_CLOCK_NS else behind_ns

    async def is_torn(self, file: OpenFile, digest: str, record: Record) -> bool:
        """Whether a file is what a crash leaves: a part of the recorded bytes, or nothing but zeros."""
        if digest == await self.disk.threads.run(_digest_of_zeros, file.size):
            return True
        return file.size < record.size and digest == await self._digest_of_beginning(record, file.size)

    async def _digest_of_beginning(self, record: Record, size: int) -> str:
        whole, left = hashlib.sha256(), size
        try:
            async with aclosing(self.database.blobs.read_unchecked(record)) as batches:
                async for chunks in batches:
                    for chunk in chunks:
                        whole.update(chunk[:left])
                        left -= min(left, len(chunk))
                    if not left:
                        break
        except CorruptBlob:
            return ""
        return whole.hexdigest()


def _digest_of_zeros(size: int) -> str:
    whole, zeros = hashlib.sha256(), bytes(PIECE)
    for at in range(0, size, PIECE):
        whole.update(zeros[: size - at])
    return whole.hexdigest()


def _changed_ns(record: Record) -> int:
    return int(record.changed_at.timestamp() * 10**9)
