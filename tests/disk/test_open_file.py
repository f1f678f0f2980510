"""An open file: measured once, read in pieces or chunks, hashed, and closed; a file that is cut short raises."""

from __future__ import annotations

import errno
import hashlib
import inspect
import os
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from selfheal.aio.threads import Threads
from selfheal.content.digests import Digests
from selfheal.content.sources import CHUNK
from selfheal.disk import open_file as files
from selfheal.disk.open_file import PIECE, OpenFile, ReadFailed, identity_of, read_cached
from selfheal.errors import FileChanged
from tests.support.os_errors import fails

PICTURE = bytes(range(256)) * 40
LONG = b"".join(number.to_bytes(4, "big") for number in range((4 * PIECE + 3 * CHUNK) // 4)) + b"end"
MODIFIED = 1_234_567_890_123_456_789


@pytest.fixture
def threads() -> Iterator[Threads]:
    """A thread pool with one thread."""
    threads = Threads(1)
    yield threads
    threads.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a file."""
    path = tmp_path / "tom.png"
    path.write_bytes(PICTURE)
    os.utime(path, ns=(MODIFIED, MODIFIED))
    return path


@pytest.fixture
def file(path: Path, threads: Threads) -> Iterator[OpenFile]:
    """The file at `path`, open."""
    with open_path(path, threads) as file:
        yield file


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """Every read from the page cache succeeds; the value lists the threads that read from it."""
    real, readers = os.preadv, list[threading.Thread]()

    def at_once(fd: int, buffers: Sequence[bytearray], offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        readers.append(threading.current_thread())
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", at_once)
    return readers


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """No read from the page cache succeeds; the value lists the threads that waited for the disk."""
    real, readers = os.pread, list[threading.Thread]()

    def slowly(fd: int, size: int, offset: int) -> bytes:
        readers.append(threading.current_thread())
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", slowly)
    monkeypatch.setattr(os, "preadv", fails(errno.EAGAIN))
    return readers


def open_path(path: Path, threads: Threads) -> OpenFile:
    """Open the file at a path."""
    fd = os.open(path, os.O_RDONLY)
    return OpenFile(fd, str(path), os.fstat(fd), threads)


# -- measured --------------------------------------------------------------------------------------------------------


def test_a_file_is_measured_once(file: OpenFile, path: Path) -> None:
    """Size, mtime and identity are those at the time of opening, whatever happens to the name later."""
    measured = path.stat()
    path.rename(path.with_name("mog.png"))
    path.write_bytes(b"another")
    assert (file.size, file.modified_ns) == (len(PICTURE), MODIFIED)
    assert file.identity == identity_of(measured)
    assert file.read_waiting(0, file.size) == PICTURE


def test_an_identity_is_time_size_inode_and_change(path: Path) -> None:
    """The identity is (mtime in ns, size, inode, ctime in ns), in this order: other modules compare it."""
    measured = path.stat()
    wanted = (MODIFIED, len(PICTURE), measured.st_ino, measured.st_ctime_ns)
    assert identity_of(measured) == wanted


# -- read ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "size", "wanted"),
    [(0, 10, PICTURE[:10]), (7, 1, PICTURE[7:8]), (0, len(PICTURE), PICTURE), (300, 99_999, PICTURE[300:])],
)
async def test_cached_bytes_are_read_without_a_thread(
    cached: list[threading.Thread], file: OpenFile, start: int, size: int, wanted: bytes
) -> None:
    """Cached bytes are read in the caller's thread: as many as asked for, or as there are."""
    assert read_cached(file.fd, start, size) == wanted
    assert await file.read(start, size) == wanted
    assert set(cached) == {threading.current_thread()}


@pytest.mark.parametrize(
    ("start", "size", "wanted"), [(0, 10, PICTURE[:10]), (300, 99_999, PICTURE[300:]), (len(PICTURE), 1, b"")]
)
async def test_uncached_bytes_are_read_in_a_thread(
    uncached: list[threading.Thread], file: OpenFile, start: int, size: int, wanted: bytes
) -> None:
    """Bytes that are not cached are read in a thread of the pool, so that the event loop is not blocked."""
    with pytest.raises(BlockingIOError):
        read_cached(file.fd, start, size)
    assert uncached == []
    assert await file.read(start, size) == wanted
    assert len(uncached) == 1
    assert threading.current_thread() not in uncached


def test_the_cache_does_not_show_the_end(cached: list[threading.Thread], file: OpenFile) -> None:
    """A read of 0 bytes from the cache is not the end of the file: only the disk can tell."""
    with pytest.raises(BlockingIOError):
        read_cached(file.fd, file.size, 1)


@pytest.mark.parametrize("size", [PIECE, PIECE + 1, 3 * PIECE])
async def test_a_read_from_the_cache_is_one_piece_at_most(
    cached: list[threading.Thread], path: Path, threads: Threads, size: int
) -> None:
    """A read from the cache returns one piece at most."""
    path.write_bytes(LONG)
    with open_path(path, threads) as file:
        assert read_cached(file.fd, 7, size) == LONG[7 : 7 + PIECE]
        assert await file.read(7, size) == LONG[7 : 7 + PIECE]


def test_bytes_that_were_read_do_not_change(cached: list[threading.Thread], file: OpenFile) -> None:
    """A read returns `bytes`, which a later read does not change."""
    first = read_cached(file.fd, 0, 100)
    assert read_cached(file.fd, 100, 100) == PICTURE[100:200]
    assert type(first) is bytes
    assert first == PICTURE[:100]


def test_threads_that_read_at_once_do_not_mix(path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that read at the same time get their own bytes, although each reads into a buffer first."""
    real, both_have_read, got = os.preadv, threading.Barrier(2), dict[int, bytes]()

    def together(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        count = real(fd, buffers, offset)
        both_have_read.wait(10)
        return count

    def read(start: int) -> None:
        got[start] = read_cached(file.fd, start, 1000)

    monkeypatch.setattr(os, "preadv", together)
    with open_path(path, threads) as file:
        readers = [threading.Thread(target=read, args=(start,)) for start in (0, 3001)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert got == {start: PICTURE[start : start + 1000] for start in (0, 3001)}


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EINVAL])
async def test_a_file_system_without_nowait_reads(file: OpenFile, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """If a file system, an old kernel or a sandbox cannot say whether bytes are cached, they are read in a thread."""
    monkeypatch.setattr(os, "preadv", fails(code))
    with pytest.raises(BlockingIOError):
        read_cached(file.fd, 0, 10)
    assert await file.read(0, 10) == PICTURE[:10]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
async def test_a_piece_that_cannot_be_read(file: OpenFile, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """An error of the disk becomes `ReadFailed`, so that it is not confused with an error of the connection."""
    monkeypatch.setattr(os, "preadv", fails(code))
    with pytest.raises(ReadFailed) as caught:
        await anext(file.pieces(0, 10))
    assert (caught.value.errno, caught.value.filename) == (code, file.path)
    assert caught.value.strerror


def test_an_error_of_closing_is_ignored(path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of `close`, which some file systems raise, is ignored: the bytes read are correct."""
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, "Input/output error")

    file = open_path(path, threads)
    monkeypatch.setattr(os, "close", close)
    file.close()
    monkeypatch.undo()


async def test_a_platform_without_nowait_reads(file: OpenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a platform without RWF_NOWAIT, bytes are read in a thread."""
    monkeypatch.setattr(files, "_NOWAIT", None)
    with pytest.raises(BlockingIOError):
        read_cached(file.fd, 0, 10)
    assert await file.read(0, 10) == PICTURE[:10]


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADF, errno.ESTALE])
async def test_an_error_of_the_disk_is_raised(file: OpenFile, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """An error of the disk is raised by a read from the cache and by a read in a thread."""
    monkeypatch.setattr(os, "preadv", fails(code))
    with pytest.raises(OSError) as caught:
        await file.read(0, 10)
    assert caught.value.errno == code
    monkeypatch.setattr(os, "preadv", fails(errno.EAGAIN))
    monkeypatch.setattr(os, "pread", fails(code))
    with pytest.raises(OSError) as caught:
        await file.read(0, 10)
    assert caught.value.errno == code


@pytest.mark.parametrize("system", ["cached", "uncached"])
@pytest.mark.parametrize("start", [0, 1, PIECE])
@pytest.mark.parametrize("stop", [1, PIECE, PIECE + 1, 3 * PIECE, len(LONG)])
async def test_pieces_are_those_between_start_and_stop(
    request: pytest.FixtureRequest, path: Path, threads: Threads, system: str, start: int, stop: int
) -> None:
    """The pieces are the bytes from `start` up to, without, `stop`; all but the last have the full size."""
    request.getfixturevalue(system)
    path.write_bytes(LONG)
    with open_path(path, threads) as file:
        pieces = [piece async for piece in file.pieces(start, stop)]
    assert b"".join(pieces) == LONG[start:stop]
    assert {len(piece) for piece in pieces[:-1]} <= {PIECE}
    assert all(0 < len(piece) <= PIECE for piece in pieces)


@pytest.mark.parametrize("left", [0, 100])
async def test_a_file_that_is_cut_short_raises(file: OpenFile, path: Path, left: int) -> None:
    """If a file is truncated, its remaining bytes are yielded; then `FileChanged` is raised with its path."""
    os.truncate(path, left)
    pieces = file.pieces(0, file.size)
    assert left == 0 or await anext(pieces) == PICTURE[:left]
    with pytest.raises(FileChanged) as caught:
        await anext(pieces)
    assert str(path) in str(caught.value)


async def all_chunks(file: OpenFile) -> list[bytes]:
    """Return all chunks of an open file."""
    return [chunk async for chunk in file.chunks()]


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 2 * len(LONG)])
@pytest.mark.parametrize("at_most", [PIECE, 100_000], ids=["all bytes", "fewer bytes"])
async def test_chunks_are_those_of_the_file_that_was_measured(
    path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch, size: int, at_most: int
) -> None:
    """Chunks and digests are those of the size at opening, even if the file grows or a read returns less."""
    data, real = (LONG * 2)[:size], os.pread
    path.write_bytes(data)
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: real(fd, min(size, at_most), offset))
    with open_path(path, threads) as file:
        with path.open("ab") as appended:
            appended.write(b"grown")
        chunks = [data[start : start + CHUNK] for start in range(0, size, CHUNK)]
        assert await all_chunks(file) == chunks
        assert await file.digests() == Digests.of(chunks)


@pytest.mark.parametrize("take", [all_chunks, OpenFile.digests])
async def test_chunks_of_a_file_that_is_cut_short(
    path: Path, threads: Threads, take: Callable[[OpenFile], Awaitable[object]]
) -> None:
    """If a file is truncated, `chunks` and `digests` raise `FileChanged` with its path."""
    path.write_bytes(LONG)
    with open_path(path, threads) as file:
        os.truncate(path, len(LONG) - 1)
        with pytest.raises(FileChanged, match=re.escape(str(path))):
            await take(file)


# -- hashed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", PICTURE, LONG[: 4 * PIECE], LONG, 2 * LONG], ids=len)
async def test_a_digest_is_that_of_the_whole_file(path: Path, threads: Threads, data: bytes) -> None:
    """`sha256`, `digest` and `digests` are those of the whole file, and of each chunk, for every size."""
    path.write_bytes(data)
    with open_path(path, threads) as file:
        assert file.sha256() == await file.digest() == hashlib.sha256(data).hexdigest()
        assert await file.digests() == Digests.of(data[start : start + CHUNK] for start in range(0, len(data), CHUNK))


@pytest.mark.parametrize("digest", [OpenFile.sha256, OpenFile.digest, OpenFile.digests])
async def test_hashing_holds_a_little_of_a_file_at_a_time(
    path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch, digest: Callable[[OpenFile], object]
) -> None:
    """Hashing reads a few pieces at a time, so that memory does not grow with the file."""
    real, sizes = os.pread, list[int]()

    def observed(fd: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", observed)
    path.write_bytes(LONG)
    with open_path(path, threads) as file:
        made = digest(file)
        if inspect.isawaitable(made):
            await made
    assert max(sizes) <= 4 * PIECE
    assert len(sizes) <= len(LONG) // CHUNK + 2, "many small reads cost time"


# -- closed ----------------------------------------------------------------------------------------------------------


def test_closing_twice_is_harmless(path: Path, threads: Threads) -> None:
    """A second `close` does not close a descriptor that now belongs to another file."""
    with open_path(path, threads) as file:
        number = file.fd
        file.close()
        with open(path, "rb") as other:
            assert other.fileno() == number
            file.close()
            assert other.read() == PICTURE


def test_a_closed_file_reads_nothing(file: OpenFile) -> None:
    """After `close` every read raises EBADF, even if another file has the same number."""
    file.close()
    for read in (partial(read_cached, file.fd), file.read_waiting):
        with pytest.raises(OSError) as caught:
            read(0, 10)
        assert caught.value.errno == errno.EBADF


def test_descriptor_zero_is_closed(path: Path, threads: Threads) -> None:
    """Descriptor 0, which a process without standard input can get, is closed like any other."""
    kept = os.dup(0)
    os.close(0)
    try:
        file = open_path(path, threads)
        number = file.fd
        file.close()
        with pytest.raises(OSError):
            os.fstat(number)
    finally:
        os.dup2(kept, 0)
        os.close(kept)
    assert number == 0
