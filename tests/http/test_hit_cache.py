"""What was answered before: the same answer again, in one go, for as long as the file and the question are the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from selfheal.disk import directory as disk_room
from selfheal.disk import syscalls
from selfheal.disk.directory import LOOK_EVERY, UploadsDirectory
from selfheal.disk.open_file import PIECE, identity_of
from selfheal.http import hit_cache as room
from selfheal.http.hit_cache import Hits
from selfheal.http.sending import Responder, make_head
from tests.support.asgi import Lines, ask_scope, scope_of
from tests.support.descriptors import assert_no_more_than, open_descriptors

MODIFIED = 1_234_567_890_123_456_789
PICTURE = os.urandom(5000)
PATH = "/static/uploads/tom.png"


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is, whatever the file system that the tests run on can tell."""

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
    """A directory with a picture."""
    disk = UploadsDirectory(tmp_path / "uploads")
    disk.path.mkdir()
    lay(disk.path / "tom.png")
    before = open_descriptors()
    yield disk
    disk.close()
    assert_no_more_than(before)


@pytest.fixture
def hits(disk: UploadsDirectory) -> Hits:
    """Which know nothing yet."""
    return Hits(disk, Responder())


def lay(path: Path, data: bytes = PICTURE) -> None:
    """A file of a time of its own."""
    path.write_bytes(data)
    os.utime(path, ns=(MODIFIED, MODIFIED))


def learn(hits: Hits, disk: UploadsDirectory, name: str = "tom.png", scope: Scope | None = None) -> None:
    """What happens the first time that a file is asked for."""
    file = disk.open(name)
    assert file is not None
    with file:
        hits.learn(scope or scope_of(f"/static/uploads/{name}"), name, file)


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
async def test_the_answer_is_the_one_that_is_sent_after_waiting(
    disk: UploadsDirectory, hits: Hits, method: str, size: int, headers: Lines
) -> None:
    """To the letter, whatever is asked for."""
    lay(disk.path / "tom.png", os.urandom(size))
    responder, scope = Responder(), scope_of(PATH, method=method, headers=headers)

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        file = disk.open("tom.png")
        assert file is not None
        with file:
            plan, first = await responder.read_first(scope, responder.head_of("tom.png", file), file)
            await responder.send_file(scope, receive, send, file, plan, first)

    learn(hits, disk)
    found = hits.answer(scope)
    assert found is not None
    known, start, body = found
    assert (await ask_scope(waiting, scope)).messages == [start, {**body, "more_body": False}]
    assert (known.name, known.size) == ("tom.png", size)
    assert known.identity == identity_of(os.stat(disk.path / "tom.png"))


def test_what_was_never_asked_for_is_not_known(hits: Hits) -> None:
    """Nothing is looked for on a disk."""
    assert hits.answer(scope_of(PATH)) is None


@pytest.mark.parametrize(
    "asked",
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
def test_another_question_has_no_answer(hits: Hits, disk: UploadsDirectory, asked: Scope) -> None:
    """Only all that a server says of a path tells which name that is: `%2f` is no slash, though its path has one."""
    learn(hits, disk)
    assert hits.answer(asked) is None
    assert hits.answer(scope_of(PATH)) is not None


def test_headers_that_can_be_read_once(hits: Hits, disk: UploadsDirectory) -> None:
    """A server may give any iterable: what is not answered here must find all of it."""
    learn(hits, disk)
    scope = scope_of(PATH, headers=[("Range", "bytes=0-9")])
    lines = list(scope["headers"])
    scope["headers"] = iter(lines)
    assert hits.answer(scope) is None
    assert list(scope["headers"]) == lines


def test_a_server_that_says_less(hits: Hits, disk: UploadsDirectory) -> None:
    """`raw_path` and `root_path` are optional in ASGI."""
    scope = scope_of(PATH)
    del scope["raw_path"], scope["root_path"]
    learn(hits, disk, scope=scope)
    assert hits.answer(scope) is not None


def test_a_path_that_is_written_in_two_ways(hits: Hits, disk: UploadsDirectory) -> None:
    """The one that was asked for last is known: nobody slows all others down for good."""
    for target in ("/static/uploads/%74om.png", PATH):
        learn(hits, disk, scope=scope_of(target))
        assert hits.answer(scope_of(target)) is not None


def replaced(path: Path) -> None:
    lay(path.with_name("new"), bytes(len(PICTURE)))
    os.rename(path.with_name("new"), path)


def overwritten(path: Path) -> None:
    before = os.stat(path)
    while os.stat(path).st_ctime_ns == before.st_ctime_ns:  # the clock of files is a coarse one
        lay(path, bytes(len(PICTURE)))


def made_a_link(path: Path) -> None:
    os.rename(path, path.with_name("target"))
    os.symlink("target", path)


def made_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "change", [replaced, overwritten, made_a_link, made_a_directory, Path.unlink, lambda path: os.truncate(path, 10)]
)
def test_a_file_that_changed_is_not_answered(
    hits: Hits, disk: UploadsDirectory, change: Callable[[Path], None]
) -> None:
    """Though its name, its size and its time of modification may be the same."""
    learn(hits, disk)
    change(disk.path / "tom.png")
    assert hits.answer(scope_of(PATH)) is None


