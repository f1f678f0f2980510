"""The contract on the wire: raw bytes to real servers (uvicorn with h11 and with httptools, granian, hypercorn).

Below `/static/uploads` the database is down: a request that reaches it gets a 503, and one that reaches a planted file
would get a 200. A 404 of the wrapped app proves that neither was touched. Below `/live/uploads` everything works.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from selfheal import UploadStore
from selfheal.http.headers import make_head
from tests.support.servers import COMMANDS, HttpServer, all_running
from tests.support.sockets import make_socket
from tests.support.two_store_app import DEAD, LIVE
from tests.support.waiting import wait_until
from tests.support.wire import Reply, parse_reply

SECRET = b"these bytes must never be sent"
PICTURE = random.Random(1).randbytes(5000)
FILM = random.Random(2).randbytes(20 * 1024 * 1024)
FIRST_SIZE = 300 * 1024
"""The size of a file of more than one piece."""
MODIFIED_NS = 1_700_000_000_123_456_789
LONG_PART = "d" * 200

PLANTED = (
    ".hidden.png", ".git/config", "cats/.htaccess", "nul.png", "CON", "aux", "cats/com1.txt", "lpt9", "a::$DATA",
    "a.png:$I30", "C:x.png", "trail.", "trail ", "cats /tom.jpg", "dot./tom.jpg", "back\\slash.png", "..\\secret.txt",
    "ctrl\x01.png", "new\nline.png", "tab\t.png", "del\x7f.png", "c1\x85.png", "line\u2028.png", "\ufffd.png",
    "a%2fb.png", "a%2Fb.png", "%2e%2e", "a%5cb.png", "a%00.png", "a%252fb.png", ".selfheal-tmp/x.png",
    ".selfheal-quarantine/x.png", ".selfheal-marker", f"{LONG_PART}/{LONG_PART}/{LONG_PART}.png",
)  # fmt: skip
"""Names outside the grammar; each of them is a file in the uploads directory."""

TRAVERSALS = (
    "/../secret.txt", "/../../secret.txt", "/cats/../../secret.txt", "/..", "/../", "/cats/..", "/cats/../good.png",
    "/./good.png", "/.", "/cats/./tom.jpg", "/%2e%2e/secret.txt", "/%2E%2E/secret.txt", "/.%2e/secret.txt",
    "/%2e./secret.txt", "/cats/%2e%2e/good.png", "/%2e/good.png", "/..%2fsecret.txt", "/%2e%2e%2fsecret.txt",
    "/..%2Fsecret.txt", "/cats%2ftom.jpg", "/cats%2Ftom.jpg", "/%2fetc/passwd", "/%2f", "/cats/%2ftom.jpg",
    "/%252e%252e/secret.txt", "/%252e%252e%252fsecret.txt", "/cats%252ftom.jpg", "/%25252e%25252e/secret.txt",
    "/..%5csecret.txt", "/..%255csecret.txt", "/%5c..%5csecret.txt", "/%c0%ae%c0%ae/secret.txt",
    "/%c0%ae%c0%ae%c0%afsecret.txt", "/%e0%80%ae/x", "/%ff.png", "/%ed%a0%80.png", "//good.png", "//", "///good.png",
    "/cats//tom.jpg", "//etc/passwd", "/good.png/", "/cats/", "/", "/good.png//", "/good.png%00", "/good.png%00.txt",
    "/%00", "/%0a", "/%0d%0aX-Injected:%20yes", "/http://test/good.png", "/http:%2f%2ftest/good.png",
    "/file:///etc/passwd", "/C:/Windows/win.ini", "/C:%5cWindows%5cwin.ini", "_private/good.png", "_private",
    ".png", "/../uploads_private/good.png", "/..;/secret.txt/.", "/%20", "/good.png%20", "/good.png.", "/good.png%2e",
    "/...", "/~/..", "/good.png::$DATA", "/good.png:$DATA", "/" + "x" * 256, "/" + "%C3%A9" * 128,
    "/" + "/".join(["y" * 100] * 6),
)  # fmt: skip
"""Targets, after the prefix, that try to reach a file by a trick of naming."""

OTHER_TARGETS = (
    "//static/uploads/good.png", "/static//uploads/good.png", "/static/./uploads/good.png", "/static/uploads",
    "/x/../static/uploads/good.png", "/STATIC/uploads/good.png", "/static/uploads%2fgood.png",
    "/static%2fuploads%2fgood.png", "/static/uploads%5cgood.png", "/static/uploads%00/good.png",
)  # fmt: skip

HOSTILE = (*(f"{DEAD}{rest}" for rest in TRAVERSALS), *(f"{DEAD}/{quote(name)}" for name in PLANTED), *OTHER_TARGETS)

LINKS = ("link.png", "linked/good.png", "loop.png", "link-to-good.png", "directory.png", "pipe.png", "socket.png")

GOOD = (
    "good.png", "cats/tom.jpg", "a b.png", " lead.png", "caf\u00e9.png", "cafe\u0301.png", "\u65e5\u672c/\u5199.jpg",
    "\U0001f600.png", "brackets[1](2){3}.png", "icon@2x.png", "100%.png", "50%off.png", "%41.png", "%zz.png",
    "a+b.png", "semi;colon.png", "comma,.png", "ask?.png", "hash#tag.png", "til~de.png", "'single'.png",
    '"double".png', "a&b=c.png", "a..b.png", "UPPER.PNG", "upper.png", "console.png", "nullable.png", "com10.png",
    "-dash.png", "$dollar!.png", "a|b.png", "<b>.png", "star*.png", "x" * 251 + ".png", "no-extension",
)  # fmt: skip

HEADERS: dict[str, tuple[list[bytes], int, slice]] = {
    "nothing": ([], 200, slice(None)),
    "first bytes": ([b"Range: bytes=0-9"], 206, slice(0, 10)),
    "last bytes": ([b"Range: bytes=-10"], 206, slice(-10, None)),
    "to the end": ([b"Range: bytes=4990-"], 206, slice(4990, None)),
    "past the end": ([b"Range: bytes=5000-"], 416, slice(0, 0)),
    "upper-case unit": ([b"RANGE: BYTES=0-9"], 206, slice(0, 10)),
    "underscores": ([b"Range: bytes=1_0-2_0"], 200, slice(None)),
    "a plus sign": ([b"Range: bytes=+1-3"], 200, slice(None)),
    "Arabic digits": (["Range: bytes=٠-٩".encode()], 200, slice(None)),
    "several": ([b"Range: bytes=0-1,3-4"], 200, slice(None)),
    "a hundred": ([b"Range: bytes=" + b",".join([b"0-"] * 100)], 200, slice(None)),
    "two lines": ([b"Range: bytes=0-1", b"Range: bytes=3-4"], 200, slice(None)),
    "the same tag": ([b"If-None-Match: {etag}"], 304, slice(0, 0)),
    "tags on two lines": ([b'If-None-Match: "x"', b"If-None-Match: W/{etag}"], 304, slice(0, 0)),
    "the same date": ([b"If-Modified-Since: {modified}"], 304, slice(0, 0)),
    "another tag": ([b'If-Match: "x"'], 412, slice(0, 0)),
    "tags to match on two lines": ([b'If-Match: "x"', b"If-Match: {etag}"], 200, slice(None)),
    "a stale If-Range": ([b"Range: bytes=0-9", b'If-Range: "x"'], 200, slice(None)),
    "a good If-Range": ([b"Range: bytes=0-9", b"If-Range: {etag}"], 206, slice(0, 10)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with everything that the servers must serve, and everything that they must not."""
    base = tmp_path_factory.mktemp("served")
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, _fill_live(base)).result()
    uploads = base / "dead" / "uploads"
    for name in GOOD:
        _write(uploads / name, name.encode())
    for path in ("secret.txt", "dead/secret.txt", "dead/uploads_private/good.png", "dead/uploads.png"):
        _write(base / path, SECRET)
    (uploads / "link.png").symlink_to("../secret.txt")
    (uploads / "link-to-good.png").symlink_to("good.png")
    (uploads / "linked").symlink_to("../uploads_private")
    (uploads / "loop.png").symlink_to("loop.png")
    (uploads / "directory.png").mkdir()
    os.mkfifo(uploads / "pipe.png")
    make_socket(uploads / "socket.png")
    return base


