"""Conformance to RFC 9110, sections 8, 13 and 14, for every place in which a file can be.

The same request gets the same answer from the disk, from the database (the file is deleted before each request) and
past a disk that accepts no file. With `serve=False` the answers are those of Starlette's `StaticFiles`.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfheal import UploadStore
from selfheal.sql.table_names import TableClaim
from tests.support.asgi import Answer, ask, ask_scope, scope_of
from tests.support.http_cases import CASES, DATES, MODIFIED_NS, SECONDS, SIZE, WITH_STATIC_FILES, Case
from tests.support.middleware import TRANSPORTS
from tests.support.served_files import (
    IN_DATABASE,
    ON_DISK,
    PLACES,
    PREFIX,
    WITHOUT_DISK,
    ServedFiles,
    content,
    starlette_headers,
)

KIB, MB = 1024, 1000 * 1000
SIZES = (0, 1, SIZE, 256 * KIB, 256 * KIB + 1, 3 * MB, 20 * MB)


def name_of(size: int) -> str:
    """Return the name of the file of this size."""
    return f"sizes/{size}.png"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop for the whole module, as for a server."""
    return "asyncio"


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """Stores of this process may share tables: they stand for two nodes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TableClaim, "take", lambda _claim: None)
        yield


@pytest.fixture(scope="module", params=TRANSPORTS)
async def files(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, two_nodes: None
) -> AsyncIterator[ServedFiles]:
    """Files of every size, over SQLite, served with ASGI and with WSGI."""
    base = tmp_path_factory.mktemp("files")
    database = f"sqlite+aiosqlite:///{base}/catalogue.db"
    async with (
        UploadStore(base / "uploads", database) as store,
        UploadStore(base / "mount" / "uploads", database, require_marker=True) as without_disk,
    ):
        await store.database.create_tables()
        files = ServedFiles(store, without_disk, TRANSPORTS[request.param])
        for size in SIZES:
            await files.put(name_of(size), content(size))
        yield files


@pytest.fixture(scope="module")
def like_starlette(files: ServedFiles) -> dict[str, str]:
    """The headers of Starlette for the file of 4 KiB."""
    return starlette_headers(files.root / name_of(SIZE))


def check(answer: Answer, case: Case, method: str, like: dict[str, str], data: bytes) -> None:
    """Fail if the status, a header or the body of an answer is not what the case says."""
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
@pytest.mark.parametrize("place", PLACES)
async def test_answer(files: ServedFiles, like_starlette: dict[str, str], place: str, case: Case) -> None:
    """GET and HEAD with these header lines get the answer of RFC 9110, wherever the file is."""
    for method in ("GET", "HEAD"):
        headers = case.headers(like_starlette["etag"])
        answer = await files.ask(place, name_of(SIZE), method=method, headers=headers)
        check(answer, case, method, like_starlette, content(SIZE))


def test_there_are_enough_cases() -> None:
    """There are more than 200 cases, and no two of them are equal."""
    assert len({case.lines for case in CASES}) == len(CASES) > 200


async def test_postgres_answers_alike(directory: Path, postgres_url: str, tmp_path: Path) -> None:
    """Every case gets the same answer from PostgreSQL."""
    async with (
        UploadStore(directory, postgres_url) as store,
        UploadStore(tmp_path / "mount", postgres_url, require_marker=True) as without_disk,
    ):
        await store.database.create_tables()
        files = ServedFiles(store, without_disk)
        like, data = await files.put("a.png", content(SIZE)), content(SIZE)
        for case in CASES:
            place = random.choice((IN_DATABASE, WITHOUT_DISK))
            check(await files.ask(place, "a.png", headers=case.headers(like["etag"])), case, "GET", like, data)


# -- sizes ------------------------------------------------------------------------------------------------------------


def _parts(size: int) -> list[tuple[int, int]]:
    """Return parts of a file, as (start, stop), at every boundary between pieces and chunks."""
    boundaries = [256 * KIB, 2 * 1024 * KIB, 16 * 1024 * KIB]
    parts = [(0, 1), (0, size), (size - 1, size), (size // 2, size // 2 + 10), (1, size - 1)]
    parts += [(boundary - 1, boundary + 1) for boundary in boundaries] + [
        (boundary, boundary + 1) for boundary in boundaries
    ]
    parts += [(boundary - 100, min(size, boundary + 600 * KIB)) for boundary in boundaries[1:]]
    return [(start, stop) for start, stop in parts if 0 <= start < stop <= size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
async def test_whole(files: ServedFiles, place: str, size: int) -> None:
    """A file of any size, also an empty one, is sent whole with Starlette's validators."""
    path, data = files.root / name_of(size), content(size)
    like = starlette_headers(path)
    for method in ("HEAD", "GET"):
        answer = await files.ask(place, name_of(size), method=method, headers=[])
        check(answer, Case("", (), 200, (0, size)), method, like, data)
    assert path.read_bytes() == data


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
async def test_parts(files: ServedFiles, place: str, size: int) -> None:
    """A range across the boundaries of pieces and chunks gets exactly its bytes."""
    path, data = files.root / name_of(size), content(size)
    like = starlette_headers(path)
    for start, stop in _parts(size):
        case = Case("", (f"Range: bytes={start}-{stop - 1}",), 206, (start, stop))
        check(await files.ask(place, name_of(size), headers=case.headers("")), case, "GET", like, data)


