"""One conformance suite (RFC 9110, sections 8, 13 and 14) over every place a file can be in.

The same request gets the same answer from the disk, out of the database (the disk copy is removed before every single
request) and past a disk that takes no file. With `serve=False` the answers are those of Starlette's `StaticFiles`.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import FileResponse
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from selfheal import SelfHealMiddleware, UploadStore
from tests.support.asgi import Answer, Wrapped, ask, ask_scope, scope_of

PREFIX = "/static/uploads"
ON_DISK, IN_DATABASE, WITHOUT_DISK = "on disk", "only in the database", "past a disk that takes no file"
PLACES = (ON_DISK, IN_DATABASE, WITHOUT_DISK)
KIB, MB = 1024, 1000 * 1000
SIZES = (0, 1, 4096, 256 * KIB, 256 * KIB + 1, 3 * MB, 20 * MB)
SIZE = 4096
SECONDS = 1_700_000_000
MODIFIED_NS = SECONDS * 10**9 + 123_456_789
HUGE = "9" * 20
DATES = {
    "modified": formatdate(SECONDS, usegmt=True),
    "before": formatdate(SECONDS - 1, usegmt=True),
    "after": formatdate(SECONDS + 1, usegmt=True),
    "future": "Sun, 06 Nov 2099 08:49:37 GMT",
}


@lru_cache
def content(size: int) -> bytes:
    """Bytes in which no two places look alike."""
    return random.Random(size).randbytes(size)


def name_of(size: int) -> str:
    """The name under which a file of this size is kept."""
    return f"sizes/{size}.png"


@dataclass(frozen=True)
class Case:
    """A request's header lines and the answer to a GET with them: its status, and the bytes of a 206."""

    what: str
    lines: tuple[str, ...]
    status: int
    part: tuple[int, int] = (0, SIZE)

    def headers(self, etag: str) -> list[tuple[str, str]]:
        """The header lines, about a file with this ETag."""
        known = {**DATES, "etag": etag, "opaque": etag.strip('"')}
        return [
            (key, value.strip(" ").format(**known)) for key, _, value in (line.partition(":") for line in self.lines)
        ]


def _ranges(status: int, *values: str) -> list[Case]:
    return [Case(f"bytes={value}"[:60], (f"Range: bytes={value}",), status) for value in values]


def _part(value: str, start: int, stop: int) -> Case:
    return Case(f"bytes={value}"[:60], (f"Range: bytes={value}",), 206, (start, stop))


def _case(status: int, *lines: str, part: tuple[int, int] = (0, SIZE)) -> Case:
    return Case(" & ".join(lines)[:120], lines, status, part)