@pytest.fixture(scope="module")
def servers(base: Path) -> Iterator[dict[str, HttpServer]]:
    """Every server, running; the port of the dead database is bound, and no process listens on it."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with all_running(base, unused.getsockname()[1]) as servers:
            for name in PLANTED:  # after the start, which sweeps the temporary directory
                _write(base / "dead" / "uploads" / name, SECRET)
            yield servers


@pytest.fixture(params=list(COMMANDS))
def server(request: pytest.FixtureRequest, servers: dict[str, HttpServer]) -> HttpServer:
    """Every server."""
    return servers[request.param]


async def _fill_live(base: Path) -> None:
    async with UploadStore(base / "live" / "uploads", f"sqlite+aiosqlite:///{base}/live.db") as store:
        await store.database.create_tables()
        for name in GOOD:
            await store.database.store_image(name, name.encode(), modified_ns=MODIFIED_NS)
        await store.database.store_image("picture.png", PICTURE, modified_ns=MODIFIED_NS)
        await store.database.store_image("film.mp4", FILM, modified_ns=MODIFIED_NS)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(MODIFIED_NS, MODIFIED_NS))


def _without_date(reply: Reply) -> Reply:
    kept = {key: value for key, value in reply.headers.items() if key != "date"}
    return Reply(reply.status, kept, reply.body)


# -- hostile paths ----------------------------------------------------------------------------------------------------


def test_traps_are_set(base: Path, server: HttpServer) -> None:
    """A missing good name is a 503, a good name on disk is a 200, and all planted files exist."""
    assert server.get(f"{DEAD}/absent.png".encode()).status == 503
    assert server.get(f"{DEAD}/good.png".encode()).body == b"good.png"
    uploads = base / "dead" / "uploads"
    assert all((uploads / name).read_bytes() == SECRET for name in PLANTED)
    assert (uploads / "../secret.txt").read_bytes() == SECRET
    assert len(set(HOSTILE)) == len(HOSTILE) > 100


@pytest.mark.parametrize("target", HOSTILE)
def test_hostile_path(servers: dict[str, HttpServer], target: str) -> None:
    """A name outside the grammar gets the wrapped app's 404 on every server; neither disk nor database is touched.

    CVE-2023-29159 (prefix sibling), CVE-2021-45452 and CVE-2026-28414 (traversal, absolute path), CVE-2025-66221
    (device names).
    """
    for server in servers.values():
        reply = server.get(target.encode())
        assert reply.status == 404, server.kind
        assert (reply.is_wrapped and reply.body == b"wrapped") or "/.selfheal" in target, server.kind
        assert SECRET not in reply.body, server.kind
        if target.startswith(f"{DEAD}/"):
            assert reply.headers["cache-control"] == "no-store", server.kind


@pytest.mark.parametrize("name", LINKS)
def test_not_a_file(servers: dict[str, HttpServer], name: str) -> None:
    """A link, directory, FIFO or socket gets the wrapped app's 404 at once, wherever a link leads (CVE-2024-23334)."""
    for server in servers.values():
        reply = server.get(f"{DEAD}/{name}".encode())
        assert (reply.status, reply.body) == (404, b"wrapped"), server.kind
        assert reply.headers["cache-control"] == "no-store", server.kind


