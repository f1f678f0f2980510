"""`SelfHealMiddleware`: which requests are its own, and which go to the wrapped app unchanged."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from selfheal import SelfHealMiddleware, SettingsError, UploadStore
from tests.support.asgi import Wrapped, ask, ask_scope, scope_of
from tests.support.files import write_file
from tests.support.middleware import PICTURE, PREFIX, Wrapping, assert_unknown, put, static_over
from tests.support.sockets import make_socket

# -- requests for the wrapped app -------------------------------------------------------------------------------------


METHODS = ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "QUERY", "get", "")


async def test_other_methods(broken_store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """Every method but GET and HEAD goes to the wrapped app, also while the database is down."""
    inner = Wrapped(405, [("cache-control", "max-age=1")])
    write_file(broken_store.disk.path / "hit.png", PICTURE)
    for method, name in itertools.product(METHODS, ("hit.png", "miss.png", ".hidden")):
        scope = scope_of(f"{PREFIX}/{name}", method=method)
        answer = await ask_scope(wrapping(broken_store, serve, inner), scope)
        assert (answer.status, answer.headers["cache-control"]) == (405, "max-age=1"), method
        assert inner.scopes[-1] is scope


@pytest.mark.parametrize("kind", ["websocket", "webtransport", "something.new"])
async def test_other_scopes(broken_store: UploadStore, serve: bool, kind: str) -> None:
    """A websocket below the prefix goes to the wrapped app with the same scope, receive and send."""
    seen: list[object] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend((scope, receive, send))

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    scope = {**scope_of(f"{PREFIX}/miss.png"), "type": kind}
    before = dict(scope)
    await SelfHealMiddleware(inner, broken_store, serve=serve)(scope, receive, send)
    assert [id(thing) for thing in seen] == [id(scope), id(receive), id(send)]
    assert scope == before


async def test_scope_is_handed_on_unchanged(sqlite_store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """The wrapped app gets the scope as the server made it."""
    inner = Wrapped()
    scope = scope_of(f"{PREFIX}/absent%20one.png?x=1", headers=[("Range", "bytes=0-1")], root_path="", state={"a": 1})
    before = dict(scope)
    await ask_scope(wrapping(sqlite_store, serve, inner), scope)
    assert inner.scopes == [before]


async def test_error_of_the_wrapped_app_passes(sqlite_store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """An exception of the wrapped app reaches the server unchanged."""

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError("of the app")

    for target in ("/elsewhere", f"{PREFIX}/absent.png", f"{PREFIX}/.hidden"):
        with pytest.raises(ZeroDivisionError, match="of the app"):
            await ask(wrapping(sqlite_store, serve, inner), target)


# -- names that are not uploads ---------------------------------------------------------------------------------------


SECRET = b"must never be sent"


@pytest.mark.parametrize("kind", ["directory", "fifo", "socket", "link", "linked directory", "loop"])
async def test_not_a_file(broken_store: UploadStore, kind: str, tmp_path: Path, wrapping: Wrapping) -> None:
    """A name that is no regular file goes to the wrapped app at once, without the database (CVE-2024-23334)."""
    root, name = broken_store.disk.path, "thing.png"
    root.mkdir(parents=True, exist_ok=True)
    write_file(tmp_path / "secret" / "secret.png", SECRET)
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
    for serve in (True, False):
        app = wrapping(broken_store, serve)
        answer = await asyncio.wait_for(ask(app, f"{PREFIX}/{name}"), 20)
        assert (answer.status, answer.body, answer.headers["cache-control"]) == (404, b"wrapped", "no-store")


async def test_name_below_a_file(broken_store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """A name below a file is missing on disk, and only the database can say whether it exists."""
    write_file(broken_store.disk.path / "good.png", PICTURE)
    assert_unknown(await ask(wrapping(broken_store, serve), f"{PREFIX}/good.png/x.png"))


OWN_NAMES = (
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


@pytest.mark.parametrize("target", OWN_NAMES)
async def test_own_names_are_never_served(
    tmp_path: Path, sqlite_url: str, serve: bool, target: str, wrapping: Wrapping
) -> None:
    """selfheal's own files are never served, not even by a wrapped StaticFiles over the parent directory.

    The parent directory has no public name (such as `static`), so the quarantine is in it.
    """
    parent = tmp_path / "files"
    async with UploadStore(parent / "uploads", sqlite_url) as store:
        await store.database.create_tables()
        assert store.disk.quarantine_path == parent / ".selfheal-quarantine-uploads"
        app = wrapping(store, serve, static_over(parent, "/static"))
        write_file(parent / target.removeprefix("/static/"), SECRET)
        write_file(parent / "style.css", b"of the app")
        assert (await ask(app, "/static/style.css")).body == b"of the app"
        for trick, method, headers in itertools.product(TRICKS, ("GET", "HEAD"), ([], [("Range", "bytes=0-5")])):
            answer = await ask(app, trick(target), method=method, headers=headers)
            assert answer.status == 404, trick(target)
            assert SECRET[:5] not in answer.body, trick(target)


async def test_quarantined_copy_is_not_served(tmp_path: Path, sqlite_url: str, serve: bool, wrapping: Wrapping) -> None:
    """A file in quarantine is not served under its path there."""
    parent = tmp_path / "files"
    async with UploadStore(parent / "uploads", sqlite_url) as store:
        await store.database.create_tables()
        await put(store, "a.png")
        write_file(parent / "uploads" / "a.png", SECRET)
        moved = store.disk.quarantine("a.png")
        assert moved is not None
        assert moved.read_bytes() == SECRET
        app = wrapping(store, serve, static_over(parent, "/static"))
        answer = await ask(app, f"/static/{quote(str(moved.relative_to(parent)))}")
        assert (answer.status, SECRET in answer.body) == (404, False)
        assert (await ask(app, f"{PREFIX}/a.png")).body == PICTURE


# -- prefix and root path ---------------------------------------------------------------------------------------------


BELOW_ROOT_PATH = (
    ("", f"{PREFIX}/a.png"),
    ("/sub", f"/sub{PREFIX}/a.png"),
    ("/sub/deeper", f"/sub/deeper{PREFIX}/a.png"),
    ("/sub", f"{PREFIX}/a.png"),
    ("/static", f"{PREFIX}/a.png"),
    (PREFIX, f"{PREFIX}/a.png"),
    ("/", f"{PREFIX}/a.png"),
    ("/sub/", f"/sub{PREFIX}/a.png"),
    ("/sub", f"/sub{PREFIX}/%61.png"),
)
NOT_BELOW_ROOT_PATH = (
    ("/su", f"/sub{PREFIX}/a.png"),
    ("/sub", f"/subway{PREFIX}/a.png"),
    ("/static", f"/static{PREFIX}/a.png"),
    ("/static/upload", f"{PREFIX}_private/a.png"),
    ("/sub", f"/x/sub{PREFIX}/a.png"),
    ("", f"/sub{PREFIX}/a.png"),
    ("/sub", f"/sub{PREFIX}_private/a.png"),
    ("/sub", f"/sub/sub{PREFIX}/a.png"),
    ("/sub", f"/sub{PREFIX}/../a.png"),
)


async def test_root_path(sqlite_store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """Names are the same below a root path, which servers put before the path and some proxies do not."""
    path = await put(sqlite_store, "a.png")
    app = wrapping(sqlite_store, serve, Wrapped(200, body=b"handed on"))
    for root_path, target in BELOW_ROOT_PATH:
        path.unlink()
        answer = await ask(app, target, root_path=root_path)
        assert answer.body == (PICTURE if serve else b"handed on"), (root_path, target)
        assert path.read_bytes() == PICTURE, (root_path, target)


async def test_root_path_that_does_not_match(broken_store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """A root path is removed once, in whole segments; a path not below root path and prefix goes to the wrapped app."""
    for root_path, target in NOT_BELOW_ROOT_PATH:
        answer = await ask(wrapping(broken_store, serve), target, root_path=root_path)
        assert (answer.status, answer.body) == (404, b"wrapped"), (root_path, target)


async def test_mounted_below_a_path(sqlite_store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """Inside Starlette's `Mount`, whose routes never see a lifespan, it serves and heals."""
    await put(sqlite_store, "a.png", on_disk=False)
    inner = wrapping(sqlite_store, serve, static_over(sqlite_store.disk.path))
    app = Starlette(routes=[Mount("/sub", inner), Route("/", lambda request: PlainTextResponse("home"))])
    assert (await ask(app, f"/sub{PREFIX}/a.png")).body == PICTURE
    assert (await ask(app, f"{PREFIX}/a.png")).status == 404
    assert (await ask(app, "/")).body == b"home"


