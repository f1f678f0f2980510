"""The middleware: three answers, the wrapped app's own, lifespan, and where it may stand among other middleware."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import socket
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfheal import SelfHealMiddleware, SettingsError, UploadStore, middleware
from selfheal.content.digests import chunk_digest
from selfheal.content.sources import CHUNK
from selfheal.disk import syscalls
from selfheal.events import Kind
from tests.support.asgi import Answer, Wrapped, ask, ask_and_leave, ask_scope, scope_of
from tests.support.sockets import make_socket
from tests.support.waiting import eventually

PREFIX = "/static/uploads"
SECONDS = 1_700_000_000
MODIFIED_NS = SECONDS * 10**9
PICTURE = random.Random(3).randbytes(5000)
LARGE = random.Random(4).randbytes(3 * 1024 * 1024)
FILM = random.Random(5).randbytes(17 * 1024 * 1024)
"""More than is restored before its answer begins."""
SECRET = b"nobody may ever read this"


async def put(store: UploadStore, name: str, data: bytes = PICTURE, *, on_disk: bool = True) -> Path:
    """Keep a file in the database and, with `on_disk`, on disk; old enough that nobody waits for it to hold still."""
    await store.database.store_image(name, data, modified_ns=MODIFIED_NS)
    if on_disk:
        await store.restore(name)
    return store.disk.path_of(name)


def lay(path: Path, data: bytes = PICTURE) -> Path:
    """A file that is on disk only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (SECONDS, SECONDS))
    return path


def open_below(directory: Path) -> list[str]:
    """What this process holds open below a directory."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return [link for link in links if link.startswith(f"{directory}/")]


def wrapping(store: UploadStore, mode: bool, app: ASGIApp | None = None, **more: Any) -> SelfHealMiddleware:
    """The middleware over a store, serving by itself or not."""
    return SelfHealMiddleware(app or Wrapped(), store, serve=mode, **more)


def static_over(directory: Path, path: str = PREFIX) -> Starlette:
    """A wrapped app that serves a directory by itself."""
    directory.mkdir(parents=True, exist_ok=True)  # StaticFiles raises over one that is not there
    return Starlette(routes=[Mount(path, StaticFiles(directory=directory))])


@pytest.fixture(params=[True, False], ids=["serve", "hand on"])
def mode(request: pytest.FixtureRequest) -> bool:
    """Both values of `serve`."""
    return bool(request.param)


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port at which nobody listens, kept from being taken by another."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture(params=["sqlite", "postgres"])
async def broken_store(
    request: pytest.FixtureRequest, directory: Path, tmp_path: Path, dead_port: int
) -> AsyncIterator[UploadStore]:
    """A store whose database is down."""
    url = {
        "sqlite": f"sqlite+aiosqlite:///{tmp_path}/no/such/directory/a.db",
        "postgres": f"postgresql+asyncpg://nobody@127.0.0.1:{dead_port}/none",
    }[request.param]
    async with UploadStore(directory, url) as store:
        yield store
    await eventually(no_driver_threads)


async def no_driver_threads() -> bool:
    """Whether aiosqlite is done: a connection that could not be opened still talks to its loop from a thread."""
    return not any("_connection_worker_thread" in thread.name for thread in threading.enumerate())


# -- three answers ----------------------------------------------------------------------------------------------------


def assert_unknown(answer: Answer) -> None:
    """503, with a number of seconds to wait, never to be stored."""
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["cache-control"] == "no-store"


async def test_present_absent_deleted(store: UploadStore, mode: bool) -> None:
    """Present is 200, from the disk and out of the database; absent and deleted are the wrapped app's."""
    app = wrapping(store, mode, static_over(store.disk.path))
    path = await put(store, "on/disk.png")
    assert (await ask(app, f"{PREFIX}/on/disk.png")).body == PICTURE
    path.unlink()
    assert (await ask(app, f"{PREFIX}/on/disk.png")).body == PICTURE
    assert path.read_bytes() == PICTURE
    await put(store, "only/in/the database.png", on_disk=False)
    assert (await ask(app, f"{PREFIX}/only/in/the%20database.png")).body == PICTURE
    await put(store, "deleted.png")
    await store.delete("deleted.png")
    for name in ("absent.png", "deleted.png"):
        answer = await ask(wrapping(store, mode, Wrapped(418)), f"{PREFIX}/{name}")
        assert (answer.status, answer.body, answer.headers["cache-control"]) == (418, b"wrapped", "no-store")


async def test_large_file_comes_back(store: UploadStore, mode: bool) -> None:
    """A file of many chunks comes back whole, at the first request."""
    app = wrapping(store, mode, static_over(store.disk.path))
    path = await put(store, "film.mp4", FILM, on_disk=False)
    assert (await ask(app, f"{PREFIX}/film.mp4")).body == FILM
    assert path.read_bytes() == FILM


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_unknown(broken_store: UploadStore, mode: bool, method: str) -> None:
    """With the database down a hit is 200, and a miss is 503, never 404; the wrapped app is not asked about it."""
    lay(broken_store.disk.path / "hit.png")
    inner = Wrapped()
    hit = await ask(
        wrapping(broken_store, mode, static_over(broken_store.disk.path)), f"{PREFIX}/hit.png", method=method
    )
    assert (hit.status, hit.headers["content-length"]) == (200, "5000")
    for _ in range(2):
        assert_unknown(await ask(wrapping(broken_store, mode, inner), f"{PREFIX}/miss.png", method=method))
    assert inner.scopes == []


async def test_unknown_is_not_remembered_as_absent(directory: Path, sqlite_url: str, mode: bool) -> None:
    """As soon as the database answers again, so do we."""
    async with UploadStore(directory, sqlite_url) as store:
        app = wrapping(store, mode, static_over(directory))
        assert_unknown(await ask(app, f"{PREFIX}/a.png"))
        await store.database.create_tables()
        await put(store, "a.png", on_disk=False)
        assert (await ask(app, f"{PREFIX}/a.png")).body == PICTURE


