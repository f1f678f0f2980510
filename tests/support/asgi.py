"""What a server does, without a server: one request into an ASGI app, and its answer checked against the protocol."""

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
    """An answer as a client sees it. Header names are lower case; none of them may come twice."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def take(self, message: Message) -> None:
        """Add a message of the app; anything out of order is an error of the app."""
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
        """All that came of it."""
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def is_over(self) -> bool:
        """Whether the app has said all."""
        last = self.messages[-1] if self.messages else {"type": ""}
        return last["type"] == "http.response.pathsend" or (
            last["type"] == "http.response.body" and not last.get("more_body", False)
        )


def scope_of(target: str, *, method: str = "GET", headers: Lines = (), **more: Any) -> Scope:
    """The scope that a server makes of a request's target (percent-encoded) and its header lines."""
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
    """One request of a client that waits for the whole answer."""
    return await ask_scope(app, scope_of(target, method=method, headers=headers, **more))


async def ask_scope(app: ASGIApp, scope: Scope) -> Answer:
    """As `ask`, for a scope of one's own."""
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
    """A client that hangs up once `after` bytes of the body have come: quietly, or (`fails`) so that `send` raises."""
    answer, came, gone = Answer(), 0, asyncio.Event()

    async def send(message: Message) -> None:
        nonlocal came
        if gone.is_set() and fails:
            raise OSError("the client is gone")
        if not gone.is_set():
            answer.take(message)
        came += len(message.get("body", b""))
        if answer.status and came >= after:
            gone.set()
        await asyncio.sleep(0)  # a server waits here for its socket

    await app(scope, _request_then(gone), send)
    return answer


def _request_then(gone: asyncio.Event) -> Receive:
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


def _check(answer: Answer, method: str) -> None:
    """What HTTP asks of every answer: the length that was promised, and no body where there is none."""
    is_path = answer.messages[-1]["type"] == "http.response.pathsend"
    if method == "HEAD" or answer.status in (204, 304):
        assert answer.body == b"", "a body where there is none"
    elif not is_path and "content-length" in answer.headers:
        assert len(answer.body) == int(answer.headers["content-length"]), "not the promised length"


class Wrapped:
    """An app that answers everything alike, and remembers what it was asked."""

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
