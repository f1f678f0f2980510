"""Where the bytes of blobs are: the protocol of a blob store. `database.py` keeps them in the database's own tables."""

from collections.abc import AsyncGenerator, Iterable
from datetime import datetime
from typing import Any, Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from ..content.digests import Digests
from ..content.sources import Source
from ..sql.models import Contents, Found, SmallFile
from ..sql.transactions import Write
from .chunk_rows import Received

READ_AT_ONCE = 8  # chunks in one query (2 MiB): what one reader holds in memory


class BlobStore(Protocol):
    """Puts, reads and drops the bytes behind digests. Raises `DatabaseUnavailable` if it gives no answer."""

    async def fetch(self, wanted: Iterable[str]) -> dict[str, Found]:
        """Return records with the first chunks of their blobs: one query is enough to restore a small file."""

    def fetch_in_thread(self, name: str) -> Found | None:
        """As `fetch`, for one name in the calling thread; see `Engine.rows_in_thread`."""

    async def put(
        self, write: Write, data: Source, known: Digests | None = None, *, in_transaction: bool = False
    ) -> Received:
        """Store bytes in transactions of `write`, or in the caller's; `finish` makes the blob complete."""

    async def put_files(self, connection: AsyncConnection, files: Iterable[SmallFile]) -> None:
        """Store the blobs of small files in the caller's transaction."""

    async def finish(self, connection: AsyncConnection, received: Received) -> None:
        """Make a blob complete in the caller's transaction."""

    def read(self, version: Contents, first: int = 0, at_once: int = READ_AT_ONCE) -> AsyncGenerator[list[bytes], None]:
        """Yield chunks from number `first` on, up to `at_once` at a time, each checked by its own digest."""

    def read_unchecked(self, version: Contents, first_chunk: bytes | None = None) -> AsyncGenerator[list[bytes], None]:
        """As `read`, unchecked: for callers that check the digest of the whole before they use anything."""

    async def recorded(self, name: str, sha256: str) -> tuple[int, bytes] | None:
        """Return the size and the first chunk of a complete blob, if a name's record or version refers to it."""

    async def digest(self, version: Contents) -> str:
        """Return the SHA-256 of the stored bytes; the recorded one may differ. Raises `CorruptBlob`."""

    async def keep(self, connection: AsyncConnection, sha256: str) -> bool:
        """Keep a blob from being dropped for the grace period; False if it is gone."""

    async def drop_unreferenced(
        self, connection: AsyncConnection, referenced: Any, before: datetime
    ) -> tuple[int, int]:
        """Drop blobs stored `before`, unless the query `referenced` returns their digests; return (blobs, bytes)."""
