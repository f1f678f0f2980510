"""A body → ASGI messages: validators, plans, and what is sent when the client hangs up."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncGenerator, Iterator
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.open_file import PIECE as FILE_PIECE
from selfheal.http.sending import (
    SANDBOX,
    Head,
    Plan,
    Responder,
    can_pathsend,
    error_messages,
    make_head,
    never_stored,
    plan_of,
)
from tests.support.asgi import Answer, ask_and_leave, ask_scope, scope_of

MODIFIED_NS = 1_700_000_000_123_456_789
PIECE = 100_000


class Bytes:
    """A body in memory that notes how far it was read, and whether it was let go."""

    def __init__(self, data: bytes, modified_ns: int = MODIFIED_NS) -> None:
        self.data = data
        self.size = len(data)
        self.modified_ns = modified_ns
        self.read = 0
        self.was_asked = self.is_open = False

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        self.was_asked = self.is_open = True
        try:
            for at in range(start, stop, PIECE):
                self.read = min(stop, at + PIECE)
                yield self.data[at : self.read]
        finally:
            self.is_open = False


class Broken(Bytes):
    """A body whose bytes turn out to be damaged after the first piece."""

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        yield self.data[start : start + 10]
        raise RuntimeError("damaged")


def answering(body: Bytes, name: str = "a.png", cache_control: str | None = None) -> object:
    """An app that answers every request with a body."""
    responder = Responder(cache_control)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await responder.send_body(scope, receive, send, name, body)

    return app


def plan(head: Head, size: int, *lines: tuple[bytes, bytes], is_head: bool = False) -> Plan:
    """What is planned for these header lines."""
    return plan_of(lines, head, size, is_head=is_head)


# -- the head ---------------------------------------------------------------------------------------------------------


@given(modified_ns=st.integers(-(2**31) * 10**9, 2**33 * 10**9), size=st.integers(0, 2**50))
@settings(deadline=None, database=None)
def test_validators_are_those_of_starlette(modified_ns: int, size: int) -> None:
    """For every stat there can be, ETag and Last-Modified are those of Starlette's `FileResponse`."""
    seconds, nanoseconds = divmod(modified_ns, 10**9)
    mtime = seconds + 1e-9 * nanoseconds  # as os.stat has it
    stat = os.stat_result((0o100644, 0, 0, 0, 0, 0, size, 0, seconds, 0, 0.0, mtime, 0.0, 0, modified_ns, 0))
    assert stat.st_mtime == mtime
    like = FileResponse("a.png", stat_result=stat).headers
    head = make_head("a.png", modified_ns, size)
    assert (head.etag, head.last_modified) == (like["etag"], like["last-modified"])
    assert (b"content-length", like["content-length"].encode()) in head.whole.headers


@pytest.mark.parametrize("modified_ns", [10**30, -(10**30), 253_402_300_800 * 10**9, -62_135_596_801 * 10**9, 2**63])
def test_time_that_no_date_can_say(modified_ns: int) -> None:
    """A time before the year 1 or after 9999 becomes the nearest date there is, and it is 304 (CVE-2017-20005)."""
    head = make_head("a.png", modified_ns, 5)
    parsedate_to_datetime(head.last_modified)
    assert plan(head, 5, (b"if-modified-since", head.last_modified.encode())).status == 304
    assert plan(head, 5, (b"if-none-match", head.etag.encode())).status == 304
    assert plan(head, 5).status == 200


def test_etag_is_the_md5_of_time_and_size() -> None:
    """The ETag is written down here once, so that no release of Starlette changes it unseen."""
    assert make_head("a.png", 1_500_000_000, 7).etag == f'"{hashlib.md5(b"1.5-7").hexdigest()}"'
    assert make_head("a.png", 0, 0).etag == f'"{hashlib.md5(b"0.0-0").hexdigest()}"'