RANGES = [
    _part("0-0", 0, 1),
    _part("0-99", 0, 100),
    _part("100-199", 100, 200),
    _part("00100-00199", 100, 200),
    _part("0-", 0, SIZE),
    _part("1-", 1, SIZE),
    _part("4000-", 4000, SIZE),
    _part("4095-", 4095, SIZE),
    _part("4095-4095", 4095, SIZE),
    _part("0-4095", 0, SIZE),
    _part("0-4096", 0, SIZE),
    _part("4000-999999", 4000, SIZE),
    _part("-1", 4095, SIZE),
    _part("-100", 3996, SIZE),
    _part("-4096", 0, SIZE),
    _part("-4097", 0, SIZE),
    _part("-999999", 0, SIZE),
    # last positions and suffixes past the end are cut to it, however many digits they have (CVE-2017-7529)
    _part("0-9223372036854775807", 0, SIZE),
    _part(f"0-{HUGE}", 0, SIZE),
    _part(f"-{HUGE}", 0, SIZE),
    _part("0-" + "9" * 5000, 0, SIZE),
    *_ranges(416, "4096-", "4096-4096", "4096-9999", "5000-", "999999-", "-0", "-00", "9223372036854775807-"),
    *_ranges(416, "18446744073709551615-", "18446744073709551616-18446744073709551617", f"{HUGE}-", "9" * 5000 + "-"),
    # malformed, or not a range at all: ignored
    *_ranges(200, "", "-", "--", "a-b", "0", "0-a", "a-0", "5-2", "1-0", "0-1-2", "--1", "-1-2", "0--1", "-+1"),
    *_ranges(200, "0x0-0x9", "1_0-2_0", "+1-3", "1-+3", "1.0-2.0", "1e0-2e0", "0 -1", "0- 1", "0-1;", '"0-1"', "*"),
    *_ranges(200, "٠-٩", "²-³", "０-９", "0-９", "0-1\x0b", "0–9", "\u00a00-1", "NaN-", "inf-"),  # CVE-2025-69225
    # several: the whole file (CVE-2011-3192, CVE-2025-62727)
    *_ranges(200, "0-1,3-4", "0-1, 3-4", "0-0,-1", "0-,0-,0-", "5000-,0-1", "0-1,5-2", ",".join(["0-"] * 100)),
    *_ranges(200, ",".join(["5-0"] + [f"5-{end}" for end in range(1300)]), ",".join(f"{at}-" for at in range(5000))),
    *_ranges(200, "-9223372036854775608,-9223372036854771713", "," * 60_000, "0-1" + "," * 60_000 + "2-3"),
    _case(206, "Range: BYTES=0-9", part=(0, 10)),
    _case(206, "Range: Bytes=-10", part=(SIZE - 10, SIZE)),
    *(_case(200, f"Range: {value}") for value in ("", "bytes", "=0-9", "0-9", "bytes 0-9", "bytes:0-9", "b=0-9")),
    *(_case(200, f"Range: {unit}=0-9") for unit in ("items", "seconds", "bytess", "byte", "none", "octets", "x-bytes")),
    _case(200, "Range: bytes=0-1", "Range: bytes=3-4"),
    _case(200, "Range: bytes=0-1", "Range: bytes=0-1"),
]  # fmt: skip

MALFORMED_DATES = (
    "", "garbage", "0", "-1", "1700000000", "Tue", "GMT", "2099-11-14T22:13:20Z", "2099-11-14", "14/11/2099",
    "Tue, 14 Nov 2099", "Tue, 14 Nov 2099 22:13:20", "Tue, 14 Nov 2099 22:13:20 +0100", "Tue, 14 Nov 2099 22:13:20 PST",
    "Tue, 14 Foo 2099 22:13:20 GMT", "Tue, 14 Nov 99999 22:13:20 GMT", "Tue, ²4 Nov 2099 22:13:20 GMT",
    "Tue, 32 Nov 2099 22:13:20 GMT", "Tue, 31 Feb 2099 22:13:20 GMT", "Tue, 14 Nov 2099 25:61:61 GMT",
    "Tue, ١٤ Nov 2099 22:13:20 GMT", "Tue, 14 Nov 2099 22:13:20 GMT, Tue, 14 Nov 2099 22:13:20 GMT", '"{opaque}"',
)  # fmt: skip
"""No HTTP dates. Those in 2099 would be later than the file if somebody read a date out of them."""

