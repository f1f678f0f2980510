"""The tests of the ASGI middleware run against the WSGI middleware too: an ASGI face for WSGI apps, and the reverse."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment
from wsgiref.util import FileWrapper

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfheal import UploadStore
from selfheal.wsgi import SelfHealMiddleware
from tests.support.asgi import no_message

SCOPE, LOOP = "tests.scope", "tests.loop"
"""Keys of an environment: the scope that it was made of, and the event loop of the test."""


def environ_of(scope: Scope, **more: Any) -> WSGIEnvironment:
    """Return the environment that a WSGI server makes of a request; lines with the same name are joined."""
    root = scope.get("root_path", "").rstrip("/")
    path = scope["path"]
    environ: WSGIEnvironment = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": as_bytes(root),
        "PATH_INFO": as_bytes(path.removeprefix(root) if path.startswith(f"{root}/") else path),
        "QUERY_STRING": scope.get("query_string", b"").decode("latin-1"),
        "SERVER_NAME": "test",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": FileWrapper,
    }
    if scope.get("raw_path") is not None:
        environ["RAW_URI"] = scope["raw_path"].decode("latin-1") + "?a=%2f"
    for key, value in scope["headers"]:
        name = f"HTTP_{key.decode().upper().replace('-', '_')}"
        text = value.decode("latin-1")
        environ[name] = f"{environ[name]},{text}" if name in environ else text
    return environ | more


def as_bytes(path: str) -> str:
    """Return a path as WSGI has it: a character for each byte."""
    return path.encode("utf-8", "surrogateescape").decode("latin-1")


def as_asgi(app: WSGIApplication) -> ASGIApp:
    """Return an ASGI app that passes its requests to a WSGI app in a thread, as a WSGI server does."""

    async def call(scope: Scope, _receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()

        def tell(message: Message) -> None:
            asyncio.run_coroutine_threadsafe(_awaited(send, message), loop).result()

        environ, done = environ_of(scope) | {SCOPE: scope, LOOP: loop}, Future[None]()

        def run() -> None:
            try:
                serve(app, environ, tell)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            await asyncio.wrap_future(done)
        finally:
            thread.join()

    return call


async def _awaited(send: Send, message: Message) -> None:
    await send(message)


def serve(app: WSGIApplication, environ: WSGIEnvironment, tell: Callable[[Message], None]) -> None:
    """Do what a WSGI server does with a request; `tell` gets the answer as messages of ASGI."""
    begun: list[Message] = []

    def start_response(status: str, headers: list[tuple[str, str]], *_: Any) -> Callable[[bytes], object]:
        pairs = [(key.lower().encode("latin-1"), value.encode("latin-1")) for key, value in headers]
        begun[:] = [{"type": "http.response.start", "status": int(status[:3]), "headers": pairs}]
        return lambda _: None

    answer = app(environ, start_response)
    try:
        for piece in answer:
            if begun:
                tell(begun.pop())
            if piece:
                tell({"type": "http.response.body", "body": piece, "more_body": True})
        if begun:
            tell(begun.pop())
        tell({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        if hasattr(answer, "close"):
            answer.close()


def as_wsgi(app: ASGIApp) -> WSGIApplication:
    """Return a WSGI app that passes its requests to an ASGI app, on the loop of the test, with its scope there."""

    def call(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        messages: list[Message] = []

        async def send(message: Message) -> None:
            messages.append(message)

        async def run() -> None:
            await app(environ[SCOPE], no_message, send)

        asyncio.run_coroutine_threadsafe(run(), environ[LOOP]).result()
        begin, *rest = messages
        lines = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in begin.get("headers", ())]
        start_response(f"{begin['status']} Status", lines)
        return [message.get("body", b"") for message in rest]

    return call


class WsgiMiddleware:
    """The WSGI middleware around an ASGI app, with the face of an ASGI app itself."""

    def __init__(self, app: ASGIApp, store: UploadStore | None = None, **more: Any) -> None:
        middleware = SelfHealMiddleware(as_wsgi(app), store, **more)
        self.store = middleware.store
        self._face = as_asgi(middleware)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._face(scope, receive, send)