@pytest.mark.parametrize(
    "name", ["a.svg", "a.SVG", "x/a.html", "a.htm", "a.xhtml", "a.xht", "a.xml", "a.xsl", "a.jpg.svg", "a.hTmL"]
)
def test_documents_that_can_run_scripts_are_sandboxed(name: str) -> None:
    """SVG, HTML and XML say `sandbox` with a 200, a 206 and a 304 (CVE-2020-15275)."""
    head = make_head(name, MODIFIED_NS, 100)
    policy = (b"content-security-policy", b"sandbox; default-src 'none'; style-src 'unsafe-inline'")
    assert policy[1] == SANDBOX
    for lines, status in (
        ([], 200),
        ([(b"range", b"bytes=0-9")], 206),
        ([(b"if-none-match", b"*")], 304),
        ([(b"if-match", b'"x"')], 412),
        ([(b"range", b"bytes=100-")], 416),
    ):
        planned = plan(head, 100, *lines)
        assert planned.status == status
        assert policy in planned.headers
        assert (b"x-content-type-options", b"nosniff") in planned.headers


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.txt", "a.json", "a.css", "a", "svg", "a.svg.png"])
def test_other_files_are_not(name: str) -> None:
    """What runs no script has no policy; `nosniff` it has."""
    keys = [key for key, _ in make_head(name, MODIFIED_NS, 100).whole.headers]
    assert b"content-security-policy" not in keys
    assert b"x-content-type-options" in keys


@pytest.mark.parametrize("value", ["public, max-age=31536000, immutable", "no-cache", "private", ""])
def test_cache_control_of_ones_own(value: str) -> None:
    """The option is said with 200, 206 and 304, and with no other answer."""
    head = make_head("a.png", MODIFIED_NS, 100, value.encode())
    for lines, status in (([], 200), ([(b"range", b"bytes=0-9")], 206), ([(b"if-none-match", b"*")], 304)):
        planned = plan(head, 100, *lines)
        assert planned.status == status
        assert [said for key, said in planned.headers if key == b"cache-control"] == [value.encode()]
    for lines, status in (([(b"range", b"bytes=100-")], 416), ([(b"if-match", b'"x"')], 412)):
        planned = plan(head, 100, *lines)
        assert planned.status == status
        assert [said for key, said in planned.headers if key == b"cache-control"] == [b"no-store"]


async def test_cache_control_as_it_is_given() -> None:
    """The option reaches the client in every letter that a header can hold; without it there is no such header."""
    for value in ("no-cache", 'private="\xfc"', None):
        answer = await ask_scope(answering(Bytes(b"x"), cache_control=value), scope_of("/"))  # type: ignore[arg-type]
        assert answer.headers.get("cache-control") == value


# -- the plan ---------------------------------------------------------------------------------------------------------

