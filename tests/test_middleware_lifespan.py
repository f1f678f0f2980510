"""`SelfHealMiddleware` and lifespan: the store opens and closes with the app, whatever the app does with lifespan."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfheal import SettingsError, UploadStore
from tests.support.asgi import ask
from tests.support.files import write_file
from tests.support.middleware import (
    FILM,
    PICTURE,
    PREFIX,
    assert_unknown,
    put,
    restore_started,
    static_over,
    wrapping,
)
from tests.support.open_files import open_below


class Lifespan:
    """The server's part of the lifespan protocol."""

    def __init__(self, app: ASGIApp, state: dict[str, object] | None = None) -> None:
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue()
        self.scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {} if state is None else state}
        self.task = asyncio.create_task(app(self.scope, self._to_app.get, self._from_app.put))  # type: ignore[arg-type]

    async def say(self, kind: str) -> Message:
        """Send `lifespan.<kind>`, and return what the app answers."""
        await self._to_app.put({"type": f"lifespan.{kind}"})
        return await asyncio.wait_for(self._from_app.get(), 20)


class Inner:
    """A wrapped app with lifespan that records the messages it gets."""

    def __init__(self, startup: str = "startup.complete", shutdown: str = "shutdown.complete") -> None:
        self.answers = {"lifespan.startup": startup, "lifespan.shutdown": shutdown}
        self.received: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "lifespan"
        scope["state"]["from"] = "the app"
        while not self.received or self.received[-1] != "lifespan.shutdown":
            self.received.append((await receive())["type"])
            answer = self.answers[self.received[-1]]
            await send({"type": f"lifespan.{answer}", "message": "of the app"})
            if answer.endswith("failed"):
                return


@pytest.fixture
def fresh_store(directory: Path, sqlite_url: str) -> UploadStore:
    """A store that is not open yet."""
    return UploadStore(directory, sqlite_url)


async def use(store: UploadStore) -> None:
    """Let a store open everything that it ever opens."""
    await store.database.create_tables()
    await put(store, "a.png", on_disk=False)
    await store.restore("a.png")


def is_closed(store: UploadStore) -> bool:
    """Return whether a store holds nothing open."""
    return not [link for link in open_below(store.disk.path.parents[2]) if link != "/"]


# -- apps with lifespan -----------------------------------------------------------------------------------------------


async def test_lifespan_is_forwarded(fresh_store: UploadStore, serve: bool) -> None:
    """The app starts and stops with its server and shares its state, and the store closes with it."""
    inner = Inner()
    server = Lifespan(wrapping(fresh_store, serve, inner))
    assert await server.say("startup") == {"type": "lifespan.startup.complete", "message": "of the app"}
    assert server.scope["state"] == {"from": "the app"}
    await use(fresh_store)
    assert not is_closed(fresh_store)
    assert await server.say("shutdown") == {"type": "lifespan.shutdown.complete", "message": "of the app"}
    assert is_closed(fresh_store)
    await server.task
    assert inner.received == ["lifespan.startup", "lifespan.shutdown"]


async def test_startup_failed_passes(fresh_store: UploadStore, serve: bool) -> None:
    """The server gets the app's own `startup.failed` message, and the store is closed."""
    server = Lifespan(wrapping(fresh_store, serve, Inner(startup="startup.failed")))
    assert await server.say("startup") == {"type": "lifespan.startup.failed", "message": "of the app"}
    await server.task
    assert is_closed(fresh_store)


async def test_shutdown_failed_passes(fresh_store: UploadStore, serve: bool) -> None:
    """The server gets the app's own `shutdown.failed` message, and the store is closed."""
    server = Lifespan(wrapping(fresh_store, serve, Inner(shutdown="shutdown.failed")))
    await server.say("startup")
    await use(fresh_store)
    assert await server.say("shutdown") == {"type": "lifespan.shutdown.failed", "message": "of the app"}
    await server.task
    assert is_closed(fresh_store)


async def test_error_after_startup_passes(fresh_store: UploadStore, serve: bool) -> None:
    """An exception after startup is no refusal: it reaches the server, and the store is closed."""

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        raise ZeroDivisionError("of the app")

    server = Lifespan(wrapping(fresh_store, serve, inner))
    await server.say("startup")
    await use(fresh_store)
    server._to_app.put_nowait({"type": "lifespan.shutdown"})
    with pytest.raises(ZeroDivisionError, match="of the app"):
        await server.task
    assert is_closed(fresh_store)


async def test_lifespan_twice(fresh_store: UploadStore, serve: bool) -> None:
    """A closed store opens again: servers that reload start the same app twice."""
    app = wrapping(fresh_store, serve, Inner())
    for _ in range(2):
        app.app.received.clear()  # type: ignore[attr-defined]
        server = Lifespan(app)
        await server.say("startup")
        await use(fresh_store)
        await server.say("shutdown")
        await server.task
        assert is_closed(fresh_store)


# -- apps without lifespan --------------------------------------------------------------------------------------------


