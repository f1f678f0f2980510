"""Headers: validators, content policy, caching, and answers without a file."""

from __future__ import annotations

import hashlib
import os
from email.utils import parsedate_to_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import FileResponse
from starlette.types import Message

from selfheal.http.headers import SANDBOX, Plan, error_messages, make_head, never_stored
from tests.support.plans import MODIFIED_NS, plan

# -- validators -------------------------------------------------------------------------------------------------------


@given(modified_ns=st.integers(-(2**31) * 10**9, 2**33 * 10**9), size=st.integers(0, 2**50))
def test_validators_are_those_of_starlette(modified_ns: int, size: int) -> None:
    """For any size and mtime, ETag and Last-Modified are those of Starlette's `FileResponse`."""
    seconds, nanoseconds = divmod(modified_ns, 10**9)
    mtime = seconds + 1e-9 * nanoseconds  # as os.stat has it
    stat = os.stat_result((0o100644, 0, 0, 0, 0, 0, size, 0, seconds, 0, 0.0, mtime, 0.0, 0, modified_ns, 0))
    assert stat.st_mtime == mtime
    like = FileResponse("a.png", stat_result=stat).headers
    head = make_head("a.png", modified_ns, size)
    assert (head.etag, head.last_modified) == (like["etag"], like["last-modified"])
    assert (b"content-length", like["content-length"].encode()) in head.whole.headers


@pytest.mark.parametrize("modified_ns", [10**30, -(10**30), 253_402_300_800 * 10**9, -62_135_596_801 * 10**9, 2**63])
def test_times_that_no_date_can_express(modified_ns: int) -> None:
    """A time before year 1 or after 9999 becomes the nearest date, and that date gets a 304 (CVE-2017-20005)."""
    head = make_head("a.png", modified_ns, 5)
    parsedate_to_datetime(head.last_modified)
    assert plan(head, 5, (b"if-modified-since", head.last_modified.encode())).status == 304
    assert plan(head, 5, (b"if-none-match", head.etag.encode())).status == 304
    assert plan(head, 5).status == 200


def test_etag_is_the_md5_of_time_and_size() -> None:
    """The ETag is fixed here, so that a release of Starlette cannot change it unnoticed."""
    assert make_head("a.png", 1_500_000_000, 7).etag == f'"{hashlib.md5(b"1.5-7").hexdigest()}"'
    assert make_head("a.png", 0, 0).etag == f'"{hashlib.md5(b"0.0-0").hexdigest()}"'


# -- headers of files -------------------------------------------------------------------------------------------------


def test_headers_of_every_answer() -> None:
    """The headers of a 200, 206, 304, 412 and 416 are exactly these (RFC 9110)."""
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


@pytest.mark.parametrize(
    "name", ["a.svg", "a.SVG", "x/a.html", "a.htm", "a.xhtml", "a.xht", "a.xml", "a.xsl", "a.jpg.svg", "a.hTmL"]
)
def test_documents_that_can_run_scripts_are_sandboxed(name: str) -> None:
    """SVG, HTML and XML have `sandbox` with every status (CVE-2020-15275)."""
    head = make_head(name, MODIFIED_NS, 100)
    allowed = b"style-src 'unsafe-inline'; img-src data:; font-src data:"
    policy = (b"content-security-policy", b"sandbox; default-src 'none'; " + allowed)
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
def test_other_files_are_not_sandboxed(name: str) -> None:
    """Files that run no script have no policy, but `nosniff`."""
    keys = [key for key, _ in make_head(name, MODIFIED_NS, 100).whole.headers]
    assert b"content-security-policy" not in keys
    assert b"x-content-type-options" in keys


@pytest.mark.parametrize("value", ["public, max-age=31536000, immutable", "no-cache", "private", ""])
def test_cache_control_by_status(value: str) -> None:
    """The option is sent with 200, 206 and 304; a 412 or 416 has `no-store` instead."""
    head = make_head("a.png", MODIFIED_NS, 100, value.encode())
    for lines, status in (([], 200), ([(b"range", b"bytes=0-9")], 206), ([(b"if-none-match", b"*")], 304)):
        planned = plan(head, 100, *lines)
        assert planned.status == status
        assert [sent for key, sent in planned.headers if key == b"cache-control"] == [value.encode()]
    for lines, status in (([(b"range", b"bytes=100-")], 416), ([(b"if-match", b'"x"')], 412)):
        planned = plan(head, 100, *lines)
        assert planned.status == status
        assert [sent for key, sent in planned.headers if key == b"cache-control"] == [b"no-store"]