async def test_missing_tables(directory: Path, database_url: str, mode: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Without its tables the database knows nothing: 503, and one critical line that says what to run."""
    async with UploadStore(directory, database_url) as store:
        for index in range(3):
            assert_unknown(await ask(wrapping(store, mode), f"{PREFIX}/{index}.png"))
    critical = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
    assert len(critical) == 1
    assert "selfheal migrate" in critical[0]


async def test_locked_database(directory: Path, sqlite_url: str, mode: bool) -> None:
    """A SQLite that somebody keeps locked is unknown, by the deadline; hits do not notice."""
    async with UploadStore(directory, sqlite_url, deadline=1.0) as store:
        await store.database.create_tables()
        await put(store, "hit.png")
        app = wrapping(store, mode, static_over(directory))
        with sqlite3.connect(sqlite_url.partition("///")[2]) as other:
            other.execute("PRAGMA locking_mode=EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            started = time.monotonic()
            assert_unknown(await ask(app, f"{PREFIX}/miss.png"))
            assert time.monotonic() - started < 8
            assert (await ask(app, f"{PREFIX}/hit.png")).body == PICTURE
        other.close()


async def test_silent_database(directory: Path, mode: bool) -> None:
    """A database that takes connections and says nothing is unknown by the deadline, for every asker; hits go on."""
    with socket.socket() as black_hole:
        black_hole.bind(("127.0.0.1", 0))
        black_hole.listen(64)
        url = f"postgresql+asyncpg://nobody@127.0.0.1:{black_hole.getsockname()[1]}/none"
        async with UploadStore(directory, url, deadline=1.0) as store:
            lay(directory / "hit.png")
            app, started = wrapping(store, mode, static_over(directory)), time.monotonic()
            misses = [ask(app, f"{PREFIX}/{index}.png") for index in range(20)]
            hits = [ask(app, f"{PREFIX}/hit.png") for _ in range(20)]
            answers = await asyncio.gather(*hits, *misses)
            assert time.monotonic() - started < 8
        assert [answer.status for answer in answers[:20]] == [200] * 20
        for answer in answers[20:]:
            assert_unknown(answer)


@pytest.mark.parametrize("data", [PICTURE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("damage", ["data", "missing"])
async def test_damaged_in_the_database(
    sqlite_store: UploadStore, sqlite_url: str, mode: bool, data: bytes, damage: str
) -> None:
    """Damaged bytes are a 500, never stored, not written, and not the wrapped app's affair; the record stays."""
    path = await put(sqlite_store, "a.png", data, on_disk=False)
    with sqlite3.connect(sqlite_url.partition("///")[2]) as other:
        if damage == "data":
            other.execute("UPDATE image_chunk SET data = zeroblob(length(data)) WHERE position = 0")
        else:
            other.execute("DELETE FROM image_chunk WHERE position = 0")
    other.close()
    for method in ("GET", "HEAD"):
        answer = await ask(wrapping(sqlite_store, mode), f"{PREFIX}/a.png", method=method)
        assert (answer.status, answer.headers["cache-control"]) == (500, "no-store")
        assert "x-wrapped" not in answer.headers
    assert not path.exists()
    assert await sqlite_store.database.find("a.png")


@pytest.mark.parametrize("place", ["only in the database", "past a disk that takes no file"])
@pytest.mark.parametrize("forged", [False, True])
async def test_damaged_large_file_is_never_sent_whole(
    directory: Path, sqlite_url: str, place: str, forged: bool
) -> None:
    """Where the answer begins before the end is known, damage at the end breaks it off: no copy looks complete.

    Not even damage that only the whole digest tells: a last chunk that is good in itself, and another file's.
    """
    async with UploadStore(directory, sqlite_url, require_marker=place.startswith("past")) as store:
        await store.database.create_tables()
        path = await put(store, "film.mp4", FILM, on_disk=False)
        position = len(FILM) // CHUNK - 1
        data = bytes(CHUNK)
        digest = chunk_digest(position, data) if forged else bytes(32)
        with sqlite3.connect(sqlite_url.partition("///")[2]) as other:
            other.execute("UPDATE image_chunk SET data = ?, digest = ? WHERE position = ?", (data, digest, position))
        other.close()
        answer = Answer()

        async def send(message: Message) -> None:
            answer.take(message)

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        with pytest.raises(Exception, match="damaged"):
            await wrapping(store, True)(scope_of(f"{PREFIX}/film.mp4"), receive, send)
        assert len(answer.body) < len(FILM)
        assert not answer.is_over
        await store.tasks.settle(10)
        assert not path.exists()
        assert open_below(directory) == []


async def test_disk_takes_no_file(directory: Path, sqlite_url: str) -> None:
    """With `serve`, what the disk does not take is served from the database; without, it is a 503, never a 404."""
    async with UploadStore(directory, sqlite_url, require_marker=True) as store:
        await store.database.create_tables()
        for name, data in (("a.png", PICTURE), ("b.png", LARGE), ("c.mp4", FILM)):
            await put(store, name, data, on_disk=False)
            assert (await ask(wrapping(store, True), f"{PREFIX}/{name}")).body == data
            assert_unknown(await ask(wrapping(store, False), f"{PREFIX}/{name}"))
        assert (await ask(wrapping(store, True), f"{PREFIX}/absent.png")).status == 404
    assert not directory.exists()


async def test_just_uploaded_elsewhere(store: UploadStore, mode: bool) -> None:
    """A name that was absent a moment ago, and that another node has saved since, is served within 2 s."""
    app = wrapping(store, mode, static_over(store.disk.path))
    assert (await ask(app, f"{PREFIX}/new.png")).status == 404
    await store.database.store_image("new.png", PICTURE)

    async def is_served() -> bool:
        return (await ask(app, f"{PREFIX}/new.png")).body == PICTURE

    started = time.monotonic()
    await eventually(is_served)
    assert time.monotonic() - started < 6


async def test_many_clients_one_missing_name(store: UploadStore, mode: bool) -> None:
    """All of them get the whole file."""
    await put(store, "a.png", LARGE[:300_000], on_disk=False)
    app = wrapping(store, mode, static_over(store.disk.path))
    answers = await asyncio.gather(*(ask(app, f"{PREFIX}/a.png") for _ in range(100)))
    assert all(answer.status == 200 and answer.body == LARGE[:300_000] for answer in answers)


# -- no-store and the headers of safety -------------------------------------------------------------------------------


HIDDEN = (f"{PREFIX}/absent.png", f"{PREFIX}/%2e%2e/x", f"{PREFIX}/.hidden", f"{PREFIX}/", f"{PREFIX}//a")


@pytest.mark.parametrize("status", [404, 403, 401, 302, 410, 500, 418])
async def test_wrapped_answers_are_not_stored(sqlite_store: UploadStore, mode: bool, status: int) -> None:
    """Whatever the wrapped app says of a name that is not there, nobody may store it."""
    app = wrapping(sqlite_store, mode, Wrapped(status, [("cache-control", "public, max-age=31536000")]))
    for method, target in itertools.product(("GET", "HEAD"), HIDDEN):
        answer = await ask(app, target, method=method)
        said = (answer.status, answer.headers["cache-control"], answer.headers["x-wrapped"])
        assert said == (status, "no-store", "yes"), target


@pytest.mark.parametrize("target", ["/", "/static/app.css", "/static/uploads", "/static/uploads_private/a.png", "/a/b"])
async def test_other_paths_are_left_alone(sqlite_store: UploadStore, mode: bool, target: str) -> None:
    """What is not below the prefix passes as it is, header by header (CVE-2023-29159: a prefix sibling)."""
    inner = Wrapped(404, [("cache-control", "max-age=60"), ("x-own", "1")])
    through, direct = await ask(wrapping(sqlite_store, mode, inner), target), await ask(inner, target)
    assert (through.status, through.headers, through.body) == (direct.status, direct.headers, direct.body)
    assert inner.scopes[0]["path"] == target


@pytest.mark.parametrize("on_disk", [True, False])
async def test_scripts_are_sandboxed(sqlite_store: UploadStore, on_disk: bool) -> None:
    """SVG, HTML and XML come with a sandbox, from the disk and out of the database (CVE-2020-15275)."""
    data = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    names = ("a.svg", "a.SVG", "a.html", "a.htm", "a.xhtml", "a.xml", "a.xsl")
    paths = {name: await put(sqlite_store, name, data) for name in names}
    requests = (
        ("GET", [], 200),
        ("HEAD", [], 200),
        ("GET", [("Range", "bytes=0-3")], 206),
        ("GET", [("If-None-Match", "*")], 304),
    )
    for name, (method, headers, status) in itertools.product(names, requests):
        if not on_disk:
            paths[name].unlink()
        answer = await ask(wrapping(sqlite_store, True), f"{PREFIX}/{name}", method=method, headers=headers)
        policy = "sandbox; default-src 'none'; style-src 'unsafe-inline'"
        assert (answer.status, answer.headers["content-security-policy"]) == (status, policy), name
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_never_sniffed(sqlite_store: UploadStore, sqlite_url: str, tmp_path: Path, dead_port: int) -> None:
    """`nosniff` with every answer of ours: 200, 206, 304, 404, 412, 416, 500, 503."""
    await put(sqlite_store, "a.png")
    await put(sqlite_store, "damaged.png", LARGE, on_disk=False)
    with sqlite3.connect(sqlite_url.partition("///")[2]) as other:
        other.execute("UPDATE image_chunk SET data = zeroblob(length(data)) WHERE position = 3")
    other.close()
    dead = UploadStore(tmp_path / "dead", f"postgresql+asyncpg://nobody@127.0.0.1:{dead_port}/none")
    app, statuses = wrapping(sqlite_store, True), set()
    for over, target, headers in (
        (app, "a.png", []),
        (app, "a.png", [("Range", "bytes=0-3")]),
        (app, "a.png", [("If-None-Match", "*")]),
        (app, "a.png", [("If-Match", '"x"')]),
        (app, "a.png", [("Range", "bytes=9999-")]),
        (app, ".selfheal-tmp/x", []),
        (app, "damaged.png", []),
        (wrapping(dead, True), "miss.png", []),
    ):
        answer = await ask(over, f"{PREFIX}/{target}", headers=headers)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert ("cache-control" in answer.headers) == (answer.status not in (200, 206, 304))
        statuses.add(answer.status)
    assert statuses == {200, 206, 304, 404, 412, 416, 500, 503}
    await dead.close()


async def test_cache_control_of_ones_own(sqlite_store: UploadStore) -> None:
    """The option is said with 200, 206 and 304, from the disk and out of the database; all else is `no-store`."""
    path = await put(sqlite_store, "a.png")
    app = wrapping(sqlite_store, True, cache_control="public, max-age=31536000, immutable")
    for headers, status in (
        ([], 200),
        ([("Range", "bytes=0-3")], 206),
        ([("If-None-Match", "*")], 304),
        ([("If-Match", '"x"')], 412),
        ([("Range", "bytes=9999-")], 416),
    ):
        for on_disk in (True, False):
            if not on_disk:
                path.unlink()
            answer = await ask(app, f"{PREFIX}/a.png", headers=headers)
            expected = "public, max-age=31536000, immutable" if status in (200, 206, 304) else "no-store"
            assert (answer.status, answer.headers["cache-control"]) == (status, expected)
    assert (await ask(app, f"{PREFIX}/absent.png")).headers["cache-control"] == "no-store"


# -- what is not ours -------------------------------------------------------------------------------------------------


METHODS = ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "QUERY", "get", "")


