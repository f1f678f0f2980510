"""The hit cache: the same answer again, without a wait, while the file and the request are the same."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.types import Message, Receive, Scope, Send

from selfheal.disk import root as root_module
from selfheal.disk import syscalls
from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.open_file import PIECE, Identity, identity_of
from selfheal.disk.root import CHECK_EVERY
from selfheal.healing.reconcile import Judged
from selfheal.http.headers import make_head
from selfheal.http.hit_cache import HitCache
from selfheal.http.sending import Responder, send_pieces
from tests.support.asgi import Lines, ask_scope, scope_of
from tests.support.open_files import open_now, opened_since
from tests.support.os_errors import fails

MODIFIED = 1_234_567_890_123_456_789
PICTURE = os.urandom(5000)
PATH = "/static/uploads/tom.png"


@pytest.fixture(autouse=True)
def all_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is in the page cache, even if the file system of the tests cannot tell."""

    def open_known(root: int, path: bytes) -> int:
        try:
            return syscalls.open_file(root, os.fsdecode(path))
        except OSError:
            return -1

    real = os.preadv
    monkeypatch.setattr(syscalls, "open_known", open_known)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, _: real(fd, buffers, offset))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[UploadsDirectory]:
    """A directory with one picture."""
    disk = UploadsDirectory(tmp_path / "uploads")
    disk.path.mkdir()
    write_picture(disk.path / "tom.png")
    before = open_now()
    yield disk
    disk.close()
    assert opened_since(before) == []


@pytest.fixture
def hits(disk: UploadsDirectory) -> HitCache:
    """An empty hit cache."""
    return HitCache(disk, Responder(), not_judged)


def not_judged(name: str, identity: Identity) -> Judged | None:
    """No file was compared with its record yet."""
    return None


def write_picture(path: Path, data: bytes = PICTURE) -> None:
    """Write a file with a fixed mtime."""
    path.write_bytes(data)
    os.utime(path, ns=(MODIFIED, MODIFIED))


def learn(hits: HitCache, disk: UploadsDirectory, name: str = "tom.png", scope: Scope | None = None) -> None:
    """Put a name into the hit cache, as its first request does."""
    file = disk.open(name)
    assert file is not None
    with file:
        hits.add(scope or scope_of(f"/static/uploads/{name}"), name, file)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("size", [0, 100, PIECE])
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Range", "bytes=10-89")],
        [("Range", "bytes=-1")],
        [("Range", f"bytes={PIECE}-")],
        [("If-None-Match", "*")],
        [("If-Match", '"other"')],
        [("If-Modified-Since", "Fri, 13 Feb 2009 23:31:30 GMT")],
    ],
    ids=str,
)
async def test_the_answer_equals_the_one_after_a_wait(
    disk: UploadsDirectory, hits: HitCache, method: str, size: int, headers: Lines
) -> None:
    """An answer from the hit cache equals, message by message, the one that is sent after a wait for the disk."""
    write_picture(disk.path / "tom.png", os.urandom(size))
    responder, scope = Responder(), scope_of(PATH, method=method, headers=headers)

    async def after_a_wait(scope: Scope, receive: Receive, send: Send) -> None:
        file = disk.open("tom.png")
        assert file is not None
        with file:
            plan, first = await responder.read_first(scope, responder.head_of_file("tom.png", file, None), file)
            await send_pieces(receive, send, plan, file, first)

    learn(hits, disk)
    found = hits.answer(scope)
    assert found is not None
    known, start, body = found
    assert (await ask_scope(after_a_wait, scope)).messages == [start, {**body, "more_body": False}]
    assert (known.name, known.size) == ("tom.png", size)
    assert known.identity == identity_of(os.stat(disk.path / "tom.png"))


@pytest.mark.parametrize(
    ("name", "cache_control", "waits"),
    [("tom.png", None, False), ("tom.png", "immutable", True), ("tom", None, True), ("tom.xyz", None, True)],
)
def test_a_file_whose_headers_depend_on_its_record(
    disk: UploadsDirectory, name: str, cache_control: str | None, waits: bool
) -> None:
    """If the record may change the headers of a file, it is in the hit cache once it was compared, and not before."""
    write_picture(disk.path / name)
    compared = dict[tuple[str, Identity], Judged]()
    hits = HitCache(disk, Responder(cache_control), lambda *file: compared.get(file))
    scope, identity = scope_of(f"/static/uploads/{name}"), identity_of(os.stat(disk.path / name))
    learn(hits, disk, name)
    assert (hits.answer(scope) is None) == waits
    compared[name, identity] = Judged(identity, content_type="image/png")
    learn(hits, disk, name)
    found = hits.answer(scope)
    assert found is not None
    headers = dict(found[1]["headers"])
    assert headers[b"content-type"] == b"image/png"
    assert headers.get(b"cache-control") == (cache_control and cache_control.encode())
    write_picture(disk.path / name, b"other bytes")
    learn(hits, disk, name)
    assert (hits.answer(scope) is None) == waits