@pytest.mark.parametrize(
    "target",
    [b"/good.png\x00", b"/\xff.png", b"/a b.png", b"/ctrl\x01.png", b"/\xc0\xae\xc0\xae/secret.txt", b"/a\tb.png"],
)
def test_bytes_that_no_target_may_hold(servers: dict[str, HttpServer], target: bytes) -> None:
    """A target that is not valid HTTP is refused by the server or gets the wrapped app's 404; it never gets a file."""
    for server in servers.values():
        reply = server.get(DEAD.encode() + target)
        assert reply.status in (0, 400) or (reply.status == 404 and reply.is_wrapped), server.kind
        assert SECRET not in reply.body, server.kind


@pytest.mark.parametrize(
    "target", ["http://test/static/uploads/../secret.txt", "http://test/static/uploads/%2e%2e/secret.txt",
               "http://test/static/uploads/.hidden.png", "http://test//static/uploads/good.png", "file:///etc/passwd",
               "http://test/static/uploads_private/good.png"],
)  # fmt: skip
def test_absolute_url_with_a_hostile_path(servers: dict[str, HttpServer], target: str) -> None:
    """An absolute URL cannot bypass the grammar (CVE-2026-28414)."""
    for server in servers.values():
        reply = server.get(target.encode())
        assert reply.status == 400 or (reply.status == 404 and reply.is_wrapped), server.kind
        assert SECRET not in reply.body, server.kind