async def raises_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that does not know lifespan, as Django's."""
    raise ValueError("Django can only handle ASGI/HTTP connections, not lifespan.")


async def raises_after_startup(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that fails at the first lifespan message."""
    await receive()
    raise KeyError("type")


async def returns_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that ignores unknown scopes."""


async def returns_after_startup(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that receives the first message and sends nothing."""
    await receive()


async def asserts_the_type(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that asserts the type of the scope, as old frameworks do."""
    assert scope["type"] in ("http", "websocket")


REFUSALS = [raises_at_once, raises_after_startup, returns_at_once, returns_after_startup, asserts_the_type]


@pytest.mark.parametrize("inner", REFUSALS, ids=lambda inner: inner.__name__)
async def test_app_without_lifespan(fresh_store: UploadStore, serve: bool, inner: ASGIApp) -> None:
    """An app that refuses lifespan is served, and its store opens and closes with the server."""
    server = Lifespan(wrapping(fresh_store, serve, inner))
    assert (await server.say("startup"))["type"] == "lifespan.startup.complete"
    await use(fresh_store)
    assert not is_closed(fresh_store)
    assert (await server.say("shutdown"))["type"] == "lifespan.shutdown.complete"
    await server.task
    assert is_closed(fresh_store)


async def test_served_without_lifespan(fresh_store: UploadStore, serve: bool) -> None:
    """A server without lifespan is served; the store opens at its first use."""
    app = wrapping(fresh_store, serve, static_over(fresh_store.disk.path))
    try:
        assert_unknown(await ask(app, f"{PREFIX}/a.png"))
        await use(fresh_store)
        fresh_store.disk.path_of("a.png").unlink()
        assert (await ask(app, f"{PREFIX}/a.png")).body == PICTURE
    finally:
        await fresh_store.close()
    assert is_closed(fresh_store)


# -- startup and shutdown ---------------------------------------------------------------------------------------------


async def test_startup_with_the_database_down(broken_store: UploadStore, serve: bool) -> None:
    """The app starts though the database is down, and serves its hits."""
    server = Lifespan(wrapping(broken_store, serve, Inner()))
    assert (await server.say("startup"))["type"] == "lifespan.startup.complete"
    write_file(broken_store.disk.path / "hit.png", PICTURE)
    assert (await ask(wrapping(broken_store, True), f"{PREFIX}/hit.png")).body == PICTURE
    await server.say("shutdown")
    await server.task


async def test_startup_with_a_disk_that_fails(
    fresh_store: UploadStore, serve: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrapped app starts though the uploads directory cannot be read."""

    def failing(path: Any, *args: Any, **more: Any) -> int:
        if str(path) == str(fresh_store.disk.path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *args, **more)

    opened = os.open
    monkeypatch.setattr(os, "open", failing)
    server = Lifespan(wrapping(fresh_store, serve, inner := Inner()))
    assert (await server.say("startup"))["type"] == "lifespan.startup.complete"
    assert inner.received == ["lifespan.startup"]
    await server.say("shutdown")
    await server.task


@pytest.fixture
def claimed_tables() -> None:
    """Two stores of this process may not share tables, as in an app."""


async def test_startup_of_a_store_that_is_refused(
    fresh_store: UploadStore, sqlite_url: str, tmp_path: Path, serve: bool, claimed_tables: None
) -> None:
    """A store that may not open ends the server's start with its reason: the app is not served unstarted."""
    async with UploadStore(tmp_path / "other", sqlite_url):
        server = Lifespan(wrapping(fresh_store, serve, inner := Inner()))
        answer = await server.say("startup")
        assert answer["type"] == "lifespan.startup.failed"
        assert "table_prefix" in answer["message"]
        with pytest.raises(SettingsError):
            await server.task
        assert inner.received == []


async def test_temporary_files_are_removed_at_startup(fresh_store: UploadStore, serve: bool) -> None:
    """A temporary file of a killed process is removed at the next start."""
    leftover = write_file(fresh_store.disk.path / ".selfheal-tmp" / "0123456789abcdef", b"half a fi")
    server = Lifespan(wrapping(fresh_store, serve, Inner()))
    await server.say("startup")
    assert not leftover.exists()
    await server.say("shutdown")
    await server.task


async def test_restore_under_way_at_shutdown(fresh_store: UploadStore) -> None:
    """A restore that runs when the server stops is finished, within its grace period."""
    server = Lifespan(wrapping(fresh_store, True, Inner()))
    await server.say("startup")
    await fresh_store.database.create_tables()
    path = await put(fresh_store, "film.mp4", FILM, on_disk=False)
    request = asyncio.create_task(ask(wrapping(fresh_store, True), f"{PREFIX}/film.mp4"))
    await restore_started(fresh_store)
    request.cancel()
    await server.say("shutdown")
    await server.task
    await asyncio.wait((request,))
    assert path.read_bytes() == FILM
    assert is_closed(fresh_store)
