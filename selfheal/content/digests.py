"""What bytes are known by: the digest of the whole, and of each chunk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self


class Hash(Protocol):
    """A digest in the making, as `hashlib` has them."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


@dataclass(frozen=True, slots=True)
class Digests:
    """Of bytes that somebody has read once already: the `whole` in hex, and each of its chunks in their order."""

    whole: str
    chunks: Sequence[bytes]

    @classmethod
    def of(cls, chunks: Iterable[bytes]) -> Self:
        """Those of bytes that come chunk by chunk."""
        whole, each = hashlib.sha256(), list[bytes]()
        for chunk in chunks:
            whole.update(chunk)
            each.append(chunk_digest(len(each), chunk))
        return cls(whole.hexdigest(), each)


def chunk_digest(position: int, data: bytes) -> bytes:
    """The digest by which a chunk is trusted before the last one has come; it binds the chunk to its position."""
    digest = hashlib.sha256(position.to_bytes(8, "big"))
    digest.update(data)
    return digest.digest()


def chunk_digests(first: int, chunks: Iterable[bytes]) -> list[bytes]:
    """Those of consecutive chunks, the first of them at position `first`."""
    return [chunk_digest(position, data) for position, data in enumerate(chunks, first)]


def add_all(whole: Hash, chunks: Iterable[bytes]) -> None:
    """Hash chunks, one after the other."""
    for chunk in chunks:
        whole.update(chunk)