CONDITIONS = [
    _case(200, "Accept: image/*", "Accept-Encoding: gzip, br", "X-Unknown: 1"),
    # If-None-Match: weak comparison
    _case(304, "If-None-Match: {etag}"),
    _case(304, "If-None-Match: W/{etag}"),
    _case(304, "If-None-Match: *"),
    _case(304, 'If-None-Match: "a", {etag}'),
    _case(304, 'If-None-Match: "a",{etag},"b"'),
    _case(304, 'If-None-Match: W/"a" , W/{etag}'),
    _case(304, 'If-None-Match: "a, b", {etag}'),
    _case(304, 'If-None-Match: "", {etag}'),
    _case(304, "If-None-Match: " + '"x", ' * 2000 + "{etag}"),
    _case(304, 'If-None-Match: "a"', "If-None-Match: {etag}"),
    _case(200, 'If-None-Match: "a"'),
    _case(200, 'If-None-Match: "a", W/"b"'),
    _case(200, "If-None-Match:"),
    _case(200, 'If-None-Match: ""'),
    _case(200, "If-None-Match: {opaque}"),
    _case(200, 'If-None-Match: "{opaque}-gzip"'),
    _case(200, 'If-None-Match: "x{opaque}"'),
    _case(200, 'If-None-Match: "a,{opaque}"'),
    _case(200, 'If-None-Match: "a"', 'If-None-Match: "b"'),
    # If-Modified-Since, in the three formats of a date
    _case(304, "If-Modified-Since: {modified}"),
    _case(304, "If-Modified-Since: {after}"),
    _case(304, "If-Modified-Since: {future}"),
    _case(304, "If-Modified-Since: Tuesday, 14-Nov-23 22:13:20 GMT"),
    _case(304, "If-Modified-Since: Tue Nov 14 22:13:20 2023"),
    _case(304, "If-Modified-Since: Sat Dec  2 08:49:37 2023"),
    _case(200, "If-Modified-Since: {before}"),
    _case(200, "If-Modified-Since: Tuesday, 14-Nov-23 22:13:19 GMT"),
    _case(200, "If-Modified-Since: Tue Nov 14 22:13:19 2023"),
    _case(200, "If-Modified-Since: Sun Nov  6 08:49:37 1994"),
    _case(200, "If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT"),
    _case(200, "If-Modified-Since: {future}", "If-Modified-Since: {future}"),
    *(_case(200, f"If-Modified-Since: {date}") for date in MALFORMED_DATES),
    # If-None-Match goes before If-Modified-Since
    _case(200, 'If-None-Match: "a"', "If-Modified-Since: {modified}"),
    _case(304, "If-None-Match: {etag}", "If-Modified-Since: {before}"),
    # If-Match: strong comparison
    _case(200, "If-Match: {etag}"),
    _case(200, "If-Match: *"),
    _case(200, 'If-Match: "a", {etag}'),
    _case(200, 'If-Match: "a"', "If-Match: {etag}"),
    _case(412, 'If-Match: "a"'),
    _case(412, 'If-Match: "a", "b"'),
    _case(412, "If-Match: W/{etag}"),
    _case(412, 'If-Match: "a", W/{etag}'),
    _case(412, 'If-Match: "a,{opaque}"'),
    # If-Unmodified-Since
    _case(200, "If-Unmodified-Since: {modified}"),
    _case(200, "If-Unmodified-Since: {after}"),
    _case(200, "If-Unmodified-Since: Tuesday, 14-Nov-23 22:13:20 GMT"),
    _case(200, "If-Unmodified-Since: Tue Nov 14 22:13:20 2023"),
    _case(412, "If-Unmodified-Since: {before}"),
    _case(412, "If-Unmodified-Since: Tuesday, 14-Nov-23 22:13:19 GMT"),
    _case(412, "If-Unmodified-Since: Sun Nov  6 08:49:37 1994"),
    *(_case(200, f"If-Unmodified-Since: {date.replace('2099', '1999')}") for date in MALFORMED_DATES),
    # the order of section 13.2.2
    _case(200, "If-Match: {etag}", "If-Unmodified-Since: {before}"),
    _case(412, 'If-Match: "a"', "If-Unmodified-Since: {after}"),
    _case(412, 'If-Match: "a"', "If-None-Match: {etag}"),
    _case(412, "If-Unmodified-Since: {before}", "If-None-Match: {etag}"),
    _case(304, "If-Match: {etag}", "If-None-Match: {etag}"),
    _case(304, "If-Unmodified-Since: {after}", "If-Modified-Since: {after}"),
    # conditions with ranges
    _case(304, "If-None-Match: {etag}", "Range: bytes=0-9"),
    _case(304, "If-None-Match: {etag}", "Range: bytes=9999-"),
    _case(304, "If-Modified-Since: {modified}", "Range: bytes=0-9"),
    _case(412, 'If-Match: "a"', "Range: bytes=0-9"),
    _case(412, 'If-Match: "a"', "Range: bytes=9999-"),
    _case(412, "If-Unmodified-Since: {before}", "Range: bytes=0-9"),
    _case(206, 'If-None-Match: "a"', "Range: bytes=0-9", part=(0, 10)),
    _case(206, "If-Modified-Since: {before}", "Range: bytes=0-9", part=(0, 10)),
    _case(206, "If-Match: {etag}", "Range: bytes=0-9", part=(0, 10)),
    _case(206, "If-Unmodified-Since: {modified}", "Range: bytes=-9", part=(SIZE - 9, SIZE)),
    # If-Range: strong, and exact
    _case(206, "If-Range: {etag}", "Range: bytes=0-9", part=(0, 10)),
    _case(206, "If-Range: {modified}", "Range: bytes=0-9", part=(0, 10)),
    _case(206, "Range: bytes=0-9", "If-Range: {etag}", part=(0, 10)),
    _case(416, "If-Range: {etag}", "Range: bytes=9999-"),
    _case(200, 'If-Range: "a"', "Range: bytes=0-9"),
    _case(200, 'If-Range: "a"', "Range: bytes=9999-"),
    _case(200, "If-Range: W/{etag}", "Range: bytes=0-9"),
    _case(200, "If-Range: {opaque}", "Range: bytes=0-9"),
    _case(200, 'If-Range: "a", {etag}', "Range: bytes=0-9"),
    _case(200, "If-Range: *", "Range: bytes=0-9"),
    _case(200, "If-Range:", "Range: bytes=0-9"),
    _case(200, "If-Range: {before}", "Range: bytes=0-9"),
    _case(200, "If-Range: {after}", "Range: bytes=0-9"),
    _case(200, "If-Range: {future}", "Range: bytes=0-9"),
    _case(200, "If-Range: garbage", "Range: bytes=0-9"),
    _case(200, "If-Range: {etag}"),
    _case(200, 'If-Range: "a"'),
    _case(200, "If-Range: {etag}", "Range: bytes=0-1,3-4"),
    _case(304, "If-Range: {etag}", "Range: bytes=0-9", "If-None-Match: {etag}"),
    _case(412, "If-Range: {etag}", "Range: bytes=0-9", 'If-Match: "a"'),
]
CASES = [*RANGES, *CONDITIONS]

