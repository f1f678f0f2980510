"""An app that writes, reads and deletes its files itself, on a real server: nothing is lost, and nothing comes back."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.example_apps import PREFIX, Server, serving
from tests.support.sample_data import noise
from tests.support.waiting import wait_until

APP = """
import os
from pathlib import Path
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from selfheal import SelfHealMiddleware, UploadStore

uploads = UploadStore(os.environ["SELFHEAL_DIRECTORY"], os.environ["SELFHEAL_DATABASE_URL"], watch=True)

async def write(request):
    await uploads.database.create_tables()
    path = uploads.disk.path / request.path_params["name"]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(await request.body())
    return PlainTextResponse(uploads.url(request.path_params["name"]))

async def delete(request):
    os.remove(uploads.disk.path / request.path_params["name"])
    return PlainTextResponse("gone")

async def thumbnail(request):
    async with uploads.open(request.path_params["name"]) as file:
        return PlainTextResponse(file.read()[:100])

async def versioned(request):
    return PlainTextResponse(await uploads.url(request.path_params["name"], versioned=True))

app = Starlette(routes=[
    Route("/files/{name:path}", write, methods=["PUT"]),
    Route("/files/{name:path}", delete, methods=["DELETE"]),
    Route("/thumbnails/{name:path}", thumbnail),
    Route("/urls/{name:path}", versioned),
])
app.add_middleware(SelfHealMiddleware, store=uploads)
"""
IMMUTABLE = "public, max-age=31536000, immutable"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """The app on uvicorn; one file is in its directory before it starts."""
    (tmp_path / "writing_app.py").write_text(APP)
    (tmp_path / "uploads" / "originals").mkdir(parents=True)
    (tmp_path / "uploads" / "originals" / "before.jpg").write_bytes(noise(5000))
    with serving("writing_app:app", tmp_path) as server:
        yield server


def stored(server: Server) -> set[str]:
    """Return the names of the living records."""
    connection = sqlite3.connect(server.directory.parent / "gallery.db")
    try:
        return {name for (name,) in connection.execute("SELECT name FROM image_storage WHERE deleted_at IS NULL")}
    finally:
        connection.close()


def test_an_app_that_knows_nothing_of_selfheal(server: Server) -> None:
    """What it writes outlives the disk without a visitor, what it reads is there, what it deletes stays deleted."""
    name, data = "cats/tom.jpg", noise(300_000)
    url = server.browser.put(f"/files/{name}", content=data).text
    assert url == f"{PREFIX}/{name}"
    wait_until(lambda: stored(server) == {name, "originals/before.jpg"})

    shutil.rmtree(server.directory)
    assert server.browser.get("/thumbnails/originals/before.jpg").content == noise(5000)[:100]
    assert server.browser.get(url).content == data
    versioned = server.browser.get(f"/urls/{name}").text
    wait_until(lambda: server.browser.get(versioned).headers.get("cache-control") == IMMUTABLE)
    assert "cache-control" not in server.browser.get(f"{url}?v=1").headers

    wait_until(lambda: _is_watched(server), step=0.5)
    assert server.browser.delete(f"/files/{name}").text == "gone"
    assert server.browser.get(url).status_code in (200, 404)  # at this moment nobody may know of it yet
    wait_until(lambda: name not in stored(server))
    wait_until(lambda: not (server.directory / name).exists())
    assert server.browser.get(url).status_code == 404


def _is_watched(server: Server) -> bool:
    """Whether the directory that was made after the loss is watched already: what is written there is stored."""
    server.browser.put(f"/files/probes/{uuid4()}.jpg", content=noise(100))
    return any(name.startswith("probes/") for name in stored(server))