async def test_other_prefix(sqlite_store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """With another prefix, of any letters and with spaces, the default one belongs to the wrapped app."""
    await put(sqlite_store, "a.png")
    app = wrapping(
        sqlite_store, serve, static_over(sqlite_store.disk.path, "/médias publics"), prefix="/médias publics"
    )
    assert (await ask(app, f"{quote('/médias publics')}/a.png")).body == PICTURE
    assert (await ask(app, f"{PREFIX}/a.png")).status == 404


async def test_a_prefix_may_end_with_a_slash(sqlite_store: UploadStore) -> None:
    """A slash at the end of the prefix makes no difference."""
    await sqlite_store.save("a.png", PICTURE)
    app = SelfHealMiddleware(Wrapped(), sqlite_store, prefix=f"{PREFIX}/")
    assert (await ask(app, f"{PREFIX}/a.png")).body == PICTURE
    assert (await ask(app, f"{PREFIX}_private/a.png")).status == 404


@pytest.mark.parametrize("prefix", ["", "/", "static", "/static//", "//static", "/a//b", "/a%20b", "http://x/y"])
def test_impossible_prefix(directory: Path, sqlite_url: str, prefix: str) -> None:
    """A prefix that no request can match is refused at once."""
    with pytest.raises(SettingsError):
        SelfHealMiddleware(Wrapped(), UploadStore(directory, sqlite_url), prefix=prefix)


async def test_store_from_the_environment(directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a store, the environment sets directory, database and prefix."""
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


async def test_server_without_a_raw_path(sqlite_store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """Requests work without `raw_path`, which ASGI makes optional."""
    await put(sqlite_store, "a b.png")
    app = wrapping(sqlite_store, serve, static_over(sqlite_store.disk.path))
    for more in ({"raw_path": None}, {}):
        scope = scope_of(f"{PREFIX}/a%20b.png", **more)
        if not more:
            del scope["raw_path"], scope["root_path"]
        assert (await ask_scope(app, scope)).body == PICTURE