KEYS = (b"range", b"if-range", b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since")
STATUSES = {200, 206, 304, 412, 416}


def test_headers_of_every_answer() -> None:
    """What is said with a 200, 206, 304, 412 and 416 is written down here once, header by header (RFC 9110)."""
    head = make_head("a.png", 1_500_000_000, 100)
    common = {
        b"last-modified": b"Thu, 01 Jan 1970 00:00:01 GMT",
        b"etag": b'"' + hashlib.md5(b"1.5-100").hexdigest().encode() + b'"',
        b"x-content-type-options": b"nosniff",
    }
    whole = {b"content-type": b"image/png", b"accept-ranges": b"bytes", b"content-length": b"100", **common}
    none = {**common, b"content-length": b"0", b"cache-control": b"no-store"}
    for lines, expected in (
        ([], (200, whole, 0, 100)),
        ([(b"range", b"bytes=10-19")],
            (206, {**whole, b"content-length": b"10", b"content-range": b"bytes 10-19/100"}, 10, 20)),
        ([(b"if-none-match", b"*")], (304, common, 0, 0)),
        ([(b"if-match", b'"x"')], (412, none, 0, 0)),
        ([(b"range", b"bytes=100-")], (416, {**none, b"content-range": b"bytes */100"}, 0, 0)),
    ):  # fmt: skip
        planned = plan(head, 100, *lines)
        assert (planned.status, dict(planned.headers), planned.start, planned.stop) == expected
        assert len(planned.headers) == len(dict(planned.headers))
    for lines in ([], [(b"if-none-match", b'"x"')]):
        assert plan(head, 100, *lines, is_head=True) == Plan(200, head.whole.headers)


@given(lines=st.lists(st.tuples(st.sampled_from(KEYS), st.binary(max_size=60)), max_size=6), is_head=st.booleans())
@settings(max_examples=500, deadline=None, database=None)
def test_any_bytes_in_any_header(lines: list[tuple[bytes, bytes]], is_head: bool) -> None:
    """No header can make an error of our own; and to HEAD there is neither 206 nor 416."""
    planned = plan(make_head("a.png", MODIFIED_NS, 100), 100, *lines, is_head=is_head)
    assert planned.status in (STATUSES - {206, 416} if is_head else STATUSES)
    assert 0 <= planned.start <= planned.stop <= 100


@given(
    day=st.text("0123456789²١ ", min_size=1, max_size=3),
    month=st.sampled_from(["Jan", "Feb", "Nov", "Foo", "11", ""]),
    year=st.text("0123456789²", min_size=1, max_size=5),
    clock=st.text("0123456789:²", max_size=9),
    zone=st.sampled_from([" GMT", "", " +0100", " PST", " -0000", " GMTX", ", GMT", " GMT GMT"]),
    pattern=st.sampled_from(["Tue, {0} {1} {2} {3}{4}", "Tuesday, {0}-{1}-{2} {3}{4}", "Tue {1} {0} {3} {2}{4}"]),
)
@settings(max_examples=500, deadline=None, database=None)
def test_what_looks_like_a_date(day: str, month: str, year: str, clock: str, zone: str, pattern: str) -> None:
    """Whatever looks like a date is one or is ignored; it is never an error of ours."""
    date = pattern.format(day, month, year, clock, zone).encode()
    head = make_head("a.png", MODIFIED_NS, 100)
    assert plan(head, 100, (b"if-modified-since", date)).status in (200, 304)
    assert plan(head, 100, (b"if-unmodified-since", date)).status in (200, 412)


@pytest.mark.parametrize(
    "date", ["Tue, 99 Nov 2023 22:13:20 GMT", "Tue, 14 Nov 2023 25:13:20 GMT", "Thu, 30 Feb 2023 22:13:20 GMT"]
)
def test_a_date_that_no_calendar_has_is_ignored(date: str) -> None:
    """What has the form of a date and is none decides nothing (RFC 9110, section 13.1.3)."""
    head = make_head("a.png", MODIFIED_NS, 100)
    assert plan(head, 100, (b"if-modified-since", date.encode())).status == 200
    assert plan(head, 100, (b"if-unmodified-since", date.encode())).status == 200


@given(seconds=st.integers(-(2**31), 2**33), shift=st.integers(-3, 3))
@settings(deadline=None, database=None)
def test_dates_are_compared_as_times(seconds: int, shift: int) -> None:
    """A file is unmodified since its own second and every later one, and modified since every earlier one."""
    head = make_head("a.png", seconds * 10**9, 100)
    date = formatdate(seconds + shift, usegmt=True).encode()
    assert plan(head, 100, (b"if-modified-since", date)).status == (304 if shift >= 0 else 200)
    assert plan(head, 100, (b"if-unmodified-since", date)).status == (200 if shift >= 0 else 412)
    assert plan(head, 100, (b"range", b"bytes=0-9"), (b"if-range", date)).status == (206 if shift == 0 else 200)


@pytest.mark.parametrize(
    ("said", "if_match", "if_none_match"),
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
    ],
)
def test_tags_are_compared_as_they_should_be(said: str, if_match: int, if_none_match: int) -> None:
    """If-Match compares strongly, If-None-Match weakly; lists may come in one line or several (RFC 9110, 8.8.3.2)."""
    head = make_head("a.png", MODIFIED_NS, 100)
    whole = said.format(head.etag)
    for lines in ([whole], whole.split(",")):
        said_lines = [line.encode() for line in lines]
        assert plan(head, 100, *((b"if-match", line) for line in said_lines)).status == if_match
        assert plan(head, 100, *((b"if-none-match", line) for line in said_lines)).status == if_none_match


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Tokyo"])
@pytest.mark.parametrize("pattern", ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"])
def test_dates_of_every_form_are_those_of_greenwich(monkeypatch: pytest.MonkeyPatch, zone: str, pattern: str) -> None:
    """All three forms of a date (RFC 9110, 5.6.7) are understood, to the second, wherever the server stands."""
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


@given(size=st.integers(0, 2**40), first=st.integers(0, 2**41), last=st.integers(0, 2**41))
@settings(max_examples=300, deadline=None, database=None)
def test_any_range(size: int, first: int, last: int) -> None:
    """`first-last`, `first-` and `-last` are those bytes, cut to the size; 416 past the end; ignored if reversed."""
    head = make_head("a.png", MODIFIED_NS, size)
    closed = plan(head, size, (b"range", f"bytes={first}-{last}".encode()))
    if last < first:
        assert (closed.status, closed.start, closed.stop) == (200, 0, size)
    elif first >= size:
        assert (closed.status, closed.start, closed.stop) == (416, 0, 0)
    else:
        assert (closed.status, closed.start, closed.stop) == (206, first, min(last + 1, size))
    opened = plan(head, size, (b"range", f"bytes={first}-".encode()))
    assert (opened.status, opened.start, opened.stop) == ((206, first, size) if first < size else (416, 0, 0))
    if size and last:
        suffix = plan(head, size, (b"range", f"bytes=-{last}".encode()))
        assert (suffix.status, suffix.start, suffix.stop) == (206, max(0, size - last), size)


@pytest.mark.parametrize(("first", "last", "status"), [(30, 20, 200), (20, 20, 416), (20, 30, 416)])
def test_numbers_beyond_every_file(first: int, last: int, status: int) -> None:
    """A range in numbers of many digits is reversed, and ignored, or past the end: as with small ones."""
    for size in (100, 2**50):
        head = make_head("a.png", MODIFIED_NS, size)
        assert plan(head, size, (b"range", f"bytes={10**first}-{10**last}".encode())).status == status


@pytest.mark.parametrize(
    ("said", "planned"),
    [
        ("bytes=-", (200, 0, 100)),
        ("bytes=", (200, 0, 100)),
        ("bytes", (200, 0, 100)),
        ("items=0-9", (200, 0, 100)),
        ("bytes 0-9", (200, 0, 100)),
        ("bytes=0-9,20-29", (200, 0, 100)),
        ("bytes=1_0-2_0", (200, 0, 100)),
        ("bytes=+1-3", (200, 0, 100)),
        ("bytes=\xb2-3", (200, 0, 100)),
        ("bytes=a-b", (200, 0, 100)),
        ("bytes=20-19", (200, 0, 100)),
        ("bytes=020-19", (200, 0, 100)),
        ("bytes=-0", (416, 0, 0)),
        ("bytes=-00", (416, 0, 0)),
        ("bytes=100-", (416, 0, 0)),
        ("bytes=0-0", (206, 0, 1)),
        ("bytes=00-009", (206, 0, 10)),
        ("BYTES= 10-19\t", (206, 10, 20)),
        ("bytes=99-1000", (206, 99, 100)),
        (f"bytes=10-{10**30}", (206, 10, 100)),
        (f"bytes=-{10**30}", (206, 0, 100)),
        ("bytes=-1", (206, 99, 100)),
    ],
)
def test_every_form_of_a_range(said: str, planned: tuple[int, int, int]) -> None:
    """One range of ASCII digits is answered; what is malformed, several or of another unit gets the whole file."""
    answer = plan(make_head("a.png", MODIFIED_NS, 100), 100, (b"range", said.encode("latin-1")))
    assert (answer.status, answer.start, answer.stop) == planned


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
def test_long_headers_take_no_time(key: bytes, value: bytes) -> None:
    """A megabyte of a header is judged in time that grows with its length alone (CVE-2025-62727, CVE-2011-3192)."""
    head = make_head("a.png", MODIFIED_NS, 100)
    started = time.monotonic()
    assert plan(head, 100, (key, value), (b"range", b"bytes=0-9")).status in STATUSES
    assert time.monotonic() - started < 5


def test_ten_thousand_lines_take_no_time() -> None:
    """Many lines of one header are joined in time that grows with their number alone."""
    head = make_head("a.png", MODIFIED_NS, 100)
    started = time.monotonic()
    assert plan(head, 100, *[(b"range", b"bytes=0-0")] * 10_000).status == 200
    assert plan(head, 100, *[(b"if-none-match", b'"x"')] * 10_000).status == 200
    assert time.monotonic() - started < 5


# -- sending ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 12 * PIECE])
async def test_body_comes_whole(size: int) -> None:
    """All pieces come, the last one says that it is the last, and the body is let go."""
    body = Bytes(os.urandom(size))
    answer = await ask_scope(answering(body), scope_of("/"))  # type: ignore[arg-type]
    assert (answer.status, answer.body) == (200, body.data)
    assert not body.is_open


async def test_part_reads_only_that_part() -> None:
    """A range reads its own bytes and no others."""
    body = Bytes(os.urandom(12 * PIECE))
    headers = [("Range", f"bytes={PIECE}-{2 * PIECE - 1}")]
    answer = await ask_scope(answering(body), scope_of("/", headers=headers))  # type: ignore[arg-type]
    assert (answer.status, answer.body) == (206, body.data[PIECE : 2 * PIECE])
    assert body.read == 2 * PIECE


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("HEAD", []),
        ("GET", [("If-None-Match", "*")]),
        ("GET", [("If-Match", '"x"')]),
        ("GET", [("Range", "bytes=9999999-")]),
    ],
)
async def test_answer_without_bytes_reads_none(method: str, headers: list[tuple[str, str]]) -> None:
    """HEAD, 304, 412 and 416 read nothing."""
    body = Bytes(os.urandom(12 * PIECE))
    answer = await ask_scope(answering(body), scope_of("/", method=method, headers=headers))  # type: ignore[arg-type]
    assert (answer.body, body.read, body.was_asked) == (b"", 0, False)


