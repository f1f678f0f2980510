"""Conditional requests: the answer that preconditions and a range lead to (RFC 9110, section 13)."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime

from .headers import Head, Headers, Plan, error_headers
from .ranges import parse_range

CONDITIONS = frozenset(
    {b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since", b"range", b"if-range"}
)
_MEMBER = re.compile(r'(?:"[^"]*"?|[^",])+')
"""A member of a list; a comma inside an entity tag does not end it."""
_CODING = re.compile(rb"gzip|br|zstd|deflate", re.IGNORECASE)
_TIME = r"(?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)"
_DATES = (
    re.compile(rf"[A-Z][a-z]{{2}}, (?P<day>\d\d) (?P<month>[A-Z][a-z]{{2}}) (?P<year>\d{{4}}) {_TIME} GMT", re.ASCII),
    re.compile(rf"[A-Z][a-z]{{2,5}}day, (?P<day>\d\d)-(?P<month>[A-Z][a-z]{{2}})-(?P<year>\d\d) {_TIME} GMT", re.ASCII),
    re.compile(rf"[A-Z][a-z]{{2}} (?P<month>[A-Z][a-z]{{2}}) (?P<day>[ \d]\d) {_TIME} (?P<year>\d{{4}})", re.ASCII),
)
"""The three formats of an HTTP date (RFC 9110, section 5.6.7)."""
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def plan_of(request: Iterable[tuple[bytes, bytes]], head: Head, size: int, *, is_head: bool) -> Plan:
    """Evaluate the preconditions and the range of a request's headers, in the order of RFC 9110, section 13.2.2."""
    conditions: dict[bytes, str] = {}
    for key, value in request:
        if key in CONDITIONS:
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
    if wanted is None or not size:  # an empty file has no range, and is whole
        return head.whole
    if wanted.start >= size:
        return Plan(416, [(b"content-range", f"bytes */{size}".encode()), *error_headers(head)])
    content_range = (b"content-range", f"bytes {wanted.start}-{wanted.stop - 1}/{size}".encode())
    length = (b"content-length", str(len(wanted)).encode())
    rest = [header for header in head.whole.headers if header[0] != b"content-length"]
    return Plan(206, [*rest, length, content_range, *_identity(request)], wanted.start, wanted.stop)


def _identity(request: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return what keeps GZipMiddleware of older Starlette off a part. Section 8.4.1 advises against it, so only clients
    that accept codings get it; browsers accept none with a range.
    """
    accepted = b",".join(value for key, value in request if key == b"accept-encoding")
    return [(b"content-encoding", b"identity")] if _CODING.search(accepted) else []


def _fails(conditions: dict[bytes, str], head: Head) -> bool:
    """If-Match (strong comparison), else If-Unmodified-Since."""
    if b"if-match" in conditions:
        members = _members(conditions[b"if-match"])
        return members != {"*"} and head.etag not in members
    since = _date(conditions.get(b"if-unmodified-since"))
    return since is not None and head.modified > since


def _is_not_modified(conditions: dict[bytes, str], head: Head) -> bool:
    """If-None-Match (weak comparison), else If-Modified-Since."""
    if b"if-none-match" in conditions:
        members = _members(conditions[b"if-none-match"])
        return members == {"*"} or not members.isdisjoint({head.etag, f"W/{head.etag}"})
    header_since = conditions.get(b"if-modified-since")
    if header_since == head.last_modified:
        return True
    since = _date(header_since)
    return since is not None and head.modified <= since


def _members(header: str) -> set[str]:
    """Return the members of a list, as they are written: `w/"x"` is no weak tag (section 8.8.3)."""
    return {member.strip(" \t") for member in _MEMBER.findall(header)}


def _date(header: str | None) -> int | None:
    """Return an HTTP date in seconds since the epoch; None if it is malformed, and ignored (section 13.1.3)."""
    match = next((match for form in _DATES if (match := form.fullmatch(header or ""))), None)
    if match is None or match["month"] not in _MONTHS:
        return None
    year, day, hour, minute, second = (int(match[part]) for part in ("year", "day", "hour", "minute", "second"))
    month = _MONTHS.index(match["month"]) + 1
    if len(match["year"]) == 2:
        year = _full_year(year, (month, day, hour, minute, second))
    try:  # Python has no year 0, which is as long ago as 1
        return int(datetime(max(year, 1), month, day, hour, minute, second, tzinfo=UTC).timestamp())
    except ValueError:
        return None


def _full_year(year: int, rest: tuple[int, ...]) -> int:
    """Return the full year for one of two digits: more than 50 years in the future is the past (section 5.6.7)."""
    now = datetime.now(UTC)
    latest = now.year + 50
    full = latest - (latest - year) % 100
    return full - 100 if (full, *rest) > (latest, *now.timetuple()[1:6]) else full
