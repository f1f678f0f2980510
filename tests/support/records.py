"""Records of the catalogue and their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from selfheal import ImageStorage, Record, UploadStore
from selfheal.content.digests import Digests
from selfheal.content.sources import CHUNK
from selfheal.sql.models import SmallFile


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digests_of(data: bytes) -> Digests:
    """Return the digests of bytes and of their chunks."""
    return Digests.of(data[at : at + CHUNK] for at in range(0, len(data), CHUNK))


def small_file(name: str, data: bytes, modified_ns: int = 7) -> SmallFile:
    """Return a file as a bulk run gives it to `store_many`."""
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    return SmallFile(name, len(data), modified_ns, chunks, Digests.of(chunks))


async def read_record(images: ImageStorage, record: Record, first: int = 0) -> bytes:
    """Return the bytes of a record, from chunk number `first` on."""
    return b"".join([chunk async for chunk in images.read(record, first)])


async def bytes_of(images: ImageStorage, name: str) -> bytes | None:
    """Return the bytes of a name, or None if it has no record or is deleted."""
    record = await images.find(name)
    return None if record is None or record.is_deleted else await read_record(images, record)


async def existing_record(images: ImageStorage, name: str = "a.png") -> Record:
    """Return the record of a name; fail if there is none."""
    record = await images.find(name)
    assert record is not None
    return record


async def fill_catalogue(url: str, directory: Path, names: Iterable[str]) -> None:
    """Create the tables, and store names in the database alone, each with its own text as bytes."""
    async with UploadStore(directory, url) as store:
        await store.database.create_tables()
        for name in names:
            await store.database.store_image(name, name.encode())
