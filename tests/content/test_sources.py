"""Sources of an upload: each becomes read_chunks of one size, and everything that was opened is closed."""

from __future__ import annotations

import array
import asyncio
import gc
import io
import os
import tempfile
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import UploadFile

from selfheal.aio.threads import Threads
from selfheal.content.sources import CHUNK, Source, read_chunks
from tests.support.open_files import descriptors_of

SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 7]
Maker = Callable[[bytes, Path], Source]


@pytest.fixture
def threads() -> Iterator[Threads]:
    """A thread pool in which files are read."""
    threads = Threads(4)
    yield threads
    threads.close()


class Wrapper:
    """A file object that delegates to another one, as those of `tempfile` and Flask do."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class AsyncFile:
    """A file object of an asynchronous framework; `at` is its position."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._file = io.BytesIO(data)
        self._file.seek(at)

    async def read(self, size: int) -> bytes:
        """Return up to `size` bytes."""
        await asyncio.sleep(0)
        return self._file.read(size)

    async def seek(self, offset: int) -> None:
        """Move to `offset`."""
        self._file.seek(offset)


def data_of(size: int) -> bytes:
    """Return bytes that differ at every position."""
    return b"".join(number.to_bytes(4, "big") for number in range(size // 4 + 1))[:size]


def written(data: bytes, path: Path) -> Path:
    """Write a file and return its path."""
    path.write_bytes(data)
    return path


async def in_pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    """Yield `data` in pieces of `size` bytes, with empty ones between them."""
    for start in range(0, len(data), size):
        yield data[start : start + size]
        yield b""


def stream_reader(data: bytes, _: Path) -> asyncio.StreamReader:
    """Return a reader as of a socket or a pipe."""
    reader = asyncio.StreamReader(limit=1 << 24)
    reader.feed_data(data)
    reader.feed_eof()
    return reader


SOURCES: dict[str, Maker] = {
    "bytes": lambda data, _: data,
    "bytearray": lambda data, _: bytearray(data),
    "memoryview": lambda data, _: memoryview(data),
    "path": written,
    "path as str": lambda data, path: str(written(data, path)),
    "BytesIO": lambda data, _: io.BytesIO(data),
    "async iterator of small pieces": lambda data, _: in_pieces(data, 65_521),
    "async iterator of large pieces": lambda data, _: in_pieces(data, 2 * CHUNK + 5),
    "UploadFile": lambda data, _: UploadFile(io.BytesIO(data), filename="a.png"),
    "AsyncFile": lambda data, _: AsyncFile(data),
    "AsyncFile that was read": lambda data, _: AsyncFile(data, at=len(data) // 2),
    "StreamReader": stream_reader,
    "wrapped file object": lambda data, _: Wrapper(io.BytesIO(data)),
}


async def collected(source: Source, threads: Threads) -> list[bytes]:
    """Return all read_chunks of a source."""
    return [chunk async for chunk in read_chunks(source, threads)]


def assert_is_whole(pieces: list[bytes], data: bytes) -> None:
    """Fail unless the read_chunks are the data, each of `CHUNK` bytes but the last, which is not empty."""
    assert b"".join(pieces) == data
    assert all(type(piece) is bytes for piece in pieces)
    assert [len(piece) for piece in pieces[:-1]] == [CHUNK] * (len(pieces) - 1)
    assert all(0 < len(piece) <= CHUNK for piece in pieces[-1:])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
async def test_every_source(make: Maker, size: int, threads: Threads, tmp_path: Path) -> None:
    """Every kind of source, of every edge-case size, gives its whole data in read_chunks of one size."""
    data = data_of(size)
    assert_is_whole(await collected(make(data, tmp_path / "upload"), threads), data)


@given(st.lists(st.sampled_from([0, 1, 2, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3]), max_size=8))
@settings(max_examples=30)
def test_odd_pieces(sizes: list[int]) -> None:
    """A stream in pieces of any size, empty ones too, gives its whole data in read_chunks of one size."""
    data = data_of(sum(sizes))

    async def cut() -> AsyncIterator[bytes]:
        start = 0
        for size in sizes:
            yield data[start : start + size]
            start += size

    assert_is_whole(asyncio.run(collected(cut(), Threads())), data)


async def test_a_view_of_wide_items(threads: Threads) -> None:
    """A view with items wider than a byte is saved as its bytes."""
    numbers = array.array("I", range(CHUNK // 2))
    assert_is_whole(await collected(memoryview(numbers), threads), numbers.tobytes())


@pytest.mark.parametrize("step", [2, -1])
async def test_a_view_with_a_step(step: int, threads: Threads) -> None:
    """A view with a step, forwards or backwards, is saved as the bytes it shows."""
    data = data_of(3 * CHUNK)
    assert_is_whole(await collected(memoryview(data)[::step], threads), data[::step])


async def test_an_upload_that_was_spooled_to_disk(threads: Threads) -> None:
    """An UploadFile that was spooled to disk and read by the app is saved from its beginning."""
    data = data_of(3 * CHUNK + 7)
    with tempfile.SpooledTemporaryFile(max_size=CHUNK) as file:
        upload = UploadFile(file, filename="a.png")  # type: ignore[arg-type]
        await upload.write(data)
        await upload.seek(0)
        assert await upload.read(16) == data[:16]
        assert_is_whole(await collected(upload, threads), data)


async def test_a_temporary_file(threads: Threads) -> None:
    """A named temporary file, which delegates to a file, can be saved."""
    data = data_of(CHUNK + 7)
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.seek(0)
        assert_is_whole(await collected(file, threads), data)


async def test_an_opened_file(threads: Threads, tmp_path: Path) -> None:
    """A file that the caller opened is read to its end and stays open."""
    data = data_of(CHUNK + 7)
    path = written(data, tmp_path / "upload")
    with path.open("rb") as file:
        assert_is_whole(await collected(file, threads), data)
        assert not file.closed
    async with await anyio.open_file(path, "rb") as async_file:
        assert_is_whole(await collected(async_file, threads), data)
        assert not async_file.wrapped.closed


async def test_files_are_read_in_threads(threads: Threads) -> None:
    """A file object is not read in the thread of the event loop: its disk may be slow."""
    readers: set[int] = set()

    class Recording(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            readers.add(threading.get_ident())
            return super().read(size)

    await collected(Recording(data_of(CHUNK + 1)), threads)
    assert readers
    assert threading.get_ident() not in readers


@pytest.mark.parametrize("source", [None, 5, object(), ["a"], iter([b"a"])], ids=lambda source: type(source).__name__)
async def test_other_types_are_refused(source: Any, threads: Threads) -> None:
    """Any other type raises `TypeError` with the type and the types that are accepted."""
    with pytest.raises(TypeError, match=f"cannot save a {type(source).__name__}: give bytes, a path"):
        await collected(source, threads)


async def test_text_is_refused(threads: Threads, tmp_path: Path) -> None:
    """A file opened as text raises a `TypeError` that says to open it in binary mode."""
    with pytest.raises(TypeError, match="open it in binary mode"):
        await collected(io.StringIO("text"), threads)  # type: ignore[arg-type]
    with written(b"text", tmp_path / "upload").open() as file, pytest.raises(TypeError, match="binary mode"):
        await collected(file, threads)  # type: ignore[arg-type]

    async def text() -> AsyncIterator[Any]:
        yield "text"

    with pytest.raises(TypeError):
        await collected(text(), threads)


async def test_a_path_that_cannot_be_opened(threads: Threads, tmp_path: Path) -> None:
    """A path that cannot be opened raises the error of `open`."""
    with pytest.raises(FileNotFoundError):
        await collected(tmp_path / "nothing", threads)
    with pytest.raises(IsADirectoryError):
        await collected(tmp_path, threads)


async def test_errors_of_a_source_reach_the_caller(threads: Threads, tmp_path: Path) -> None:
    """An error of a stream or file is raised after the bytes that came before it."""

    async def broken() -> AsyncIterator[bytes]:
        yield bytes(CHUNK)
        raise ConnectionResetError("the client is gone")

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    stream = read_chunks(broken(), threads)
    assert await anext(stream) == bytes(CHUNK)
    with pytest.raises(ConnectionResetError, match="the client is gone"):
        await anext(stream)
    with pytest.raises(OSError, match="Input/output error"):
        await collected(Broken(), threads)


async def test_a_path_is_closed_at_its_end(threads: Threads, tmp_path: Path) -> None:
    """A file opened for its path is closed after it was read."""
    path = written(data_of(CHUNK + 1), tmp_path / "upload")
    await collected(path, threads)
    assert descriptors_of(path) == 0


async def test_a_path_is_closed_when_the_reader_stops(threads: Threads, tmp_path: Path) -> None:
    """A file opened for its path is closed when the reader stops early."""
    path = written(data_of(4 * CHUNK), tmp_path / "upload")
    async with aclosing(read_chunks(path, threads)) as stream:
        await anext(stream)
        assert descriptors_of(path) == 1
    assert descriptors_of(path) == 0


async def test_a_stream_is_closed_when_the_reader_stops(threads: Threads) -> None:
    """The app's stream has run its clean-up when the reader stops early."""
    ended = []

    async def stream() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(CHUNK)
        finally:
            ended.append(True)

    async with aclosing(read_chunks(stream(), threads)) as read:
        await anext(read)
    assert ended == [True]


async def test_cancelled_while_the_file_opens(threads: Threads, tmp_path: Path) -> None:
    """A caller that is cancelled while its file is opened leaves no file open."""
    path = tmp_path / "slow"
    os.mkfifo(path)  # opening it waits, as on a slow disk, until a writer opens the other end
    reading: Awaitable[list[bytes]] = asyncio.ensure_future(collected(path, threads))
    await asyncio.sleep(0.1)
    reading.cancel()  # type: ignore[attr-defined]
    await asyncio.sleep(0.1)
    writer = os.open(path, os.O_WRONLY)
    try:
        with pytest.raises(asyncio.CancelledError):
            await reading
        gc.collect()
        assert descriptors_of(path) == 1
    finally:
        os.close(writer)


@pytest.mark.parametrize("kind", ["stream", "path", "bytes"])
async def test_memory_does_not_grow_with_the_file(kind: str, threads: Threads, tmp_path: Path) -> None:
    """Besides what the caller holds, only a few read_chunks are in memory, however large the upload is."""
    size = 48 * CHUNK

    async def stream() -> AsyncIterator[bytes]:
        for _ in range(size // 65_536):
            yield bytes(65_536)

    sources: dict[str, Callable[[], Source]] = {
        "stream": stream,
        "path": lambda: written(bytes(size), tmp_path / "upload"),
        "bytes": lambda: bytes(size),
    }
    source = sources[kind]()
    tracemalloc.start()
    try:
        total = 0
        async for chunk in read_chunks(source, threads):
            total += len(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == size
    assert peak < 8 * CHUNK
