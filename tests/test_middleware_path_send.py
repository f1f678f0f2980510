"""`SelfHealMiddleware` and `http.response.pathsend`: a name can change before a server opens it, so it is not used."""

from __future__ import annotations

import pytest
from starlette.types import Receive, Scope, Send

from selfheal import UploadStore
from tests.support.asgi import ask
from tests.support.middleware import LARGE, PREFIX, put, wrapping

OFFER = {"http.response.pathsend": {}}


@pytest.mark.parametrize("size", [0, 1, 4096, 256 * 1024, 256 * 1024 + 1, len(LARGE)])
async def test_an_offer_of_path_send_is_refused(sqlite_store: UploadStore, size: int) -> None:
    """With the offer, the answer is the same bytes, read from the open file, for every size and from every place."""
    path = await put(sqlite_store, "a.png", LARGE[:size])
    app = wrapping(sqlite_store, True)
    for on_disk in (True, False):
        if not on_disk:
            path.unlink()
        answer = await ask(app, f"{PREFIX}/a.png", extensions=OFFER)
        assert {message["type"] for message in answer.messages} == {"http.response.start", "http.response.body"}
        assert (answer.status, answer.body) == (200, LARGE[:size])


async def test_path_send_of_the_wrapped_app_passes(sqlite_store: UploadStore) -> None:
    """A path that the wrapped app sends (Starlette's FileResponse may) passes unchanged."""
    path = await put(sqlite_store, "film.mp4", LARGE)
    sent = {"type": "http.response.pathsend", "path": str(path)}

    async def sends_a_path(scope: Scope, _receive: Receive, send: Send) -> None:
        assert scope["extensions"] == OFFER
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send(sent)

    answer = await ask(wrapping(sqlite_store, False, sends_a_path), f"{PREFIX}/film.mp4", extensions=OFFER)
    assert answer.messages[-1] == sent
