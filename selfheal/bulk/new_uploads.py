"""Uploads without a record, on their way into the database: hashed, and the small ones taken many at a time."""

import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from ..aio.threads import Threads
from ..content.content_types import content_type
from ..content.digests import Digests, chunk_digest
from ..content.sources import CHUNK, Source, read_chunks
from ..sql.models import Contents, SmallFile
from .importer import Incoming, Items
from .outcomes import Result

NAMES_AT_ONCE = 100  # uploads in one transaction: each waits for the disk
BYTES_AT_ONCE = 8 * 1024 * 1024  # of their bytes, which are held in memory


async def new_upload(
    name: str, read: Callable[[], Source], threads: Threads, modified_ns: int, kind: str = ""
) -> Incoming:
    """Read an upload and hash it; if it has more bytes than a chunk, they are read again when they are stored."""
    whole, digests, size, first = hashlib.sha256(), list[bytes](), 0, b""
    async with aclosing(read_chunks(read(), threads)) as chunks:
        async for chunk in chunks:
            digests.append(await threads.run(_hash, len(digests), chunk, whole))
            first, size = first or chunk, size + len(chunk)
    known = Digests(whole.hexdigest(), digests)
    contents = Contents(name, known.whole, size, kind or content_type(name), modified_ns)
    small = SmallFile(name, size, modified_ns, [first] if first else [], known, kind) if size <= CHUNK else None
    return Incoming(contents, (), lambda _contents: read(), known=known, small=small)


async def in_groups(items: AsyncGenerator[Incoming | Result, None]) -> AsyncGenerator[Items, None]:
    """Yield small uploads many at a time, in their order; a large one ends its group."""
    group, size = list[Incoming](), 0
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Result):
                yield item
                continue
            group.append(item)
            size += item.record.size
            if item.small is None or size >= BYTES_AT_ONCE or len(group) == NAMES_AT_ONCE:
                yield group
                group, size = [], 0
    if group:
        yield group


def _hash(position: int, chunk: bytes, whole: "hashlib._Hash") -> bytes:
    whole.update(chunk)
    return chunk_digest(position, chunk)
