"""Send one request to an ASGI app without a server, and check its answer against the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Lines = Iterable[tuple[str, str]]


@dataclass
class Answer:
    """An answer as a client sees it. Header names must be lower case, and each may appear only once."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def take(self, message: Message) -> None:
        """Add a message of the app; assert that the order of messages is right."""
        kind = message["type"]
        if kind == "http.response.start":
            assert not self.status, "a second start"
            self.status = message["status"]
            for key, value in message.get("headers", ()):
                name = key.decode("latin-1")
                assert name == name.lower(), f"{name} is not lower case"
                assert name not in self.headers, f"{name} comes twice"
                self.headers[name] = value.decode("latin-1")
        else:
            assert self.status, f"{kind} before the start"
            assert not self.is_over, f"{kind} after the end"
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        """The bytes of all body messages so far."""
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def is_over(self) -> bool:
        """Whether the last message ends the answer."""
        last = self.messages[-1] if self.messages else {"type": ""}
        return last["type"] == "http.response.pathsend" or (
            last["type"] == "http.response.body" and not last.get("more_body", False)
        )


# -- requests ---------------------------------------------------------------------------------------------------------


def scope_of(target: str, *, method: str = "GET", headers: Lines = (), **more: Any) -> Scope:
    """Return the scope that a server makes of a request's target (percent-encoded) and its header lines."""
    path, _, query = target.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"test"), *((key.lower().encode(), value.encode()) for key, value in headers)],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        **more,
    }


async def ask(app: ASGIApp, target: str, *, method: str = "GET", headers: Lines = (), **more: Any) -> Answer:
    """Send a request as a client that waits for the whole answer, and return the answer."""
    return await ask_scope(app, scope_of(target, method=method, headers=headers, **more))


async def ask_scope(app: ASGIApp, scope: Scope) -> Answer:
    """Do as `ask`, with a scope that the test made."""
    answer, over = Answer(), asyncio.Event()

    async def send(message: Message) -> None:
        answer.take(message)
        if answer.is_over:
            over.set()

    await app(scope, _request_then(over), send)
    assert answer.is_over, "the answer has no end"
    _check(answer, scope["method"])
    return answer


async def ask_and_leave(app: ASGIApp, scope: Scope, *, after: int, fails: bool = False) -> Answer:
    """Send a request as a client that disconnects after `after` bytes of the body; return what it has received.

    After that `send` does nothing, as in ASGI 2.3, or with `fails` raises `OSError`, as in ASGI 2.4.
    """
    answer, received, gone = Answer(), 0, asyncio.Event()

    async def send(message: Message) -> None:
        nonlocal received
        if gone.is_set() and fails:
            raise OSError("the client is gone")
        if not gone.is_set():
            answer.take(message)
        received += len(message.get("body", b""))
        if answer.status and received >= after:
            gone.set()
        await asyncio.sleep(0)  # a server waits here for its socket

    await app(scope, _request_then(gone), send)
    return answer


async def no_message() -> Message:
    """Wait for ever: the `receive` of a client that stays connected and sends nothing."""
    await asyncio.Event().wait()
    raise AssertionError


def _request_then(gone: asyncio.Event) -> Receive:
    """Return a `receive` that gives an empty request body and, once `gone` is set, the disconnect."""
    is_received = False

    async def receive() -> Message:
        nonlocal is_received
        if not is_received:
            is_received = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


def _check(answer: Answer, method: str) -> None:
    """Assert what HTTP demands of every answer: the promised length, and no body where none is allowed."""
    is_path = answer.messages[-1]["type"] == "http.response.pathsend"
    if method == "HEAD" or answer.status in (204, 304):
        assert answer.body == b"", "a body where none is allowed"
    elif not is_path and "content-length" in answer.headers:
        assert len(answer.body) == int(answer.headers["content-length"]), "not the promised length"


# -- the wrapped app --------------------------------------------------------------------------------------------------


class Wrapped:
    """An app that gives every request the same answer, and records the scopes."""

    def __init__(self, status: int = 404, headers: Lines = (), body: bytes = b"wrapped") -> None:
        self.status = status
        self.headers = [(key.encode(), value.encode()) for key, value in headers]
        self.body = body
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        self.scopes.append(scope)
        headers = [(b"x-wrapped", b"yes"), (b"content-length", str(len(self.body)).encode()), *self.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else self.body})