WITH_STATIC_FILES = [
    _case(200),
    _case(304, "If-None-Match: {etag}"),
    _case(304, "If-None-Match: W/{etag}"),
    _case(304, 'If-None-Match: "a", {etag}'),
    _case(200, 'If-None-Match: "a"'),
    _case(304, "If-Modified-Since: {modified}"),
    _case(304, "If-Modified-Since: {after}"),
    _case(200, "If-Modified-Since: {before}"),
    _part("0-99", 0, 100),
    _part("4000-", 4000, SIZE),
    _part("-100", 3996, SIZE),
    _part("0-999999", 0, SIZE),
    *_ranges(416, "4096-", "5000-5001"),
    _case(206, "If-Range: {etag}", "Range: bytes=0-9", part=(0, 10)),
    _case(200, 'If-Range: "a"', "Range: bytes=0-9"),
]
"""What Starlette's `StaticFiles` answers as we do."""


class Shelf:
    """The same files in every place, and the ETag and Last-Modified that Starlette gives them."""

    def __init__(self, store: UploadStore, without_disk: UploadStore) -> None:
        self.root = store.disk.path
        self.no_root = without_disk.disk.path
        served = SelfHealMiddleware(Wrapped(), store)
        self.apps: dict[str, ASGIApp] = {
            ON_DISK: served,
            IN_DATABASE: served,
            WITHOUT_DISK: SelfHealMiddleware(Wrapped(), without_disk),
        }
        self.root.mkdir(parents=True, exist_ok=True)
        static = Starlette(routes=[Mount(PREFIX, StaticFiles(directory=self.root))])
        self.handed_on = SelfHealMiddleware(static, store, serve=False)
        self.store = store

    async def put(self, name: str, data: bytes, modified_ns: int = MODIFIED_NS) -> dict[str, str]:
        """Keep a file in the database and on disk; returns Starlette's headers for it."""
        await self.store.database.store_image(name, data, modified_ns=modified_ns)
        path = (await self.store.restore(name)).path
        return dict(FileResponse(path, stat_result=path.stat()).headers)

    async def ask(self, place: str, name: str, *, method: str = "GET", headers: list[tuple[str, str]]) -> Answer:
        """One request for a file that is in `place`."""
        await self.put_into(place, name)
        answer = await ask(self.apps[place], f"{PREFIX}/{name}", method=method, headers=headers)
        if place == WITHOUT_DISK:
            assert not self.no_root.exists(), "something was written beneath the mount point"
        else:
            await self.store.tasks.settle(30)
            assert (self.root / name).is_file(), "it did not come back"
        return answer

    async def put_into(self, place: str, name: str) -> None:
        """Lose the disk copy if the place is the database alone; not while the last restore is still at work on it."""
        await self.store.tasks.settle(30)
        if place == IN_DATABASE:
            (self.root / name).unlink()


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop for the whole module, as for a server."""
    return "asyncio"


@pytest.fixture(scope="module")
async def shelf(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shelf]:
    """Files of every size, over SQLite."""
    base = tmp_path_factory.mktemp("shelf")
    database = f"sqlite+aiosqlite:///{base}/catalogue.db"
    async with (
        UploadStore(base / "uploads", database) as store,
        UploadStore(base / "mount" / "uploads", database, require_marker=True) as without_disk,
    ):
        await store.database.create_tables()
        shelf = Shelf(store, without_disk)
        for size in SIZES:
            await shelf.put(name_of(size), content(size))
        yield shelf


@pytest.fixture(scope="module")
def like_starlette(shelf: Shelf) -> dict[str, str]:
    """The headers that Starlette gives to the file of 4 KiB."""
    path = shelf.root / name_of(SIZE)
    return dict(FileResponse(path, stat_result=path.stat()).headers)


def check(answer: Answer, case: Case, method: str, like: dict[str, str], data: bytes) -> None:
    """That an answer is, header by header, what the case says."""
    status, (start, stop) = case.status, case.part
    if method == "HEAD" and status in (206, 416):
        status, start, stop = 200, 0, len(data)
    validators = {key: like[key] for key in ("etag", "last-modified")} | {"x-content-type-options": "nosniff"}
    whole = validators | {"content-type": "image/png", "accept-ranges": "bytes"}
    assert answer.status == status
    if status in (200, 206):
        partial = {"content-range": f"bytes {start}-{stop - 1}/{len(data)}"} if status == 206 else {}
        assert answer.headers == whole | partial | {"content-length": str(stop - start)}
        assert answer.body == (b"" if method == "HEAD" else data[start:stop])
    elif status == 304:
        assert answer.headers == validators
    else:
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers.get("content-range") == (f"bytes */{len(data)}" if status == 416 else None)
        assert data[:100] not in answer.body


# -- the matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
@pytest.mark.parametrize("place", PLACES)
async def test_answer(shelf: Shelf, like_starlette: dict[str, str], place: str, case: Case) -> None:
    """GET and HEAD with these header lines get the answer of RFC 9110, wherever the file is."""
    for method in ("GET", "HEAD"):
        headers = case.headers(like_starlette["etag"])
        answer = await shelf.ask(place, name_of(SIZE), method=method, headers=headers)
        check(answer, case, method, like_starlette, content(SIZE))


def test_there_are_enough_cases() -> None:
    """At least forty combinations of headers, each of them once."""
    assert len({case.lines for case in CASES}) == len(CASES) > 200


async def test_postgres_answers_alike(directory: Path, postgres_url: str, tmp_path: Path) -> None:
    """The whole matrix holds out of PostgreSQL, too."""
    async with (
        UploadStore(directory, postgres_url) as store,
        UploadStore(tmp_path / "mount", postgres_url, require_marker=True) as without_disk,
    ):
        await store.database.create_tables()
        shelf = Shelf(store, without_disk)
        like, data = await shelf.put("a.png", content(SIZE)), content(SIZE)
        for case in CASES:
            place = random.choice((IN_DATABASE, WITHOUT_DISK))
            check(await shelf.ask(place, "a.png", headers=case.headers(like["etag"])), case, "GET", like, data)


# -- sizes ------------------------------------------------------------------------------------------------------------


def _parts(size: int) -> list[tuple[int, int]]:
    """Parts of a file, as (start, stop), at every seam between pieces and chunks."""
    seams = [256 * KIB, 2 * 1024 * KIB, 16 * 1024 * KIB]
    parts = [(0, 1), (0, size), (size - 1, size), (size // 2, size // 2 + 10), (1, size - 1)]
    parts += [(seam - 1, seam + 1) for seam in seams] + [(seam, seam + 1) for seam in seams]
    parts += [(seam - 100, min(size, seam + 600 * KIB)) for seam in seams[1:]]
    return [(start, stop) for start, stop in parts if 0 <= start < stop <= size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
async def test_whole(shelf: Shelf, place: str, size: int) -> None:
    """Empty, small, of exactly one chunk, or 20 MB: every byte comes, with Starlette's validators."""
    path, data = shelf.root / name_of(size), content(size)
    like = dict(FileResponse(path, stat_result=path.stat()).headers)
    for method in ("HEAD", "GET"):
        answer = await shelf.ask(place, name_of(size), method=method, headers=[])
        check(answer, Case("", (), 200, (0, size)), method, like, data)
    assert path.read_bytes() == data


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
async def test_parts(shelf: Shelf, place: str, size: int) -> None:
    """A range that crosses the seams between pieces and chunks brings exactly its bytes."""
    path, data = shelf.root / name_of(size), content(size)
    like = dict(FileResponse(path, stat_result=path.stat()).headers)
    for start, stop in _parts(size):
        case = Case("", (f"Range: bytes={start}-{stop - 1}",), 206, (start, stop))
        check(await shelf.ask(place, name_of(size), headers=case.headers("")), case, "GET", like, data)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
