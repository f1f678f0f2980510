"""Conditional requests: the answer that preconditions and a range lead to (RFC 9110, section 13)."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import parsedate_tz

from .headers import Head, Plan, error_headers
from .ranges import parse_range

_CONDITIONS = frozenset(
    {b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since", b"range", b"if-range"}
)
_TAG = re.compile(r'(W/)?"([^"]*)"')
_DATE = re.compile(
    r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT"
    r"|[A-Z][a-z]{2,5}day, \d\d-[A-Z][a-z]{2}-\d\d \d\d:\d\d:\d\d GMT"
    r"|[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}",
    re.ASCII,
)
"""The three formats of an HTTP date (RFC 9110, section 5.6.7)."""


def plan_of(request: Iterable[tuple[bytes, bytes]], head: Head, size: int, *, is_head: bool) -> Plan:
    """Evaluate the preconditions and the range of a request's headers, in the order of RFC 9110, section 13.2.2."""
    conditions: dict[bytes, str] = {}
    for key, value in request:
        if key in _CONDITIONS:
            text = value.decode("latin-1")
            conditions[key] = f"{conditions[key]}, {text}" if key in conditions else text
    if not conditions:
        return head.bare if is_head else head.whole
    if _fails(conditions, head):
        return Plan(412, error_headers(head))
    if _is_not_modified(conditions, head):
        return Plan(304, head.not_modified)
    if is_head:
        return head.bare
    is_current = conditions.get(b"if-range", head.etag) in (head.etag, head.last_modified)
    wanted = parse_range(conditions[b"range"], size) if b"range" in conditions and is_current else None
    if wanted is None:
        return head.whole
    if wanted.start >= size:
        return Plan(416, [(b"content-range", f"bytes */{size}".encode()), *error_headers(head)])
    content_range = (b"content-range", f"bytes {wanted.start}-{wanted.stop - 1}/{size}".encode())
    length = (b"content-length", str(len(wanted)).encode())
    rest = [header for header in head.whole.headers if header[0] != b"content-length"]
    return Plan(206, [*rest, length, content_range], wanted.start, wanted.stop)


def _fails(conditions: dict[bytes, str], head: Head) -> bool:
    """If-Match (strong comparison), else If-Unmodified-Since."""
    if b"if-match" in conditions:
        header = conditions[b"if-match"]
        strong = {f'"{tag}"' for weak, tag in _TAG.findall(header) if not weak}
        return header.strip() != "*" and head.etag not in strong
    since = _date(conditions.get(b"if-unmodified-since"))
    return since is not None and head.modified > since


def _is_not_modified(conditions: dict[bytes, str], head: Head) -> bool:
    """If-None-Match (weak comparison), else If-Modified-Since."""
    if b"if-none-match" in conditions:
        header = conditions[b"if-none-match"]
        return header.strip() == "*" or head.etag in {f'"{tag}"' for _, tag in _TAG.findall(header)}
    header_since = conditions.get(b"if-modified-since")
    if header_since == head.last_modified:
        return True
    since = _date(header_since)
    return since is not None and head.modified <= since


def _date(header: str | None) -> int | None:
    """Return an HTTP date in seconds since the epoch; None if it is malformed, and ignored (section 13.1.3)."""
    parsed = parsedate_tz(header) if header is not None and _DATE.fullmatch(header) else None
    if parsed is None:
        return None
    try:
        return int(datetime(*parsed[:6], tzinfo=UTC).timestamp())
    except ValueError:
        return None
