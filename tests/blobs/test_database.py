"""Bytes in the database: what is stored comes back, from every source, in every size. Over every database."""

from __future__ import annotations

import hashlib
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, aclosing
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import UploadFile

from selfheal import ImageStorage
from selfheal.blobs.blob_store import READ_AT_ONCE
from selfheal.blobs.database import WRITE_AT_ONCE
from selfheal.content.sources import CHUNK, Source
from tests.support.damaged_chunks import (
    CHUNKS,
    PICTURE,
)
from tests.support.records import read_record
from tests.support.sample_data import noise, pieces_of_sizes

LARGE = WRITE_AT_ONCE * CHUNK + 12345
"""Bytes that are stored in more than one transaction."""
SIZES = {
    "nothing": 0,
    "one chunk": CHUNK,
    "one chunk and a byte": CHUNK + 1,
    "3 MB": 3_000_000,
    "20 MB": 20_000_000,
}


def an_upload(data: bytes, _: Path, open_files: ExitStack) -> Source:
    """Return a framework's UploadFile whose first bytes the app has read."""
    upload = UploadFile(open_files.enter_context(tempfile.SpooledTemporaryFile(max_size=1_000_000)))
    upload.file.write(data)
    upload.file.seek(min(len(data), 16))
    return upload


def a_path(data: bytes, directory: Path, _: ExitStack) -> Source:
    """Return the path of a file."""
    path = directory / "source.bin"
    path.write_bytes(data)
    return path


def a_file(data: bytes, directory: Path, open_files: ExitStack) -> Source:
    """Return a file object."""
    return open_files.enter_context(Path(str(a_path(data, directory, open_files))).open("rb"))


SOURCES: dict[str, Callable[[bytes, Path, ExitStack], Source]] = {
    "bytes": lambda data, _, __: data,
    "path": a_path,
    "file object": a_file,
    "async iterator": lambda data, _, __: pieces_of_sizes(data, (1, 70_000, 0, CHUNK, 999_983)),
    "UploadFile": an_upload,
}
OTHER_SOURCES: dict[str, Callable[[bytes, Path, ExitStack], Source]] = {
    "bytearray": lambda data, _, __: bytearray(data),
    "memoryview": lambda data, _, __: memoryview(data),
    "memoryview of numbers": lambda data, _, __: memoryview(data).cast("I"),
    "path as text": lambda data, directory, files: str(a_path(data, directory, files)),
    "file object in memory": lambda data, _, __: BytesIO(data),
    "single bytes": lambda data, _, __: pieces_of_sizes(data[:300], (1,)),
}


# -- storing -----------------------------------------------------------------------------------------------------------


