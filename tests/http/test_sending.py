"""Sending a body: in pieces, to every version of ASGI, and to clients that disconnect."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.open_file import PIECE as FILE_PIECE
from selfheal.http.headers import make_head
from selfheal.http.sending import Responder, send_pieces
from tests.support.asgi import Answer, ask_and_leave, ask_scope, scope_of
from tests.support.plans import MODIFIED_NS

# -- bodies in memory -------------------------------------------------------------------------------------------------

PIECE = 100_000


class Bytes:
    """A body in memory; `read` is how far it was read, `is_open` whether its pieces are still open."""

    def __init__(self, data: bytes, modified_ns: int = MODIFIED_NS) -> None:
        self.data = data
        self.size = len(data)
        self.modified_ns = modified_ns
        self.content_type = "image/png"
        self.sha256 = ""
        self.read = 0
        self.was_asked = self.is_open = False

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        self.was_asked = self.is_open = True
        try:
            for at in range(start, stop, PIECE):
                self.read = min(stop, at + PIECE)
                yield self.data[at : self.read]
        finally:
            self.is_open = False


class Broken(Bytes):
    """A body that raises after its first 10 bytes."""

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        yield self.data[start : start + 10]
        raise RuntimeError("damaged")


def answering(body: Bytes, name: str = "a.png", cache_control: str | None = None) -> ASGIApp:
    """Return an app that answers every request with a body."""
    responder = Responder(cache_control)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await responder.send_body(scope, receive, send, name, body)

    return app


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 12 * PIECE])
async def test_a_body_is_sent_whole(size: int) -> None:
    """Every piece is sent, the last one is marked as the last, and the pieces are closed."""
    body = Bytes(os.urandom(size))
    answer = await ask_scope(answering(body), scope_of("/"))
    assert (answer.status, answer.body) == (200, body.data)
    assert not body.is_open


async def test_a_range_reads_only_its_bytes() -> None:
    """A range reads its own bytes and no others."""
    body = Bytes(os.urandom(12 * PIECE))
    headers = [("Range", f"bytes={PIECE}-{2 * PIECE - 1}")]
    answer = await ask_scope(answering(body), scope_of("/", headers=headers))
    assert (answer.status, answer.body) == (206, body.data[PIECE : 2 * PIECE])
    assert body.read == 2 * PIECE


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("HEAD", []),
        ("GET", [("If-None-Match", "*")]),
        ("GET", [("If-Match", '"x"')]),
        ("GET", [("Range", "bytes=9999999-")]),
    ],
)
async def test_an_answer_without_bytes_reads_none(method: str, headers: list[tuple[str, str]]) -> None:
    """HEAD, 304, 412 and 416 read no bytes."""
    body = Bytes(os.urandom(12 * PIECE))
    answer = await ask_scope(answering(body), scope_of("/", method=method, headers=headers))
    assert (answer.body, body.read, body.was_asked) == (b"", 0, False)


async def test_cache_control_is_sent_as_given() -> None:
    """The option is sent with all its characters; without it there is no such header."""
    for value in ("no-cache", 'private="\xfc"', None):
        answer = await ask_scope(answering(Bytes(b"x"), cache_control=value), scope_of("/"))
        assert answer.headers.get("cache-control") == value


@pytest.mark.parametrize("spec_version", ["2.0", "2.1", "2.3", "2.4", "2.5", "3.0", None])
@pytest.mark.parametrize("size", [5 * PIECE, 100 * PIECE])
async def test_every_version_of_asgi(spec_version: str | None, size: int) -> None:
    """The whole body is sent for every ASGI version, and if the server names none."""
    body, tasks = Bytes(os.urandom(size)), asyncio.all_tasks()
    scope = scope_of("/")
    scope["asgi"] = {"version": "3.0"} if spec_version is None else {"version": "3.0", "spec_version": spec_version}
    answer = await ask_scope(answering(body), scope)
    assert answer.body == body.data
    assert asyncio.all_tasks() == tasks


# -- clients that disconnect ------------------------------------------------------------------------------------------


async def test_a_client_that_disconnects_silently() -> None:
    """If `send` never fails (ASGI 2.3), reading stops soon after the client has disconnected (CVE-2026-54280)."""
    body, tasks = Bytes(os.urandom(200 * PIECE)), asyncio.all_tasks()
    answer = await ask_and_leave(answering(body), scope_of("/"), after=3 * PIECE)
    assert 3 * PIECE <= len(answer.body) <= 100 * PIECE
    assert body.read <= 100 * PIECE
    assert not body.is_open
    assert asyncio.all_tasks() == tasks


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_a_client_that_disconnects_from_a_server_that_never_waits(spec_version: str) -> None:
    """A server that takes every message at once, and drops them after a disconnect, is sent few more pieces."""
    body, sent, gone = Bytes(os.urandom(200 * PIECE)), 0, asyncio.Event()
    scope = scope_of("/")
    scope["asgi"]["spec_version"] = spec_version

    async def send(message: Message) -> None:
        nonlocal sent
        sent += len(message.get("body", b""))
        if sent >= 3 * PIECE:
            asyncio.get_running_loop().call_soon(gone.set)  # as a transport tells of a lost connection

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    await answering(body)(scope, receive, send)
    assert sent <= 7 * PIECE
    assert not body.is_open


async def test_other_tasks_run_between_the_pieces() -> None:
    """A client that takes every piece at once gives way to other tasks after each of them."""
    body, turns = Bytes(bytes(100 * PIECE)), 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(others())
    answer = await ask_scope(answering(body), scope_of("/"))
    task.cancel()
    assert answer.body == body.data
    assert turns >= 100


async def test_a_client_that_disconnects_with_an_error() -> None:
    """If `send` raises (ASGI 2.4), the pieces are closed at once, and nothing is raised: nobody did anything wrong."""
    body, tasks = Bytes(os.urandom(200 * PIECE)), asyncio.all_tasks()
    scope = scope_of("/")
    scope["asgi"]["spec_version"] = "2.4"
    await ask_and_leave(answering(body), scope, after=3 * PIECE, fails=True)
    assert body.read <= 5 * PIECE
    assert not body.is_open
    assert asyncio.all_tasks() == tasks


async def test_cancelled_while_it_sends() -> None:
    """A server that cancels the request (a timeout) leaves no pieces open and no task."""
    body, tasks, waiting = Bytes(os.urandom(200 * PIECE)), asyncio.all_tasks(), asyncio.Event()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            waiting.set()
            await asyncio.Event().wait()

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    task = asyncio.create_task(answering(body)(scope_of("/"), receive, send))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not body.is_open
    assert asyncio.all_tasks() == tasks


async def test_a_damaged_body_is_never_finished() -> None:
    """If the bytes are damaged, the error is raised and the last message is never sent."""
    answer = Answer()

    async def send(message: Message) -> None:
        answer.take(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = scope_of("/")
    scope["asgi"]["spec_version"] = "2.4"
    with pytest.raises(RuntimeError, match="damaged"):
        await answering(Broken(b"x" * 100))(scope, receive, send)
    assert answer.body == b"x" * 10
    assert not answer.is_over


# -- open files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[UploadsDirectory]:
    """A directory of files; the name of each is its size in bytes."""
    disk = UploadsDirectory(tmp_path)
    for size in (0, 100, FILE_PIECE, FILE_PIECE + 1, 3 * FILE_PIECE):
        (tmp_path / f"{size}.png").write_bytes(os.urandom(size))
    yield disk
    disk.close()


def sending(disk: UploadsDirectory, name: str, firsts: list[bytes]) -> ASGIApp:
    """Return an app that answers with a file; `firsts` lists what is read before each answer starts."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        responder, file = Responder(), disk.open(name)
        assert file is not None
        with file:
            planned, first = await responder.read_first(scope, responder.head_of_file("a.png", file, None), file)
            firsts.append(first)
            await send_pieces(receive, send, planned, file, first)

    return app