async def test_other_methods(broken_store: UploadStore, mode: bool) -> None:
    """Every method but GET and HEAD is the wrapped app's, unseen: not even a database that is down is noticed."""
    inner = Wrapped(405, [("cache-control", "max-age=1")])
    lay(broken_store.disk.path / "hit.png")
    for method, name in itertools.product(METHODS, ("hit.png", "miss.png", ".hidden")):
        scope = scope_of(f"{PREFIX}/{name}", method=method)
        answer = await ask_scope(wrapping(broken_store, mode, inner), scope)
        assert (answer.status, answer.headers["cache-control"]) == (405, "max-age=1"), method
        assert inner.scopes[-1] is scope


@pytest.mark.parametrize("kind", ["websocket", "webtransport", "something.new"])
async def test_other_scopes(broken_store: UploadStore, mode: bool, kind: str) -> None:
    """A websocket, even below the prefix, is the wrapped app's: the same scope, the same receive, the same send."""
    seen: list[object] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend((scope, receive, send))

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    scope = {**scope_of(f"{PREFIX}/miss.png"), "type": kind}
    before = dict(scope)
    await wrapping(broken_store, mode, inner)(scope, receive, send)
    assert [id(thing) for thing in seen] == [id(scope), id(receive), id(send)]
    assert scope == before


async def test_scope_is_handed_on_unchanged(sqlite_store: UploadStore, mode: bool) -> None:
    """The wrapped app sees the request as the server made it."""
    inner = Wrapped()
    scope = scope_of(f"{PREFIX}/absent%20one.png?x=1", headers=[("Range", "bytes=0-1")], root_path="", state={"a": 1})
    before = dict(scope)
    await ask_scope(wrapping(sqlite_store, mode, inner), scope)
    assert inner.scopes == [before]


async def test_error_of_the_wrapped_app_passes(sqlite_store: UploadStore, mode: bool) -> None:
    """What the wrapped app raises is for its server and its own middleware to see."""

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError("of the app")

    for target in ("/elsewhere", f"{PREFIX}/absent.png", f"{PREFIX}/.hidden"):
        with pytest.raises(ZeroDivisionError, match="of the app"):
            await ask(wrapping(sqlite_store, mode, inner), target)


@pytest.mark.parametrize("kind", ["directory", "fifo", "socket", "link", "linked directory", "loop"])
async def test_not_a_file(broken_store: UploadStore, kind: str, tmp_path: Path) -> None:
    """What is no regular file is the wrapped app's, at once, and no business of the database (CVE-2024-23334)."""
    root, name = broken_store.disk.path, "thing.png"
    root.mkdir(parents=True)
    lay(tmp_path / "secret" / "secret.png", SECRET)
    if kind == "directory":
        (root / name).mkdir()
    elif kind == "fifo":
        os.mkfifo(root / name)
    elif kind == "socket":
        make_socket(root / name)
    elif kind == "link":
        (root / name).symlink_to(tmp_path / "secret" / "secret.png")
    elif kind == "linked directory":
        (root / "linked").symlink_to(tmp_path / "secret")
        name = "linked/secret.png"
    elif kind == "loop":
        (root / name).symlink_to(name)
    for mode in (True, False):
        app = wrapping(broken_store, mode)
        answer = await asyncio.wait_for(ask(app, f"{PREFIX}/{name}"), 20)
        assert (answer.status, answer.body, answer.headers["cache-control"]) == (404, b"wrapped", "no-store")


