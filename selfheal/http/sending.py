"""Sending: a planned answer becomes ASGI messages, piece by piece, for as long as the client is there."""

import asyncio
from contextlib import aclosing
from typing import Self

from starlette.types import Message, Receive, Scope, Send

from ..disk.open_file import PIECE, PIECE_SIZE, OpenFile
from ..healing.bodies import Body
from .conditional import plan_of
from .headers import Head, Plan, make_head

WATCH_FROM = 4 * PIECE  # bytes from which on the client of a body is watched (CVE-2026-54280)


class Responder:
    """Answers with bodies; `cache_control`, if given, goes with every 200, 206 and 304."""

    def __init__(self, cache_control: str | None = None) -> None:
        self._cache_control = None if cache_control is None else cache_control.encode("latin-1")

    def head_of(self, name: str, body: OpenFile | Body) -> Head:
        """Return the head of a body under this name."""
        return make_head(name, body.modified_ns, body.size, self._cache_control)

    async def read_first(self, scope: Scope, head: Head, file: OpenFile) -> tuple[Plan, bytes]:
        """Return the plan for an open file, and its first piece; raises `OSError` if that cannot be read."""
        plan = plan_of(scope["headers"], head, file.size, is_head=scope["method"] == "HEAD")
        size = plan.stop - plan.start
        if size > PIECE and can_pathsend(scope, plan, file.size):
            return plan, b""
        first = await file.read(plan.start, size if size <= PIECE else PIECE_SIZE.now) if size else b""
        return plan, first

    async def send_file(
        self, scope: Scope, receive: Receive, send: Send, file: OpenFile, plan: Plan, first: bytes
    ) -> None:
        """Send a planned answer from an open file."""
        if not first and plan.start < plan.stop and can_pathsend(scope, plan, file.size):
            await send(start_of(plan))
            await send({"type": "http.response.pathsend", "path": file.path})
        else:
            await _send_pieces(scope, receive, send, plan, file, first)

    async def send_body(self, scope: Scope, receive: Receive, send: Send, name: str, body: Body) -> None:
        """Send the answer from any body."""
        head = self.head_of(name, body)
        plan = plan_of(scope["headers"], head, body.size, is_head=scope["method"] == "HEAD")
        await _send_pieces(scope, receive, send, plan, body)


def can_pathsend(scope: Scope, plan: Plan, size: int) -> bool:
    """Whether the server offers to send a whole file by itself (ASGI's path send extension)."""
    return plan.stop - plan.start == size and "http.response.pathsend" in (scope.get("extensions") or ())


def start_of(plan: Plan) -> Message:
    """Return the first message of an answer; its headers are a copy, for other middleware may add to them."""
    return {"type": "http.response.start", "status": plan.status, "headers": plan.headers.copy()}


async def _send_pieces(
    scope: Scope, receive: Receive, send: Send, plan: Plan, body: OpenFile | Body, first: bytes = b""
) -> None:
    with PIECE_SIZE:
        await send(start_of(plan))
        start, stop = plan.start + len(first), plan.stop
        if first or start == stop:
            await send({"type": "http.response.body", "body": first, "more_body": start < stop})
        if start == stop:
            return
        async with (
            _Disconnect(scope, receive, stop - start) as disconnect,
            aclosing(body.pieces(start, stop)) as pieces,
        ):
            async for piece in pieces:
                start += len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": start < stop})
                if disconnect.has_come:
                    return


class _Disconnect:
    """Whether the client has hung up. Before ASGI 2.4, `send` to a closed client succeeds silently; later it raises."""

    def __init__(self, scope: Scope, receive: Receive, size: int) -> None:
        self.has_come = False
        self._receive = receive
        version = tuple(int(part) for part in scope.get("asgi", {}).get("spec_version", "2.0").split("."))
        self._is_needed = size >= WATCH_FROM and version < (2, 4)
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._is_needed:
            self._watch = asyncio.get_running_loop().create_task(self._wait())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.has_come = True