def test_absolute_url_of_a_file(servers: dict[str, HttpServer]) -> None:
    """An absolute URL gets the file if the server strips scheme and host, or the wrapped app's 404 if it does not.

    RFC 9112, section 3.2.2, asks servers to strip them; h11 and hypercorn do not.
    """
    for server in servers.values():
        reply = server.get(b"http://test/static/uploads/good.png")
        assert (reply.status, reply.body) in ((200, b"good.png"), (404, b"wrapped")), server.kind


@pytest.mark.parametrize("host", [b"test/static/uploads/good.png?", b"x/static/uploads", b"a@b/static/uploads/#"])
def test_poisoned_host_is_no_path(servers: dict[str, HttpServer], host: bytes) -> None:
    """The Host header is no part of the path: it neither creates a name nor hides one (CVE-2026-48710)."""
    for server in servers.values():
        elsewhere = server.get(b"/good.png", host=host)
        assert elsewhere.status == 400 or (elsewhere.status == 404 and elsewhere.is_wrapped), server.kind
        hidden = server.get(f"{DEAD}/.hidden.png".encode(), host=host)
        assert hidden.status == 400 or (hidden.status == 404 and hidden.is_wrapped), server.kind
        there = server.get(f"{DEAD}/good.png".encode(), host=host)
        assert there.status == 400 or there.body == b"good.png", server.kind


@pytest.mark.parametrize(
    ("there", "not_there"),
    [
        ("/.hidden.png", "/.absent.png"),
        ("/.git/config", "/.git/absent"),
        ("/../secret.txt", "/../absent.txt"),
        ("/link.png", "/linked/good.png"),
        ("/directory.png", "/pipe.png"),
        ("_private/good.png", "_private/absent.png"),
        ("/.selfheal-tmp/x.png", "/.selfheal-tmp/absent.png"),
    ],
)
def test_no_existence_oracle(server: HttpServer, there: str, not_there: str) -> None:
    """A hidden file and a missing one get the same answer, header by header (CVE-2025-69226)."""
    hidden, absent = (server.get(f"{DEAD}{rest}".encode()) for rest in (there, not_there))
    assert _without_date(hidden) == _without_date(absent)


# -- good names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_good_name(base: Path, servers: dict[str, HttpServer], name: str) -> None:
    """Names with spaces, Unicode (NFC and NFD differ), brackets and percent signs are served from disk and database."""
    target = quote(name).encode()
    for server in servers.values():
        on_disk = server.get(f"{DEAD}/".encode() + target)
        assert (on_disk.status, on_disk.body) == (200, name.encode()), server.kind
        (base / "live" / "uploads" / name).unlink(missing_ok=True)
        restored = server.get(f"{LIVE}/".encode() + target)
        assert (restored.status, restored.body) == (200, name.encode()), server.kind
        assert (base / "live" / "uploads" / name).read_bytes() == name.encode()


