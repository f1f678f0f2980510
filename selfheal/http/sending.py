"""A body → ASGI messages: validators, conditions, ranges, HEAD (RFC 9110); ETag and Last-Modified as Starlette's."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import formatdate, parsedate_tz
from http import HTTPStatus
from math import floor
from typing import Protocol, Self

from starlette.types import Message, Receive, Scope, Send

from ..content.content_types import can_run_script, content_type
from ..disk.open_file import CROWD, PIECE, OpenFile

Headers = list[tuple[bytes, bytes]]

SANDBOX = b"sandbox; default-src 'none'; style-src 'unsafe-inline'"
RETRY_AFTER = b"2"
FIRST_DATE = -62135596800
LAST_DATE = 253402300799
"""9999-12-31T23:59:59Z, the last second that an HTTP date can say, in seconds since the epoch (CVE-2017-20005)."""
WATCH_FROM = 4 * PIECE
"""Bytes from which a body is worth watching whether its client is still there (CVE-2026-54280)."""

_ASKING = frozenset(
    {b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since", b"range", b"if-range"}
)
_TAG = re.compile(r'(?:W/)?"([^"]*)"')
_STRONG_TAG = re.compile(r'(W/)?"([^"]*)"')
_RANGE = re.compile(r"([0-9]*)-([0-9]*)", re.ASCII)
_DATE = re.compile(
    r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT"
    r"|[A-Z][a-z]{2,5}day, \d\d-[A-Z][a-z]{2}-\d\d \d\d:\d\d:\d\d GMT"
    r"|[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}",
    re.ASCII,
)
"""The three formats of an HTTP date (RFC 9110, section 5.6.7)."""


class Body(Protocol):
    """So many bytes, of such an age, from any of them to any other."""

    @property
    def size(self) -> int:
        """In bytes."""

    @property
    def modified_ns(self) -> int:
        """In ns since the epoch."""

    def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """The bytes from `start` up to, without, `stop`; raises rather than yield a wrong one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer that a request's conditions and range lead to: bytes from `start` up to `stop`."""

    status: int
    headers: Headers
    start: int = 0
    stop: int = 0


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of a file before a byte of it is read: its validators, and its 200 with all bytes and with none."""

    etag: str
    last_modified: str
    modified: int
    not_modified: Headers
    whole: Plan
    bare: Plan


class Responder:
    """Answers with bodies. `cache_control`, if given, is said with every 200, 206 and 304."""

    def __init__(self, cache_control: str | None = None) -> None:
        self._cache_control = None if cache_control is None else cache_control.encode("latin-1")

    def head_of(self, name: str, body: Body) -> Head:
        """What is said of a body under this name."""
        return make_head(name, body.modified_ns, body.size, self._cache_control)

    async def read_first(self, scope: Scope, head: Head, file: OpenFile) -> tuple[Plan, bytes]:
        """What to answer from an open file, and its first piece; raises `OSError` if that cannot be read."""
        plan = plan_of(scope["headers"], head, file.size, is_head=scope["method"] == "HEAD")
        size = plan.stop - plan.start
        if size > PIECE and can_pathsend(scope, plan, file.size):
            return plan, b""
        first = await file.read(plan.start, size if size <= PIECE else CROWD.piece) if size else b""
        return plan, first

    async def send_file(
        self, scope: Scope, receive: Receive, send: Send, file: OpenFile, plan: Plan, first: bytes
    ) -> None:
        """Answer from an open file, as planned."""
        if not first and plan.start < plan.stop and can_pathsend(scope, plan, file.size):
            await send(start_of(plan))
            await send({"type": "http.response.pathsend", "path": file.path})
        else:
            await _send_pieces(scope, receive, send, plan, file, first)

    async def send_body(self, scope: Scope, receive: Receive, send: Send, name: str, body: Body) -> None:
        """Answer from any body."""
        head = self.head_of(name, body)
        plan = plan_of(scope["headers"], head, body.size, is_head=scope["method"] == "HEAD")
        await _send_pieces(scope, receive, send, plan, body)


def make_head(name: str, modified_ns: int, size: int, cache_control: bytes | None = None) -> Head:
    """The validators and headers of a file, as Starlette's `FileResponse` computes them from its stat."""
    seconds, rest = divmod(modified_ns, 10**9)
    mtime = seconds + 1e-9 * rest  # the float that os.stat makes of it
    modified = floor(round(min(max(mtime, FIRST_DATE), LAST_DATE), 6))  # as a date rounds it
    etag = f'"{hashlib.md5(f"{mtime}-{size}".encode(), usedforsecurity=False).hexdigest()}"'
    last_modified = formatdate(modified, usegmt=True)
    kind = content_type(name)
    common: Headers = [
        (b"last-modified", last_modified.encode()),
        (b"etag", etag.encode()),
        (b"x-content-type-options", b"nosniff"),
    ]
    if cache_control is not None:
        common.append((b"cache-control", cache_control))
    if can_run_script(kind):
        common.append((b"content-security-policy", SANDBOX))
    whole: Headers = [
        (b"content-type", kind.encode()),
        (b"accept-ranges", b"bytes"),
        (b"content-length", str(size).encode()),
    ]
    headers = whole + common
    return Head(etag, last_modified, modified, common, Plan(200, headers, 0, size), Plan(200, headers))