async def test_file_where_a_directory_is_asked_for(broken_store: UploadStore, mode: bool) -> None:
    """A name below a file is only missing on disk: what it is, the database knows."""
    lay(broken_store.disk.path / "good.png")
    assert_unknown(await ask(wrapping(broken_store, mode), f"{PREFIX}/good.png/x.png"))


# -- our own names ----------------------------------------------------------------------------------------------------

OWN = (
    f"{PREFIX}/.selfheal-tmp/0123456789abcdef", f"{PREFIX}/.selfheal-quarantine/20260101T000000-00000000/a.png",
    f"{PREFIX}/.selfheal-marker", "/static/.selfheal-quarantine-uploads/20260101T000000-00000000/a.png",
)  # fmt: skip


TRICKS: tuple[Callable[[str], str], ...] = (
    lambda target: target,
    lambda target: target.replace("/.selfheal", "/%2eselfheal"),
    lambda target: target.replace("/.selfheal", "/./.selfheal"),
    lambda target: target.replace("/.selfheal", "//.selfheal"),
    lambda target: target.replace("/static/", "/static/uploads/../", 1),
    lambda target: target.replace("/static/", "/static/x/../", 1),
)


@pytest.mark.parametrize("target", OWN)
async def test_own_names_are_never_served(tmp_path: Path, sqlite_url: str, mode: bool, target: str) -> None:
    """Not even by a wrapped StaticFiles over the directory above: what we keep on disk is for nobody to fetch.

    The parent is no public directory by name, so the quarantine stands in it.
    """
    parent = tmp_path / "files"
    async with UploadStore(parent / "uploads", sqlite_url) as store:
        await store.database.create_tables()
        assert store.disk.quarantine_path == parent / ".selfheal-quarantine-uploads"
        app = wrapping(store, mode, static_over(parent, "/static"))
        lay(parent / target.removeprefix("/static/"), SECRET)
        lay(parent / "style.css", b"of the app")
        assert (await ask(app, "/static/style.css")).body == b"of the app"
        for trick, method, headers in itertools.product(TRICKS, ("GET", "HEAD"), ([], [("Range", "bytes=0-5")])):
            answer = await ask(app, trick(target), method=method, headers=headers)
            assert answer.status == 404, trick(target)
            assert SECRET[:5] not in answer.body, trick(target)


async def test_quarantined_copy_is_not_served(tmp_path: Path, sqlite_url: str, mode: bool) -> None:
    """A copy that went to quarantine is not to be had under its path there."""
    parent = tmp_path / "files"
    async with UploadStore(parent / "uploads", sqlite_url) as store:
        await store.database.create_tables()
        await put(store, "a.png")
        lay(parent / "uploads" / "a.png", SECRET)
        await store.check("a.png")
        (moved,) = (path for path in parent.rglob("a.png") if path.read_bytes() == SECRET)
        app = wrapping(store, mode, static_over(parent, "/static"))
        answer = await ask(app, f"/static/{quote(str(moved.relative_to(parent)))}")
        assert (answer.status, SECRET in answer.body) == (404, False)
        assert (await ask(app, f"{PREFIX}/a.png")).body == PICTURE


# -- where it stands --------------------------------------------------------------------------------------------------


BELOW_ROOT_PATH = (
    ("", f"{PREFIX}/a.png"),
    ("/sub", f"/sub{PREFIX}/a.png"),
    ("/sub/deeper", f"/sub/deeper{PREFIX}/a.png"),
    ("/sub", f"{PREFIX}/a.png"),
    ("/static", f"/static{PREFIX}/a.png"),
    (PREFIX, f"{PREFIX}{PREFIX}/a.png"),
    ("/sub", f"/sub{PREFIX}/%61.png"),
)
NOT_BELOW_ROOT_PATH = (
    ("/su", f"/sub{PREFIX}/a.png"),
    ("/sub", f"/subway{PREFIX}/a.png"),
    ("/static/uploads", f"{PREFIX}/a.png"),
    ("/sub", f"/x/sub{PREFIX}/a.png"),
    ("", f"/sub{PREFIX}/a.png"),
    ("/sub", f"/sub{PREFIX}_private/a.png"),
    ("/sub", f"/sub/sub{PREFIX}/a.png"),
    ("/sub", f"/sub{PREFIX}/../a.png"),
)


async def test_root_path(sqlite_store: UploadStore, mode: bool) -> None:
    """Below a root path, which servers put before the path and some proxies do not, names are the same."""
    path = await put(sqlite_store, "a.png")
    app = wrapping(sqlite_store, mode, Wrapped(200, body=b"handed on"))
    for root_path, target in BELOW_ROOT_PATH:
        path.unlink()
        answer = await ask(app, target, root_path=root_path)
        assert answer.body == (PICTURE if mode else b"handed on"), (root_path, target)
        assert path.read_bytes() == PICTURE, (root_path, target)


async def test_root_path_that_is_not_the_paths(broken_store: UploadStore, mode: bool) -> None:
    """A root path is whole parts of the path, once; what is not below root path and prefix is the wrapped app's."""
    for root_path, target in NOT_BELOW_ROOT_PATH:
        answer = await ask(wrapping(broken_store, mode), target, root_path=root_path)
        assert (answer.status, answer.body) == (404, b"wrapped"), (root_path, target)


async def test_mounted_below_a_path(sqlite_store: UploadStore, mode: bool) -> None:
    """Inside Starlette's `Mount`, whose routes never see a lifespan, it serves and heals."""
    await put(sqlite_store, "a.png", on_disk=False)
    inner = wrapping(sqlite_store, mode, static_over(sqlite_store.disk.path))
    app = Starlette(routes=[Mount("/sub", inner), Route("/", lambda request: PlainTextResponse("home"))])
    assert (await ask(app, f"/sub{PREFIX}/a.png")).body == PICTURE
    assert (await ask(app, f"{PREFIX}/a.png")).status == 404
    assert (await ask(app, "/")).body == b"home"


async def test_other_prefix(sqlite_store: UploadStore, mode: bool) -> None:
    """With a prefix of one's own, of any letters and with spaces, the default one is the wrapped app's."""
    await put(sqlite_store, "a.png")
    app = wrapping(sqlite_store, mode, static_over(sqlite_store.disk.path, "/médias publics"), prefix="/médias publics")
    assert (await ask(app, f"{quote('/médias publics')}/a.png")).body == PICTURE
    assert (await ask(app, f"{PREFIX}/a.png")).status == 404


@pytest.mark.parametrize("prefix", ["", "/", "static", "/static/", "//static", "/a//b", "/a%20b", "http://x/y"])
def test_prefix_that_cannot_be_one(directory: Path, sqlite_url: str, prefix: str) -> None:
    """A prefix that no request could match is refused at once."""
    with pytest.raises(SettingsError):
        SelfHealMiddleware(Wrapped(), UploadStore(directory, sqlite_url), prefix=prefix)


