"""Headers: validators as Starlette's `FileResponse` computes them, and answers without a file."""

import hashlib
import re
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from math import floor

from starlette.types import Message, Send

from ..content.content_types import UNKNOWN, can_run_script, content_type

Headers = list[tuple[bytes, bytes]]

SANDBOX = b"sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:"
_SAFE = re.compile(
    r"(?:audio|font|image|video)/[a-z0-9][a-z0-9.+-]*|application/pdf|text/plain(?:; charset=[a-z0-9-]+)?", re.ASCII
)
"""Recorded types that are served: a browser runs no script in them, or only in the sandbox (`image/svg+xml`)."""
RETRY_AFTER = b"2"
FIRST_DATE = -62135596800
LAST_DATE = 253402300799
"""9999-12-31T23:59:59Z, the last second of an HTTP date, in seconds since the epoch (CVE-2017-20005)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """An answer: its status, its headers, and the bytes from `start` to before `stop`."""

    status: int
    headers: Headers
    start: int = 0
    stop: int = 0


@dataclass(frozen=True, slots=True)
class Head:
    """The validators and headers of a file; the answers with all bytes (`whole`) and with none (`bare`)."""

    etag: str
    last_modified: str
    modified: int
    not_modified: Headers
    whole: Plan
    bare: Plan


def served_type(name: str, recorded: str) -> str:
    """Return the type of a name's extension; the recorded one if the extension says nothing, and it is safe."""
    known = content_type(name)
    return recorded if known == UNKNOWN and _SAFE.fullmatch(recorded) else known


def make_head(
    name: str, modified_ns: int, size: int, cache_control: bytes | None = None, recorded_type: str = UNKNOWN
) -> Head:
    """Return the head of a file: `modified_ns` in ns since the epoch, `size` in bytes."""
    seconds, rest = divmod(modified_ns, 10**9)
    mtime = seconds + 1e-9 * rest  # the float of os.stat
    modified = floor(round(min(max(mtime, FIRST_DATE), LAST_DATE), 6))  # as formatdate rounds it
    etag = f'"{hashlib.md5(f"{mtime}-{size}".encode(), usedforsecurity=False).hexdigest()}"'
    last_modified = formatdate(modified, usegmt=True)
    kind = served_type(name, recorded_type)
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


def error_headers(head: Head) -> Headers:
    """Return the headers of a 412 or 416: the validators, no body, not to be stored."""
    kept = [header for header in head.not_modified if header[0] != b"cache-control"]
    return [*kept, (b"content-length", b"0"), (b"cache-control", b"no-store")]


def error_messages(status: int, *, is_head: bool) -> tuple[Message, Message]:
    """Return the two messages of an answer without a file, which is not to be stored; a 503 says when to ask again."""
    text = f"{HTTPStatus(status).phrase}\n".encode()
    headers: Headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(text)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
    ]
    if status == 503:
        headers.append((b"retry-after", RETRY_AFTER))
    start: Message = {"type": "http.response.start", "status": status, "headers": headers}
    return start, {"type": "http.response.body", "body": b"" if is_head else text}


def never_stored(send: Send) -> Send:
    """Wrap the `send` of the wrapped app: its answers about our names are not to be stored, but for 200, 206, 304."""

    async def send_unstored(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] not in (200, 206, 304):
            kept = [(key, value) for key, value in message.get("headers", ()) if key.lower() != b"cache-control"]
            message = {**message, "headers": [*kept, (b"cache-control", b"no-store")]}
        await send(message)

    return send_unstored