@pytest.mark.parametrize(
    ("size", "headers", "start", "stop"),
    [
        (0, [], 0, 0),
        (100, [], 0, 100),
        (100, [("Range", "bytes=10-89")], 10, 90),
        (FILE_PIECE, [], 0, FILE_PIECE),
        (FILE_PIECE + 1, [], 0, FILE_PIECE + 1),
        (3 * FILE_PIECE, [("Range", "bytes=7-")], 7, 3 * FILE_PIECE),
        (3 * FILE_PIECE, [("Range", f"bytes={FILE_PIECE}-{2 * FILE_PIECE}")], FILE_PIECE, 2 * FILE_PIECE + 1),
    ],
)
async def test_an_open_file_is_sent(
    disk: UploadsDirectory, size: int, headers: list[tuple[str, str]], start: int, stop: int
) -> None:
    """The first piece is read before the answer starts."""
    data = disk.path_of(f"{size}.png").read_bytes()
    firsts: list[bytes] = []
    for method in ("GET", "HEAD"):
        answer = await ask_scope(sending(disk, f"{size}.png", firsts), scope_of("/", method=method, headers=headers))
        is_sent = method == "GET"
        assert firsts.pop() == (data[start:stop][:FILE_PIECE] if is_sent else b"")
        assert answer.body == (data[start:stop] if is_sent else b"")
        assert answer.status == (206 if headers and is_sent else 200)
        assert "cache-control" not in answer.headers
        assert answer.headers["etag"] == make_head("", disk.path_of(f"{size}.png").stat().st_mtime_ns, size).etag


