"""A Flask app on real WSGI servers: uploads over HTTP, a disk that is lost, crowds, and clients and workers that go."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from selfheal import UploadStore
from tests.support.files import noise, write_file
from tests.support.sample_images import picture
from tests.support.waiting import wait_until
from tests.support.wsgi_servers import COMMANDS, Server, serving

APP = "examples.flask_app:app"
LARGE = noise(20_000_000)


@pytest.fixture(scope="module", params=COMMANDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The Flask example on every server."""
    with serving(request.param, APP, tmp_path_factory.mktemp("flask")) as server:
        yield server


def lose_the_disk(server: Server) -> None:
    """Delete every upload of a server."""
    for path in server.directory.iterdir():
        if not path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def store_of(server: Server) -> UploadStore:
    """Return a store over the directory and the database of a server."""
    return UploadStore(server.directory, f"sqlite:///{server.directory.parent}/gallery.db")


def shown(server: Server) -> set[str]:
    """Return the names of the pictures on the page."""
    return set(re.findall(r'src="/static/uploads/([^"]+)"', server.browser.get("/").text))


def test_the_life_of_an_upload(server: Server) -> None:
    """An upload from a form is served, survives the loss of the disk, and is gone once it was deleted."""
    data, before = picture("PNG"), shown(server)
    answer = server.browser.post("/upload", files={"pictures": ("../../evil.png", data, "text/html")})
    assert answer.status_code == 303
    (name,) = shown(server) - before
    for _ in range(2):
        hit = server.browser.get(server.url(name))
        assert (hit.status_code, hit.content, hit.headers["content-type"]) == (200, data, "image/png")
    lose_the_disk(server)
    healed = server.browser.get(server.url(name))
    assert (healed.status_code, healed.content) == (200, data)
    assert healed.headers["etag"] == hit.headers["etag"]
    assert healed.headers["last-modified"] == hit.headers["last-modified"]
    assert (server.directory / name).read_bytes() == data
    assert server.browser.get(server.url(name), headers={"If-None-Match": hit.headers["etag"]}).status_code == 304
    assert server.browser.post("/delete", data={"name": name}).status_code == 303
    gone = server.browser.get(server.url(name))
    assert (gone.status_code, gone.headers["cache-control"]) == (404, "no-store")
    refused = server.browser.post("/upload", files={"pictures": ("a.png", b"no picture")})
    assert refused.status_code == 415


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_large_file_and_its_parts(server: Server, on_disk: bool) -> None:
    """A large file and every part of it arrive whole, with the promised length, and nothing stays open."""
    name = f"large/{on_disk}.bin"
    with store_of(server).sync as uploads:
        path = uploads.save(name, LARGE).path
        if not on_disk:
            path.unlink()
    url, size = server.url(name), len(LARGE)
    whole = server.browser.get(url)
    assert (whole.status_code, whole.content == LARGE) == (200, True)
    head = server.browser.head(url)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(size), b"")
    for start, stop in ((0, 1), (1, size), (size - 1, size), (300_000, 900_000), (0, size), (size // 2, size)):
        part = server.browser.get(url, headers={"Range": f"bytes={start}-{stop - 1}"})
        assert (part.status_code, part.content == LARGE[start:stop]) == (206, True)
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    wait_until(lambda: not server.open_uploads())


def test_encoded_names(server: Server) -> None:
    """Spaces and letters of all alphabets work; an encoded slash is no slash; our own files are nobody's."""
    with store_of(server).sync as uploads:
        uploads.save("cats/Käthe 猫.png", b"a cat").path.unlink()
    for path, status in (
        ("cats/K%C3%A4the%20%E7%8C%AB.png", 200),
        ("cats%2FK%C3%A4the%20%E7%8C%AB.png", 404),
        ("cats/K%E4the.png", 404),
        (".selfheal-disk", 404),
        ("%2e%2e/gallery.db", 404),
    ):
        if server.kind != "wsgiref" or "%2F" not in path:  # it does not tell how a path was written
            assert server.browser.get(server.url(path)).status_code == status, path


def test_a_crowd(server: Server) -> None:
    """32 clients at once, of names that are missing on disk and names that are not, all get whole files."""
    data = {f"crowd/{number}.bin": noise(1000 * 7**number, number) for number in range(5)}
    with store_of(server).sync as uploads:
        for name, one in data.items():
            path = uploads.save(name, one).path
            if len(one) % 2000:
                path.unlink()

    def visit(number: int) -> bool:
        name = f"crowd/{number % 5}.bin"
        return httpx.get(f"http://127.0.0.1:{server.port}{server.url(name)}", timeout=60).content == data[name]

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(visit, range(96)))
    wait_until(lambda: not server.open_uploads())


def test_a_client_that_leaves(server: Server) -> None:
    """A client that hangs up in the middle of a large file leaves no open file, and others are served."""
    with store_of(server).sync as uploads:
        uploads.save("left.bin", LARGE)
    for headers in (b"", b"Range: bytes=5-\r\n"):
        for _ in range(6):
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.sendall(b"GET /static/uploads/left.bin HTTP/1.1\r\nHost: test\r\n" + headers + b"\r\n")
                assert client.recv(1000)[:6] == b"HTTP/1"
        wait_until(lambda: not server.open_uploads())
    assert server.browser.get(server.url("left.bin")).content == LARGE


@pytest.mark.parametrize("kind", ["gunicorn sync", "gunicorn gthread", "gunicorn preload"])
def test_a_worker_that_is_killed(kind: str, tmp_path: Path) -> None:
    """Workers that are killed are replaced by ones that serve and heal; nothing torn is on the disk."""
    data = picture("PNG")
    with serving(kind, APP, tmp_path) as server:
        server.browser.post("/upload", files={"pictures": ("a.png", data)})
        (name,) = shown(server)
        for _ in range(3):
            lose_the_disk(server)
            before = server.processes()[1:]
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda killed=before: len(set(server.processes()[1:]) - set(killed)) == 2)  # type: ignore[misc]
            browser = httpx.Client(base_url=server.browser.base_url, timeout=60, trust_env=False)
            with browser:
                assert browser.get(server.url(name)).content == data
        assert (server.directory / name).read_bytes() == data