@pytest.mark.parametrize("query", [b"?", b"?v=1", b"?next=a%2fb", b"?../../secret.txt", b"?%00", b"??"])
def test_query_is_no_part_of_the_name(servers: dict[str, HttpServer], query: bytes) -> None:
    """The query does not change which file is served."""
    for server in servers.values():
        assert server.get(f"{DEAD}/good.png".encode() + query).body == b"good.png", server.kind


def test_encoded_letters_are_the_letters(servers: dict[str, HttpServer]) -> None:
    """A percent-encoded letter means the letter."""
    for server in servers.values():
        assert server.get(f"{DEAD}/%67ood%2Epng".encode()).body == b"good.png", server.kind


# -- headers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("place", ["on disk", "only in the database"])
def test_headers_on_the_wire(base: Path, servers: dict[str, HttpServer], case: str, place: str) -> None:
    """Every server gives the same answer to these headers, from disk and from the database (CVE-2025-69225)."""
    lines, status, part = HEADERS[case]
    target = f"{LIVE}/picture.png".encode()
    for server in servers.values():
        known = server.get(target).headers
        lines_now = [
            line.replace(b"{etag}", known["etag"].encode()).replace(b"{modified}", known["last-modified"].encode())
            for line in lines
        ]
        if place == "only in the database":
            (base / "live" / "uploads" / "picture.png").unlink()
        reply = server.get(target, *lines_now)
        assert (reply.status, reply.body) == (status, PICTURE[part]), server.kind
        if status in (200, 206):
            assert reply.headers["content-length"] == str(len(PICTURE[part])), server.kind
        if status == 416:
            assert reply.headers["content-range"] == f"bytes */{len(PICTURE)}", server.kind
        if status != 412:
            assert "no-store" not in reply.headers.get("cache-control", "") or status == 416, server.kind


@pytest.mark.parametrize(
    ("lines", "method"),
    [
        ([], b"HEAD"),
        ([b"Range: bytes=0-9"], b"HEAD"),
        ([b"If-None-Match: *"], b"GET"),
        ([b'If-Match: "x"'], b"GET"),
        ([b"Range: bytes=9999-"], b"GET"),
        ([b"Range: bytes=0-9"], b"GET"),
    ],
)
def test_connection_goes_on(server: HttpServer, lines: list[bytes], method: bytes) -> None:
    """After an answer without a body, or with a part of one, the next answer on the same connection is whole."""
    target = f"{LIVE}/picture.png".encode()
    first = b"\r\n".join([method + b" " + target + b" HTTP/1.1", b"Host: test", *lines]) + b"\r\n\r\n"
    second = b"GET " + target + b" HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(first)
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(1)
        reply = parse_reply(head)
        has_body = method == b"GET" and reply.status != 304
        for _ in range(int(reply.headers.get("content-length", "0")) if has_body else 0):
            assert connection.recv(1)
        connection.sendall(second)
        data = b""
        while part := connection.recv(1 << 20):
            data += part
    assert parse_reply(data).body == PICTURE


def test_large_body_comes_whole(base: Path, server: HttpServer) -> None:
    """A file of 20 MiB is sent whole, first from the database and then from disk, with the same validators."""
    (base / "live" / "uploads" / "film.mp4").unlink(missing_ok=True)
    restored = server.get(f"{LIVE}/film.mp4".encode())
    on_disk = server.get(f"{LIVE}/film.mp4".encode())
    assert restored.status == 200
    assert restored.body == FILM
    assert _without_date(restored) == _without_date(on_disk)


# -- names that change while they are sent ----------------------------------------------------------------------------