async def test_past_the_end(shelf: Shelf, place: str, size: int) -> None:
    """A range that begins at the size or after it is a 416 that tells the size, of an empty file as well."""
    path = shelf.root / name_of(size)
    like = dict(FileResponse(path, stat_result=path.stat()).headers)
    for first in (size, size + 1, 2 * size + 1):
        case = Case("", (f"Range: bytes={first}-",), 416)
        answer = await shelf.ask(place, name_of(size), headers=case.headers(""))
        assert answer.headers["content-range"] == f"bytes */{size}"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.status == 416
        assert answer.body == b""
        unmodified = await shelf.ask(place, name_of(size), headers=[("If-None-Match", like["etag"])])
        assert (unmodified.status, unmodified.body) == (304, b"")


@given(first=st.integers(0, 3 * MB + 10), length=st.integers(1, 3 * MB), size=st.sampled_from(SIZES[1:-1]))
@settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("place", PLACES)
async def test_any_range(shelf: Shelf, place: str, first: int, length: int, size: int) -> None:
    """Of any size, from any byte to any other: the bytes asked for, or 416."""
    first %= size + 2
    stop = min(first + length, size)
    answer = await shelf.ask(place, name_of(size), headers=[("Range", f"bytes={first}-{first + length - 1}")])
    if first >= size:
        assert answer.status == 416
    else:
        assert answer.status == 206
        assert answer.headers["content-range"] == f"bytes {first}-{stop - 1}/{size}"
        assert answer.body == content(size)[first:stop]