@pytest.mark.parametrize("headers", [[], [("Range", "bytes=10-89")], [("If-None-Match", "*")]])
async def test_added_headers_stay_with_their_answer(disk: UploadsDirectory, headers: list[tuple[str, str]]) -> None:
    """A middleware that adds headers to one answer does not change the next one."""
    responder, head = Responder(), make_head("a.png", MODIFIED_NS, 100)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def adding(message: Message) -> None:
            if "headers" in message:
                message["headers"].append((b"x-added", b"1"))
            await send(message)

        file = disk.open("100.png")
        assert file is not None
        with file:
            planned, first = await responder.read_first(scope, head, file)
            await send_pieces(receive, adding, planned, file, first)

    for _ in range(2):
        answer = await ask_scope(app, scope_of("/", headers=headers))
        start = next(message for message in answer.messages if "headers" in message)
        assert [key for key, _ in start["headers"]].count(b"x-added") == 1


@pytest.mark.parametrize("size", [100, FILE_PIECE])
async def test_a_file_that_is_cached_in_part(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """If only a part of a file is cached, that part is sent first, then the rest, nothing twice."""
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, _: real(fd, [buffers[0][:60]], offset))
    firsts: list[bytes] = []
    answer = await ask_scope(sending(disk, f"{size}.png", firsts), scope_of("/"))
    assert [len(first) for first in firsts] == [60]
    assert answer.body == disk.path_of(f"{size}.png").read_bytes()
    assert answer.headers["content-length"] == str(size)


async def test_a_client_of_an_open_file_that_disconnects(disk: UploadsDirectory) -> None:
    """Reading a file, too, stops soon after the client has disconnected."""
    sent = 0
    with disk.path_of("long.png").open("wb") as long:
        long.truncate(200 * FILE_PIECE)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            nonlocal sent
            sent += len(message.get("body", b""))
            await send(message)

        await sending(disk, "long.png", [])(scope, receive, counting)

    await ask_and_leave(app, scope_of("/"), after=3 * FILE_PIECE)
    assert 3 * FILE_PIECE <= sent <= 100 * FILE_PIECE