def plan_of(request: Iterable[tuple[bytes, bytes]], head: Head, size: int, *, is_head: bool) -> Plan:
    """Evaluate a request's preconditions and range, in the order of RFC 9110, section 13.2.2."""
    asked: dict[bytes, str] = {}
    for key, value in request:
        if key in _ASKING:
            said = value.decode("latin-1")
            asked[key] = f"{asked[key]}, {said}" if key in asked else said
    if not asked:
        return head.bare if is_head else head.whole
    if _fails(asked, head):
        return Plan(412, _error_headers(head))
    if _is_unmodified(asked, head):
        return Plan(304, head.not_modified)
    if is_head:
        return head.bare
    wanted = _range(asked, head, size)
    if wanted is None:
        return head.whole
    if wanted.start >= size:
        return Plan(416, [(b"content-range", f"bytes */{size}".encode()), *_error_headers(head)])
    content_range = (b"content-range", f"bytes {wanted.start}-{wanted.stop - 1}/{size}".encode())
    length = (b"content-length", str(len(wanted)).encode())
    rest = [header for header in head.whole.headers if header[0] != b"content-length"]
    return Plan(206, [*rest, length, content_range], wanted.start, wanted.stop)


def error_messages(status: int, *, is_head: bool, more: Headers | None = None) -> tuple[Message, Message]:
    """The two messages of an answer without a file; it is never to be stored."""
    text = f"{HTTPStatus(status).phrase}\n".encode()
    headers: Headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(text)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        *(more or ()),
    ]
    start: Message = {"type": "http.response.start", "status": status, "headers": headers}
    return start, {"type": "http.response.body", "body": b"" if is_head else text}


def never_stored(send: Send) -> Send:
    """A `send` for the wrapped app's answers about names we do not serve: only 200, 206 and 304 may be stored."""

    async def send_unstored(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] not in (200, 206, 304):
            kept = [(key, value) for key, value in message.get("headers", ()) if key.lower() != b"cache-control"]
            message = {**message, "headers": [*kept, (b"cache-control", b"no-store")]}
        await send(message)

    return send_unstored


def can_pathsend(scope: Scope, plan: Plan, size: int) -> bool:
    """Whether the server offers to send a whole file by itself (ASGI's path send extension)."""
    return plan.stop - plan.start == size and "http.response.pathsend" in (scope.get("extensions") or ())


def start_of(plan: Plan) -> Message:
    """The first message of a planned answer; its headers are a copy: those around us may add to them."""
    return {"type": "http.response.start", "status": plan.status, "headers": plan.headers.copy()}