def test_a_changed_file_is_learnt_anew(hits: Hits, disk: UploadsDirectory) -> None:
    """Its headers are those of the file that is there."""
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
def test_more_than_a_piece_is_not_answered_at_once(hits: Hits, disk: UploadsDirectory, headers: Lines) -> None:
    """It is sent piece by piece; but a part of it can be."""
    data = os.urandom(PIECE + 1)
    lay(disk.path / "tom.png", data)
    learn(hits, disk)
    assert hits.answer(scope_of(PATH, headers=headers)) is None
    found = hits.answer(scope_of(PATH, headers=[("Range", f"bytes=1-{PIECE}")]))
    assert found is not None
    assert found[2]["body"] == data[1:]


def fails(*_: Any) -> int:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    "preadv", [lambda fd, buffers, *_: 60, lambda *_: 0, fails], ids=["a part is in memory", "nothing is", "EIO"]
)
def test_what_is_not_in_memory_is_not_answered(
    hits: Hits, disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, preadv: Callable[..., int]
) -> None:
    """Whoever can wait for it finds out what is the matter."""
    learn(hits, disk)
    monkeypatch.setattr(os, "preadv", preadv)
    assert hits.answer(scope_of(PATH)) is None


def test_a_file_with_the_first_number_is_answered(hits: Hits, disk: UploadsDirectory) -> None:
    """A process without standard input hands out 0 as a descriptor."""
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


def test_an_error_of_closing_is_none(hits: Hits, disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems tell of one; what was read before is right."""
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        fails()

    learn(hits, disk)
    monkeypatch.setattr(os, "close", close)
    found = hits.answer(scope_of(PATH))
    monkeypatch.undo()
    assert found is not None
    assert found[2]["body"] == PICTURE


def test_a_kernel_that_cannot_tell(hits: Hits, disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without openat2 nothing is opened in the event loop."""
    monkeypatch.undo()
    learn(hits, disk)
    monkeypatch.setattr(syscalls, "HAS_OPENAT2", False)
    assert hits.answer(scope_of(PATH)) is None


def test_the_root_is_looked_at_every_second(
    hits: Hits, disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the path may lead elsewhere, and only the disk can say."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(disk_room, "time", SimpleNamespace(monotonic=lambda: clock.now))
    learn(hits, disk)
    clock.now += LOOK_EVERY
    assert hits.answer(scope_of(PATH)) is not None
    clock.now += 0.1
    assert hits.answer(scope_of(PATH)) is None
    disk.root()
    assert hits.answer(scope_of(PATH)) is not None
    disk.close()
    assert hits.answer(scope_of(PATH)) is None


@pytest.mark.parametrize("more", ["path", "raw_path", "root_path"])
def test_what_is_remembered_of_a_path_is_bounded(hits: Hits, disk: UploadsDirectory, more: str) -> None:
    """Below a mount whose path has a parameter, a client can ask for one file at as many long paths as it likes."""
    sizes = []
    for length in (1024 - 2 * len(PATH), 1024 - 2 * len(PATH) + 1):
        scope = scope_of(PATH)
        padding = "/" + "x" * (length - 1)
        if more != "root_path":
            scope[more] += padding if more == "path" else padding.encode()
        else:
            scope["root_path"] = padding
        learn(hits, disk, scope=scope)
        sizes.append(len(hits._known))
        hits._known.clear()
    assert sizes == [1, 0]


@pytest.mark.parametrize("headers", [[], [("Range", "bytes=10-89")], [("If-None-Match", "*")]])
def test_headers_that_are_added_stay_with_their_answer(hits: Hits, disk: UploadsDirectory, headers: Lines) -> None:
    """A middleware around us may add to the list of an answer's headers; the next answer knows nothing of it."""
    learn(hits, disk)
    for _ in range(2):
        found = hits.answer(scope_of(PATH, headers=headers))
        assert found is not None
        start: Message = found[1]
        start["headers"].append((b"x-added", b"1"))
        assert [key for key, _ in start["headers"]].count(b"x-added") == 1


def test_no_file_is_taken_for_another(hits: Hits, disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of many files, and forgotten to bound the memory, is never said of another one."""
    monkeypatch.setattr(room, "KNOWN_AT_MOST", 5)
    for index in range(12):
        lay(disk.path / f"{index}.png", b"%d" % index * (index + 1))
    for turn in range(3):
        for index in range(12):
            learn(hits, disk, f"{index if turn else index // 2}.png")
            assert len(hits._known) <= 5
            for other in range(12):
                found = hits.answer(scope_of(f"/static/uploads/{other}.png"))
                assert found is None or (found[0].name, found[2]["body"]) == (
                    f"{other}.png",
                    b"%d" % other * (other + 1),
                )
    assert [known.name for known in hits._known.values()] == [f"{index}.png" for index in range(7, 12)]
