"""Sending: a planned answer becomes ASGI messages, piece by piece, for as long as the client is there.

Always the bytes of the open file, never its path (`http.response.pathsend`): a server opens the path after `send` has
returned, and until then the name can become another version, or a link to the outside.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager

from starlette.types import Message, Receive, Scope, Send

from ..content.content_types import UNKNOWN, content_type
from ..disk.open_file import PIECE, PIECE_SIZE, OpenFile
from ..healing.bodies import Body
from ..healing.reconcile import Judged
from .conditional import plan_of
from .headers import Head, Plan, make_head
from .urls import kept_for_ever

WATCH_FROM = 4 * PIECE  # bytes from which on the client of a body is watched (CVE-2026-54280)
WATCH_PAUSE = 0.05  # seconds between two looks at a request whose body has ended


class Responder:
    """Answers with bodies; `cache_control`, if given, goes with every 200, 206 and 304 that has the recorded bytes."""

    def __init__(self, cache_control: str | None = None) -> None:
        self._cache_control = None if cache_control is None else cache_control.encode("latin-1")

    def head_of_file(self, name: str, file: OpenFile, judged: Judged | None) -> Head:
        """Return the head of a file; one that was not compared with its record may be damaged: no cache keeps it."""
        if judged is None:
            return make_head(name, file.modified_ns, file.size)
        return make_head(name, file.modified_ns, file.size, self._cache_control, judged.content_type)

    def head_of_body(self, name: str, body: Body) -> Head:
        """Return the head of a body that comes from the database."""
        return make_head(name, body.modified_ns, body.size, self._cache_control, body.content_type)

    def needs_record(self, name: str) -> bool:
        """Whether the head of a name's file is another one once the file was compared with its record."""
        return self._cache_control is not None or content_type(name) == UNKNOWN

    async def read_first(
        self, scope: Scope, head: Head, file: OpenFile, judged: Judged | None = None
    ) -> tuple[Plan, bytes]:
        """Return the plan for an open file, and its first piece; raises `OSError` if that cannot be read."""
        plan = plan_for(scope, head, file.size, "" if judged is None else judged.sha256)
        size = plan.stop - plan.start
        return plan, await file.read(plan.start, size if size <= PIECE else PIECE_SIZE.now) if size else b""

    async def send_body(self, scope: Scope, receive: Receive, send: Send, name: str, body: Body) -> None:
        """Send the answer from any body."""
        plan = plan_for(scope, self.head_of_body(name, body), body.size, body.sha256)
        await send_pieces(receive, send, plan, body)


def plan_for(scope: Scope, head: Head, size: int, sha256: str) -> Plan:
    """Return the answer to a request for these bytes."""
    plan = plan_of(scope["headers"], head, size, is_head=scope["method"] == "HEAD")
    return kept_for_ever(plan, scope.get("query_string", b""), sha256)


def start_of(plan: Plan) -> Message:
    """Return the first message of an answer; its headers are a copy, for other middleware may add to them."""
    return {"type": "http.response.start", "status": plan.status, "headers": plan.headers.copy()}


async def send_all(send: Send, messages: Iterable[Message]) -> None:
    """Send the messages of a small answer, to a client that may be gone."""
    client = _Client(send)
    for message in messages:
        await client.send(message)


async def send_pieces(receive: Receive, send: Send, plan: Plan, body: OpenFile | Body, first: bytes = b"") -> None:
    """Send a planned answer, of which the `first` bytes are read already, until the client hangs up."""
    start, stop = plan.start + len(first), plan.stop
    client = _Client(send)
    with PIECE_SIZE:
        await client.send(start_of(plan))
        if first or start == stop:
            await client.send({"type": "http.response.body", "body": first, "more_body": start < stop})
        if start == stop:
            return
        async with client.watched(receive, stop - start), aclosing(body.pieces(start, stop)) as pieces:
            async for piece in pieces:
                start += len(piece)
                await client.send({"type": "http.response.body", "body": piece, "more_body": start < stop})
                del piece  # its memory is for the next piece of anyone
                await asyncio.sleep(0)  # a fast client never makes `send` wait: others get their turn here
                if client.is_gone:
                    return


class _Client:
    """The client of an answer. Before ASGI 2.4, `send` to a closed client succeeds silently; later, `OSError`."""

    def __init__(self, send: Send) -> None:
        self.is_gone = False
        self._send = send

    async def send(self, message: Message) -> None:
        """Send a message, or find out that the client is gone."""
        try:
            await self._send(message)
        except OSError:
            self.is_gone = True

    @asynccontextmanager
    async def watched(self, receive: Receive, size: int) -> AsyncIterator[None]:
        """Wait for the client to hang up, while `size` bytes are sent to it."""
        if size < WATCH_FROM:
            yield
            return
        watch = asyncio.get_running_loop().create_task(self._watch(receive))
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self, receive: Receive) -> None:
        has_ended = False
        while (message := await receive())["type"] != "http.disconnect":
            if has_ended:  # a `receive` that never waits must not keep all others waiting
                await asyncio.sleep(WATCH_PAUSE)
            has_ended = not message.get("more_body")
        self.is_gone = True
