"""`SelfHealMiddleware` and its clients: those that disconnect, are cancelled or read slowly; many at once."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from selfheal import SelfHealMiddleware, UploadStore
from selfheal.content.sources import CHUNK
from selfheal.disk import syscalls
from tests.support.asgi import Answer, Wrapped, ask, ask_and_leave, no_message, scope_of
from tests.support.middleware import (
    FILM,
    LARGE,
    PICTURE,
    PREFIX,
    put,
    restore_started,
    wrapping,
)
from tests.support.open_files import open_below
from tests.support.waiting import eventually

# -- clients that disconnect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("source", ["on disk", "only in the database", "past a disk that takes no file"])
async def test_client_gone(tmp_path: Path, sqlite_url: str, spec_version: str, source: str) -> None:
    """A client that disconnects in a large body leaves no descriptor, task or connection (CVE-2026-54280)."""
    root = tmp_path / "files" / "uploads"
    async with UploadStore(root, sqlite_url, require_marker=source.startswith("past")) as store:
        await store.database.create_tables()
        path = await put(store, "film.mp4", FILM, on_disk=source == "on disk")
        app = wrapping(store, True)
        assert (await ask(app, f"{PREFIX}/absent.png")).status == 404
        await store.tasks.drain(10)
        tasks = asyncio.all_tasks()
        for after in (0, 1, 300_000, 1_000_000):
            if source == "only in the database":
                path.unlink(missing_ok=True)
            scope = scope_of(f"{PREFIX}/film.mp4")
            scope["asgi"]["spec_version"] = spec_version
            answer = await ask_and_leave(app, scope, after=after, fails=spec_version == "2.4")
            assert len(answer.body) < len(FILM)
            await store.tasks.drain(10)
        assert open_below(root) == []
        assert asyncio.all_tasks() <= tasks
        assert (await ask(app, f"{PREFIX}/film.mp4")).body == FILM


async def test_cancelled_requests_leak_no_connection(store: UploadStore, serve: bool) -> None:
    """Requests that are cancelled at any moment leave the database usable and no incomplete file.

    A BaseHTTPMiddleware around the middleware cancels so when a client disconnects (SQLAlchemy 12077).
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        """Send a file; `StaticFiles` would leave one open that it is cancelled at."""
        await Response(store.disk.path_of(scope["path"].rpartition("/")[2]).read_bytes())(scope, receive, send)

    app = wrapping(store, serve, wrapped)
    paths = [await put(store, f"{index}.png", LARGE, on_disk=False) for index in range(12)]
    store.upkeep.start()  # it goes on after all requests
    tasks = asyncio.all_tasks()
    for index in range(12):
        request = asyncio.create_task(ask(app, f"{PREFIX}/{index}.png"))
        await asyncio.sleep(index / 800)
        request.cancel()
        await asyncio.wait((request,))
    await store.tasks.drain(30)
    for path in paths:
        assert not path.exists() or path.read_bytes() == LARGE
        path.unlink(missing_ok=True)
    answers = await asyncio.gather(*(ask(app, f"{PREFIX}/{index}.png") for index in range(12)))
    assert [answer.body == LARGE for answer in answers] == [True] * 12
    await store.tasks.drain(30)
    assert asyncio.all_tasks() <= tasks


async def test_restore_outlives_its_client(store: UploadStore, serve: bool) -> None:
    """A restore whose only client disconnects finishes and leaves nothing open."""
    path = await put(store, "film.mp4", FILM, on_disk=False)
    request = asyncio.create_task(ask(wrapping(store, serve), f"{PREFIX}/film.mp4"))
    await restore_started(store)
    request.cancel()
    await asyncio.wait((request,))
    await store.tasks.drain(30)
    assert path.read_bytes() == FILM
    assert open_below(store.disk.path) == []