@pytest.mark.parametrize("spec_version", ["2.0", "2.1", "2.3", "2.4", "2.5", "3.0", None])
@pytest.mark.parametrize("size", [5 * PIECE, 100 * PIECE])
async def test_every_version_of_asgi(spec_version: str | None, size: int) -> None:
    """Whatever version of ASGI the server speaks, and if it says none, the body comes whole."""
    body, tasks = Bytes(os.urandom(size)), asyncio.all_tasks()
    scope = scope_of("/")
    scope["asgi"] = {"version": "3.0"} if spec_version is None else {"version": "3.0", "spec_version": spec_version}
    answer = await ask_scope(answering(body), scope)  # type: ignore[arg-type]
    assert answer.body == body.data
    assert asyncio.all_tasks() == tasks


async def test_client_that_hangs_up_in_silence() -> None:
    """Where `send` never fails (ASGI 2.3) reading stops soon after the client has gone (CVE-2026-54280)."""
    body, tasks = Bytes(os.urandom(200 * PIECE)), asyncio.all_tasks()
    answer = await ask_and_leave(answering(body), scope_of("/"), after=3 * PIECE)  # type: ignore[arg-type]
    assert 3 * PIECE <= len(answer.body) <= 100 * PIECE
    assert body.read <= 100 * PIECE
    assert not body.is_open
    assert asyncio.all_tasks() == tasks


