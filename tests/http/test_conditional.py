"""Preconditions and dates (RFC 9110, section 13): any bytes in any header, in time that is linear in their length."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from email.utils import formatdate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfheal.http.headers import make_head
from tests.support.plans import MODIFIED_NS, STATUSES, plan

HEADERS = (b"range", b"if-range", b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since")


# -- dates ------------------------------------------------------------------------------------------------------------


@given(
    day=st.text("0123456789²١ ", min_size=1, max_size=3),
    month=st.sampled_from(["Jan", "Feb", "Nov", "Foo", "11", ""]),
    year=st.text("0123456789²", min_size=1, max_size=5),
    clock=st.text("0123456789:²", max_size=9),
    zone=st.sampled_from([" GMT", "", " +0100", " PST", " -0000", " GMTX", ", GMT", " GMT GMT"]),
    pattern=st.sampled_from(["Tue, {0} {1} {2} {3}{4}", "Tuesday, {0}-{1}-{2} {3}{4}", "Tue {1} {0} {3} {2}{4}"]),
)
@settings(max_examples=500)
def test_text_that_looks_like_a_date(day: str, month: str, year: str, clock: str, zone: str, pattern: str) -> None:
    """Text that looks like a date is a date or is ignored; it never raises."""
    date = pattern.format(day, month, year, clock, zone).encode()
    head = make_head("a.png", MODIFIED_NS, 100)
    assert plan(head, 100, (b"if-modified-since", date)).status in (200, 304)
    assert plan(head, 100, (b"if-unmodified-since", date)).status in (200, 412)


@pytest.mark.parametrize(
    "date", ["Tue, 99 Nov 2023 22:13:20 GMT", "Tue, 14 Nov 2023 25:13:20 GMT", "Thu, 30 Feb 2023 22:13:20 GMT"]
)
def test_a_date_that_does_not_exist_is_ignored(date: str) -> None:
    """A date that does not exist is ignored (RFC 9110, section 13.1.3)."""
    head = make_head("a.png", MODIFIED_NS, 100)
    assert plan(head, 100, (b"if-modified-since", date.encode())).status == 200
    assert plan(head, 100, (b"if-unmodified-since", date.encode())).status == 200


@given(seconds=st.integers(-(2**31), 2**33), shift=st.integers(-3, 3))
def test_dates_are_compared_in_seconds(seconds: int, shift: int) -> None:
    """If-Modified-Since and If-Unmodified-Since compare in seconds; If-Range needs the same second."""
    head = make_head("a.png", seconds * 10**9, 100)
    date = formatdate(seconds + shift, usegmt=True).encode()
    assert plan(head, 100, (b"if-modified-since", date)).status == (304 if shift >= 0 else 200)
    assert plan(head, 100, (b"if-unmodified-since", date)).status == (200 if shift >= 0 else 412)
    assert plan(head, 100, (b"range", b"bytes=0-9"), (b"if-range", date)).status == (206 if shift == 0 else 200)


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Tokyo"])
@pytest.mark.parametrize("pattern", ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"])
def test_every_date_format_is_gmt(monkeypatch: pytest.MonkeyPatch, zone: str, pattern: str) -> None:
    """All three date formats (RFC 9110, section 5.6.7) are GMT, whatever the time zone of the server."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        head = make_head("a.png", MODIFIED_NS, 100)
        for shift, unmodified in ((-1, False), (0, True), (1, True)):
            date = time.strftime(pattern, time.gmtime(MODIFIED_NS // 10**9 + shift)).encode()
            assert plan(head, 100, (b"if-modified-since", date)).status == (304 if unmodified else 200)
            assert plan(head, 100, (b"if-unmodified-since", date)).status == (200 if unmodified else 412)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("year", ["0000", "0001", "0024", "0069", "0070", "0099", "0100"])
@pytest.mark.parametrize("pattern", ["Mon, 01 Jan {} 00:00:00 GMT", "Mon Jan  1 00:00:00 {}"])
def test_years_of_the_first_centuries(year: str, pattern: str) -> None:
    """A year of four digits is that year, long ago: `0001` is not 2001 (the minimal date of .NET)."""
    date = pattern.format(year).encode()
    head = make_head("a.png", 10**9 * 10**9 // 2, 100)  # in 1985
    assert plan(head, 100, (b"if-modified-since", date)).status == 200
    assert plan(head, 100, (b"if-unmodified-since", date)).status == 412


def test_years_of_two_digits() -> None:
    """A year of two digits is the last such year up to 50 years from now (RFC 9110, section 5.6.7)."""
    now = time.gmtime()
    for years, is_past in ((-49, True), (-1, True), (1, False), (49, False), (51, True), (99, True)):
        date = f"Monday, 01-Jan-{(now.tm_year + years) % 100:02} 00:00:00 GMT".encode()
        head = make_head("a.png", time.time_ns(), 100)
        assert plan(head, 100, (b"if-modified-since", date)).status == (200 if is_past else 304), years
        assert plan(head, 100, (b"if-unmodified-since", date)).status == (412 if is_past else 200), years


@pytest.mark.parametrize(("days", "is_past"), [(-2, False), (2, True)])
def test_fifty_years_are_counted_in_days(days: int, is_past: bool) -> None:
    """A date two days before 50 years from now is in the future, one two days after that is of the past century."""
    now = datetime.now(UTC)
    now = now.replace(year=now.year + 50, day=28 if (now.month, now.day) == (2, 29) else now.day)
    date = (now + timedelta(days=days)).strftime("%d-%b-%y %T")
    head = make_head("a.png", time.time_ns(), 100)
    planned = plan(head, 100, (b"if-modified-since", f"Monday, {date} GMT".encode()))
    assert planned.status == (200 if is_past else 304)


# -- entity tags ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "if_match", "if_none_match"),
    [
        ("{}", 200, 304),
        ("W/{}", 412, 304),
        ("*", 200, 304),
        (" * ", 200, 304),
        ('"x", {}', 200, 304),
        ('"x",W/{}', 412, 304),
        ('W/"x",{} , "y"', 200, 304),
        ('"x"', 412, 200),
        ('"*"', 412, 200),
        ("", 412, 200),
        ("x", 412, 200),
        ("w/{}", 412, 200),
        ('w/{}, "x"', 412, 200),
        ("w/{}, {}", 200, 304),
        ("W/{}, w/{}", 412, 304),
        ('"x"{}', 412, 200),
    ],
)
def test_entity_tags_are_compared_strongly_or_weakly(tags: str, if_match: int, if_none_match: int) -> None:
    """If-Match compares strongly, If-None-Match weakly, in one line or in several (RFC 9110, section 8.8.3.2)."""
    head = make_head("a.png", MODIFIED_NS, 100)
    whole = tags.replace("{}", head.etag)
    for lines in ([whole], whole.split(",")):
        encoded = [line.encode() for line in lines]
        assert plan(head, 100, *((b"if-match", line) for line in encoded)).status == if_match
        assert plan(head, 100, *((b"if-none-match", line) for line in encoded)).status == if_none_match


# -- any bytes --------------------------------------------------------------------------------------------------------


@given(lines=st.lists(st.tuples(st.sampled_from(HEADERS), st.binary(max_size=60)), max_size=6), is_head=st.booleans())
@settings(max_examples=500)
def test_any_bytes_in_any_header(lines: list[tuple[bytes, bytes]], is_head: bool) -> None:
    """No bytes in any header make the plan raise; HEAD never gets 206 or 416."""
    planned = plan(make_head("a.png", MODIFIED_NS, 100), 100, *lines, is_head=is_head)
    assert planned.status in (STATUSES - {206, 416} if is_head else STATUSES)
    assert 0 <= planned.start <= planned.stop <= 100


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"range", b"bytes=" + b"0-," * 300_000),
        (b"range", b"bytes=" + b"0" * 1_000_000),
        (b"range", b"bytes=" + b"9" * 1_000_000 + b"-"),
        (b"range", b"bytes=" + b" " * 1_000_000 + b"-"),
        (b"range", b"bytes=" + b"-" * 1_000_000),
        (b"if-none-match", b'"' * 1_000_001),
        (b"if-none-match", b"W/" * 500_000),
        (b"if-none-match", b'"x", ' * 200_000),
        (b"if-match", b'W/"' * 300_001),
        (b"if-match", b"," * 1_000_000),
        (b"if-range", b'"' * 1_000_000),
        (b"if-modified-since", b"Tue, " * 200_000),
        (b"if-modified-since", b" " * 1_000_000),
        (b"if-modified-since", b"(" * 1_000_000),
        (b"if-unmodified-since", b"1" * 1_000_000),
        (b"if-unmodified-since", b"Tue, 14 Nov " + b"2" * 1_000_000 + b" 22:13:20 GMT"),
    ],
    ids=lambda value: value[:16].decode(),
)
def test_long_headers_take_linear_time(key: bytes, value: bytes) -> None:
    """A header of 1 MB is handled in time linear in its length (CVE-2025-62727, CVE-2011-3192)."""
    head = make_head("a.png", MODIFIED_NS, 100)
    started = time.monotonic()
    assert plan(head, 100, (key, value), (b"range", b"bytes=0-9")).status in STATUSES
    assert time.monotonic() - started < 5


def test_many_lines_take_linear_time() -> None:
    """10,000 lines of one header are handled in time linear in their number."""
    head = make_head("a.png", MODIFIED_NS, 100)
    started = time.monotonic()
    assert plan(head, 100, *[(b"range", b"bytes=0-0")] * 10_000).status == 200
    assert plan(head, 100, *[(b"if-none-match", b'"x"')] * 10_000).status == 200
    assert time.monotonic() - started < 5