@pytest.mark.parametrize("place", PLACES)
async def test_range_of_an_empty_file(files: ServedFiles, place: str) -> None:
    """A range of an empty file gets a 200 and no bytes."""
    like = starlette_headers(files.root / name_of(0))
    for value in ("0-", "0-0", "5-", "-1"):
        case = Case("", (f"Range: bytes={value}",), 200, (0, 0))
        check(await files.ask(place, name_of(0), headers=case.headers("")), case, "GET", like, b"")


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("place", PLACES)
async def test_past_the_end(files: ServedFiles, place: str, size: int) -> None:
    """A range that begins at the end of a file or after it is a 416 with the size."""
    path = files.root / name_of(size)
    like = starlette_headers(path)
    for first in (size, size + 1, 2 * size + 1):
        case = Case("", (f"Range: bytes={first}-",), 416)
        answer = await files.ask(place, name_of(size), headers=case.headers(""))
        assert answer.headers["content-range"] == f"bytes */{size}"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.status == 416
        assert answer.body == b""
        unmodified = await files.ask(place, name_of(size), headers=[("If-None-Match", like["etag"])])
        assert (unmodified.status, unmodified.body) == (304, b"")


@given(first=st.integers(0, 3 * MB + 10), length=st.integers(1, 3 * MB), size=st.sampled_from(SIZES[1:-1]))
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("place", PLACES)
async def test_any_range(files: ServedFiles, place: str, first: int, length: int, size: int) -> None:
    """A range from any byte to any other, in a file of any size, gets its bytes or a 416."""
    first %= size + 2
    stop = min(first + length, size)
    answer = await files.ask(place, name_of(size), headers=[("Range", f"bytes={first}-{first + length - 1}")])
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
async def test_validators_are_those_of_starlette(files: ServedFiles, place: str, modified_ns: int) -> None:
    """ETag and Last-Modified are those that Starlette computes from the same stat, for every time."""
    name = f"times/{modified_ns}.png"
    like = await files.put(name, b"a picture", modified_ns)
    if (files.root / name).stat().st_mtime_ns != modified_ns:
        pytest.skip("the file system does not keep such a time")
    answer = await files.ask(place, name, headers=[])
    assert answer.headers["etag"] == like["etag"]
    assert answer.headers["last-modified"] == like["last-modified"]
    for lines in (("If-None-Match", like["etag"]), ("If-Modified-Since", like["last-modified"])):
        assert (await files.ask(place, name, headers=[lines])).status == 304


@pytest.mark.parametrize("modified_ns", [2**63 - 1, 1 - 2**63, 10**19, 15 * 10**18])
async def test_extreme_time(files: ServedFiles, modified_ns: int) -> None:
    """A file with an extreme time is served, and its validators work (CVE-2017-20005)."""
    path = files.root / "extreme" / f"{modified_ns}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"a picture")
    os.utime(path, ns=(modified_ns, modified_ns))  # the file system stores the nearest time that it can
    answer = await ask(files.apps[ON_DISK], f"{PREFIX}/extreme/{path.name}")
    assert (answer.status, answer.body) == (200, b"a picture")
    for header in (("If-None-Match", answer.headers["etag"]), ("If-Modified-Since", answer.headers["last-modified"])):
        assert (await ask(files.apps[ON_DISK], f"{PREFIX}/extreme/{path.name}", headers=[header])).status == 304


@pytest.mark.parametrize("modified_ns", [2**63 - 1, 1 - 2**63])
@pytest.mark.parametrize("place", PLACES)
async def test_extreme_time_in_a_record(files: ServedFiles, place: str, modified_ns: int) -> None:
    """A record with an extreme time is served from every place, and its validators work (CVE-2017-20005)."""
    name = f"extreme-record/{place}/{modified_ns}.png"
    await files.put(name, b"a picture", modified_ns)
    answer = await files.ask(place, name, headers=[])
    assert (answer.status, answer.body) == (200, b"a picture")
    for header in (("If-None-Match", answer.headers["etag"]), ("If-Modified-Since", answer.headers["last-modified"])):
        assert (await files.ask(place, name, headers=[header])).status == 304


async def test_validators_change_with_the_file(files: ServedFiles) -> None:
    """The ETag changes with the size and with the time, even if the bytes are equal."""
    tags = set()
    for index, (data, modified_ns) in enumerate([(b"ab", 10**18), (b"abc", 10**18), (b"ab", 10**18 + 10**6)]):
        await files.put(f"changing/{index}.png", data, modified_ns)
        tags.add((await files.ask(ON_DISK, f"changing/{index}.png", headers=[])).headers["etag"])
    assert len(tags) == 3