async def test_client_that_hangs_up_with_an_error() -> None:
    """Where `send` raises (ASGI 2.4) the body is let go at once."""
    body, tasks = Bytes(os.urandom(200 * PIECE)), asyncio.all_tasks()
    scope = scope_of("/")
    scope["asgi"]["spec_version"] = "2.4"
    with pytest.raises(OSError, match="gone"):
        await ask_and_leave(answering(body), scope, after=3 * PIECE, fails=True)  # type: ignore[arg-type]
    assert body.read <= 5 * PIECE
    assert not body.is_open
    assert asyncio.all_tasks() == tasks


async def test_cancelled_while_it_sends() -> None:
    """A server that cancels the request (a time limit) gets everything back."""
    body, tasks, waiting = Bytes(os.urandom(200 * PIECE)), asyncio.all_tasks(), asyncio.Event()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            waiting.set()
            await asyncio.Event().wait()

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    task = asyncio.create_task(answering(body)(scope_of("/"), receive, send))  # type: ignore[operator]
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not body.is_open
    assert asyncio.all_tasks() == tasks


async def test_damaged_body_is_never_finished() -> None:
    """Bytes that turn out to be damaged end the answer with an error, short of its length; no last message is sent."""
    answer = Answer()

    async def send(message: Message) -> None:
        answer.take(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = scope_of("/")
    scope["asgi"]["spec_version"] = "2.4"
    with pytest.raises(RuntimeError, match="damaged"):
        await answering(Broken(b"x" * 100))(scope, receive, send)  # type: ignore[operator]
    assert answer.body == b"x" * 10
    assert not answer.is_over


OFFERED = {"extensions": {"http.response.pathsend": {}}}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[UploadsDirectory]:
    """A directory of files, each of as many bytes as its name says."""
    disk = UploadsDirectory(tmp_path)
    for size in (0, 100, FILE_PIECE, FILE_PIECE + 1, 3 * FILE_PIECE):
        (tmp_path / f"{size}.png").write_bytes(os.urandom(size))
    yield disk
    disk.close()


@pytest.mark.parametrize("more", [{}, OFFERED], ids=["bytes", "path"])
@pytest.mark.parametrize(
    ("size", "headers", "start", "stop"),
    [
        (0, [], 0, 0),
        (100, [], 0, 100),
        (100, [("Range", "bytes=10-89")], 10, 90),
        (FILE_PIECE, [], 0, FILE_PIECE),
        (FILE_PIECE + 1, [], 0, FILE_PIECE + 1),
        (3 * FILE_PIECE, [("Range", "bytes=7-")], 7, 3 * FILE_PIECE),
        (3 * FILE_PIECE, [("Range", f"bytes={FILE_PIECE}-{2 * FILE_PIECE}")], FILE_PIECE, 2 * FILE_PIECE + 1),
    ],
)
async def test_an_open_file_is_sent(
    disk: UploadsDirectory, more: dict[str, Any], size: int, headers: list[tuple[str, str]], start: int, stop: int
) -> None:
    """Its first piece is read before the answer begins, unless the server sends it by its path: large and whole."""
    by_path = bool(more) and start == 0 and stop == size > FILE_PIECE
    data = disk.path_of(f"{size}.png").read_bytes()
    firsts: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        responder, file = Responder(), disk.open(f"{size}.png")
        assert file is not None
        with file:
            planned, first = await responder.read_first(scope, responder.head_of("a.png", file), file)
            firsts.append(first)
            await responder.send_file(scope, receive, send, file, planned, first)

    for method in ("GET", "HEAD"):
        answer = await ask_scope(app, scope_of("/", method=method, headers=headers, **more))
        is_path, is_sent = by_path and method == "GET", method == "GET" and not by_path
        assert firsts.pop() == (data[start:stop][:FILE_PIECE] if is_sent else b"")
        assert answer.body == (data[start:stop] if is_sent else b"")
        assert [said["path"] for said in answer.messages if "path" in said] == [f"{disk.path}/{size}.png"] * is_path
        assert answer.status == (206 if headers and method == "GET" else 200)
        assert "cache-control" not in answer.headers
        assert answer.headers["etag"] == make_head("", disk.path_of(f"{size}.png").stat().st_mtime_ns, size).etag


@pytest.mark.parametrize("headers", [[], [("Range", "bytes=10-89")], [("If-None-Match", "*")]])
async def test_headers_that_are_added_stay_with_their_answer(
    disk: UploadsDirectory, headers: list[tuple[str, str]]
) -> None:
    """A middleware around us may add to the list of an answer's headers; the next answer knows nothing of it."""
    responder, head = Responder(), make_head("a.png", MODIFIED_NS, 100)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def adding(message: Message) -> None:
            if "headers" in message:
                message["headers"].append((b"x-added", b"1"))
            await send(message)

        file = disk.open("100.png")
        assert file is not None
        with file:
            planned, first = await responder.read_first(scope, head, file)
            await responder.send_file(scope, receive, adding, file, planned, first)

    for _ in range(2):
        answer = await ask_scope(app, scope_of("/", headers=headers))
        start = next(said for said in answer.messages if "headers" in said)
        assert [key for key, _ in start["headers"]].count(b"x-added") == 1


@pytest.mark.parametrize("size", [100, FILE_PIECE])
async def test_a_file_of_which_a_part_is_in_memory(
    disk: UploadsDirectory, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """What is there at once is sent first, the rest after it, and nothing twice."""
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, _: real(fd, [buffers[0][:60]], offset))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        responder, file = Responder(), disk.open(f"{size}.png")
        assert file is not None
        with file:
            planned, first = await responder.read_first(scope, responder.head_of("a.png", file), file)
            assert len(first) == 60
            await responder.send_file(scope, receive, send, file, planned, first)

    answer = await ask_scope(app, scope_of("/"))
    assert answer.body == disk.path_of(f"{size}.png").read_bytes()
    assert answer.headers["content-length"] == str(size)


async def test_client_of_an_open_file_that_hangs_up_in_silence(disk: UploadsDirectory) -> None:
    """The reading of a file stops, too, soon after the client has gone."""
    sent = 0
    with disk.path_of("long.png").open("wb") as long:
        long.truncate(200 * FILE_PIECE)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            nonlocal sent
            sent += len(message.get("body", b""))
            await send(message)

        responder, file = Responder(), disk.open("long.png")
        assert file is not None
        with file:
            planned, first = await responder.read_first(scope, responder.head_of("long.png", file), file)
            await responder.send_file(scope, receive, counting, file, planned, first)

    await ask_and_leave(app, scope_of("/"), after=3 * FILE_PIECE)
    assert 3 * FILE_PIECE <= sent <= 100 * FILE_PIECE


@pytest.mark.parametrize("extensions", [None, {}, {"http.response.pathsend": {}}])
@pytest.mark.parametrize("whole", [True, False])
def test_path_is_sent_where_that_is_offered(extensions: dict[str, object] | None, whole: bool) -> None:
    """Only a whole file, and only where the server offers it (ASGI's path send extension)."""
    scope = {**scope_of("/"), "extensions": extensions}
    for planned in [Plan(200, [], 0, 100)] if whole else [Plan(206, [], 10, 100), Plan(206, [], 10, 90)]:
        assert can_pathsend(scope, planned, 100) == (bool(extensions) and whole)


def test_scope_without_extensions() -> None:
    """A server that knows of no extensions leaves the key away."""
    assert not can_pathsend(scope_of("/"), Plan(200, [], 0, 100), 100)


# -- other answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [404, 500, 503])
@pytest.mark.parametrize("is_head", [True, False])
def test_answer_without_a_file(status: int, is_head: bool) -> None:
    """It says its length, is never stored and never sniffed; to HEAD it has the same headers and no body."""
    start, body = error_messages(status, is_head=is_head, more=[(b"retry-after", b"2")])
    headers = dict(start["headers"])
    text = {404: b"Not Found\n", 500: b"Internal Server Error\n", 503: b"Service Unavailable\n"}[status]
    assert (start["type"], start["status"]) == ("http.response.start", status)
    assert body == {"type": "http.response.body", "body": b"" if is_head else text}
    assert headers[b"content-type"] == b"text/plain; charset=utf-8"
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"retry-after"] == b"2"
    assert (body["body"] == b"") == is_head
    assert error_messages(status, is_head=False, more=[(b"retry-after", b"2")])[0] == start
    assert int(headers[b"content-length"]) == len(error_messages(status, is_head=False)[1]["body"])


