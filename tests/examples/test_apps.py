"""The examples as a newcomer runs them: real servers, real pictures, real HTTP, and a disk that is lost."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from random import Random
from urllib.parse import quote
from xml.etree import ElementTree as ET

import httpx
import pytest
from PIL import ExifTags, Image

from examples.pictures import pictures
from tests.support import ROOT

APPS = ["starlette_app", "fastapi_app"]
PREFIX = "/static/uploads"
MIB = 1024 * 1024

LARGE_APP = """
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from selfheal import SelfHealMiddleware, UploadStore

uploads = UploadStore.from_env()

async def save(request):
    await uploads.database.create_tables()
    saved = await uploads.save(request.path_params["name"], request.stream())
    return PlainTextResponse(saved.sha256)

app = Starlette(
    routes=[Route("/{name}", save, methods=["PUT"])], middleware=[Middleware(SelfHealMiddleware, store=uploads)]
)
"""


@dataclass(frozen=True)
class Server:
    """An app behind a real uvicorn, a browser for it, and its disk."""

    browser: httpx.Client
    directory: Path
    pid: int

    def add(self, *files: tuple[str, bytes]) -> httpx.Response:
        """Send files through the gallery's form."""
        return self.browser.post("/upload", files=[("pictures", file) for file in files])

    def shown(self) -> set[str]:
        """The paths of the pictures that the gallery shows."""
        return {unescape(found) for found in re.findall(r'<img src="([^"]+)"', self.browser.get("/").text)}

    def added(self, name: str, data: bytes) -> str:
        """Send one picture; its path."""
        before = self.shown()
        assert self.add((name, data)).status_code == 303
        (path,) = self.shown() - before
        return path

    def file(self, path: str) -> Path:
        """The file on disk of a path."""
        return self.directory / path.removeprefix(f"{PREFIX}/")

    def peak(self) -> int:
        """The most memory that the server ever held, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


@contextmanager
def serving(app: str, home: Path, database: str | None = None) -> Iterator[Server]:
    """Run an app in a process of its own, over a directory and (unless told otherwise) a SQLite database in `home`."""
    directory = home / "uploads"
    environ = {
        "SELFHEAL_DIRECTORY": str(directory),
        "SELFHEAL_DATABASE_URL": database or f"sqlite+aiosqlite:///{home}/gallery.db",
        "SELFHEAL_PREFIX": PREFIX,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(home))),
    }
    with socket.create_server(("127.0.0.1", 0)) as listener, (home / "log").open("w") as log:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port, fd = listener.getsockname()[1], listener.fileno()
        command = [sys.executable, "-X", "dev", "-m", "uvicorn", app, "--fd", str(fd), "--no-access-log"]
        process = subprocess.Popen(command, env=os.environ | environ, pass_fds=[fd], cwd=home, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as browser:
            yield Server(browser, directory, process.pid)
    finally:
        process.terminate()
        process.wait(30)
    said = (home / "log").read_text()
    assert "Traceback" not in said, said
    assert "Warning" not in said, said


@pytest.fixture(scope="module")
def originals() -> dict[str, bytes]:
    """The demo's pictures."""
    return pictures()


