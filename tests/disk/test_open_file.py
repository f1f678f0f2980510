"""An open file: what was measured, what is read and how, what is told when it is cut short."""

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
from selfheal.errors import Unsettled
from tests.disk.test_staged_file import assert_no_more_than, descriptors, fails

PICTURE = bytes(range(256)) * 40
LONG = b"".join(number.to_bytes(4, "big") for number in range((4 * PIECE + 3 * CHUNK) // 4)) + b"end"
MODIFIED = 1_234_567_890_123_456_789


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    """As many descriptors are open after a test as before it."""
    before = descriptors()
    yield
    assert_no_more_than(before)


@pytest.fixture
def threads() -> Iterator[Threads]:
    """The threads that wait for the disk."""
    threads = Threads(1)
    yield threads
    threads.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file on disk."""
    path = tmp_path / "tom.png"
    path.write_bytes(PICTURE)
    os.utime(path, ns=(MODIFIED, MODIFIED))
    return path


@pytest.fixture
def file(path: Path, threads: Threads) -> Iterator[OpenFile]:
    """The file, opened and measured."""
    with opened(path, threads) as file:
        yield file


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """A system that holds every file in memory; the threads that read from it."""
    real, readers = os.preadv, list[threading.Thread]()

    def at_once(fd: int, buffers: Sequence[bytearray], offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        readers.append(threading.current_thread())
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", at_once)
    return readers


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """A system that holds no file in memory; the threads that waited for the disk."""
    real, readers = os.pread, list[threading.Thread]()

    def slowly(fd: int, size: int, offset: int) -> bytes:
        readers.append(threading.current_thread())
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", slowly)
    monkeypatch.setattr(os, "preadv", fails(errno.EAGAIN))
    return readers


def opened(path: Path, threads: Threads) -> OpenFile:
    """A file, opened and measured."""
    fd = os.open(path, os.O_RDONLY)
    return OpenFile(fd, str(path), os.fstat(fd), threads)


# -- measured --------------------------------------------------------------------------------------------------------


def test_it_is_what_was_measured(file: OpenFile, path: Path) -> None:
    """Size, time and identity are those of the moment it was opened, whatever becomes of its name since."""
    measured = path.stat()
    path.rename(path.with_name("mog.png"))
    path.write_bytes(b"another")
    assert (file.size, file.modified_ns) == (len(PICTURE), MODIFIED)
    assert file.identity == identity_of(measured)
    assert file.read_waiting(0, file.size) == PICTURE


def test_an_identity_is_time_size_inode_and_change(path: Path) -> None:
    """In this order, and in ns: other rooms keep it and compare it."""
    measured = path.stat()
    wanted = (MODIFIED, len(PICTURE), measured.st_ino, measured.st_ctime_ns)
    assert identity_of(measured) == wanted


# -- read ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "size", "wanted"),
    [(0, 10, PICTURE[:10]), (7, 1, PICTURE[7:8]), (0, len(PICTURE), PICTURE), (300, 99_999, PICTURE[300:])],
)
async def test_what_is_in_memory_is_read_without_a_thread(
    memory: list[threading.Thread], file: OpenFile, start: int, size: int, wanted: bytes
) -> None:
    """From `start`, as many bytes as are asked for or there are, in the asker's own thread."""
    assert read_cached(file.fd, start, size) == wanted
    assert await file.read(start, size) == wanted
    assert set(memory) == {threading.current_thread()}


@pytest.mark.parametrize(
    ("start", "size", "wanted"), [(0, 10, PICTURE[:10]), (300, 99_999, PICTURE[300:]), (len(PICTURE), 1, b"")]
)
async def test_what_is_not_in_memory_is_waited_for_in_a_thread(
    waits: list[threading.Thread], file: OpenFile, start: int, size: int, wanted: bytes
) -> None:
    """The same bytes, and the event loop goes on meanwhile."""
    with pytest.raises(BlockingIOError):
        read_cached(file.fd, start, size)
    assert waits == []
    assert await file.read(start, size) == wanted
    assert len(waits) == 1
    assert threading.current_thread() not in waits


def test_the_end_is_not_told_from_memory(memory: list[threading.Thread], file: OpenFile) -> None:
    """Nothing in memory is no proof of an end: only the disk knows whether the file is over."""
    with pytest.raises(BlockingIOError):
        read_cached(file.fd, file.size, 1)


@pytest.mark.parametrize("size", [PIECE, PIECE + 1, 3 * PIECE])
async def test_no_more_than_a_piece_comes_from_memory(
    memory: list[threading.Thread], path: Path, threads: Threads, size: int
) -> None:
    """Whoever asks for more gets the first piece of it, and asks again."""
    path.write_bytes(LONG)
    with opened(path, threads) as file:
        assert read_cached(file.fd, 7, size) == LONG[7 : 7 + PIECE]
        assert await file.read(7, size) == LONG[7 : 7 + PIECE]


def test_what_was_read_stays(memory: list[threading.Thread], file: OpenFile) -> None:
    """It is `bytes`, which every server sends, and no later reading changes it."""
    first = read_cached(file.fd, 0, 100)
    assert read_cached(file.fd, 100, 100) == PICTURE[100:200]
    assert type(first) is bytes
    assert first == PICTURE[:100]


def test_threads_that_read_at_once_do_not_mix(path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Event loops in several threads each get their own bytes, though both have read before either goes on."""
    real, both, got = os.preadv, threading.Barrier(2), dict[int, bytes]()

    def together(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        count = real(fd, buffers, offset)
        both.wait(10)
        return count

    def read(start: int) -> None:
        got[start] = read_cached(file.fd, start, 1000)

    monkeypatch.setattr(os, "preadv", together)
    with opened(path, threads) as file:
        readers = [threading.Thread(target=read, args=(start,)) for start in (0, 3001)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert got == {start: PICTURE[start : start + 1000] for start in (0, 3001)}


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EINVAL])
async def test_a_file_system_that_cannot_tell_is_waited_for(
    file: OpenFile, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Where nobody can say whether bytes are in memory, they are taken for not in memory: so say file systems, old
    kernels and sandboxes.
    """
    monkeypatch.setattr(os, "preadv", fails(code))
    with pytest.raises(BlockingIOError):
        read_cached(file.fd, 0, 10)
    assert await file.read(0, 10) == PICTURE[:10]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
async def test_a_piece_that_the_disk_does_not_give(file: OpenFile, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """It is told as such: whoever sends the pieces has errors of his own, which may have the same number."""
    monkeypatch.setattr(os, "preadv", fails(code))
    with pytest.raises(ReadFailed) as caught:
        await anext(file.pieces(0, 10))
    assert (caught.value.errno, caught.value.filename) == (code, file.path)
    assert caught.value.strerror


def test_an_error_of_closing_is_none(path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems tell of one; whatever was read is right."""
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, "Input/output error")

    file = opened(path, threads)
    monkeypatch.setattr(os, "close", close)
    file.close()
    monkeypatch.undo()


async def test_a_platform_that_cannot_tell_is_waited_for(file: OpenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a file system, so for a platform without the question."""
    monkeypatch.setattr(files, "_NOWAIT", None)
    with pytest.raises(BlockingIOError):
        read_cached(file.fd, 0, 10)
    assert await file.read(0, 10) == PICTURE[:10]


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADF, errno.ESTALE])
async def test_a_disk_that_fails_is_told(file: OpenFile, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """An error is no reason to wait: it is told as it is, from memory and from the disk."""
    monkeypatch.setattr(os, "preadv", fails(code))
    with pytest.raises(OSError) as caught:
        await file.read(0, 10)
    assert caught.value.errno == code
    monkeypatch.setattr(os, "preadv", fails(errno.EAGAIN))
    monkeypatch.setattr(os, "pread", fails(code))
    with pytest.raises(OSError) as caught:
        await file.read(0, 10)
    assert caught.value.errno == code


@pytest.mark.parametrize("system", ["memory", "waits"])
@pytest.mark.parametrize("start", [0, 1, PIECE])
@pytest.mark.parametrize("stop", [1, PIECE, PIECE + 1, 3 * PIECE, len(LONG)])
async def test_pieces_are_those_between_start_and_stop(
    request: pytest.FixtureRequest, path: Path, threads: Threads, system: str, start: int, stop: int
) -> None:
    """Together they are the bytes from `start` up to, without, `stop`; each but the last is as large as may be."""
    request.getfixturevalue(system)
    path.write_bytes(LONG)
    with opened(path, threads) as file:
        pieces = [piece async for piece in file.pieces(start, stop)]
    assert b"".join(pieces) == LONG[start:stop]
    assert {len(piece) for piece in pieces[:-1]} <= {PIECE}
    assert all(0 < len(piece) <= PIECE for piece in pieces)


@pytest.mark.parametrize("left", [0, 100])
async def test_a_file_that_is_cut_short_is_told(file: OpenFile, path: Path, left: int) -> None:
    """What was there is given; then it is told which file ended early, and nothing is made up for the rest."""
    os.truncate(path, left)
    pieces = file.pieces(0, file.size)
    assert left == 0 or await anext(pieces) == PICTURE[:left]
    with pytest.raises(Unsettled) as caught:
        await anext(pieces)
    assert str(path) in str(caught.value)


async def all_chunks(file: OpenFile) -> list[bytes]:
    """What an open file gives to who takes all of it."""
    return [chunk async for chunk in file.chunks()]


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 2 * len(LONG)])
@pytest.mark.parametrize("at_most", [PIECE, 100_000], ids=["all that is asked for", "less"])
async def test_chunks_are_those_of_the_file_that_was_measured(
    path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch, size: int, at_most: int
) -> None:
    """Whatever was appended meanwhile, and however little a reading gives (some network file systems give less)."""
    data, real = (LONG * 2)[:size], os.pread
    path.write_bytes(data)
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: real(fd, min(size, at_most), offset))
    with opened(path, threads) as file:
        with path.open("ab") as appended:
            appended.write(b"grown")
        chunks = [data[start : start + CHUNK] for start in range(0, size, CHUNK)]
        assert await all_chunks(file) == chunks
        assert await file.digests() == Digests.of(chunks)


@pytest.mark.parametrize("take", [all_chunks, OpenFile.digests])
async def test_chunks_of_a_file_that_is_cut_short(
    path: Path, threads: Threads, take: Callable[[OpenFile], Awaitable[object]]
) -> None:
    """It is told; nobody takes the rest for the whole."""
    path.write_bytes(LONG)
    with opened(path, threads) as file:
        os.truncate(path, len(LONG) - 1)
        with pytest.raises(Unsettled, match=re.escape(str(path))):
            await take(file)


# -- hashed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", PICTURE, LONG[: 4 * PIECE], LONG], ids=len)
async def test_a_digest_is_that_of_the_whole_file(path: Path, threads: Threads, data: bytes) -> None:
    """However many readings it takes, and of every chunk besides, from the same bytes."""
    path.write_bytes(data)
    with opened(path, threads) as file:
        assert file.sha256() == hashlib.sha256(data).hexdigest()
        assert await file.digests() == Digests.of(data[start : start + CHUNK] for start in range(0, len(data), CHUNK))


@pytest.mark.parametrize("digest", [OpenFile.sha256, OpenFile.digests])
async def test_hashing_holds_a_little_of_a_file_at_a_time(
    path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch, digest: Callable[[OpenFile], object]
) -> None:
    """Memory does not grow with the file: no reading asks for more than a few pieces."""
    real, asked = os.pread, list[int]()

    def observed(fd: int, size: int, offset: int) -> bytes:
        asked.append(size)
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", observed)
    path.write_bytes(LONG)
    with opened(path, threads) as file:
        made = digest(file)
        if inspect.isawaitable(made):
            await made
    assert max(asked) <= 4 * PIECE
    assert len(asked) <= len(LONG) // CHUNK + 2, "many small readings cost time"


# -- closed ----------------------------------------------------------------------------------------------------------


def test_closing_twice_is_harmless(path: Path, threads: Threads) -> None:
    """A descriptor that was closed belongs to somebody else by then."""
    with opened(path, threads) as file:
        number = file.fd
        file.close()
        with open(path, "rb") as other:
            assert other.fileno() == number
            file.close()
            assert other.read() == PICTURE


def test_what_was_closed_reads_nothing(file: OpenFile) -> None:
    """Not the file that has its number meanwhile, either."""
    file.close()
    for read in (partial(read_cached, file.fd), file.read_waiting):
        with pytest.raises(OSError) as caught:
            read(0, 10)
        assert caught.value.errno == errno.EBADF


def test_a_file_with_the_first_number_is_closed(path: Path, threads: Threads) -> None:
    """A process without standard input hands out 0 as a descriptor; it is closed like any other."""
    kept = os.dup(0)
    os.close(0)
    try:
        file = opened(path, threads)
        number = file.fd
        file.close()
        with pytest.raises(OSError):
            os.fstat(number)
    finally:
        os.dup2(kept, 0)
        os.close(kept)
    assert number == 0