@pytest.mark.parametrize("status", [201, 204, 301, 302, 307, 400, 401, 403, 404, 405, 410, 412, 416, 418, 500, 503])
@pytest.mark.parametrize(
    "said", [[], [(b"cache-control", b"public, max-age=9")], [(b"Cache-Control", b"a"), (b"cache-control", b"b")]]
)
async def test_never_stored(status: int, said: list[tuple[bytes, bytes]]) -> None:
    """Whatever the wrapped app says of caching, an answer that is not 200, 206 or 304 says `no-store`, once."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    start = {"type": "http.response.start", "status": status, "headers": [(b"x-own", b"1"), *said]}
    body = {"type": "http.response.body", "body": b"x"}
    for message in (start, body):
        await never_stored(send)(message)
    assert sent == [{**start, "headers": [(b"x-own", b"1"), (b"cache-control", b"no-store")]}, body]
    assert start["headers"] == [(b"x-own", b"1"), *said]


@pytest.mark.parametrize("status", [200, 206, 304])
async def test_what_may_be_stored_is_left_alone(status: int) -> None:
    """200, 206 and 304 of the wrapped app pass as they are; so does a start without headers."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    start = {"type": "http.response.start", "status": status, "headers": [(b"cache-control", b"public")]}
    await never_stored(send)(start)
    await never_stored(send)({"type": "http.response.start", "status": 404})
    assert sent[0] == start
    assert sent[1]["headers"] == [(b"cache-control", b"no-store")]
