"""SHA-256 digests of whole files and of their chunks."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Digests:
    """The digests of bytes: of the `whole`, in hex, and of each chunk in order."""

    whole: str
    chunks: Sequence[bytes]

    @classmethod
    def of(cls, chunks: Iterable[bytes]) -> Self:
        """Hash bytes that come chunk by chunk."""
        whole, each = hashlib.sha256(), list[bytes]()
        for chunk in chunks:
            whole.update(chunk)
            each.append(chunk_digest(len(each), chunk))
        return cls(whole.hexdigest(), each)


def chunk_digest(position: int, data: bytes) -> bytes:
    """Return the digest that proves one chunk before the others have come; it covers the chunk's position too."""
    digest = hashlib.sha256(position.to_bytes(8, "big"))
    digest.update(data)
    return digest.digest()


def chunk_digests(first: int, chunks: Iterable[bytes]) -> list[bytes]:
    """Return the digests of consecutive chunks; the first one is at position `first`."""
    return [chunk_digest(position, data) for position, data in enumerate(chunks, first)]


def update_all(whole: "hashlib._Hash", chunks: Iterable[bytes]) -> None:
    """Hash chunks in order."""
    for chunk in chunks:
        whole.update(chunk)
