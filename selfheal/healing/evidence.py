"""Evidence: when a file and its record differ, whether the app overwrote the file, or the file is old or damaged."""

import hashlib
import time
from contextlib import aclosing
from dataclasses import dataclass

from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.open_file import PIECE, OpenFile
from ..errors import CorruptBlob
from ..sql.models import Record

SAME_CLOCK_NS = 2 * 10**9
"""Clocks that differ by less count as the same; so do the two times of a file whose writer set neither."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What speaks for the disk, and what for the database."""

    disk: UploadsDirectory
    database: ImageStorage

    async def is_overwrite(self, file: OpenFile, digest: str, record: Record) -> bool:
        """Whether a file of other bytes than the recorded ones is newer than the record: then it is to be adopted.

        Bytes of a version were laid by a deploy; a file older than the disk's mark came with the disk; a part of the
        recorded bytes, or nothing but zeros, is what a crash leaves. In all of these the database is right.
        """
        if any(version.sha256 == digest for version in await self.database.history(record.name)):
            return False
        if file.identity[3] < await self.disk.threads.run(self.disk.marked_ns):
            return False
        return await self._is_newer(file, record) and not await self._is_torn(file, digest, record)

    async def _is_newer(self, file: OpenFile, record: Record) -> bool:
        """Compare times of one clock: the file's with the record's, or this node's with the database's.

        The ctime tells when the bytes were laid here, unless their writer kept an older mtime (rsync, tar, a clone).
        """
        changed_ns = file.identity[3]
        behind_ns = await self._behind_ns()
        if file.modified_ns == self.disk.kept_ns(record.modified_ns):
            return False  # no writer: the bytes of our own copy were damaged
        is_live = abs(changed_ns - file.modified_ns) < SAME_CLOCK_NS
        if file.modified_ns > record.modified_ns and (not is_live or abs(behind_ns) < SAME_CLOCK_NS):
            return True
        return is_live and changed_ns + behind_ns > int(record.changed_at.timestamp() * 10**9)

    async def _behind_ns(self) -> int:
        """Return by how much this node's clock is behind the database's, in ns."""
        before = time.time_ns()
        now = await self.database.changes.now()
        return int(now.timestamp() * 10**9) - (before + time.time_ns()) // 2

    async def _is_torn(self, file: OpenFile, digest: str, record: Record) -> bool:
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