@pytest.fixture(scope="module")
def galleries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Both galleries, each with a disk and a SQLite database of its own."""
    homes = {name: tmp_path_factory.mktemp(name) for name in APPS}
    with serving("examples.starlette_app:app", homes[APPS[0]]) as first:
        with serving("examples.fastapi_app:app", homes[APPS[1]]) as second:
            yield dict(zip(APPS, (first, second), strict=True))


@pytest.fixture(params=APPS)
def gallery(request: pytest.FixtureRequest, galleries: dict[str, Server]) -> Server:
    """One gallery after the other."""
    return galleries[request.param]


def soon(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something holds that is done behind; fail if it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.05)


def opened(name: str, data: bytes) -> tuple[str, tuple[int, int], int]:
    """What a picture is when it is decoded, every frame of it: format, size, frames."""
    if name.endswith(".svg"):
        root = ET.fromstring(data)
        _, _, width, height = root.attrib["viewBox"].split()
        return "SVG", (int(width), int(height)), 1
    with Image.open(BytesIO(data)) as picture:
        frames = getattr(picture, "n_frames", 1)
        for frame in range(frames):
            picture.seek(frame)
            picture.load()
        return picture.format or "", picture.size, frames


# -- the pictures -----------------------------------------------------------------------------------------------------


def test_the_pictures_are_the_same_at_every_run(originals: dict[str, bytes]) -> None:
    """Who compares what came back must be able to make the same pictures again."""
    assert pictures() == originals


def test_the_pictures_are_of_every_kind(originals: dict[str, bytes]) -> None:
    """JPEG with EXIF, PNG with alpha and with a palette, an animated GIF, WebP, SVG; a few hundred KB in all."""
    kinds = {name: opened(name, data) for name, data in originals.items()}
    assert {kind for kind, _, _ in kinds.values()} == {"JPEG", "PNG", "GIF", "WEBP", "SVG"}
    assert kinds["orbit.gif"][2] == 24
    assert 300_000 < sum(map(len, originals.values())) < 1_000_000
    with Image.open(BytesIO(originals["dusk.jpg"])) as picture:
        assert picture.getexif()[ExifTags.Base.ImageDescription] == "Dusk"
    with Image.open(BytesIO(originals["sunflower.png"])) as picture:
        assert picture.mode == "RGBA"
    with Image.open(BytesIO(originals["tiles.png"])) as picture:
        assert picture.mode == "P"


# -- lost and brought back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("app", APPS)
def test_real_pictures_come_back(app: str, originals: dict[str, bytes], database_url: str, tmp_path: Path) -> None:
    """Pictures sent through the form, then lost with the whole disk, are served again, the same in every respect."""
    with serving(f"examples.{app}:app", tmp_path, database_url) as gallery:
        answer = gallery.add(*originals.items())
        assert (answer.status_code, answer.headers["Location"]) == (303, "/")
        before = {path: gallery.browser.get(path) for path in gallery.shown()}
        names = {data: name for name, data in originals.items()}
        assert {names[answer.content] for answer in before.values()} == originals.keys()
        times = {path: gallery.file(path).stat().st_mtime_ns for path in before}

        shutil.rmtree(gallery.directory)
        for path, was in before.items():
            now = gallery.browser.get(path)
            assert now.status_code == 200
            assert now.content == was.content
            for header in ("ETag", "Last-Modified", "Content-Type", "Content-Length"):
                assert now.headers[header] == was.headers[header], header
            assert opened(names[was.content], now.content) == opened(names[was.content], was.content)
            soon(gallery.file(path).exists)
            assert gallery.file(path).read_bytes() == was.content
            assert gallery.file(path).stat().st_mtime_ns == times[path]

        shutil.rmtree(gallery.directory)
        for path, was in before.items():
            assert gallery.browser.get(path, headers={"If-None-Match": was.headers["ETag"]}).status_code == 304


def test_a_deletion_can_be_undone(gallery: Server, originals: dict[str, bytes]) -> None:
    """A deleted picture is gone from page, disk and HTTP; its undo button brings the same picture back."""
    path = gallery.added("julia.webp", originals["julia.webp"])
    before, name = gallery.browser.get(path), gallery.file(path).name

    answer = gallery.browser.post("/delete", data={"name": name})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    gone = gallery.browser.get(path)
    assert (gone.status_code, gone.headers["Cache-Control"]) == (404, "no-store")
    assert path not in gallery.shown()
    assert not gallery.file(path).exists()
    assert re.search(rf'action="/undo"[^>]*>\s*<button name="name" value="{name}"', gallery.browser.get("/").text)

    answer = gallery.browser.post("/undo", data={"name": name})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    after = gallery.browser.get(path)
    assert (after.status_code, after.content) == (200, before.content)
    assert (after.headers["ETag"], after.headers["Last-Modified"]) == (
        before.headers["ETag"],
        before.headers["Last-Modified"],
    )
    assert path in gallery.shown()


LAYING_BACK: dict[str, Callable[[Path, Path], object]] = {
    "written anew": lambda kept, file: file.write_bytes(kept.read_bytes()),
    "copied with its time": shutil.copy2,
    "linked, the very same file": os.link,
}


def test_deleted_stays_deleted(gallery: Server, originals: dict[str, bytes], tmp_path: Path) -> None:
    """However a deploy lays the file of a deleted picture back, the picture goes again, even where it was served."""
    paths = {how: gallery.added("tiles.png", originals["tiles.png"]) for how in LAYING_BACK}
    for how, path in paths.items():
        os.link(gallery.file(path), tmp_path / how)
        assert gallery.browser.get(path).status_code == 200
    time.sleep(2)  # by now the server has looked behind these hits, and knows the files
    for how, path in paths.items():
        assert gallery.browser.post("/delete", data={"name": gallery.file(path).name}).status_code == 303
        LAYING_BACK[how](tmp_path / how, gallery.file(path))
    for path in paths.values():
        soon(lambda path=path: gallery.browser.get(path).status_code == 404)
        assert not gallery.file(path).exists()
    assert gallery.shown().isdisjoint(paths.values())


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make", "status"),
    [
        ("tool.exe", lambda of: of["dusk.jpg"], 415),
        ("no extension", lambda of: of["dusk.jpg"], 415),
        ("page.png", lambda _: b"<!doctype html><script>alert(1)</script>", 415),
        ("photo.png", lambda of: of["dusk.jpg"], 415),
        ("large.jpg", lambda of: of["dusk.jpg"][:-2] + bytes(50 * MIB) + b"\xff\xd9", 413),
        ("empty.jpg", lambda _: b"", 422),
        ("half.jpg", lambda of: of["dusk.jpg"][: len(of["dusk.jpg"]) // 2], 422),
        ("half.png", lambda of: of["tiles.png"][:-20], 422),
        ("half.webp", lambda of: of["julia.webp"][:-1], 422),
    ],
)
def test_what_is_no_whole_picture_is_refused(
    gallery: Server, originals: dict[str, bytes], name: str, make: Callable[[dict[str, bytes]], bytes], status: int
) -> None:
    """A wrong type is 415, too much 413, empty or cut off 422; neither page nor disk have it after, and it is named."""
    before = gallery.shown(), set(gallery.directory.glob("*"))
    answer = gallery.add((name, make(originals)))
    assert answer.status_code == status
    assert f"<p role=alert><b>{name}</b>" in answer.text
    assert (gallery.shown(), set(gallery.directory.glob("*"))) == before


def test_what_is_good_beside_it_is_kept(gallery: Server, originals: dict[str, bytes]) -> None:
    """One refused file does not cost the visitor the others of the same form."""
    before = gallery.shown()
    answer = gallery.add(("a.png", originals["tiles.png"]), ("b.exe", b"MZ"), ("c.svg", originals["rose.svg"]))
    assert answer.status_code == 415
    added = gallery.shown() - before
    assert {gallery.browser.get(path).content for path in added} == {originals["tiles.png"], originals["rose.svg"]}


@pytest.mark.parametrize("action", ["delete", "undo"])
@pytest.mark.parametrize("name", ["../gallery.db", ".selfheal", "/etc/passwd", "a\\b", "CON", "x" * 600])
def test_a_tampered_name_is_not_found(gallery: Server, action: str, name: str) -> None:
    """A form's name that is not in the grammar is a 404 and does nothing."""
    assert gallery.browser.post(f"/{action}", data={"name": name}).status_code == 404