async def test_store_from_the_environment(directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a store the environment says where everything is, the prefix as well."""
    monkeypatch.setenv("SELFHEAL_DIRECTORY", str(directory))
    monkeypatch.setenv("SELFHEAL_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("SELFHEAL_PREFIX", "/media")
    app = SelfHealMiddleware(Wrapped())
    try:
        await app.store.database.create_tables()
        await put(app.store, "a.png")
        assert (await ask(app, "/media/a.png")).body == PICTURE
        assert (await ask(app, f"{PREFIX}/a.png")).body == b"wrapped"
    finally:
        await app.store.close()


async def test_server_without_a_raw_path(sqlite_store: UploadStore, mode: bool) -> None:
    """`raw_path` is optional in ASGI; without it everything works."""
    await put(sqlite_store, "a b.png")
    app = wrapping(sqlite_store, mode, static_over(sqlite_store.disk.path))
    for more in ({"raw_path": None}, {}):
        scope = scope_of(f"{PREFIX}/a%20b.png", **more)
        if not more:
            del scope["raw_path"], scope["root_path"]
        assert (await ask_scope(app, scope)).body == PICTURE


# -- path send --------------------------------------------------------------------------------------------------------


async def test_path_send(sqlite_store: UploadStore) -> None:
    """Where the server offers it, it gets the absolute path of a large file, with the headers of any 200."""
    path = await put(sqlite_store, "film.mp4", LARGE)
    app, offer = wrapping(sqlite_store, True), {"http.response.pathsend": {}}
    plain = await ask(app, f"{PREFIX}/film.mp4")
    sent = await ask(app, f"{PREFIX}/film.mp4", extensions=offer)
    assert [message["type"] for message in sent.messages] == ["http.response.start", "http.response.pathsend"]
    assert sent.messages[1]["path"] == str(path)
    assert os.path.isabs(sent.messages[1]["path"])
    assert (sent.status, sent.headers) == (plain.status, plain.headers)


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", [("Range", "bytes=0-9")], 206),
        ("GET", [("Range", f"bytes=1-{len(LARGE)}")], 206),
        ("GET", [("If-None-Match", "*")], 304),
        ("GET", [("If-Match", '"x"')], 412),
        ("GET", [("Range", "bytes=99999999-")], 416),
        ("HEAD", [], 200),
    ],
)
async def test_no_path_send(
    sqlite_store: UploadStore, method: str, headers: list[tuple[str, str]], status: int
) -> None:
    """What is not a whole file is never sent by its path, offered or not."""
    await put(sqlite_store, "film.mp4", LARGE)
    offer = {"http.response.pathsend": {}}
    answer = await ask(
        wrapping(sqlite_store, True), f"{PREFIX}/film.mp4", method=method, headers=headers, extensions=offer
    )
    assert answer.status == status
    assert {message["type"] for message in answer.messages} == {"http.response.start", "http.response.body"}


@pytest.mark.parametrize("size", [0, 1, 4096, 256 * 1024, 256 * 1024 + 1])
async def test_offer_of_path_send_loses_nothing(sqlite_store: UploadStore, size: int) -> None:
    """With the offer, of every size and out of the database, the bytes are those of the file."""
    path = await put(sqlite_store, "a.png", LARGE[:size])
    app, offer = wrapping(sqlite_store, True), {"http.response.pathsend": {}}
    for on_disk in (True, False):
        if not on_disk:
            path.unlink()
        answer = await ask(app, f"{PREFIX}/a.png", extensions=offer)
        last = answer.messages[-1]
        sent = Path(last["path"]).read_bytes() if last["type"] == "http.response.pathsend" else answer.body
        assert sent == LARGE[:size]


async def test_path_send_of_the_wrapped_app_passes(sqlite_store: UploadStore) -> None:
    """Starlette's own FileResponse sends a path where that is offered, and it comes through."""
    path = await put(sqlite_store, "film.mp4", LARGE)
    app = wrapping(sqlite_store, False, static_over(sqlite_store.disk.path))
    answer = await ask(app, f"{PREFIX}/film.mp4", extensions={"http.response.pathsend": {}})
    assert answer.messages[-1] == {"type": "http.response.pathsend", "path": str(path)}


# -- clients that go away ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("place", ["on disk", "only in the database", "past a disk that takes no file"])
async def test_client_gone(tmp_path: Path, sqlite_url: str, spec_version: str, place: str) -> None:
    """In the middle of a large body: no descriptor, no task and no connection stays behind (CVE-2026-54280)."""
    root = tmp_path / "files" / "uploads"
    async with UploadStore(root, sqlite_url, require_marker=place.startswith("past")) as store:
        await store.database.create_tables()
        path = await put(store, "film.mp4", FILM, on_disk=place == "on disk")
        app = wrapping(store, True)
        assert (await ask(app, f"{PREFIX}/absent.png")).status == 404
        await store.tasks.settle(10)
        tasks = asyncio.all_tasks()
        for after in (0, 1, 300_000, 1_000_000):
            if place == "only in the database":
                path.unlink(missing_ok=True)
            scope = scope_of(f"{PREFIX}/film.mp4")
            scope["asgi"]["spec_version"] = spec_version
            if spec_version == "2.3":
                answer = await ask_and_leave(app, scope, after=after)
            else:
                with pytest.raises(OSError, match="gone"):
                    await ask_and_leave(app, scope, after=after, fails=True)
                answer = Answer(200)
            assert len(answer.body) < len(FILM)
            await store.tasks.settle(10)
        assert open_below(root) == []
        assert asyncio.all_tasks() == tasks
        assert (await ask(app, f"{PREFIX}/film.mp4")).body == FILM


async def test_cancelled_requests_leak_no_connection(store: UploadStore, mode: bool) -> None:
    """Requests that are cancelled at any moment leave the database usable, and no torn file.

    A BaseHTTPMiddleware around us cancels so when a client goes away (SQLAlchemy 12077).
    """
    app = wrapping(store, mode, static_over(store.disk.path))
    paths = [await put(store, f"{index}.png", LARGE, on_disk=False) for index in range(12)]
    tasks = asyncio.all_tasks()
    for index in range(12):
        request = asyncio.create_task(ask(app, f"{PREFIX}/{index}.png"))
        await asyncio.sleep(index / 800)
        request.cancel()
        await asyncio.wait((request,))
    await store.tasks.settle(30)
    for path in paths:
        assert not path.exists() or path.read_bytes() == LARGE
        path.unlink(missing_ok=True)
    answers = await asyncio.gather(*(ask(app, f"{PREFIX}/{index}.png") for index in range(12)))
    assert [answer.body == LARGE for answer in answers] == [True] * 12
    await store.tasks.settle(30)
    assert asyncio.all_tasks() == tasks


async def under_way(store: UploadStore) -> None:
    """Wait until a restore has begun to write."""

    give_up = time.monotonic() + 10
    while not any("(deleted)" in link for link in open_below(store.disk.path)):  # it may be over in 20 ms
        assert time.monotonic() < give_up, "no restore was seen"
        await asyncio.sleep(0)


async def test_restore_outlives_its_asker(store: UploadStore, mode: bool) -> None:
    """A restore whose only asker goes away goes on to its end, and leaves nothing open."""
    path = await put(store, "film.mp4", FILM, on_disk=False)
    request = asyncio.create_task(ask(wrapping(store, mode), f"{PREFIX}/film.mp4"))
    await under_way(store)
    request.cancel()
    await asyncio.wait((request,))
    await store.tasks.settle(30)
    assert path.read_bytes() == FILM
    assert open_below(store.disk.path) == []


async def test_first_asker_gone(store: UploadStore) -> None:
    """The asker that began a restore goes away; those who joined it get the file."""
    await put(store, "a.png", LARGE, on_disk=False)
    app = wrapping(store, True)
    first = asyncio.create_task(ask(app, f"{PREFIX}/a.png"))
    others = [asyncio.create_task(ask(app, f"{PREFIX}/a.png")) for _ in range(5)]
    await asyncio.sleep(0)
    first.cancel()
    assert [(await other).body == LARGE for other in others] == [True] * 5
    await asyncio.wait((first,))


async def test_stalled_clients_hold_no_connection(directory: Path, sqlite_url: str) -> None:
    """More clients that read nothing than the pool has connections, served past a full disk: others are answered."""
    async with UploadStore(directory, sqlite_url, require_marker=True) as store:
        await store.database.create_tables()
        await put(store, "film.mp4", FILM, on_disk=False)
        await put(store, "a.png", on_disk=False)
        app, go_on, stalled = wrapping(store, True), asyncio.Event(), 0

        async def send(message: Message) -> None:
            nonlocal stalled
            if message.get("body"):
                stalled += 1
                await go_on.wait()

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        clients = [asyncio.create_task(app(scope_of(f"{PREFIX}/film.mp4"), receive, send)) for _ in range(16)]

        async def all_stalled() -> bool:
            return stalled == 16

        await eventually(all_stalled)
        assert (await ask(app, f"{PREFIX}/a.png")).body == PICTURE
        assert (await ask(app, f"{PREFIX}/absent.png")).status == 404
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def test_deleted_while_it_is_sent(sqlite_store: UploadStore) -> None:
    """Who is being sent a file gets all of it, though it is deleted meanwhile; the next one does not."""
    await put(sqlite_store, "film.mp4", LARGE)
    app, answer = wrapping(sqlite_store, True), Answer()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body" and not answer.body:
            await sqlite_store.delete("film.mp4")
        answer.take(message)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    await app(scope_of(f"{PREFIX}/film.mp4"), receive, send)
    assert answer.body == LARGE
    assert (await ask(app, f"{PREFIX}/film.mp4")).body == b"wrapped"


# -- among other middleware -------------------------------------------------------------------------------------------


class Stamp(BaseHTTPMiddleware):
    """A middleware as apps have them."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-stamp"] = request.url.path
        return response


@pytest.mark.parametrize("data", [b"", LARGE, FILM], ids=["empty", "large", "film"])
@pytest.mark.parametrize("offer", [{}, {"http.response.pathsend": {}}], ids=["no offer", "path send"])
async def test_base_http_middleware_around(
    sqlite_store: UploadStore, mode: bool, data: bytes, offer: dict[str, object]
) -> None:
    """Inside a BaseHTTPMiddleware bytes, conditions and ranges are the same, from the disk and out of the database."""
    path = await put(sqlite_store, "film.mp4", data)
    app = Stamp(wrapping(sqlite_store, mode, static_over(sqlite_store.disk.path)))
    for _ in range(2):
        answer = await ask(app, f"{PREFIX}/film.mp4", extensions=offer)
        last = answer.messages[-1]
        assert (answer.status, answer.headers["x-stamp"]) == (200, f"{PREFIX}/film.mp4")
        assert (Path(last["path"]).read_bytes() if "path" in last else answer.body) == data
        tag = [("If-None-Match", answer.headers["etag"])]
        assert (await ask(app, f"{PREFIX}/film.mp4", headers=tag, extensions=offer)).status == 304
        if data:
            part = await ask(app, f"{PREFIX}/film.mp4", headers=[("Range", "bytes=0-9")], extensions=offer)
            assert (part.status, part.body) == (206, data[:10])
        await sqlite_store.tasks.settle(10)
        path.unlink()


async def test_base_http_middleware_around_a_client_that_goes(sqlite_store: UploadStore) -> None:
    """Clients that go away leave nothing behind around a BaseHTTPMiddleware, too (SQLAlchemy 12077)."""
    path = await put(sqlite_store, "film.mp4", FILM, on_disk=False)
    app, tasks = Stamp(wrapping(sqlite_store, True)), asyncio.all_tasks()
    for after in (0, 1, 300_000, 1_000_000):
        path.unlink(missing_ok=True)
        await ask_and_leave(app, scope_of(f"{PREFIX}/film.mp4"), after=after)
        await sqlite_store.tasks.settle(10)
    assert asyncio.all_tasks() == tasks
    assert open_below(sqlite_store.disk.path) == []
    assert (await ask(app, f"{PREFIX}/film.mp4")).body == FILM


async def test_base_http_middleware_inside(sqlite_store: UploadStore, mode: bool) -> None:
    """Around a BaseHTTPMiddleware hits and healing are ours, and the app answers what is absent with its own stamp."""
    path = await put(sqlite_store, "a.png")
    app = wrapping(sqlite_store, mode, Stamp(static_over(sqlite_store.disk.path)))
    for _ in range(2):
        answer = await ask(app, f"{PREFIX}/a.png")
        assert (answer.status, answer.body) == (200, PICTURE)
        path.unlink()
    absent = await ask(app, f"{PREFIX}/absent.png")
    assert (absent.status, absent.headers["x-stamp"]) == (404, f"{PREFIX}/absent.png")
    assert absent.headers["cache-control"] == "no-store"


async def test_add_middleware(sqlite_store: UploadStore, mode: bool) -> None:
    """`app.add_middleware(SelfHealMiddleware, store=…)`, as the README says, between other middleware."""
    path = await put(sqlite_store, "a.png", on_disk=False)
    app = Starlette(
        routes=[Mount(PREFIX, StaticFiles(directory=sqlite_store.disk.path, check_dir=False))],
        middleware=[
            Middleware(Stamp),
            Middleware(SelfHealMiddleware, store=sqlite_store, serve=mode),
            Middleware(Stamp),
        ],
    )
    assert (await ask(app, f"{PREFIX}/a.png")).body == PICTURE
    assert path.read_bytes() == PICTURE
    assert (await ask(app, f"{PREFIX}/absent.png")).status == 404


async def test_guard_of_the_wrapped_app(sqlite_store: UploadStore) -> None:
    """Without `serve` the wrapped app's own checks hold for every file; with it, they are outside."""
    await put(sqlite_store, "a.png", on_disk=False)
    guarded = wrapping(sqlite_store, False, Wrapped(403, [("cache-control", "max-age=60")]))
    answer = await ask(guarded, f"{PREFIX}/a.png")
    assert (answer.status, answer.headers["cache-control"]) == (403, "no-store")
    assert (await ask(wrapping(sqlite_store, True, Wrapped(403)), f"{PREFIX}/a.png")).body == PICTURE


# -- lifespan ---------------------------------------------------------------------------------------------------------


class Lifespan:
    """A server's side of the lifespan protocol."""

    def __init__(self, app: ASGIApp, state: dict[str, object] | None = None) -> None:
        self.said: list[Message] = []
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue()
        self.scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {} if state is None else state}
        self.task = asyncio.create_task(app(self.scope, self._to_app.get, self._from_app.put))  # type: ignore[arg-type]

    async def say(self, kind: str) -> Message:
        """Send `lifespan.<kind>`, and return what the app answers."""
        await self._to_app.put({"type": f"lifespan.{kind}"})
        return await asyncio.wait_for(self._from_app.get(), 20)