BROKEN = """
from flask import Flask
from selfheal.flask import SelfHeal

app = Flask(__name__)
SelfHeal(app)
"""


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_database_that_is_down(kind: str, tmp_path: Path, dead_port: int) -> None:
    """With the database down a hit is a 200, and a miss a 503 that says when to ask again; the server still stops."""
    (tmp_path / "broken_app.py").write_text(BROKEN)
    write_file(tmp_path / "uploads" / "hit.png", LARGE)
    database = f"postgresql://nobody@127.0.0.1:{dead_port}/none"
    with serving(kind, "broken_app:app", tmp_path, database) as server:
        for _ in range(2):
            assert server.browser.get(server.url("hit.png")).content == LARGE
            miss = server.browser.get(server.url("miss.png"))
            assert (miss.status_code, miss.headers["cache-control"]) == (503, "no-store")
            assert int(miss.headers["retry-after"]) > 0


BRIDGED = """
from a2wsgi import ASGIMiddleware
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from selfheal import SelfHealMiddleware, UploadStore

uploads = UploadStore.from_env()

async def save(request):
    await uploads.database.create_tables()
    return PlainTextResponse((await uploads.save(request.path_params["name"], request.stream())).sha256)

routes = [Route("/{name}", save, methods=["PUT"])]
app = ASGIMiddleware(SelfHealMiddleware(Starlette(routes=routes), uploads))
"""


def test_an_asgi_app_on_a_wsgi_server(tmp_path: Path) -> None:
    """Behind a2wsgi, in gunicorn's threads, every save returns, and every file is served and healed."""
    (tmp_path / "bridged_app.py").write_text(BRIDGED)
    with serving("gunicorn gthread", "bridged_app:app", tmp_path) as server:
        server.browser.put("/first.bin", content=b"first")

        def save(number: int) -> bool:
            data, name = noise(100_000, number), f"{number}.bin"
            with httpx.Client(base_url=server.browser.base_url, timeout=60, trust_env=False) as browser:
                assert browser.put(f"/{name}", content=data).status_code == 200
                first = browser.get(server.url(name)).content
                (server.directory / name).unlink()
                return browser.get(server.url(name)).content == first == data

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(save, range(60)))
