"""`SelfHealMiddleware` and `http.response.pathsend`: the server gets the path of a whole file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from selfheal import UploadStore
from tests.support.asgi import ask
from tests.support.middleware import LARGE, PREFIX, put, static_over, wrapping


async def test_path_send(sqlite_store: UploadStore) -> None:
    """A server that offers it gets the absolute path of a large file, with the headers of a plain 200."""
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
    """An answer that is not a whole file never uses it, offered or not."""
    await put(sqlite_store, "film.mp4", LARGE)
    offer = {"http.response.pathsend": {}}
    answer = await ask(
        wrapping(sqlite_store, True), f"{PREFIX}/film.mp4", method=method, headers=headers, extensions=offer
    )
    assert answer.status == status
    assert {message["type"] for message in answer.messages} == {"http.response.start", "http.response.body"}


@pytest.mark.parametrize("size", [0, 1, 4096, 256 * 1024, 256 * 1024 + 1])
async def test_offer_of_path_send_loses_nothing(sqlite_store: UploadStore, size: int) -> None:
    """With the offer, the bytes are those of the file, for every size, from disk and from the database."""
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
    """A path that the wrapped app sends (Starlette's FileResponse does) passes unchanged."""
    path = await put(sqlite_store, "film.mp4", LARGE)
    app = wrapping(sqlite_store, False, static_over(sqlite_store.disk.path))
    answer = await ask(app, f"{PREFIX}/film.mp4", extensions={"http.response.pathsend": {}})
    assert answer.messages[-1] == {"type": "http.response.pathsend", "path": str(path)}