async def check_storing(images: ImageStorage, kind: Any, data: bytes, directory: Path) -> None:
    """Store `data` from a source of this kind; fail if it does not come back."""
    with ExitStack() as open_files:
        record = await images.store_image("cats/tom.png", kind(data, directory, open_files))
    assert (record.sha256, record.size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert await images.find("cats/tom.png") == record
    assert await read_record(images, record) == data


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", SOURCES.values(), ids=SOURCES)
async def test_every_source_of_every_size(images: ImageStorage, tmp_path: Path, kind: Any, size: int) -> None:
    """The bytes of an upload come back, from every kind of source and in every size."""
    await check_storing(images, kind, noise(size), tmp_path)


@pytest.mark.parametrize("kind", OTHER_SOURCES.values(), ids=OTHER_SOURCES)
async def test_other_sources(images: ImageStorage, tmp_path: Path, kind: Any) -> None:
    """The bytes come back from less usual kinds of bytes, paths and files as well."""
    size = 300 if kind is OTHER_SOURCES["single bytes"] else CHUNK + 4
    await check_storing(images, kind, noise(size), tmp_path)


@pytest.mark.parametrize("size", [LARGE - 1, LARGE, WRITE_AT_ONCE * CHUNK - 1, WRITE_AT_ONCE * CHUNK, 2 * LARGE])
async def test_sizes_around_a_transaction(images: ImageStorage, size: int) -> None:
    """No byte is lost or repeated between two transactions of a large upload."""
    record = await images.store_image("a.png", noise(size))
    assert await read_record(images, record) == noise(size)


async def test_a_value_without_bytes(images: ImageStorage) -> None:
    """A value that has no bytes is refused, and nothing is recorded."""
    nonsense: list[Any] = [None, 17, ["a", "b"], StringIO("text")]
    for source in nonsense:
        with pytest.raises(TypeError):
            await images.store_image("a.png", source)
    assert await images.find("a.png") is None


@pytest.mark.parametrize("size", [10, CHUNK + 1, 2 * LARGE])
async def test_a_source_that_breaks_off(images: ImageStorage, size: int) -> None:
    """If a source raises an error, the caller gets it, and the name stays as it was."""

    async def breaking() -> AsyncIterator[bytes]:
        yield noise(size)
        raise EOFError("the client has disconnected")

    before = await images.store_image("old.png", b"old")
    for name in ("new.png", "old.png"):
        with pytest.raises(EOFError, match="the client has disconnected"):
            await images.store_image(name, breaking())
    assert await images.find("new.png") is None
    assert await images.find("old.png") == before
    assert await images.history("old.png") == []
    assert await read_record(images, before) == b"old"


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, READ_AT_ONCE - 1, READ_AT_ONCE, CHUNKS - 1, CHUNKS, CHUNKS + 5])
async def test_reading_from_the_middle(images: ImageStorage, first: int) -> None:
    """A read from a later chunk returns all bytes from there."""
    record = await images.store_image("a.png", PICTURE)
    assert await read_record(images, record, first) == PICTURE[first * CHUNK :]


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 2 * LARGE])
async def test_a_first_chunk_is_not_read_again(images: ImageStorage, size: int) -> None:
    """A first chunk that was fetched with the record is not read again, unless it cannot be the right one."""
    data = noise(size)
    record = await images.store_image("a.png", data)
    first = (await images.blobs.fetch(["a.png"]))["a.png"].first
    odd: list[Any] = [None, b"", data[:CHUNK].hex(), data[: CHUNK - 1]]
    for given in (first, *odd):
        read = [chunk async for chunks in images.blobs.read_unchecked(record, given) for chunk in chunks]
        assert b"".join(read) == data
    if size > CHUNK:
        read = [chunk async for chunks in images.blobs.read_unchecked(record, first) for chunk in chunks]
        assert read[0] is first


async def test_a_paused_reader_holds_no_connection(images: ImageStorage) -> None:
    """Paused reads hold no connection: other calls are answered, however many reads there are."""
    record = await images.store_image("a.png", PICTURE)
    readers = [images.read(record) for _ in range(30)]
    begun = [await anext(reader) for reader in readers]
    assert await images.find("a.png") == record
    await images.store_image("b.png", b"new")
    for first, reader in zip(begun, readers, strict=True):
        assert first + b"".join([chunk async for chunk in reader]) == PICTURE


async def test_overwritten_while_it_is_read(images: ImageStorage) -> None:
    """A read returns the version with which it began, even if the name is overwritten and deleted meanwhile."""
    record = await images.store_image("a.png", PICTURE)
    async with aclosing(images.read(record)) as reader:
        got = await anext(reader)
        await images.store_image("a.png", b"new")
        await images.bury("a.png")
        got += b"".join([chunk async for chunk in reader])
    assert got == PICTURE


async def test_stored_again_while_it_is_read(images: ImageStorage) -> None:
    """Storing the same bytes again does not disturb a read."""
    data = noise(LARGE)
    record = await images.store_image("a.png", data)
    async with aclosing(images.read(record)) as reader:
        got = await anext(reader)
        await images.store_image("b.png", data)
        got += b"".join([chunk async for chunk in reader])
    assert got == data


async def test_reading_an_earlier_version(images: ImageStorage) -> None:
    """The bytes of a version in the history can be read."""
    await images.store_image("a.png", PICTURE)
    await images.store_image("a.png", b"new")
    (version,) = await images.history("a.png")
    assert b"".join([chunk async for chunk in images.read(version)]) == PICTURE


async def test_memory_does_not_grow_with_the_file(images: ImageStorage) -> None:
    """Storing and reading 32 MB needs the memory of a few chunks."""
    piece = noise(1_000_000)

    async def endless() -> AsyncIterator[bytes]:
        for number in range(32):
            yield number.to_bytes(8, "big") + piece[8:]

    tracemalloc.start()
    try:
        record = await images.store_image("a.png", endless())
        async with aclosing(images.read(record)) as reader:
            size = sum([len(chunk) async for chunk in reader])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size == record.size == 32_000_000
    assert peak < 24_000_000
