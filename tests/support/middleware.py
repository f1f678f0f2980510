"""For the tests of the middleware: files to serve, a middleware over a store, and the moment a restore begins."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from selfheal import SelfHealMiddleware, UploadStore
from tests.support.asgi import Answer, Wrapped
from tests.support.files import MODIFIED_NS
from tests.support.open_files import open_below
from tests.support.wsgi import WsgiMiddleware

PREFIX = "/static/uploads"
PICTURE = random.Random(3).randbytes(5000)
LARGE = random.Random(4).randbytes(3 * 1024 * 1024)
FILM = random.Random(5).randbytes(17 * 1024 * 1024)
"""A file of more bytes than are restored before the answer begins."""


async def put(store: UploadStore, name: str, data: bytes = PICTURE, *, on_disk: bool = True) -> Path:
    """Store a file in the database and, with `on_disk`, on disk; it is so old that it counts as still."""
    await store.database.store_image(name, data, modified_ns=MODIFIED_NS)
    if on_disk:
        await store.restore(name)
    return store.disk.path_of(name)


def wrapping(store: UploadStore, serve: bool, app: ASGIApp | None = None, **more: Any) -> SelfHealMiddleware:
    """Return the middleware over a store, around `app` or an app that answers 404."""
    return SelfHealMiddleware(app or Wrapped(), store, serve=serve, **more)


def wrapping_as_wsgi(store: UploadStore, serve: bool, app: ASGIApp | None = None, **more: Any) -> WsgiMiddleware:
    """As `wrapping`, with the middleware for WSGI."""
    return WsgiMiddleware(app or Wrapped(), store, serve=serve, **more)


Wrapping = Callable[..., SelfHealMiddleware | WsgiMiddleware]
TRANSPORTS: dict[str, Wrapping] = {"asgi": wrapping, "wsgi": wrapping_as_wsgi}


def static_over(directory: Path, path: str = PREFIX) -> Starlette:
    """Return a wrapped app that serves a directory itself."""
    directory.mkdir(parents=True, exist_ok=True)  # StaticFiles refuses a missing directory
    return Starlette(routes=[Mount(path, StaticFiles(directory=directory))])


async def restore_started(store: UploadStore) -> None:
    """Return once a restore has begun to write. It may take only 20 ms, so every turn of the event loop looks."""
    give_up = time.monotonic() + 10
    while not any("(deleted)" in link for link in open_below(store.disk.path)):
        assert time.monotonic() < give_up, "no restore began within 10 s"
        await asyncio.sleep(0)


def assert_unknown(answer: Answer) -> None:
    """Assert that an answer is a 503 with a number of seconds to wait, and is never stored."""
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["cache-control"] == "no-store"
