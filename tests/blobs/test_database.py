"""The contract of the bytes in the database: they come back as they were, or not at all. Over every database."""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import pytest
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.datastructures import UploadFile

from selfheal import CorruptBlob, DatabaseUnavailable, ImageStorage, Record, UploadStore
from selfheal.blobs.database import READ_AT_ONCE, WRITE_AT_ONCE
from selfheal.content.digests import Digests, chunk_digest
from selfheal.content.sources import CHUNK, Source
from selfheal.errors import Unsettled
from tests.support.postgres import PostgresServer
from tests.support.sides import resize, sql

LARGE = WRITE_AT_ONCE * CHUNK + 12345
"""Bytes that are stored in more than one transaction."""
SIZES = {
    "nothing": 0,
    "one chunk": CHUNK,
    "one chunk and a byte": CHUNK + 1,
    "3 MB": 3_000_000,
    "20 MB": 20_000_000,
}


def digests_of(data: bytes) -> Digests:
    """The digests that bytes are known by."""
    return Digests.of(data[at : at + CHUNK] for at in range(0, len(data), CHUNK))


@lru_cache(maxsize=16)
def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that look like those of an image: every value occurs, nothing repeats."""
    return random.Random(seed * 1_000_003 + size).randbytes(size)


@pytest.fixture(scope="module")
def a_database(postgres: PostgresServer) -> Iterator[str]:
    """A PostgreSQL database for the tests of this file: to make one takes longer than most of them."""
    name = f"t{uuid4().hex[:12]}"
    postgres.sql(f"CREATE DATABASE {name}")
    yield name
    postgres.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(postgres: PostgresServer, a_database: str) -> Iterator[str]:
    """That database; it is emptied when the test is over."""
    yield postgres.url(a_database)
    postgres.sql("SET lock_timeout = '9s'; DROP SCHEMA public CASCADE; CREATE SCHEMA public", a_database)


@pytest.fixture
def images(store: UploadStore) -> ImageStorage:
    """The database half, its tables made."""
    return store.database


def bytes_written() -> int:
    """What this process gave the kernel to write so far."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["wchar"])


async def pieces(data: bytes, sizes: tuple[int, ...]) -> AsyncIterator[bytes]:
    """Bytes as a client sends them: in pieces of these sizes, over and over."""
    start = turn = 0
    while start < len(data):
        step = sizes[turn % len(sizes)]
        yield data[start : start + step]
        start, turn = start + step, turn + 1


async def whole(images: ImageStorage, record: Record, first: int = 0) -> bytes:
    """All bytes of a record from a chunk on."""
    return b"".join([chunk async for chunk in images.read(record, first)])


def an_upload(data: bytes, _: Path, open_files: ExitStack) -> Source:
    """A framework's UploadFile, at whose beginning the app has looked."""
    upload = UploadFile(open_files.enter_context(tempfile.SpooledTemporaryFile(max_size=1_000_000)))
    upload.file.write(data)
    upload.file.seek(min(len(data), 16))
    return upload


def a_path(data: bytes, directory: Path, _: ExitStack) -> Source:
    """The path of a file."""
    path = directory / "source.bin"
    path.write_bytes(data)
    return path


def a_file(data: bytes, directory: Path, open_files: ExitStack) -> Source:
    """A file object."""
    return open_files.enter_context(Path(str(a_path(data, directory, open_files))).open("rb"))


SOURCES: dict[str, Callable[[bytes, Path, ExitStack], Source]] = {
    "bytes": lambda data, _, __: data,
    "path": a_path,
    "file object": a_file,
    "async iterator": lambda data, _, __: pieces(data, (1, 70_000, 0, CHUNK, 999_983)),
    "UploadFile": an_upload,
}
OTHER_SOURCES: dict[str, Callable[[bytes, Path, ExitStack], Source]] = {
    "bytearray": lambda data, _, __: bytearray(data),
    "memoryview": lambda data, _, __: memoryview(data),
    "memoryview of numbers": lambda data, _, __: memoryview(data).cast("I"),
    "path as text": lambda data, directory, files: str(a_path(data, directory, files)),
    "file object in memory": lambda data, _, __: BytesIO(data),
    "single bytes": lambda data, _, __: pieces(data[:300], (1,)),
}