def test_a_first_request_is_not_answered(hits: HitCache) -> None:
    """A path that was not requested before is not in the hit cache."""
    assert hits.answer(scope_of(PATH)) is None


@pytest.mark.parametrize(
    "scope",
    [
        scope_of(PATH, method="POST"),
        scope_of(PATH, method="DELETE"),
        scope_of("/static/uploads/mog.png"),
        scope_of(PATH, raw_path=PATH.replace("/tom", "%2ftom").encode()),
        scope_of(PATH, raw_path=None),
        scope_of(PATH, root_path="/static"),
        scope_of(PATH, root_path=None),
    ],
)
def test_another_request_is_not_answered(hits: HitCache, disk: UploadsDirectory, scope: Scope) -> None:
    """Another method, path, raw path or root path is not answered: `%2f` is no slash, though it is decoded to one."""
    learn(hits, disk)
    assert hits.answer(scope) is None
    assert hits.answer(scope_of(PATH)) is not None


def test_headers_that_are_an_iterator(hits: HitCache, disk: UploadsDirectory) -> None:
    """Headers that are an iterator are not consumed and not answered."""
    learn(hits, disk)
    scope = scope_of(PATH, headers=[("Range", "bytes=0-9")])
    lines = list(scope["headers"])
    scope["headers"] = iter(lines)
    assert hits.answer(scope) is None
    assert list(scope["headers"]) == lines


def test_a_scope_without_optional_keys(hits: HitCache, disk: UploadsDirectory) -> None:
    """A scope without the optional `raw_path` and `root_path` is answered."""
    scope = scope_of(PATH)
    del scope["raw_path"], scope["root_path"]
    learn(hits, disk, scope=scope)
    assert hits.answer(scope) is not None


def test_two_spellings_of_a_path(hits: HitCache, disk: UploadsDirectory) -> None:
    """For two spellings of one path, the last one requested is in the hit cache."""
    for target in ("/static/uploads/%74om.png", PATH):
        learn(hits, disk, scope=scope_of(target))
        assert hits.answer(scope_of(target)) is not None


def replaced(path: Path) -> None:
    """Replace the file with one of equal size and mtime."""
    write_picture(path.with_name("new"), bytes(len(PICTURE)))
    os.rename(path.with_name("new"), path)


def overwritten(path: Path) -> None:
    """Overwrite the file, with equal size and mtime."""
    before = os.stat(path)
    while os.stat(path).st_ctime_ns == before.st_ctime_ns:  # the clock of the file system is coarse
        write_picture(path, bytes(len(PICTURE)))


def made_a_link(path: Path) -> None:
    """Replace the file with a link to it."""
    os.rename(path, path.with_name("target"))
    os.symlink("target", path)


def made_a_directory(path: Path) -> None:
    """Replace the file with a directory."""
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "change", [replaced, overwritten, made_a_link, made_a_directory, Path.unlink, lambda path: os.truncate(path, 10)]
)
def test_a_file_that_changed_is_not_answered(
    hits: HitCache, disk: UploadsDirectory, change: Callable[[Path], None]
) -> None:
    """A file that changed is not answered, even if its name, size and mtime are the same."""
    learn(hits, disk)
    change(disk.path / "tom.png")
    assert hits.answer(scope_of(PATH)) is None


def test_a_changed_file_is_cached_again(hits: HitCache, disk: UploadsDirectory) -> None:
    """After a change, the next request puts the new file and its headers into the hit cache."""
    learn(hits, disk)
    (disk.path / "tom.png").write_bytes(b"another")
    learn(hits, disk)
    found = hits.answer(scope_of(PATH))
    assert found is not None
    known, start, body = found
    assert body["body"] == b"another"
    assert dict(start["headers"])[b"content-length"] == b"7"
    assert dict(start["headers"])[b"etag"] == make_head("tom.png", *known.identity[:2]).etag.encode()


@pytest.mark.parametrize("headers", [[], [("Range", f"bytes=0-{PIECE}")]])
def test_more_than_a_piece_is_not_answered_at_once(hits: HitCache, disk: UploadsDirectory, headers: Lines) -> None:
    """More bytes than one piece are not answered from the hit cache; a range of one piece is."""
    data = os.urandom(PIECE + 1)
    write_picture(disk.path / "tom.png", data)
    learn(hits, disk)
    assert hits.answer(scope_of(PATH, headers=headers)) is None
    found = hits.answer(scope_of(PATH, headers=[("Range", f"bytes=1-{PIECE}")]))
    assert found is not None
    assert found[2]["body"] == data[1:]