async def _send_pieces(scope: Scope, receive: Receive, send: Send, plan: Plan, body: Body, first: bytes = b"") -> None:
    with CROWD:
        await send(start_of(plan))
        start, stop = plan.start + len(first), plan.stop
        if first or start == stop:
            await send({"type": "http.response.body", "body": first, "more_body": start < stop})
        if start == stop:
            return
        async with _Gone(scope, receive, stop - start) as gone, aclosing(body.pieces(start, stop)) as pieces:
            async for piece in pieces:
                start += len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": start < stop})
                if gone.is_so:
                    return


class _Gone:
    """Whether the client has hung up. Servers of ASGI 2.3 take a body for nobody without a word; later ones raise."""

    def __init__(self, scope: Scope, receive: Receive, size: int) -> None:
        self.is_so = False
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
        self.is_so = True


def _error_headers(head: Head) -> Headers:
    kept = [header for header in head.not_modified if header[0] != b"cache-control"]
    return [*kept, (b"content-length", b"0"), (b"cache-control", b"no-store")]


def _fails(asked: dict[bytes, str], head: Head) -> bool:
    """If-Match (strong comparison), else If-Unmodified-Since."""
    if b"if-match" in asked:
        said = asked[b"if-match"]
        strong = {f'"{tag}"' for weak, tag in _STRONG_TAG.findall(said) if not weak}
        return said.strip() != "*" and head.etag not in strong
    since = _date(asked.get(b"if-unmodified-since"))
    return since is not None and head.modified > since


def _is_unmodified(asked: dict[bytes, str], head: Head) -> bool:
    """If-None-Match (weak comparison), else If-Modified-Since."""
    if b"if-none-match" in asked:
        said = asked[b"if-none-match"]
        return said.strip() == "*" or head.etag.strip('"') in _TAG.findall(said)
    said_since = asked.get(b"if-modified-since")
    if said_since == head.last_modified:
        return True
    since = _date(said_since)
    return since is not None and head.modified <= since


def _date(said: str | None) -> int | None:
    """An HTTP date in seconds since the epoch; None if it is none (RFC 9110, section 13.1.3: then it is ignored)."""
    parsed = parsedate_tz(said) if said is not None and _DATE.fullmatch(said) else None
    if parsed is None:
        return None
    try:
        return int(datetime(*parsed[:6], tzinfo=UTC).timestamp())
    except ValueError:
        return None


def _range(asked: dict[bytes, str], head: Head, size: int) -> range | None:
    """The single range that is asked for; None if the whole is (no range, several, malformed, another unit, stale).

    A range that begins at or past the end starts at `size`. Linear in the header (CVE-2025-62727, CVE-2011-3192), in
    ASCII digits only (CVE-2025-69225), and without a number that could overflow (CVE-2017-7529).
    """
    said = asked.get(b"range")
    if said is None or asked.get(b"if-range", head.etag) not in (head.etag, head.last_modified):
        return None
    unit, _, specs = said.partition("=")
    if unit.lower() != "bytes":
        return None
    match = _RANGE.fullmatch(specs.strip(" \t"))
    if match is None or match[0] == "-":
        return None
    if not match[1]:
        suffix = _number(match[2])
        return range(max(size - suffix, 0) if suffix else size, size)
    if match[2] and _order(match[2]) < _order(match[1]):
        return None
    last = _number(match[2]) if match[2] else size
    return range(_number(match[1]), min(last + 1, size))


def _number(digits: str) -> int:
    """As many digits as a client likes to send: what needs more than 18 of them is past every end (CVE-2017-7529)."""
    bare = digits.lstrip("0") or "0"
    return int(bare) if len(bare) <= 18 else 10**18


def _order(digits: str) -> tuple[int, str]:
    """What tells the larger of two numbers, of however many digits."""
    bare = digits.lstrip("0")
    return len(bare), bare