# -- validators -------------------------------------------------------------------------------------------------------

NANOSECONDS = (
    0, 1, 999_999_999, 10**9, SECONDS * 10**9, SECONDS * 10**9 + 1, MODIFIED_NS, SECONDS * 10**9 + 499_999_999,
    SECONDS * 10**9 + 500_000_001, SECONDS * 10**9 + 999_999_400, SECONDS * 10**9 + 999_999_499,
    SECONDS * 10**9 + 999_999_500, SECONDS * 10**9 + 999_999_999, 2**31 * 10**9 + 7, 2**32 * 10**9 + 333_333_333,
    4_102_444_800 * 10**9 + 987_654_321, -1, -1_500_000_000,
)  # fmt: skip


@pytest.mark.parametrize("modified_ns", NANOSECONDS)
@pytest.mark.parametrize("place", PLACES)
async def test_validators_are_those_of_starlette(shelf: Shelf, place: str, modified_ns: int) -> None:
    """ETag and Last-Modified are, for every time, the ones that Starlette makes of the same stat."""
    name = f"times/{modified_ns}.png"
    like = await shelf.put(name, b"a picture", modified_ns)
    if (shelf.root / name).stat().st_mtime_ns != modified_ns:
        pytest.skip("the file system does not keep such a time")
    answer = await shelf.ask(place, name, headers=[])
    assert answer.headers["etag"] == like["etag"]
    assert answer.headers["last-modified"] == like["last-modified"]
    for lines in (("If-None-Match", like["etag"]), ("If-Modified-Since", like["last-modified"])):
        assert (await shelf.ask(place, name, headers=[lines])).status == 304


