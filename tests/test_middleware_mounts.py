"""`SelfHealMiddleware` mounted inside an app: the prefix with or without the path of the mount, and a warning."""

from __future__ import annotations

import logging

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from selfheal import SelfHealMiddleware, UploadStore
from selfheal.http.prefix import MISSES_UNTIL_WARNING
from tests.support.asgi import Wrapped, ask
from tests.support.middleware import PICTURE, PREFIX, put

OTHER = PICTURE[::-1]
PREFIXES = [("/static", "/static/uploads"), ("/static", "/uploads"), (PREFIX, PREFIX), ("/a/b", "/a/b/c"), ("/u", "/u")]
"""The path of a mount, and a prefix inside it."""


def stripping(path: str, app: ASGIApp) -> ASGIApp:
    """Mount an app as frameworks do that take the path of the mount out of the request's path."""

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["path"].startswith(f"{path}/")
        child = {**scope, "path": scope["path"].removeprefix(path), "root_path": scope["root_path"] + path}
        await app(child, receive, send)

    return mounted


def mounts(path: str, app: ASGIApp) -> list[ASGIApp]:
    """Return an app mounted at a path, in every way."""
    return [Starlette(routes=[Mount(path, app)]), stripping(path, app)]


@pytest.mark.parametrize(("path", "prefix"), PREFIXES)
@pytest.mark.parametrize("on_disk", [True, False])
async def test_mounted(sqlite_store: UploadStore, serve: bool, path: str, prefix: str, on_disk: bool) -> None:
    """A mounted middleware serves and heals, whether its prefix has the path of the mount or not."""
    file = await put(sqlite_store, "cats/tom.png")
    url = prefix if prefix.startswith(path) else path + prefix
    inner = SelfHealMiddleware(Wrapped(200, body=b"handed on"), sqlite_store, prefix=prefix, serve=serve)
    for app in mounts(path, inner):
        for _ in range(2):
            if not on_disk:
                file.unlink()
            answer = await ask(app, f"{url}/cats/tom.png")
            assert (answer.status, answer.body) == (200, PICTURE if serve else b"handed on")
            assert file.read_bytes() == PICTURE


@pytest.mark.parametrize(("path", "prefix"), PREFIXES)
async def test_each_name_has_one_url(sqlite_store: UploadStore, path: str, prefix: str) -> None:
    """The path of a mount counts once: written twice, or left out, it leads to no file, so no guard is passed by."""
    await put(sqlite_store, "tom.png")
    url = prefix if prefix.startswith(path) else path + prefix
    inner = SelfHealMiddleware(Wrapped(), sqlite_store, prefix=prefix)
    for app in mounts(path, inner):
        assert (await ask(app, f"{url}/tom.png")).body == PICTURE
        for other in (path + url, url + path, path + path + url, url + url, f"{path}/.{url}"):
            assert PICTURE not in (await ask(app, f"{other}/tom.png")).body, other


@pytest.mark.parametrize("prefix", ["/api/static/uploads", "/static/uploads"])
@pytest.mark.parametrize("path", ["/api/static/uploads/tom.png", "/static/uploads/tom.png"])
async def test_a_server_with_a_root_path(sqlite_store: UploadStore, serve: bool, path: str, prefix: str) -> None:
    """A server's root path is part of the prefix or not, and part of the path or taken away by a proxy."""
    file = await put(sqlite_store, "tom.png", on_disk=False)
    app = SelfHealMiddleware(Wrapped(200), sqlite_store, prefix=prefix, serve=serve)
    assert (await ask(app, path, root_path="/api")).body == (PICTURE if serve else b"wrapped")
    assert file.read_bytes() == PICTURE


async def test_a_mount_below_a_root_path(sqlite_store: UploadStore) -> None:
    """A mount in an app whose server has a root path itself."""
    await put(sqlite_store, "tom.png")
    for prefix in ("/api/static/uploads", "/uploads"):
        for app in mounts("/static", SelfHealMiddleware(Wrapped(), sqlite_store, prefix=prefix)):
            target = "/api/static/uploads/tom.png" if isinstance(app, Starlette) else "/static/uploads/tom.png"
            assert (await ask(app, target, root_path="/api")).body == PICTURE


# -- a prefix that nothing matches ------------------------------------------------------------------------------------


def warnings_in(log: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings about the prefix."""
    return [record.message for record in log.records if "below the prefix" in record.message]


@pytest.mark.parametrize(
    ("target", "root_path"),
    [("/media/uploads/a.png", ""), ("/uploads/a.png", ""), ("/x/uploads/a.png", "/x"), ("/x/static/uploads/a.png", "")],
)
async def test_a_prefix_that_nothing_matches(
    sqlite_store: UploadStore, caplog: pytest.LogCaptureFixture, target: str, root_path: str
) -> None:
    """If many requests look like uploads and none is below the prefix, one warning says what was seen and expected."""
    app = SelfHealMiddleware(Wrapped(), sqlite_store)
    with caplog.at_level(logging.WARNING, "selfheal"):
        for _ in range(MISSES_UNTIL_WARNING - 1):
            await ask(app, target, root_path=root_path)
        assert warnings_in(caplog) == []
        for _ in range(2 * MISSES_UNTIL_WARNING):
            await ask(app, target, root_path=root_path)
    (warning,) = warnings_in(caplog)
    assert repr(target) in warning
    assert repr(PREFIX) in warning


async def test_no_warning_once_a_request_matched(sqlite_store: UploadStore, caplog: pytest.LogCaptureFixture) -> None:
    """A prefix that a request was below is right; other paths, and paths that only look alike, are no sign."""
    with caplog.at_level(logging.WARNING, "selfheal"):
        for first, target, method in (
            (f"{PREFIX}/a.png", "/media/uploads/a.png", "GET"),
            ("/", "/media/a.png", "GET"),
            ("/", "/media/uploads_private/a.png", "GET"),
            ("/", "/api/uploads/", "POST"),
        ):
            app = SelfHealMiddleware(Wrapped(), sqlite_store)
            await ask(app, first)
            for _ in range(2 * MISSES_UNTIL_WARNING):
                await ask(app, target, method=method)
    assert warnings_in(caplog) == []
