"""Bytes on their way into the database: as rows of chunks, and what is known of those that have come so far."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from ..content.digests import Digests, chunk_digests
from ..errors import Unsettled
from ..sql.models import SmallFile

HASH_AT_ONCE = 8
"""Chunks that are hashed (2 MiB) while others are read, and others written."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes that came: the last chunks are still `rows` in memory, those before them stand under `key`.

    The first `moved` of them stand where they belong.
    """

    key: str
    sha256: str
    size: int
    chunks: int
    rows: list[Row]
    moved: int

    @property
    def written(self) -> int:
        """How many chunks are in the database already, in transactions of their own."""
        return self.chunks - len(self.rows)


class Taken:
    """What was taken in so far. If its digests are `known`, the bytes must be those.

    Chunks stand where they belong if they are known and to be so `in_place`, or else under a key of their own.
    """

    def __init__(self, known: Digests | None, *, in_place: bool) -> None:
        self._known = known
        # as long as a digest: SQLite then writes only the page where it stands when it becomes one, not the chunk
        self._key = known.whole if known is not None and in_place else f"upload-{uuid4().hex:->57}"
        self._whole = hashlib.sha256()
        self._size = self._chunks = 0

    @property
    def is_in_place(self) -> bool:
        """Whether chunks stand where they belong."""
        return self._known is not None and self._key == self._known.whole

    def rows(self, chunks: Sequence[bytes]) -> list[Row]:
        """The next chunks as rows; raises `Unsettled` if they are not what is known of them."""
        digests = chunk_digests(self._chunks, chunks)
        if self._known is None:
            for chunk in chunks:
                self._whole.update(chunk)
        elif digests != self._known.chunks[self._chunks : self._chunks + len(chunks)]:
            raise Unsettled("the bytes changed while they were read; try again once they hold still")
        rows = _rows(self._key, self._chunks, digests, chunks)
        self._size += sum(map(len, chunks))
        self._chunks += len(chunks)
        return rows

    def received(self, last: list[Row]) -> Received:
        """All of it; the `last` rows are not written yet. Raises `Unsettled` if it is less than is known of it."""
        if self._known is not None and self._chunks != len(self._known.chunks):
            raise Unsettled("the bytes became fewer while they were read; try again once they hold still")
        digest = self._whole.hexdigest() if self._known is None else self._known.whole
        if len(last) == self._chunks:  # nothing was written under another key
            last = [row | {"sha256": digest} for row in last]
            return Received(digest, digest, self._size, self._chunks, last, self._chunks)
        moved = self._chunks if self._key == digest else 0
        return Received(self._key, digest, self._size, self._chunks, last, moved)


async def in_handfuls(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[list[bytes], None]:
    """As many chunks as are hashed in one go."""
    held: list[bytes] = []
    async with aclosing(source):
        async for chunk in source:
            held.append(chunk)
            if len(held) == HASH_AT_ONCE:
                yield held
                held = []
    if held:
        yield held


def rows_of_files(files: Iterable[SmallFile]) -> tuple[list[Row], list[Row]]:
    """The blobs of whole files, and their chunks.

    Equal bytes once, and in the order of digests: two processes then never wait for each other in a circle.
    """
    blobs: list[Row] = []
    chunks: list[Row] = []
    by_digest = {file.digests.whole: file for file in files}
    for digest, file in sorted(by_digest.items()):
        blobs.append({"sha256": digest, "size": file.size, "chunks": len(file.chunks)})
        chunks += _rows(digest, 0, file.digests.chunks, file.chunks)
    return blobs, chunks


def _rows(key: str, first: int, digests: Sequence[bytes], chunks: Sequence[bytes]) -> list[Row]:
    return [
        {"sha256": key, "position": position, "digest": digest, "data": data}
        for position, (digest, data) in enumerate(zip(digests, chunks, strict=True), first)
    ]
