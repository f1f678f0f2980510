"""`SelfHealMiddleware` among other middleware: around it, inside it, and with `add_middleware`."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfheal import SelfHealMiddleware, UploadStore
from tests.support.asgi import Wrapped, ask, ask_and_leave, scope_of
from tests.support.middleware import FILM, LARGE, PICTURE, PREFIX, put, static_over, wrapping
from tests.support.open_files import open_below


class Stamp(BaseHTTPMiddleware):
    """A middleware as apps have them: it adds a header to every answer."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-stamp"] = request.url.path
        return response


@pytest.mark.parametrize("data", [b"", LARGE, FILM], ids=["empty", "large", "film"])
@pytest.mark.parametrize("offer", [{}, {"http.response.pathsend": {}}], ids=["no offer", "path send"])
async def test_base_http_middleware_around(
    sqlite_store: UploadStore, serve: bool, data: bytes, offer: dict[str, object]
) -> None:
    """Inside a BaseHTTPMiddleware, bytes, conditions and ranges are the same, from disk and from the database."""
    path = await put(sqlite_store, "film.mp4", data)
    app = Stamp(wrapping(sqlite_store, serve, static_over(sqlite_store.disk.path)))
    for _ in range(2):
        answer = await ask(app, f"{PREFIX}/film.mp4", extensions=offer)
        last = answer.messages[-1]
        assert (answer.status, answer.headers["x-stamp"]) == (200, f"{PREFIX}/film.mp4")
        assert (Path(last["path"]).read_bytes() if "path" in last else answer.body) == data
        tag = [("If-None-Match", answer.headers["etag"])]
        assert (await ask(app, f"{PREFIX}/film.mp4", headers=tag, extensions=offer)).status == 304
        if data:
            part = await ask(app, f"{PREFIX}/film.mp4", headers=[("Range", "bytes=0-9")], extensions=offer)
            assert (part.status, part.body) == (206, data[:10])
        await sqlite_store.tasks.drain(10)
        path.unlink()


async def test_base_http_middleware_around_a_client_that_disconnects(sqlite_store: UploadStore) -> None:
    """Inside a BaseHTTPMiddleware, a client that disconnects leaves nothing open either (SQLAlchemy 12077)."""
    path = await put(sqlite_store, "film.mp4", FILM, on_disk=False)
    sqlite_store.upkeep.start()  # it goes on after all requests
    app, tasks = Stamp(wrapping(sqlite_store, True)), asyncio.all_tasks()
    for after in (0, 1, 300_000, 1_000_000):
        path.unlink(missing_ok=True)
        await ask_and_leave(app, scope_of(f"{PREFIX}/film.mp4"), after=after)
        await sqlite_store.tasks.drain(10)
    assert asyncio.all_tasks() <= tasks
    assert open_below(sqlite_store.disk.path) == []
    assert (await ask(app, f"{PREFIX}/film.mp4")).body == FILM


