"""Incoming bytes: chunks are hashed and become rows."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from ..content.digests import Digests, chunk_digests, update_all
from ..errors import FileChanged
from ..sql.models import SmallFile

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes received: the last chunks still as `rows`, those before under `key`; `moved` of them at the digest."""

    key: str
    sha256: str
    size: int
    chunks: int
    rows: list[Row]
    moved: int

    @property
    def written(self) -> int:
        """The number of chunks that are in the database, in transactions of their own."""
        return self.chunks - len(self.rows)


class Hasher:
    """Hashes chunks and makes rows of them; with `in_place`, rows of the `known` digest instead of their own key."""

    def __init__(self, known: Digests | None, *, in_place: bool) -> None:
        self._known = known
        # as long as a digest: SQLite then overwrites only the page of the key, not the chunk after it
        self._key = known.whole if known is not None and in_place else f"upload-{uuid4().hex:->57}"
        self._whole = hashlib.sha256()
        self._size = self._chunks = 0

    @property
    def is_in_place(self) -> bool:
        """Whether rows have their digest as key."""
        return self._known is not None and self._key == self._known.whole

    def rows(self, chunks: Sequence[bytes]) -> list[Row]:
        """Return the next chunks as rows; raises `FileChanged` if they are not the known ones."""
        digests = chunk_digests(self._chunks, chunks)
        if self._known is None:
            update_all(self._whole, chunks)
        elif digests != self._known.chunks[self._chunks : self._chunks + len(chunks)]:
            raise FileChanged("the bytes changed while they were read; try again when their writer is done")
        rows = _rows(self._key, self._chunks, digests, chunks)
        self._size += sum(map(len, chunks))
        self._chunks += len(chunks)
        return rows

    def received(self, last: list[Row]) -> Received:
        """Return the result; the `last` rows are not written yet. Raises `FileChanged` if known chunks are missing."""
        if self._known is not None and self._chunks != len(self._known.chunks):
            raise FileChanged("the bytes became fewer while they were read; try again when their writer is done")
        digest = self._whole.hexdigest() if self._known is None else self._known.whole
        if len(last) == self._chunks:  # nothing was written under another key
            last = [row | {"sha256": digest} for row in last]
            return Received(digest, digest, self._size, self._chunks, last, self._chunks)
        moved = self._chunks if self._key == digest else 0
        return Received(self._key, digest, self._size, self._chunks, last, moved)


def rows_of_files(files: Iterable[SmallFile]) -> tuple[list[Row], list[Row]]:
    """Return rows of blobs and chunks, each blob once, by digest: processes then never wait in a circle."""
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