@pytest.mark.parametrize(
    "preadv",
    [lambda fd, buffers, *_: 60, lambda *_: 0, fails(errno.EIO)],
    ids=["a part is cached", "nothing is", "EIO"],
)
def test_an_uncached_file_is_not_answered(
    hits: HitCache, disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, preadv: Callable[..., int]
) -> None:
    """A file that is not cached, cached in part, or cannot be read is not answered."""
    learn(hits, disk)
    monkeypatch.setattr(os, "preadv", preadv)
    assert hits.answer(scope_of(PATH)) is None


def test_descriptor_zero_is_closed(hits: HitCache, disk: UploadsDirectory) -> None:
    """Descriptor 0, which a process without standard input can get, works and is closed."""
    learn(hits, disk)
    kept = os.dup(0)
    os.close(0)
    try:
        found = hits.answer(scope_of(PATH))
        with pytest.raises(OSError):
            os.fstat(0)  # closed again
    finally:
        os.dup2(kept, 0)
        os.close(kept)
    assert found is not None
    assert found[2]["body"] == PICTURE


def test_an_error_of_closing_is_ignored(
    hits: HitCache, disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of `close`, which some file systems raise, is ignored: the bytes read are correct."""
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    learn(hits, disk)
    monkeypatch.setattr(os, "close", close)
    found = hits.answer(scope_of(PATH))
    monkeypatch.undo()
    assert found is not None
    assert found[2]["body"] == PICTURE


def test_without_openat2_nothing_is_answered(
    hits: HitCache, disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without openat2 nothing is answered: opening would block the event loop."""
    monkeypatch.undo()
    learn(hits, disk)
    monkeypatch.setattr(syscalls, "HAS_OPENAT2", False)
    assert hits.answer(scope_of(PATH)) is None


def test_the_root_is_checked_every_second(
    hits: HitCache, disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hit cache answers for one second after the root was checked; then the root must be checked again."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(root_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    learn(hits, disk)
    clock.now += CHECK_EVERY
    assert hits.answer(scope_of(PATH)) is not None
    clock.now += 0.1
    assert hits.answer(scope_of(PATH)) is None
    disk.root()
    assert hits.answer(scope_of(PATH)) is not None
    disk.close()
    assert hits.answer(scope_of(PATH)) is None


@pytest.mark.parametrize("more", ["path", "raw_path", "root_path"])
def test_long_paths_are_not_kept(hits: HitCache, disk: UploadsDirectory, more: str) -> None:
    """A path longer than 1,024 characters in all its parts is not kept: a client could choose many."""
    sizes = []
    for length in (1024 - 2 * len(PATH), 1024 - 2 * len(PATH) + 1):
        scope = scope_of(PATH)
        padding = "/" + "x" * (length - 1)
        if more != "root_path":
            scope[more] += padding if more == "path" else padding.encode()
        else:
            scope["root_path"] = padding
        learn(hits, disk, scope=scope)
        sizes.append(len(hits._entries))
        hits._entries.clear()
    assert sizes == [1, 0]


@pytest.mark.parametrize("headers", [[], [("Range", "bytes=10-89")], [("If-None-Match", "*")]])
def test_added_headers_stay_with_their_answer(hits: HitCache, disk: UploadsDirectory, headers: Lines) -> None:
    """A middleware that adds headers to one answer does not change the next one."""
    learn(hits, disk)
    for _ in range(2):
        found = hits.answer(scope_of(PATH, headers=headers))
        assert found is not None
        start: Message = found[1]
        start["headers"].append((b"x-added", b"1"))
        assert [key for key, _ in start["headers"]].count(b"x-added") == 1


def test_files_are_not_mixed_up(disk: UploadsDirectory) -> None:
    """With more files than the hit cache holds, every answer has the bytes of its own file."""
    hits = HitCache(disk, Responder(), not_judged, limit=5)
    for index in range(12):
        write_picture(disk.path / f"{index}.png", b"%d" % index * (index + 1))
    for repetition in range(3):
        for index in range(12):
            learn(hits, disk, f"{index if repetition else index // 2}.png")
            assert len(hits._entries) <= 5
            for other in range(12):
                found = hits.answer(scope_of(f"/static/uploads/{other}.png"))
                assert found is None or (found[0].name, found[2]["body"]) == (
                    f"{other}.png",
                    b"%d" % other * (other + 1),
                )
    assert [known.name for known in hits._entries.values()] == [f"{index}.png" for index in range(7, 12)]