@pytest.mark.parametrize("modified_ns", [2**63 - 1, 1 - 2**63, 10**19, 15 * 10**18])
async def test_absurd_time(shelf: Shelf, modified_ns: int) -> None:
    """A file of an absurd age is answered all the same, and its validators work (CVE-2017-20005)."""
    path = shelf.root / "absurd" / f"{modified_ns}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"a picture")
    os.utime(path, ns=(modified_ns, modified_ns))  # the file system takes what is nearest
    answer = await ask(shelf.apps[ON_DISK], f"{PREFIX}/absurd/{path.name}")
    assert (answer.status, answer.body) == (200, b"a picture")
    for header in (("If-None-Match", answer.headers["etag"]), ("If-Modified-Since", answer.headers["last-modified"])):
        assert (await ask(shelf.apps[ON_DISK], f"{PREFIX}/absurd/{path.name}", headers=[header])).status == 304


@pytest.mark.parametrize("modified_ns", [2**63 - 1, 1 - 2**63])
@pytest.mark.parametrize("place", PLACES)
async def test_absurd_time_in_a_record(shelf: Shelf, place: str, modified_ns: int) -> None:
    """The same of a record, from wherever it is served (CVE-2017-20005)."""
    name = f"absurd-record/{place}/{modified_ns}.png"
    await shelf.put(name, b"a picture", modified_ns)
    answer = await shelf.ask(place, name, headers=[])
    assert (answer.status, answer.body) == (200, b"a picture")
    for header in (("If-None-Match", answer.headers["etag"]), ("If-Modified-Since", answer.headers["last-modified"])):
        assert (await shelf.ask(place, name, headers=[header])).status == 304


async def test_validators_change_with_the_file(shelf: Shelf) -> None:
    """Another size or another time is another ETag; equal bytes of another time are, too."""
    tags = set()
    for index, (data, modified_ns) in enumerate([(b"ab", 10**18), (b"abc", 10**18), (b"ab", 10**18 + 10**6)]):
        await shelf.put(f"changing/{index}.png", data, modified_ns)
        tags.add((await shelf.ask(ON_DISK, f"changing/{index}.png", headers=[])).headers["etag"])
    assert len(tags) == 3


# -- the same from everywhere -----------------------------------------------------------------------------------------

TEMPLATES = ("Range", "If-Range", "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since")
VALUES = st.one_of(
    st.sampled_from(sorted({line.partition(":")[2].strip() for case in CASES for line in case.lines})),
    st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40),
    st.from_regex(r"\A(bytes|BYTES|items) ?= ?[0-9_+٠-٩,\- ]{0,12}\Z"),
    st.from_regex(r"\A[A-Z][a-z]{2}(,|day,)? ?[0-9²]{1,2}[ -]Nov[ -](20)?23 2[0-9](:[0-9]{2}){2} ?(GMT|UTC|\+0100)?\Z"),
    st.from_regex(r'\A(W/)?"[a-z,]{0,4}"(, ?(W/)?"[a-z*]{0,4}")?\Z'),
)  # fmt: skip


@given(
    lines=st.lists(st.tuples(st.sampled_from(TEMPLATES), VALUES), max_size=4), method=st.sampled_from(["GET", "HEAD"])
)
@settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
async def test_any_headers(
    shelf: Shelf, like_starlette: dict[str, str], lines: list[tuple[str, str]], method: str
) -> None:
    """Whatever a client says, every place gives the same answer, and it is one of five."""
    for tag in ("{etag}", "{opaque}", *(f"{{{date}}}" for date in DATES)):
        known = {**DATES, "etag": like_starlette["etag"], "opaque": like_starlette["etag"].strip('"')}
        lines = [(key, value.replace(tag, known[tag.strip("{}")])) for key, value in lines]
    answers = [await shelf.ask(place, name_of(SIZE), method=method, headers=lines) for place in PLACES]
    assert answers[0].status in (200, 206, 304, 412, 416)
    for other in answers[1:]:
        assert (other.status, other.headers, other.body) == (answers[0].status, answers[0].headers, answers[0].body)