class OldGZip:
    """Encodes as Starlette's GZipMiddleware does from 0.40 to 1.0: every body but one that says how it is encoded."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {}
        body = b""

        async def encoding(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message["body"]
            if message.get("more_body", False):
                return
            headers = MutableHeaders(raw=start["headers"])
            if "content-encoding" not in headers:
                body = gzip.compress(body)
                headers["content-encoding"], headers["content-length"] = "gzip", str(len(body))
            await send(start)
            await send({**message, "body": body})

        is_wanted = "gzip" in Headers(scope=scope).get("accept-encoding", "")
        await self.app(scope, receive, encoding if is_wanted else send)


@pytest.mark.parametrize("around", [OldGZip, GZipMiddleware])
@pytest.mark.parametrize("name", ["a.txt", "film.mp4"])
@pytest.mark.parametrize("accepted", ["gzip", "GZIP;q=0.5, br", "gzip, deflate, br, zstd", "identity", None])
async def test_gzip_around(
    sqlite_store: UploadStore, around: Callable[[ASGIApp], ASGIApp], name: str, accepted: str | None
) -> None:
    """A part of a file is not encoded: its Content-Range would be wrong. The whole may be, and is the same after it."""
    text = b"many words " * 100_000
    path = await put(sqlite_store, name, text)
    app = around(wrapping(sqlite_store, True))
    asked = [] if accepted is None else [("Accept-Encoding", accepted)]
    for on_disk in (True, False, True):
        if not on_disk:
            path.unlink()
        part = await ask(app, f"{PREFIX}/{name}", headers=[("Range", "bytes=5-9999"), *asked])
        assert (part.status, part.body) == (206, text[5:10_000])
        assert part.headers.get("content-encoding", "identity") == "identity"
        assert part.headers["content-length"] == "9995"
        whole = await ask(app, f"{PREFIX}/{name}", headers=asked)
        is_encoded = whole.headers.get("content-encoding") == "gzip"
        assert (gzip.decompress(whole.body) if is_encoded else whole.body) == text


async def test_identity_is_said_to_those_who_accept_codings(sqlite_store: UploadStore) -> None:
    """Only a 206 for a client that accepts codings says `identity`: browsers ask for ranges without codings."""
    await put(sqlite_store, "a.png")
    app, part = wrapping(sqlite_store, True), ("Range", "bytes=0-9")
    for headers, status, encoding in (
        ([part, ("Accept-Encoding", "gzip")], 206, "identity"),
        ([part, ("Accept-Encoding", "identity;q=1, *;q=0")], 206, None),
        ([part, ("Accept-Encoding", "identity")], 206, None),
        ([part], 206, None),
        ([("Accept-Encoding", "gzip")], 200, None),
        ([("Range", "bytes=99999-"), ("Accept-Encoding", "gzip")], 416, None),
    ):
        answer = await ask(app, f"{PREFIX}/a.png", headers=headers)
        assert (answer.status, answer.headers.get("content-encoding")) == (status, encoding)


async def test_base_http_middleware_inside(sqlite_store: UploadStore, serve: bool) -> None:
    """Around a BaseHTTPMiddleware, hits and healing skip it, and absent names get its header."""
    path = await put(sqlite_store, "a.png")
    app = wrapping(sqlite_store, serve, Stamp(static_over(sqlite_store.disk.path)))
    for _ in range(2):
        answer = await ask(app, f"{PREFIX}/a.png")
        assert (answer.status, answer.body) == (200, PICTURE)
        path.unlink()
    absent = await ask(app, f"{PREFIX}/absent.png")
    assert (absent.status, absent.headers["x-stamp"]) == (404, f"{PREFIX}/absent.png")
    assert absent.headers["cache-control"] == "no-store"


async def test_add_middleware(sqlite_store: UploadStore, serve: bool) -> None:
    """`app.add_middleware(SelfHealMiddleware, store=…)` works as the README says, between other middleware."""
    path = await put(sqlite_store, "a.png", on_disk=False)
    app = Starlette(
        routes=[Mount(PREFIX, StaticFiles(directory=sqlite_store.disk.path, check_dir=False))],
        middleware=[
            Middleware(Stamp),
            Middleware(SelfHealMiddleware, store=sqlite_store, serve=serve),
            Middleware(Stamp),
        ],
    )
    assert (await ask(app, f"{PREFIX}/a.png")).body == PICTURE
    assert path.read_bytes() == PICTURE
    assert (await ask(app, f"{PREFIX}/absent.png")).status == 404


async def test_guard_of_the_wrapped_app(sqlite_store: UploadStore) -> None:
    """Without `serve` the wrapped app's checks hold for every file; with `serve` they do not see the request."""
    await put(sqlite_store, "a.png", on_disk=False)
    guarded = wrapping(sqlite_store, False, Wrapped(403, [("cache-control", "max-age=60")]))
    answer = await ask(guarded, f"{PREFIX}/a.png")
    assert (answer.status, answer.headers["cache-control"]) == (403, "no-store")
    assert (await ask(wrapping(sqlite_store, True, Wrapped(403)), f"{PREFIX}/a.png")).body == PICTURE