async def test_first_client_gone(store: UploadStore) -> None:
    """If the client that began a restore disconnects, those that joined it still get the file."""
    await put(store, "a.png", LARGE, on_disk=False)
    app = wrapping(store, True)
    first = asyncio.create_task(ask(app, f"{PREFIX}/a.png"))
    others = [asyncio.create_task(ask(app, f"{PREFIX}/a.png")) for _ in range(5)]
    await asyncio.sleep(0)
    first.cancel()
    assert [(await other).body == LARGE for other in others] == [True] * 5
    await asyncio.wait((first,))


async def test_deleted_while_it_is_sent(sqlite_store: UploadStore) -> None:
    """A client gets the whole file even if it is deleted during the answer; the next client does not get it."""
    await put(sqlite_store, "film.mp4", LARGE)
    app, answer = wrapping(sqlite_store, True), Answer()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body" and not answer.body:
            await sqlite_store.delete("film.mp4")
        answer.take(message)

    await app(scope_of(f"{PREFIX}/film.mp4"), no_message, send)
    assert answer.body == LARGE
    assert (await ask(app, f"{PREFIX}/film.mp4")).body == b"wrapped"


# -- slow clients -----------------------------------------------------------------------------------------------------


async def test_stalled_clients_hold_no_connection(directory: Path, sqlite_url: str) -> None:
    """More clients that read nothing than the pool has connections, served past a full disk, delay no others."""
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

        clients = [asyncio.create_task(app(scope_of(f"{PREFIX}/film.mp4"), no_message, send)) for _ in range(16)]

        await eventually(lambda: stalled == 16)
        assert (await ask(app, f"{PREFIX}/a.png")).body == PICTURE
        assert (await ask(app, f"{PREFIX}/absent.png")).status == 404
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def test_a_slow_client_of_a_small_file_holds_nothing_open(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached file is read and closed before its answer begins, however slow the client is."""
    real, held = os.preadv, list[list[str]]()
    monkeypatch.setattr(syscalls, "open_cached", syscalls.open_file)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, _: real(fd, buffers, offset))
    await put(sqlite_store, "tom.png")
    app, answer = SelfHealMiddleware(Wrapped(), sqlite_store), Answer()

    async def send(message: Message) -> None:
        held.append(open_below(sqlite_store.disk.path))
        answer.take(message)

    sqlite_store.disk.root()  # the root is cached for a second
    await app(scope_of(f"{PREFIX}/tom.png"), no_message, send)
    assert held == [[], []]
    assert answer.body == PICTURE


@pytest.mark.parametrize("on_disk", [True, False], ids=["hit", "miss"])
async def test_many_slow_clients_take_little_memory(sqlite_store: UploadStore, on_disk: bool) -> None:
    """400 slow clients get small pieces, so that memory stays small; a single client gets large pieces."""
    await put(sqlite_store, "film.mp4", FILM, on_disk=on_disk)
    app = SelfHealMiddleware(Wrapped(), sqlite_store)
    are_fast = asyncio.Event()
    sent: list[list[int]] = []

    async def read_slowly() -> None:
        pieces: list[int] = []
        sent.append(pieces)

        async def send(message: Message) -> None:
            body = message.get("body", b"")
            assert body == FILM[sum(pieces) : sum(pieces) + len(body)]
            if body:
                pieces.append(len(body))
                await are_fast.wait()

        await app(scope_of(f"{PREFIX}/film.mp4"), no_message, send)

    clients = [asyncio.create_task(read_slowly()) for _ in range(400)]
    await asyncio.sleep(0)
    await eventually(lambda: all(sent))
    assert sum(map(sum, sent)) < 400 * CHUNK / 3
    for leaving in clients[3:]:
        leaving.cancel()
    await asyncio.gather(*clients[3:], return_exceptions=True)
    are_fast.set()
    await asyncio.gather(*clients[:3])
    assert [sum(pieces) for pieces in sent[:3]] == [len(FILM)] * 3
    await read_slowly()
    assert set(sent[-1]) == {CHUNK}