async def check_storing(images: ImageStorage, kind: Any, data: bytes, directory: Path) -> None:
    """Store `data` from a source of this kind, and see that it is all there."""
    with ExitStack() as open_files:
        record = await images.store_image("cats/tom.png", kind(data, directory, open_files))
    assert (record.sha256, record.size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert await images.find("cats/tom.png") == record
    assert await whole(images, record) == data


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", SOURCES.values(), ids=SOURCES)
async def test_every_source_of_every_size(images: ImageStorage, tmp_path: Path, kind: Any, size: int) -> None:
    """Whatever an upload comes as, and however large it is, its bytes come back."""
    await check_storing(images, kind, noise(size), tmp_path)


@pytest.mark.parametrize("kind", OTHER_SOURCES.values(), ids=OTHER_SOURCES)
async def test_other_sources(images: ImageStorage, tmp_path: Path, kind: Any) -> None:
    """The less usual shapes of bytes, paths and files are as good."""
    size = 300 if kind is OTHER_SOURCES["single bytes"] else CHUNK + 4
    await check_storing(images, kind, noise(size), tmp_path)


@pytest.mark.parametrize("size", [LARGE - 1, LARGE, WRITE_AT_ONCE * CHUNK - 1, WRITE_AT_ONCE * CHUNK, 2 * LARGE])
async def test_sizes_around_a_transaction(images: ImageStorage, size: int) -> None:
    """No byte is lost or doubled where one transaction of a large upload ends and the next begins."""
    record = await images.store_image("a.png", noise(size))
    assert await whole(images, record) == noise(size)


async def test_what_is_no_source(images: ImageStorage) -> None:
    """Something that holds no bytes is refused, and nothing is recorded."""
    nonsense: list[Any] = [None, 17, ["a", "b"], StringIO("text")]
    for source in nonsense:
        with pytest.raises(TypeError):
            await images.store_image("a.png", source)
    assert await images.find("a.png") is None


@pytest.mark.parametrize("size", [10, CHUNK + 1, 2 * LARGE])
async def test_a_source_that_breaks_off(images: ImageStorage, size: int) -> None:
    """If an upload breaks off the caller gets its error, and the name stays what it was."""

    async def breaking() -> AsyncIterator[bytes]:
        yield noise(size)
        raise EOFError("the client has gone")

    before = await images.store_image("old.png", b"old")
    for name in ("new.png", "old.png"):
        with pytest.raises(EOFError, match="the client has gone"):
            await images.store_image(name, breaking())
    assert await images.find("new.png") is None
    assert await images.find("old.png") == before
    assert await images.history("old.png") == []
    assert await whole(images, before) == b"old"


# -- equal bytes --------------------------------------------------------------------------------------------------


async def stored(url: str) -> tuple[int, int, int]:
    """Rows of blobs, rows of chunks, and bytes in those chunks."""
    (blobs,) = await sql(url, "SELECT count(*) FROM image_blob")
    (chunks,) = await sql(url, "SELECT count(*), coalesce(sum(length(data)), 0) FROM image_chunk")
    return int(blobs[0]), int(chunks[0]), int(chunks[1])


@pytest.mark.parametrize("size", [0, 1000, CHUNK + 1, LARGE])
async def test_equal_bytes_once(images: ImageStorage, database_url: str, size: int) -> None:
    """Equal bytes are stored once, whatever the names and however they come, and nothing else is stored."""
    data = noise(size)
    records = [
        await images.store_image("a.png", data),
        await images.store_image("b.png", pieces(data, (100_000,))),
        await images.store_image("c.png", data, known=digests_of(data)),
        await images.store_image("a.png", data),
    ]
    assert await stored(database_url) == (1, -(-size // CHUNK), size)
    assert [await whole(images, record) for record in records] == [data] * 4


@pytest.mark.parametrize("size", [1000, LARGE], ids=["small", "large"])
async def test_equal_bytes_at_the_same_time(images: ImageStorage, database_url: str, size: int) -> None:
    """Equal bytes that come under several names at once are stored once, and every name has them."""
    data = noise(size)
    records: dict[str, Record] = {}

    async def save(name: str) -> None:
        records[name] = await images.store_image(name, pieces(data, (CHUNK,)))

    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(save, f"{number}.png")
    assert sorted(records) == [f"{number}.png" for number in range(6)]
    for name, record in records.items():
        assert await images.find(name) == record
        assert await whole(images, record) == data
    assert await stored(database_url) == (1, -(-size // CHUNK), size)


async def test_bytes_of_known_and_of_unknown_digests_at_the_same_time(images: ImageStorage) -> None:
    """Chunks that are moved meet those that another stores where they belong: both get there, whoever is faster."""
    for turn in range(8):
        data = turn.to_bytes(4, "big") + noise(3 * LARGE)

        async def save_known(data: bytes = data, turn: int = turn) -> Record:
            await anyio.sleep(turn * 0.025)
            return await images.store_image(f"{turn}/known.png", data, known=digests_of(data))

        saving = images.store_image(f"{turn}/unknown.png", pieces(data, (CHUNK,)))
        for record in await asyncio.gather(saving, save_known()):
            assert await whole(images, record) == data


@pytest.mark.parametrize("is_damaged", [False, True], ids=["new", "damaged"])
async def test_chunks_that_are_moved_in_several_transactions(
    images: ImageStorage, database_url: str, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    """All of them stand where they belong in the end, instead of what stood there; others write in between."""
    monkeypatch.setattr("selfheal.blobs.database.MOVED_AT_ONCE", 3)
    data = noise(2 * LARGE)
    if is_damaged:
        record = await images.store_image("a.png", data, known=digests_of(data))
        for damage in (a_bit_of_the_data(4, 9), a_missing_chunk(7), an_extra_chunk(b"more")):
            await damage(database_url, record)
    records = [await images.store_image("a.png", pieces(data, (CHUNK,)))]

    async def save(name: str) -> None:
        records.append(await images.store_image(name, pieces(data, (CHUNK,))))

    async with anyio.create_task_group() as group:
        group.start_soon(save, "b.png")
        group.start_soon(save, "c.png")
        group.start_soon(images.store_image, "small.png", b"small")
    assert await stored(database_url) == (2, -(-len(data) // CHUNK) + 1, len(data) + 5)
    assert [await whole(images, record) for record in records] == [data] * 3


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 2 * LARGE])
async def test_what_is_read_whole_goes_on_after_a_first_chunk_that_is_there(images: ImageStorage, size: int) -> None:
    """A first chunk that was fetched with the record is not read again; what cannot be one is."""
    data = noise(size)
    record = await images.store_image("a.png", data)
    first = (await images.fetch(["a.png"]))["a.png"].first
    odd: list[Any] = [None, b"", data[:CHUNK].hex(), data[: CHUNK - 1]]
    for given in (first, *odd):
        read = [chunk async for chunks in images.read_whole(record, given) for chunk in chunks]
        assert b"".join(read) == data
    if size > CHUNK:
        read = [chunk async for chunks in images.read_whole(record, first) for chunk in chunks]
        assert read[0] is first


@pytest.mark.parametrize("moved_at_once", [1, 3, 7])
async def test_any_number_of_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved_at_once: int) -> None:
    """However many chunks an upload has, and however they fall into transactions: all are there, and nothing else."""
    resize(monkeypatch, CHUNK=16, HASH_AT_ONCE=2, WRITE_AT_ONCE=5, MOVED_AT_ONCE=moved_at_once)
    database_url = f"sqlite+aiosqlite:///{tmp_path / 'app.db'}"
    images = ImageStorage(database_url)
    await images.create_tables()
    chunks = size = 0
    for count in range(1, 23):
        data = noise(16 * count - 3 * (count % 2))
        first = await images.store_image(f"{count}/first.png", pieces(data, (7,)))
        again = await images.store_image(f"{count}/again.png", pieces(data, (16,)))
        assert await whole(images, first) == await whole(images, again) == data
        with pytest.raises(CorruptBlob):
            await images.mend(again, pieces(data[:-1], (16,)))
        with pytest.raises(CorruptBlob):
            await images.mend(replace(again, sha256="0" * 64), pieces(data, (16,)))
        await a_missing_chunk(count // 2)(database_url, again)
        await images.mend(again, pieces(data, (16,)))
        assert await whole(images, first) == data
        chunks, size = chunks + count, size + len(data)
    await images.purge(timedelta(0), grace=timedelta(seconds=-5))
    assert await stored(database_url) == (22, chunks, size)
    await images.close()


@pytest.mark.parametrize("done", [1, 2, 3, 8, 18])
async def test_a_move_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """The same bytes under another name stay whole; what is left of the upload is nobody's, and purged."""
    database_url = f"sqlite+aiosqlite:///{tmp_path / 'app.db'}"
    images = ImageStorage(database_url)
    await images.create_tables()
    monkeypatch.setattr("selfheal.blobs.database.MOVED_AT_ONCE", 3)
    data = noise(2 * LARGE)
    before = await images.store_image("before.png", data)
    real, left = images._engine.write, done

    async def write(work: Callable[[AsyncConnection], Awaitable[Any]]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise DatabaseUnavailable("it was killed")
        return await real(work)

    with monkeypatch.context() as patch:
        patch.setattr(images._engine, "write", write)
        with pytest.raises(DatabaseUnavailable):
            await images.store_image("a.png", pieces(data, (CHUNK,)))
    assert await images.find("a.png") is None
    assert await whole(images, before) == data
    await images.purge(timedelta(0), grace=timedelta(seconds=-5))
    assert await stored(database_url) == (1, -(-len(data) // CHUNK), len(data))
    assert await whole(images, before) == data
    await images.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much was written")
async def test_bytes_are_written_once(tmp_path: Path) -> None:
    """SQLite writes a chunk once, though the digest under which it belongs is known only at the end."""
    images = ImageStorage(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}")
    await images.create_tables()
    data = noise(8 * LARGE)
    before = bytes_written()
    await images.store_image("a.png", pieces(data, (CHUNK,)))
    written = bytes_written() - before
    await images.close()
    assert written < 1.3 * len(data)


async def test_the_same_bytes_at_the_same_time(images: ImageStorage) -> None:
    """Many saves of the same bytes under one name are one change."""
    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(images.store_image, "a.png", b"same")
    record = await images.find("a.png")
    assert record is not None
    assert record.generation == 1
    assert await images.history("a.png") == []


@pytest.mark.parametrize("size", [1000, LARGE, 2 * LARGE])
@pytest.mark.parametrize("there", [True, False], ids=["bytes are there", "bytes are new"])
async def test_a_promise_that_is_broken(images: ImageStorage, there: bool, size: int) -> None:
    """Bytes that are not the promised ones are refused, and never reach those that are stored under the promise."""
    good, bad = noise(size), noise(size, seed=1)
    if there:
        await images.store_image("good.png", good)
    for other in (bad, good[:-1], good + b"x", good[: size // 2] + b"x" + good[size // 2 + 1 :]):
        with pytest.raises(Unsettled):
            await images.store_image("bad.png", other, known=digests_of(good))
    assert await images.find("bad.png") is None
    record = await images.store_image("good.png", good) if not there else await images.find("good.png")
    assert record is not None
    assert await whole(images, record) == good


@pytest.mark.parametrize("size", [0, 1000, LARGE])
async def test_a_promise_that_is_kept(images: ImageStorage, size: int) -> None:
    """Bytes that are the promised ones are stored as any others."""
    data = noise(size)
    record = await images.store_image("a.png", data, known=digests_of(data))
    assert await whole(images, record) == data


# -- reading --------------------------------------------------------------------------------------------------------

CHUNKS = READ_AT_ONCE + 2
PICTURE = noise(CHUNKS * CHUNK - 777)
"""Read in two queries; the last chunk is shorter than the others."""


@pytest.mark.parametrize("first", [0, 1, READ_AT_ONCE - 1, READ_AT_ONCE, CHUNKS - 1, CHUNKS, CHUNKS + 5])
async def test_reading_from_the_middle(images: ImageStorage, first: int) -> None:
    """A reader that begins at a later chunk gets the rest, all of it and nothing else."""
    record = await images.store_image("a.png", PICTURE)
    assert await whole(images, record, first) == PICTURE[first * CHUNK :]


async def test_a_paused_reader_holds_no_connection(images: ImageStorage) -> None:
    """However many slow readers there are, the next question is answered."""
    record = await images.store_image("a.png", PICTURE)
    readers = [images.read(record) for _ in range(30)]
    begun = [await anext(reader) for reader in readers]
    assert await images.find("a.png") == record
    await images.store_image("b.png", b"new")
    for first, reader in zip(begun, readers, strict=True):
        assert first + b"".join([chunk async for chunk in reader]) == PICTURE


async def test_overwritten_while_it_is_read(images: ImageStorage) -> None:
    """Who has begun to read a version gets it whole, though the name was overwritten and deleted meanwhile."""
    record = await images.store_image("a.png", PICTURE)
    async with aclosing(images.read(record)) as reader:
        got = await anext(reader)
        await images.store_image("a.png", b"new")
        await images.bury("a.png")
        got += b"".join([chunk async for chunk in reader])
    assert got == PICTURE


async def test_stored_again_while_it_is_read(images: ImageStorage) -> None:
    """Storing bytes again does not disturb who reads them."""
    data = noise(LARGE)
    record = await images.store_image("a.png", data)
    async with aclosing(images.read(record)) as reader:
        got = await anext(reader)
        await images.store_image("b.png", data)
        got += b"".join([chunk async for chunk in reader])
    assert got == data


async def test_reading_an_earlier_version(images: ImageStorage) -> None:
    """The bytes of a version of the history can be read."""
    await images.store_image("a.png", PICTURE)
    await images.store_image("a.png", b"new")
    (version,) = await images.history("a.png")
    assert b"".join([chunk async for chunk in images.read(version)]) == PICTURE


async def test_memory_does_not_grow_with_the_file(images: ImageStorage) -> None:
    """Storing and reading 32 MB takes the memory of a few chunks, not of the file."""
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


# -- damage ---------------------------------------------------------------------------------------------------------

Damage = Callable[[str, Record], Awaitable[None]]


async def chunk_of(url: str, record: Record, position: int) -> tuple[bytes, bytes]:
    """The data and the digest of a chunk as they stand."""
    query = "SELECT data, digest FROM image_chunk WHERE sha256 = :key AND position = :position"
    ((data, digest),) = await sql(url, query, key=record.sha256, position=position)
    return data, digest


async def rewrite(url: str, record: Record, position: int, **columns: bytes) -> None:
    """Write columns of a chunk anew."""
    changes = ", ".join(f"{column} = :{column}" for column in columns)
    statement = f"UPDATE image_chunk SET {changes} WHERE sha256 = :key AND position = :position"
    await sql(url, statement, key=record.sha256, position=position, **columns)


def flipped(data: bytes, at: int) -> bytes:
    """The same bytes, but for one bit."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def a_bit_of_the_data(position: int, at: int) -> Damage:
    """One bit of a chunk's data differs."""

    async def damage(url: str, record: Record) -> None:
        data, _ = await chunk_of(url, record, position)
        await rewrite(url, record, position, data=flipped(data, at))

    return damage


def a_bit_of_the_digest(position: int) -> Damage:
    """One bit of a chunk's digest differs."""

    async def damage(url: str, record: Record) -> None:
        _, digest = await chunk_of(url, record, position)
        await rewrite(url, record, position, digest=flipped(digest, 31))

    return damage


def a_missing_chunk(position: int) -> Damage:
    """A chunk is gone."""

    async def damage(url: str, record: Record) -> None:
        statement = "DELETE FROM image_chunk WHERE sha256 = :key AND position = :position"
        await sql(url, statement, key=record.sha256, position=position)

    return damage


def swapped_chunks(one: int, other: int) -> Damage:
    """Two chunks have changed places, their digests with them."""

    async def damage(url: str, record: Record) -> None:
        for here, there in ((one, 1000), (other, one), (1000, other)):
            statement = "UPDATE image_chunk SET position = :there WHERE sha256 = :key AND position = :here"
            await sql(url, statement, key=record.sha256, here=here, there=there)

    return damage


def swapped_data(one: int, other: int) -> Damage:
    """The data of two chunks have changed places, their digests have not."""

    async def damage(url: str, record: Record) -> None:
        first, _ = await chunk_of(url, record, one)
        second, _ = await chunk_of(url, record, other)
        await rewrite(url, record, one, data=second)
        await rewrite(url, record, other, data=first)

    return damage


def a_chunk_of_other_length(position: int, change: int) -> Damage:
    """A chunk is longer or shorter than it should be, though its own digest matches."""

    async def damage(url: str, record: Record) -> None:
        data, _ = await chunk_of(url, record, position)
        data = data + bytes(change) if change > 0 else data[:change]
        await rewrite(url, record, position, data=data, digest=chunk_digest(position, data))

    return damage


def an_extra_chunk(data: bytes) -> Damage:
    """A chunk stands behind the last one, and its own digest matches."""

    async def damage(url: str, record: Record) -> None:
        position = -(-record.size // CHUNK)
        await sql(
            url,
            "INSERT INTO image_chunk (sha256, position, digest, data) VALUES (:key, :position, :digest, :data)",
            key=record.sha256,
            position=position,
            digest=chunk_digest(position, data),
            data=data,
        )

    return damage


def a_recorded_size(change: Callable[[int], int]) -> Damage:
    """The record says another size."""

    async def damage(url: str, record: Record) -> None:
        statement = "UPDATE image_storage SET size = :size WHERE name = :name"
        await sql(url, statement, name=record.name, size=change(record.size))

    return damage


DAMAGED_CHUNKS: dict[str, tuple[Damage, int]] = {
    **{f"data of chunk {n}": (a_bit_of_the_data(n, 1000), n) for n in (0, READ_AT_ONCE - 1, READ_AT_ONCE, CHUNKS - 1)},
    "first byte": (a_bit_of_the_data(0, 0), 0),
    "last byte": (a_bit_of_the_data(CHUNKS - 1, CHUNK - 778), CHUNKS - 1),
    **{f"digest of chunk {n}": (a_bit_of_the_digest(n), n) for n in (0, READ_AT_ONCE, CHUNKS - 1)},
    **{f"chunk {n} missing": (a_missing_chunk(n), n) for n in (0, 3, READ_AT_ONCE, CHUNKS - 1)},
    "chunks swapped": (swapped_chunks(1, 2), 1),
    "chunks swapped far apart": (swapped_chunks(0, READ_AT_ONCE), 0),
    "data swapped": (swapped_data(4, 5), 4),
    "first chunk longer": (a_chunk_of_other_length(0, 1), 0),
    "middle chunk shorter": (a_chunk_of_other_length(5, -1), 5),
    "last chunk longer": (a_chunk_of_other_length(CHUNKS - 1, 1), CHUNKS - 1),
    "last chunk shorter": (a_chunk_of_other_length(CHUNKS - 1, -1), CHUNKS - 1),
}
"""What is damaged, and the number of the first chunk that is not as it was."""
OTHER_DAMAGES: dict[str, Damage] = {
    "extra chunk": an_extra_chunk(b"more"),
    "extra whole chunk": an_extra_chunk(noise(CHUNK)),
    "size -1": a_recorded_size(lambda _: -1),
    "size -2**62": a_recorded_size(lambda _: -(2**62)),
    "size 2**62": a_recorded_size(lambda _: 2**62),
    "size 0": a_recorded_size(lambda _: 0),
    "size 1": a_recorded_size(lambda _: 1),
    "a byte less": a_recorded_size(lambda size: size - 1),
    "a byte more": a_recorded_size(lambda size: size + 1),
    "a chunk less": a_recorded_size(lambda size: size // CHUNK * CHUNK),
    "a chunk more": a_recorded_size(lambda size: size + CHUNK),
}


async def read_damaged(images: ImageStorage) -> bytes:
    """What a reader gets before it is told that the rest is damaged."""
    record = await images.find("a.png")
    assert record is not None
    got = bytearray()

    async def collect() -> None:
        async for chunk in images.read(record):
            got.extend(chunk)

    with pytest.raises(CorruptBlob) as caught:
        await collect()
    assert caught.value.name == "a.png"
    assert "a.png" in str(caught.value)
    return bytes(got)


@pytest.mark.parametrize(("damage", "intact"), DAMAGED_CHUNKS.values(), ids=DAMAGED_CHUNKS)
async def test_damaged_chunks(images: ImageStorage, database_url: str, damage: Damage, intact: int) -> None:
    """A reader gets nothing of a damaged chunk, nor of what comes behind it: never a wrong byte."""
    record = await images.store_image("a.png", PICTURE)
    await damage(database_url, record)
    assert PICTURE[: intact * CHUNK].startswith(await read_damaged(images))


@pytest.mark.parametrize("damage", OTHER_DAMAGES.values(), ids=OTHER_DAMAGES)
async def test_damaged_length(images: ImageStorage, database_url: str, damage: Damage) -> None:
    """If the chunks are more or fewer than the record says, the reader is told, and got no wrong byte."""
    record = await images.store_image("a.png", PICTURE)
    await damage(database_url, record)
    assert PICTURE.startswith(await read_damaged(images))


async def test_damage_before_the_place_that_is_read(images: ImageStorage, database_url: str) -> None:
    """What is whole behind a damaged chunk can still be read from there."""
    record = await images.store_image("a.png", PICTURE)
    await a_bit_of_the_data(0, 0)(database_url, record)
    assert await whole(images, record, 1) == PICTURE[CHUNK:]


async def test_damage_of_one_is_no_damage_of_another(images: ImageStorage, database_url: str) -> None:
    """Other images can be read beside a damaged one."""
    record = await images.store_image("a.png", PICTURE)
    other = await images.store_image("b.png", noise(1000))
    await a_missing_chunk(0)(database_url, record)
    assert await whole(images, other) == noise(1000)


# -- mending --------------------------------------------------------------------------------------------------------

MENDABLE: dict[str, Damage] = {
    what: DAMAGED_CHUNKS[what][0]
    for what in ("data of chunk 0", "digest of chunk 9", "chunk 3 missing", "chunks swapped", "last chunk longer")
} | {"extra chunk": OTHER_DAMAGES["extra chunk"]}


@pytest.mark.parametrize("way", ["mend", "store the same bytes again", "store them under another name"])
async def test_mending(images: ImageStorage, database_url: str, way: str) -> None:
    """Good bytes mend damaged ones, whatever the damage, and the record stays as it was."""
    record = await images.store_image("a.png", PICTURE)
    still_damaged = []
    for what, damage in MENDABLE.items():
        await damage(database_url, record)
        if way == "mend":
            await images.mend(record, pieces(PICTURE, (100_000,)))
        else:
            await images.store_image("a.png" if way == "store the same bytes again" else "b.png", PICTURE)
        assert await images.find("a.png") == record
        if await stored(database_url) != (1, CHUNKS, len(PICTURE)) or await whole(images, record) != PICTURE:
            still_damaged.append(what)
            await sql(database_url, "DELETE FROM image_chunk")
            await images.mend(record, PICTURE)
    assert still_damaged == []


@pytest.mark.parametrize("size", [0, 10, LARGE])
async def test_mending_with_other_bytes(images: ImageStorage, database_url: str, size: int) -> None:
    """Bytes that are not the recorded ones mend nothing and change nothing."""
    data = noise(LARGE, seed=2)
    record = await images.store_image("a.png", data)
    with pytest.raises(CorruptBlob, match=r"a\.png"):
        await images.mend(record, noise(size, seed=3))
    assert await images.find("a.png") == record
    assert await whole(images, record) == data
    assert await images.history("a.png") == []


async def test_mending_what_a_purge_took(images: ImageStorage, database_url: str) -> None:
    """Bytes that are gone altogether are mended as well as damaged ones."""
    record = await images.store_image("a.png", PICTURE)
    await sql(database_url, "DELETE FROM image_chunk")
    await sql(database_url, "DELETE FROM image_blob")
    await images.mend(record, PICTURE)
    assert await whole(images, record) == PICTURE
    assert await stored(database_url) == (1, CHUNKS, len(PICTURE))