# -- recorded types ---------------------------------------------------------------------------------------------------

SAFE = (
    "image/png", "image/jpeg", "image/vnd.microsoft.icon", "image/svg+xml", "audio/mpeg", "video/mp4",
    "video/x-msvideo", "font/woff2", "application/pdf", "text/plain", "text/plain; charset=utf-8",
)  # fmt: skip
UNSAFE = (
    "text/html", "text/html; charset=utf-8", "application/xhtml+xml", "text/xml", "application/xml", "text/javascript",
    "application/javascript", "text/css", "application/wasm", "text/plain; charset=utf-8; x=1", "multipart/mixed", "",
    "image/", "/png", "image", "image/png\r\nset-cookie: a=1", "image/png\n", " image/png", "image/png, text/html",
    "image/p\u00e4ng", "IMAGE/PNG", "application/octet-stream", "text/plainer", "application/pdfx",
)  # fmt: skip


@pytest.mark.parametrize("name", ["a", "folder.d/a", "a.unknown"])
@pytest.mark.parametrize("recorded", [*SAFE, *UNSAFE])
def test_a_recorded_type(name: str, recorded: str) -> None:
    """A name whose extension says nothing has the recorded type, if no script can run in it."""
    headers = dict(make_head(name, MODIFIED_NS, 100, None, recorded).whole.headers)
    expected = recorded if recorded in SAFE else "application/octet-stream"
    assert headers[b"content-type"] == expected.encode()
    assert (b"content-security-policy" in headers) == (recorded == "image/svg+xml")
    assert headers[b"x-content-type-options"] == b"nosniff"


def test_an_extension_wins_over_the_recorded_type() -> None:
    """A name with a known extension has the type of the table, the same on every node, whatever is recorded."""
    headers = dict(make_head("a.svg", MODIFIED_NS, 100, None, "image/png").whole.headers)
    assert headers[b"content-type"] == b"image/svg+xml"


# -- answers without a file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [404, 500, 503])
@pytest.mark.parametrize("is_head", [True, False])
def test_answers_without_a_file(status: int, is_head: bool) -> None:
    """The answer has a length, `no-store` and `nosniff`; a 503 says when to ask again; HEAD gets the same headers."""
    start, body = error_messages(status, is_head=is_head)
    headers = dict(start["headers"])
    text = {404: b"Not Found\n", 500: b"Internal Server Error\n", 503: b"Service Unavailable\n"}[status]
    assert (start["type"], start["status"]) == ("http.response.start", status)
    assert body == {"type": "http.response.body", "body": b"" if is_head else text}
    assert headers[b"content-type"] == b"text/plain; charset=utf-8"
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert headers.get(b"retry-after") == (b"2" if status == 503 else None)
    assert (body["body"] == b"") == is_head
    assert error_messages(status, is_head=False)[0] == start
    assert int(headers[b"content-length"]) == len(error_messages(status, is_head=False)[1]["body"])


@pytest.mark.parametrize("status", [201, 204, 301, 302, 307, 400, 401, 403, 404, 405, 410, 412, 416, 418, 500, 503])
@pytest.mark.parametrize(
    "caching", [[], [(b"cache-control", b"public, max-age=9")], [(b"Cache-Control", b"a"), (b"cache-control", b"b")]]
)
async def test_never_stored(status: int, caching: list[tuple[bytes, bytes]]) -> None:
    """An answer of the wrapped app that is not 200, 206 or 304 has `no-store` once, whatever the app has set."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    start = {"type": "http.response.start", "status": status, "headers": [(b"x-own", b"1"), *caching]}
    body = {"type": "http.response.body", "body": b"x"}
    for message in (start, body):
        await never_stored(send)(message)
    assert sent == [{**start, "headers": [(b"x-own", b"1"), (b"cache-control", b"no-store")]}, body]
    assert start["headers"] == [(b"x-own", b"1"), *caching]


@pytest.mark.parametrize("status", [200, 206, 304])
async def test_answers_that_may_be_stored(status: int) -> None:
    """A 200, 206 or 304 of the wrapped app is not changed; an answer without headers gets `no-store`."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    start = {"type": "http.response.start", "status": status, "headers": [(b"cache-control", b"public")]}
    await never_stored(send)(start)
    await never_stored(send)({"type": "http.response.start", "status": 404})
    assert sent[0] == start
    assert sent[1]["headers"] == [(b"cache-control", b"no-store")]