# -- the same from every place ----------------------------------------------------------------------------------------

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
@settings(max_examples=50, suppress_health_check=list(HealthCheck))
async def test_any_headers(
    files: ServedFiles, like_starlette: dict[str, str], lines: list[tuple[str, str]], method: str
) -> None:
    """Any header lines get the same answer from every place, with one of five statuses."""
    for tag in ("{etag}", "{opaque}", *(f"{{{date}}}" for date in DATES)):
        known = {**DATES, "etag": like_starlette["etag"], "opaque": like_starlette["etag"].strip('"')}
        lines = [(key, value.replace(tag, known[tag.strip("{}")])) for key, value in lines]
    answers = [await files.ask(place, name_of(SIZE), method=method, headers=lines) for place in PLACES]
    assert answers[0].status in (200, 206, 304, 412, 416)
    for other in answers[1:]:
        assert (other.status, other.headers, other.body) == (answers[0].status, answers[0].headers, answers[0].body)


# -- serve=False ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WITH_STATIC_FILES, ids=lambda case: case.title or "nothing")
@pytest.mark.parametrize("place", [ON_DISK, IN_DATABASE])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_handed_on(
    files: ServedFiles, like_starlette: dict[str, str], place: str, case: Case, method: str
) -> None:
    """With `serve=False` the wrapped `StaticFiles` answers with the status, bytes and validators of `serve=True`."""
    await files.move_to(place, name_of(SIZE))
    target, headers = f"{PREFIX}/{name_of(SIZE)}", case.headers(like_starlette["etag"])
    handed_on = await ask(files.handed_on, target, method=method, headers=headers)
    served = await ask(files.apps[place], target, method=method, headers=headers)
    if method == "GET" or case.status not in (206, 416):  # StaticFiles answers a range to HEAD
        assert handed_on.status == served.status == (200 if method == "HEAD" and case.status == 206 else case.status)
        if case.status != 416:
            assert handed_on.body == served.body
            assert handed_on.headers["etag"] == served.headers["etag"]
    if handed_on.status in (200, 206):
        same = ("etag", "last-modified", "content-type", "accept-ranges")
        assert [handed_on.headers[key] for key in same] == [served.headers[key] for key in same]
    assert (files.root / name_of(SIZE)).read_bytes() == content(SIZE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", [ON_DISK, IN_DATABASE])
async def test_handed_on_whole(files: ServedFiles, place: str, size: int) -> None:
    """With `serve=False` the wrapped app finds the whole file on disk at the first request, for every size."""
    await files.move_to(place, name_of(size))
    answer = await ask(files.handed_on, f"{PREFIX}/{name_of(size)}")
    assert answer.status == 200
    assert answer.body == content(size)


# -- the order of headers and of requests -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
async def test_order_of_the_header_lines(files: ServedFiles, like_starlette: dict[str, str], place: str) -> None:
    """The order of the header lines does not matter."""
    lines = [("Range", "bytes=0-9"), ("If-Range", like_starlette["etag"]), ("If-Match", like_starlette["etag"])]
    for order in (lines, lines[::-1]):
        answer = await files.ask(place, name_of(SIZE), headers=order)
        assert (answer.status, answer.body) == (206, content(SIZE)[:10])


@pytest.mark.parametrize("place", PLACES)
async def test_answers_do_not_mix(files: ServedFiles, place: str) -> None:
    """A request changes nothing in the answer to the next request."""
    first = await files.ask(place, name_of(SIZE), headers=[])
    for lines in (
        [("Range", "bytes=0-9")],
        [("Range", "bytes=9999-")],
        [("If-Match", '"a"')],
        [("If-None-Match", "*")],
    ):
        await files.ask(place, name_of(SIZE), headers=lines)
    last = await files.ask(place, name_of(SIZE), headers=[])
    assert (first.status, first.headers, first.body) == (last.status, last.headers, last.body)


async def test_headers_as_a_server_may_give_them(files: ServedFiles) -> None:
    """Header lines in an iterator work: the ASGI specification says only that they are iterable."""
    scope = scope_of(f"{PREFIX}/{name_of(SIZE)}")
    scope["headers"] = iter([(b"host", b"test"), (b"range", b"bytes=0-9")])
    answer = await ask_scope(files.apps[ON_DISK], scope)
    assert (answer.status, answer.body) == (206, content(SIZE)[:10])


async def test_replaced_while_it_is_sent(files: ServedFiles) -> None:
    """A file that is replaced while it is sent changes neither the bytes nor the length of the answer."""
    name, old, new = "replaced.png", content(3 * MB), content(20 * MB)
    await files.put(name, old)
    path = files.root / name
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
    await files.apps[ON_DISK](scope, receive, send)  # type: ignore[arg-type]
    assert bytes(body) == old