def test_one_version_per_answer(base: Path, server: HttpServer, times: Callable[[int, int], int]) -> None:
    """While a file is replaced again and again, each answer has the headers and the bytes of one version."""
    name, versions = base / "dead" / "uploads" / "race.mp4", dict[str, bytes]()
    for number in range(2):
        data = bytes([number]) * (FIRST_SIZE + number)
        _write(base / f"version{number}", data)
        os.utime(base / f"version{number}", (number, number))
        versions[make_head("race.mp4", number * 10**9, len(data)).etag] = data

    def replace() -> None:
        for number in range(2):
            os.link(base / f"version{number}", base / "next")
            (base / "next").replace(name)

    replace()
    with repeating(replace):
        for _ in range(times(400, 20_000)):
            reply = server.get(f"{DEAD}/race.mp4".encode())
            assert reply.status == 200
            assert reply.body == versions[reply.headers["etag"]], "headers and bytes of two versions"


def test_a_directory_that_becomes_a_link(base: Path, server: HttpServer, times: Callable[[int, int], int]) -> None:
    """While a directory changes places with a link to one outside the root, no byte from there is sent."""
    album, outside = base / "dead" / "uploads" / "album", base / "outside"
    _write(album / "race.mp4", b"i" * FIRST_SIZE)
    _write(outside / "race.mp4", SECRET * FIRST_SIZE)

    def exchange() -> None:
        album.rename(base / "kept")
        album.symlink_to(outside)
        album.unlink()
        (base / "kept").rename(album)

    with repeating(exchange):
        for _ in range(times(400, 20_000)):
            reply = server.get(f"{DEAD}/album/race.mp4".encode())
            assert SECRET not in reply.body
            assert reply.status in (200, 404, 503)


@contextmanager
def repeating(work: Callable[[], None]) -> Iterator[None]:
    """Repeat something in a thread until the block ends."""
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.is_set():
            work()

    with ThreadPoolExecutor(1) as thread:
        repeated = thread.submit(repeat)
        try:
            yield
        finally:
            is_over.set()
            repeated.result()


# -- clients that disconnect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["on disk", "only in the database"])
def test_client_gone_leaks_nothing(base: Path, server: HttpServer, place: str) -> None:
    """Clients that disconnect in the middle of a large body leave no descriptor and no task open (CVE-2026-54280)."""
    target = f"{LIVE}/film.mp4".encode()
    assert len(server.get(target).body) == len(FILM)
    wait_until(lambda: not server.state()["files"])
    tasks = server.state()["tasks"]
    for _ in range(8):
        if place == "only in the database":
            (base / "live" / "uploads" / "film.mp4").unlink(missing_ok=True)
        with server.connect() as connection:
            connection.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: test\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    wait_until(lambda: not server.state()["files"])
    wait_until(lambda: server.state()["tasks"] <= tasks)
    assert server.get(target).body == FILM


def test_client_gone_before_the_answer(base: Path, server: HttpServer) -> None:
    """A restore whose client has disconnected finishes, and leaves nothing open."""
    film = base / "live" / "uploads" / "film.mp4"
    film.unlink(missing_ok=True)

    def is_restored() -> bool:
        """Send a request and disconnect; Granian drops some of these requests, so the test sends them again."""
        with server.connect() as connection:
            connection.sendall(f"GET {LIVE}/film.mp4 HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        end = time.monotonic() + 4
        while not film.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return film.exists()

    wait_until(is_restored)
    assert film.read_bytes() == FILM
    wait_until(lambda: not server.state()["files"])


def test_stalled_clients_hold_no_connection(server: HttpServer, base: Path) -> None:
    """A missing file is restored while more clients read nothing than there are database connections."""
    (base / "live" / "uploads" / "film.mp4").unlink(missing_ok=True)
    request = f"GET {LIVE}/film.mp4 HTTP/1.1\r\nHost: test\r\n\r\n".encode()
    connections = [server.connect() for _ in range(24)]
    try:
        for connection in connections:
            connection.sendall(request)
        assert all(connection.recv(12) == b"HTTP/1.1 200" for connection in connections)
        (base / "live" / "uploads" / "picture.png").unlink(missing_ok=True)
        assert server.get(f"{LIVE}/picture.png".encode()).body == PICTURE
    finally:
        for connection in connections:
            connection.close()
    wait_until(lambda: not server.state()["files"])