class Inner:
    """A wrapped app that notes what it was told, and answers as it should."""

    def __init__(self, startup: str = "startup.complete", shutdown: str = "shutdown.complete") -> None:
        self.answers = {"lifespan.startup": startup, "lifespan.shutdown": shutdown}
        self.told: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "lifespan"
        scope["state"]["from"] = "the app"
        while not self.told or self.told[-1] != "lifespan.shutdown":
            self.told.append((await receive())["type"])
            answer = self.answers[self.told[-1]]
            await send({"type": f"lifespan.{answer}", "message": "of the app"})
            if answer.endswith("failed"):
                return


@pytest.fixture
def fresh_store(directory: Path, sqlite_url: str) -> UploadStore:
    """A store that nobody has opened."""
    return UploadStore(directory, sqlite_url)


async def use(store: UploadStore) -> None:
    """Let a store open everything that it ever opens."""
    await store.database.create_tables()
    await put(store, "a.png", on_disk=False)
    await store.restore("a.png")


def is_closed(store: UploadStore) -> bool:
    """Whether nothing of a store is open."""
    return not [link for link in open_below(store.disk.path.parents[2]) if link != "/"]


async def test_lifespan_is_forwarded(fresh_store: UploadStore, mode: bool) -> None:
    """The app starts and stops as its server says, with its state, and the store closes with it."""
    inner = Inner()
    server = Lifespan(wrapping(fresh_store, mode, inner))
    assert await server.say("startup") == {"type": "lifespan.startup.complete", "message": "of the app"}
    assert server.scope["state"] == {"from": "the app"}
    await use(fresh_store)
    assert not is_closed(fresh_store)
    assert await server.say("shutdown") == {"type": "lifespan.shutdown.complete", "message": "of the app"}
    assert is_closed(fresh_store)
    await server.task
    assert inner.told == ["lifespan.startup", "lifespan.shutdown"]