# -- serve=False ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WITH_STATIC_FILES, ids=lambda case: case.what or "nothing")
@pytest.mark.parametrize("place", [ON_DISK, IN_DATABASE])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_handed_on(shelf: Shelf, like_starlette: dict[str, str], place: str, case: Case, method: str) -> None:
    """Without `serve` the wrapped StaticFiles answers, and its status, bytes and validators are those of `serve`."""
    await shelf.put_into(place, name_of(SIZE))
    target, headers = f"{PREFIX}/{name_of(SIZE)}", case.headers(like_starlette["etag"])
    handed_on = await ask(shelf.handed_on, target, method=method, headers=headers)
    served = await ask(shelf.apps[place], target, method=method, headers=headers)
    if method == "GET" or case.status not in (206, 416):  # to HEAD, StaticFiles answers a range
        assert handed_on.status == served.status == (200 if method == "HEAD" and case.status == 206 else case.status)
        if case.status != 416:
            assert handed_on.body == served.body
            assert handed_on.headers["etag"] == served.headers["etag"]
    if handed_on.status in (200, 206):
        same = ("etag", "last-modified", "content-type", "accept-ranges")
        assert [handed_on.headers[key] for key in same] == [served.headers[key] for key in same]
    assert (shelf.root / name_of(SIZE)).read_bytes() == content(SIZE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", [ON_DISK, IN_DATABASE])
async def test_handed_on_whole(shelf: Shelf, place: str, size: int) -> None:
    """Without `serve`, of every size, the wrapped app finds the whole file on disk at the first request."""
    await shelf.put_into(place, name_of(size))
    answer = await ask(shelf.handed_on, f"{PREFIX}/{name_of(size)}")
    assert answer.status == 200
    assert answer.body == content(size)


# -- what surrounds a request -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
async def test_header_names_and_order(shelf: Shelf, like_starlette: dict[str, str], place: str) -> None:
    """The order of the header lines does not matter."""
    lines = [("Range", "bytes=0-9"), ("If-Range", like_starlette["etag"]), ("If-Match", like_starlette["etag"])]
    for order in (lines, lines[::-1]):
        answer = await shelf.ask(place, name_of(SIZE), headers=order)
        assert (answer.status, answer.body) == (206, content(SIZE)[:10])


@pytest.mark.parametrize("place", PLACES)
async def test_answers_do_not_mix(shelf: Shelf, place: str) -> None:
    """An answer to one request changes nothing in the answer to the next."""
    first = await shelf.ask(place, name_of(SIZE), headers=[])
    for lines in (
        [("Range", "bytes=0-9")],
        [("Range", "bytes=9999-")],
        [("If-Match", '"a"')],
        [("If-None-Match", "*")],
    ):
        await shelf.ask(place, name_of(SIZE), headers=lines)
    last = await shelf.ask(place, name_of(SIZE), headers=[])
    assert (first.status, first.headers, first.body) == (last.status, last.headers, last.body)


async def test_headers_as_a_server_may_give_them(shelf: Shelf) -> None:
    """A server may give the header lines as an iterator, once (the ASGI specification says an iterable)."""
    scope = scope_of(f"{PREFIX}/{name_of(SIZE)}")
    scope["headers"] = iter([(b"host", b"test"), (b"range", b"bytes=0-9")])
    answer = await ask_scope(shelf.apps[ON_DISK], scope)
    assert (answer.status, answer.body) == (206, content(SIZE)[:10])


async def test_replaced_while_it_is_sent(shelf: Shelf) -> None:
    """What was measured is what is sent: a file that is replaced meanwhile neither mixes in nor changes the length."""
    name, old, new = "replaced.png", content(3 * MB), content(20 * MB)
    await shelf.put(name, old)
    path = shelf.root / name
    scope, body = scope_of(f"{PREFIX}/{name}"), bytearray()

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body":
            part = message.get("body", b"")
            assert isinstance(part, bytes)
            if not body:
                other = path.with_name("other")
                other.write_bytes(new)
                os.replace(other, path)
            body.extend(part)

    scope["asgi"]["spec_version"] = "2.4"
    await shelf.apps[ON_DISK](scope, receive, send)  # type: ignore[arg-type]
    assert bytes(body) == old