def test_there_is_nothing_to_undo(gallery: Server) -> None:
    """Undoing what never was is a 404."""
    assert gallery.browser.post("/undo", data={"name": "never.png"}).status_code == 404


def test_without_the_database(gallery: Server, originals: dict[str, bytes]) -> None:
    """While the database gives no answer the list is a 503 to be tried again, and pictures on disk are served."""
    path = gallery.added("moon.jpg", originals["moon.jpg"])
    with sqlite3.connect(gallery.directory.parent / "gallery.db") as database:
        database.execute("ALTER TABLE image_storage RENAME TO away")
        database.commit()
        try:
            answer = gallery.browser.get("/")
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert gallery.browser.get(path).content == originals["moon.jpg"]
        finally:
            database.execute("ALTER TABLE away RENAME TO image_storage")
            database.commit()
    database.close()
    soon(lambda: gallery.browser.get("/").status_code == 200)


# -- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """A page's elements, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One more."""
        self.elements.append((tag, dict(attrs)))

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of some kinds."""
        return [attributes for tag, attributes in self.elements if tag in tags]


def test_the_page_needs_nothing_but_itself(gallery: Server, originals: dict[str, bytes]) -> None:
    """No script, no style sheet, no font, no picture comes from elsewhere."""
    gallery.added("tiles.png", originals["tiles.png"])
    text = gallery.browser.get("/").text
    page = Page(text)
    assert not page.all("script", "link", "iframe", "object", "embed")
    addresses = [
        value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")
    ]
    assert addresses
    assert all(address and address.startswith(f"{PREFIX}/") for address in addresses)
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_can_be_used_by_everybody(gallery: Server, originals: dict[str, bytes]) -> None:
    """It says its language and title; every picture, field and button has a name of its own; it fits a phone."""
    gallery.added("tiles.png", originals["tiles.png"])
    text = gallery.browser.get("/").text
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("title")) == len(page.all("h1")) == len(page.all("main")) == 1
    assert [meta["content"] for meta in page.all("meta") if meta.get("name") == "viewport"] == ["width=device-width"]
    titles = [image["alt"] for image in page.all("img")]
    assert len(titles) == len(set(titles)) > 0
    assert all(titles)
    labels = [button["aria-label"] for button in page.all("button") if button.get("name")]
    assert all(labels)
    assert {f"Delete {title}" for title in titles} <= set(labels)
    assert page.all("input")[0]["aria-label"]
    assert "color-scheme: light dark" in text


def test_hostile_names_are_escaped(gallery: Server, originals: dict[str, bytes]) -> None:
    """Neither a client's file name nor a file's own name on disk can put a tag or an attribute on the page."""
    hostile = "a'\"><img src=x onerror=alert(1)>&amp;é %.png"
    answer = gallery.add((hostile.replace('"', "") + ".exe", b"MZ"))
    assert answer.status_code == 415
    assert "<img src=x" not in answer.text

    gallery.directory.mkdir(exist_ok=True)
    (gallery.directory / hostile).write_bytes(originals["tiles.png"])
    os.utime(gallery.directory / hostile, (1e9, 1e9))
    path = f"{PREFIX}/{quote(hostile)}"
    assert gallery.browser.get(path).status_code == 200
    soon(lambda: gallery.browser.get(path).is_success and path in gallery.shown())  # adopted, behind one of these hits
    page = Page(gallery.browser.get("/").text)
    assert not [image for image in page.all("img") if "onerror" in image]
    assert hostile in [button.get("value") for button in page.all("button")]
    assert gallery.browser.post("/delete", data={"name": hostile}).status_code == 303
    assert gallery.browser.get(path).status_code == 404
    assert hostile in [button.get("value") for button in Page(gallery.browser.get("/").text).all("button")]


def test_both_examples_show_the_same_page() -> None:
    """Each example can be copied on its own; the page that both of them carry is one and the same."""
    starlette, fastapi = ((ROOT / "examples" / f"{name}.py").read_text() for name in APPS)
    page = "async def page("
    assert starlette.partition(page)[2].partition("\n\napp = ")[0].strip() == fastapi.partition(page)[2].strip()


# -- large files ------------------------------------------------------------------------------------------------------


def blocks(size: int, whole: hashlib._Hash) -> Iterator[bytes]:
    """Blocks of 1 MiB, no two of them equal, hashed as they go."""
    noise = Random(7).randbytes(MIB - 8)
    for number in range(size // MIB):
        block = number.to_bytes(8, "big") + noise
        whole.update(block)
        yield block


def digest_and_size(browser: httpx.Client, path: str, headers: dict[str, str] | None = None) -> tuple[str, int]:
    """The digest of an answer's body, held in no one's memory, and its size."""
    whole, size = hashlib.sha256(), 0
    with browser.stream("GET", path, headers=headers) as answer:
        assert answer.status_code in (200, 206)
        for piece in answer.iter_raw():
            whole.update(piece)
            size += len(piece)
    return whole.hexdigest(), size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is not here")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """1 GiB streams in, is lost, streams back and is served from disk, in less than 100 MB more than 1 MiB needs."""
    (tmp_path / "large_app.py").write_text(LARGE_APP)
    size = 1024 * MIB
    with serving("large_app:app", tmp_path) as server:
        for name in ("small.bin", "large.bin"):
            path, whole = f"{PREFIX}/{name}", hashlib.sha256()
            source = blocks(MIB if name == "small.bin" else size, whole)
            assert server.browser.put(f"/{name}", content=source).text == whole.hexdigest()
            server.file(path).unlink()
            from_database = digest_and_size(server.browser, path)
            soon(server.file(path).exists)
            assert from_database == digest_and_size(server.browser, path)
            assert from_database[0] == whole.hexdigest()
            if name == "small.bin":
                base = server.peak()
        assert from_database[1] == size
        assert server.peak() - base < 100_000_000