async def test_startup_failed_passes(fresh_store: UploadStore, mode: bool) -> None:
    """An app that cannot start says so to the server, in its own words; the store is closed."""
    server = Lifespan(wrapping(fresh_store, mode, Inner(startup="startup.failed")))
    assert await server.say("startup") == {"type": "lifespan.startup.failed", "message": "of the app"}
    await server.task
    assert is_closed(fresh_store)


async def test_shutdown_failed_passes(fresh_store: UploadStore, mode: bool) -> None:
    """An app that cannot stop says so as well; the store is closed all the same."""
    server = Lifespan(wrapping(fresh_store, mode, Inner(shutdown="shutdown.failed")))
    await server.say("startup")
    await use(fresh_store)
    assert await server.say("shutdown") == {"type": "lifespan.shutdown.failed", "message": "of the app"}
    await server.task
    assert is_closed(fresh_store)


async def raises_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that knows no lifespan, as Django's."""
    raise ValueError("Django can only handle ASGI/HTTP connections, not lifespan.")


async def raises_after_startup(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that chokes on the first message."""
    await receive()
    raise KeyError("type")


async def returns_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that ignores what it does not know."""


async def returns_after_startup(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that listens and says nothing."""
    await receive()


async def listens_in_silence(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that asserts the kind of the scope, in the way of old frameworks."""
    assert scope["type"] in ("http", "websocket")


REFUSALS = [raises_at_once, raises_after_startup, returns_at_once, returns_after_startup, listens_in_silence]


@pytest.mark.parametrize("inner", REFUSALS, ids=lambda inner: inner.__name__)
async def test_app_without_lifespan(fresh_store: UploadStore, mode: bool, inner: ASGIApp) -> None:
    """An app that refuses lifespan is served as well; the store still opens and closes with the server."""
    server = Lifespan(wrapping(fresh_store, mode, inner))
    assert (await server.say("startup"))["type"] == "lifespan.startup.complete"
    await use(fresh_store)
    assert not is_closed(fresh_store)
    assert (await server.say("shutdown"))["type"] == "lifespan.shutdown.complete"
    await server.task
    assert is_closed(fresh_store)


async def test_error_after_startup_passes(fresh_store: UploadStore, mode: bool) -> None:
    """What an app raises once it has started is no refusal: the server hears of it, and the store is closed."""

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        raise ZeroDivisionError("of the app")

    server = Lifespan(wrapping(fresh_store, mode, inner))
    await server.say("startup")
    await use(fresh_store)
    server._to_app.put_nowait({"type": "lifespan.shutdown"})
    with pytest.raises(ZeroDivisionError, match="of the app"):
        await server.task
    assert is_closed(fresh_store)


async def test_startup_with_the_database_down(broken_store: UploadStore, mode: bool) -> None:
    """The app starts though the database is down, and serves its hits."""
    server = Lifespan(wrapping(broken_store, mode, Inner()))
    assert (await server.say("startup"))["type"] == "lifespan.startup.complete"
    lay(broken_store.disk.path / "hit.png")
    assert (await ask(wrapping(broken_store, True), f"{PREFIX}/hit.png")).body == PICTURE
    await server.say("shutdown")
    await server.task


async def test_litter_is_swept_at_startup(fresh_store: UploadStore, mode: bool) -> None:
    """What a process that was killed left half written is gone after the next start."""
    litter = lay(fresh_store.disk.path / ".selfheal-tmp" / "0123456789abcdef", b"half a fi")
    server = Lifespan(wrapping(fresh_store, mode, Inner()))
    await server.say("startup")
    assert not litter.exists()
    await server.say("shutdown")
    await server.task


async def test_restore_under_way_at_shutdown(fresh_store: UploadStore) -> None:
    """A restore that is under way when the server stops is finished, within its grace."""
    server = Lifespan(wrapping(fresh_store, True, Inner()))
    await server.say("startup")
    await fresh_store.database.create_tables()
    path = await put(fresh_store, "film.mp4", FILM, on_disk=False)
    request = asyncio.create_task(ask(wrapping(fresh_store, True), f"{PREFIX}/film.mp4"))
    await under_way(fresh_store)
    request.cancel()
    await server.say("shutdown")
    await server.task
    await asyncio.wait((request,))
    assert path.read_bytes() == FILM
    assert is_closed(fresh_store)


async def test_served_without_lifespan(fresh_store: UploadStore, mode: bool) -> None:
    """Where nobody speaks of lifespan the store opens at first use."""
    app = wrapping(fresh_store, mode, static_over(fresh_store.disk.path))
    try:
        assert_unknown(await ask(app, f"{PREFIX}/a.png"))
        await use(fresh_store)
        fresh_store.disk.path_of("a.png").unlink()
        assert (await ask(app, f"{PREFIX}/a.png")).body == PICTURE
    finally:
        await fresh_store.close()
    assert is_closed(fresh_store)


async def test_lifespan_twice(fresh_store: UploadStore, mode: bool) -> None:
    """A store that was closed opens again: servers that reload start the same app twice."""
    app = wrapping(fresh_store, mode, Inner())
    for _ in range(2):
        app.app.told.clear()  # type: ignore[attr-defined]
        server = Lifespan(app)
        await server.say("startup")
        await use(fresh_store)
        await server.say("shutdown")
        await server.task
        assert is_closed(fresh_store)


# -- asked again ------------------------------------------------------------------------------------------------------


async def test_what_was_answered_before(sqlite_store: UploadStore) -> None:
    """The second answer is the first, counted and compared with its record as that was; and no other question's."""
    path = await put(sqlite_store, "cats/tom.png")
    app, target = SelfHealMiddleware(Wrapped(), sqlite_store), f"{PREFIX}/cats/tom.png"
    answers = [await ask(app, target) for _ in range(3)]
    assert {answer.body for answer in answers} == {PICTURE}
    assert len({tuple(answer.headers.items()) for answer in answers}) == 1
    assert sqlite_store.events.counters[Kind.HIT] == 3
    assert (await ask(app, target, headers=[("If-None-Match", answers[0].headers["etag"])])).status == 304
    assert (await ask(app, target, method="HEAD")).headers == answers[0].headers
    assert (await ask(app, target, headers=[("Range", "bytes=1-9")])).body == PICTURE[1:10]
    for more in ({"raw_path": target.replace("s/t", "s%2ft").encode()}, {"method": "POST"}):
        assert (await ask_scope(app, scope_of(target) | more)).body == b"wrapped"
    path.unlink()
    assert (await ask(app, target)).body == PICTURE
    assert path.read_bytes() == PICTURE
    await sqlite_store.delete("cats/tom.png")
    assert (await ask(app, target)).body == b"wrapped"


async def test_what_was_answered_before_is_compared_once_it_changed(sqlite_store: UploadStore) -> None:
    """A copy that somebody lays over it, as old and as large, is found behind its first hit, as at the very first."""
    path = await put(sqlite_store, "tom.png")
    app, target = SelfHealMiddleware(Wrapped(), sqlite_store), f"{PREFIX}/tom.png"
    for _ in range(3):
        assert (await ask(app, target)).body == PICTURE
    await sqlite_store.tasks.settle(10)
    lay(path, PICTURE[1:])
    assert (await ask(app, target)).body == PICTURE[1:]
    await sqlite_store.tasks.settle(10)
    assert (await ask(app, target)).body == PICTURE


@pytest.mark.parametrize("data", [PICTURE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, None])
async def test_an_error_of_sending_is_none_of_the_disk(
    sqlite_store: UploadStore, data: bytes, code: int | None
) -> None:
    """Whoever is around us may fail with any error, and a server says without a number that its client is gone."""
    path = await put(sqlite_store, "tom.png", data)
    app, error = SelfHealMiddleware(Wrapped(), sqlite_store), OSError() if code is None else OSError(code, "no")

    async def send(_: Message) -> None:
        raise error

    for _ in range(2):
        with pytest.raises(OSError) as caught:
            await app(scope_of(f"{PREFIX}/tom.png"), asyncio.Event().wait, send)  # type: ignore[arg-type]
        assert caught.value is error
        assert path.read_bytes() == data
    assert sqlite_store.events.counters[Kind.QUARANTINED] == 0


def test_a_platform_with_fewer_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a platform has no number for is none of an error that has no number either."""
    monkeypatch.delattr(errno, "EUCLEAN")
    spec = spec_from_file_location("selfheal.middleware_there", middleware.__file__)
    assert spec is not None
    assert spec.loader is not None
    there = module_from_spec(spec)
    spec.loader.exec_module(there)
    assert not there._is_broken(OSError())
    assert there._is_broken(OSError(errno.EIO, "no"))


# -- a crowd ----------------------------------------------------------------------------------------------------------


async def test_a_slow_client_of_a_small_file_holds_nothing_open(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in memory is read and the file closed before the answer begins, which may take the client for ever."""
    real, held = os.preadv, list[list[str]]()
    monkeypatch.setattr(syscalls, "open_cached", syscalls.open_file)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, _: real(fd, buffers, offset))
    await put(sqlite_store, "tom.png")
    app, answer = SelfHealMiddleware(Wrapped(), sqlite_store), Answer()

    async def send(message: Message) -> None:
        held.append(open_below(sqlite_store.disk.path))
        answer.take(message)

    sqlite_store.disk.root()  # for a second it is known where the root is
    await app(scope_of(f"{PREFIX}/tom.png"), asyncio.Event().wait, send)  # type: ignore[arg-type]
    assert held == [[], []]
    assert answer.body == PICTURE


@pytest.mark.parametrize("on_disk", [True, False], ids=["hit", "miss"])
async def test_many_slow_clients_take_little_memory(sqlite_store: UploadStore, on_disk: bool) -> None:
    """What they are sent at a time grows far less than their number; one alone is sent large pieces."""
    await put(sqlite_store, "film.mp4", FILM, on_disk=on_disk)
    app = SelfHealMiddleware(Wrapped(), sqlite_store)
    are_fast = asyncio.Event()
    sent: list[list[int]] = []

    async def visit() -> None:
        pieces: list[int] = []
        sent.append(pieces)

        async def send(message: Message) -> None:
            body = message.get("body", b"")
            assert body == FILM[sum(pieces) : sum(pieces) + len(body)]
            if body:
                pieces.append(len(body))
                await are_fast.wait()

        await app(scope_of(f"{PREFIX}/film.mp4"), asyncio.Event().wait, send)  # type: ignore[arg-type]

    async def all_were_sent_something() -> bool:
        return all(sent)

    visits = [asyncio.create_task(visit()) for _ in range(400)]
    await asyncio.sleep(0)
    await eventually(all_were_sent_something)
    assert sum(map(sum, sent)) < 400 * CHUNK / 3
    for leaving in visits[3:]:
        leaving.cancel()
    await asyncio.gather(*visits[3:], return_exceptions=True)
    are_fast.set()
    await asyncio.gather(*visits[:3])
    assert [sum(pieces) for pieces in sent[:3]] == [len(FILM)] * 3
    await visit()
    assert set(sent[-1]) == {CHUNK}
