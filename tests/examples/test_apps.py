"""The example apps on real servers: real pictures over HTTP, and a disk that is lost."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
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
from tests.support.example_apps import APPS, MIB, PREFIX, Server, serving

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


@pytest.fixture(scope="module")
def galleries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Both galleries, each with its own directory and SQLite database."""
    homes = {name: tmp_path_factory.mktemp(name) for name in APPS}
    with serving("examples.starlette_app:app", homes[APPS[0]]) as first:
        with serving("examples.fastapi_app:app", homes[APPS[1]]) as second:
            yield dict(zip(APPS, (first, second), strict=True))


@pytest.fixture(params=APPS)
def gallery(request: pytest.FixtureRequest, galleries: dict[str, Server]) -> Server:
    """Each of the galleries."""
    return galleries[request.param]


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition holds that the server brings about in the background; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"it does not hold after {seconds} s"
        time.sleep(0.05)


def decoded(name: str, data: bytes) -> tuple[str, tuple[int, int], int]:
    """Decode every frame of a picture; return its format, size and number of frames."""
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
    """`pictures` returns the same bytes at every call, so that restored files can be compared."""
    assert pictures() == originals


def test_the_pictures_are_of_every_kind(originals: dict[str, bytes]) -> None:
    """JPEG with EXIF, PNG with alpha and with a palette, animated GIF, WebP and SVG, a few hundred KB in all."""
    kinds = {name: decoded(name, data) for name, data in originals.items()}
    assert {kind for kind, _, _ in kinds.values()} == {"JPEG", "PNG", "GIF", "WEBP", "SVG"}
    assert kinds["orbit.gif"][2] == 24
    assert 300_000 < sum(map(len, originals.values())) < 1_000_000
    with Image.open(BytesIO(originals["dusk.jpg"])) as picture:
        assert picture.getexif()[ExifTags.Base.ImageDescription] == "Dusk"
    with Image.open(BytesIO(originals["sunflower.png"])) as picture:
        assert picture.mode == "RGBA"
    with Image.open(BytesIO(originals["tiles.png"])) as picture:
        assert picture.mode == "P"


# -- lost and restored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("app", APPS)
def test_real_pictures_are_restored(app: str, originals: dict[str, bytes], database_url: str, tmp_path: Path) -> None:
    """Pictures sent through the form and lost with the disk are restored with equal bytes, headers and mtime."""
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
            assert decoded(names[was.content], now.content) == decoded(names[was.content], was.content)
            wait_until(gallery.file(path).exists)
            assert gallery.file(path).read_bytes() == was.content
            assert gallery.file(path).stat().st_mtime_ns == times[path]

        shutil.rmtree(gallery.directory)
        for path, was in before.items():
            assert gallery.browser.get(path, headers={"If-None-Match": was.headers["ETag"]}).status_code == 304


def test_a_deletion_can_be_undone(gallery: Server, originals: dict[str, bytes]) -> None:
    """A deleted picture is gone from page, disk and HTTP; the undo button restores it with the same validators."""
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


PUT_BACK: dict[str, Callable[[Path, Path], object]] = {
    "written again": lambda kept, file: file.write_bytes(kept.read_bytes()),
    "copied with its time": shutil.copy2,
    "linked, the same inode": os.link,
}


def test_deleted_stays_deleted(gallery: Server, originals: dict[str, bytes], tmp_path: Path) -> None:
    """A file of a deleted picture that a deploy puts back, in any way, is removed again, even if it was served."""
    paths = {how: gallery.added("tiles.png", originals["tiles.png"]) for how in PUT_BACK}
    for how, path in paths.items():
        os.link(gallery.file(path), tmp_path / how)
        assert gallery.browser.get(path).status_code == 200
    time.sleep(2)  # by now the background checks after these hits are over, and the server knows the files
    for how, path in paths.items():
        assert gallery.browser.post("/delete", data={"name": gallery.file(path).name}).status_code == 303
        PUT_BACK[how](tmp_path / how, gallery.file(path))
    for path in paths.values():
        wait_until(lambda path=path: gallery.browser.get(path).status_code == 404)
        assert not gallery.file(path).exists()
    assert gallery.shown().isdisjoint(paths.values())


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make", "status"),
    [
        ("tool.exe", lambda of: of["dusk.jpg"], 415),
        ("no extension", lambda of: of["dusk.jpg"], 415),
        ("page.png", lambda _: b"<!doctype html><script>alert(1)</script>", 415),
        ("photo.png", lambda of: of["rose.svg"], 415),
        ("large.jpg", lambda of: of["dusk.jpg"][:-2] + bytes(50 * MIB) + b"\xff\xd9", 413),
        ("empty.jpg", lambda _: b"", 422),
        ("headers.jpg", lambda of: of["dusk.jpg"][: of["dusk.jpg"].index(b"\xff\xda")], 422),
        ("half.bmp", lambda of: of["tiles.png"][: len(of["tiles.png"]) // 2], 422),
        ("half.png", lambda of: of["tiles.png"][:-20], 422),
        ("half.webp", lambda of: of["julia.webp"][:-1], 422),
    ],
)
def test_a_bad_picture_is_refused(
    gallery: Server, originals: dict[str, bytes], name: str, make: Callable[[dict[str, bytes]], bytes], status: int
) -> None:
    """A wrong type is 415, too large 413, empty or truncated 422; page and disk do not change, the file is named."""
    before = gallery.shown(), set(gallery.directory.glob("[!.]*"))
    answer = gallery.add((name, make(originals)))
    assert answer.status_code == status
    assert f"<p role=alert><b>{name}</b>" in answer.text
    assert (gallery.shown(), set(gallery.directory.glob("[!.]*"))) == before


@pytest.mark.parametrize("name", ["photo.png", "photo.avif", "photo.svg"])
def test_a_picture_with_another_extension(gallery: Server, originals: dict[str, bytes], name: str) -> None:
    """A photo that is called otherwise is kept as what it is, with the extension and the type of its bytes."""
    path = gallery.added(name, originals["dusk.jpg"])
    assert path.endswith(".jpg")
    answer = gallery.browser.get(path)
    assert (answer.content, answer.headers["content-type"]) == (originals["dusk.jpg"], "image/jpeg")


def test_the_other_files_of_a_form_are_kept(gallery: Server, originals: dict[str, bytes]) -> None:
    """A refused file does not affect the other files of the same form."""
    before = gallery.shown()
    answer = gallery.add(("a.png", originals["tiles.png"]), ("b.exe", b"MZ"), ("c.svg", originals["rose.svg"]))
    assert answer.status_code == 415
    added = gallery.shown() - before
    assert {gallery.browser.get(path).content for path in added} == {originals["tiles.png"], originals["rose.svg"]}


@pytest.mark.parametrize("action", ["delete", "undo"])
@pytest.mark.parametrize("name", ["../gallery.db", ".selfheal", "/etc/passwd", "a\\b", "CON", "x" * 600])
def test_a_tampered_name_is_not_found(gallery: Server, action: str, name: str) -> None:
    """A name in a form that is not valid is a 404."""
    assert gallery.browser.post(f"/{action}", data={"name": name}).status_code == 404


def test_there_is_nothing_to_undo(gallery: Server) -> None:
    """Undo of a name that never existed is a 404."""
    assert gallery.browser.post("/undo", data={"name": "never.png"}).status_code == 404


def test_without_the_database(gallery: Server, originals: dict[str, bytes]) -> None:
    """While the database fails, the list is a 503 with `Retry-After`, and pictures on disk are served."""
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
    wait_until(lambda: gallery.browser.get("/").status_code == 200)


# -- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record an element."""
        self.elements.append((tag, dict(attrs)))

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        """Return the attributes of all elements with these tags."""
        return [attributes for tag, attributes in self.elements if tag in tags]


def test_the_page_loads_nothing_from_elsewhere(gallery: Server, originals: dict[str, bytes]) -> None:
    """The page loads no script, style sheet, font or picture from elsewhere."""
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


def test_the_page_is_accessible(gallery: Server, originals: dict[str, bytes]) -> None:
    """The page has a language and a title; every picture, field and button has its own label; it fits a phone."""
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
    """A hostile file name, from a client or on disk, adds no tag and no attribute to the page."""
    hostile = "a'\"><img src=x onerror=alert(1)>&amp;é %.png"
    answer = gallery.add((hostile.replace('"', "") + ".exe", b"MZ"))
    assert answer.status_code == 415
    assert "<img src=x" not in answer.text

    gallery.directory.mkdir(exist_ok=True)
    (gallery.directory / hostile).write_bytes(originals["tiles.png"])
    os.utime(gallery.directory / hostile, (1e9, 1e9))
    path = f"{PREFIX}/{quote(hostile)}"
    assert gallery.browser.get(path).status_code == 200
    wait_until(lambda: gallery.browser.get(path).is_success and path in gallery.shown())  # adopted in the background
    page = Page(gallery.browser.get("/").text)
    assert not [image for image in page.all("img") if "onerror" in image]
    assert hostile in [button.get("value") for button in page.all("button")]
    assert gallery.browser.post("/delete", data={"name": hostile}).status_code == 303
    assert gallery.browser.get(path).status_code == 404
    assert hostile in [button.get("value") for button in Page(gallery.browser.get("/").text).all("button")]


def test_both_examples_show_the_same_page() -> None:
    """The page is the same code in both examples, each of which can be copied on its own."""
    starlette, fastapi = ((ROOT / "examples" / f"{name}.py").read_text() for name in APPS)
    page = "async def page("
    assert starlette.partition(page)[2].partition("\n\napp = ")[0].strip() == fastapi.partition(page)[2].strip()


# -- large files ------------------------------------------------------------------------------------------------------


def blocks(size: int, whole: hashlib._Hash) -> Iterator[bytes]:
    """Yield different blocks of 1 MiB, and add them to a hash."""
    noise = Random(7).randbytes(MIB - 8)
    for number in range(size // MIB):
        block = number.to_bytes(8, "big") + noise
        whole.update(block)
        yield block


def digest_and_size(browser: httpx.Client, path: str, headers: dict[str, str] | None = None) -> tuple[str, int]:
    """Return the digest and size of a response's body, without holding it in memory."""
    whole, size = hashlib.sha256(), 0
    with browser.stream("GET", path, headers=headers) as answer:
        assert answer.status_code in (200, 206)
        for piece in answer.iter_raw():
            whole.update(piece)
            size += len(piece)
    return whole.hexdigest(), size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is not here")
def test_memory_does_not_grow_with_the_file(tmp_path: Path, times: Callable[[int, int], int]) -> None:
    """256 MiB (in a campaign 1 GiB) are uploaded, lost, restored and served with 100 MB more memory than for 1 MiB."""
    (tmp_path / "large_app.py").write_text(LARGE_APP)
    size = times(256, 1024) * MIB
    with serving("large_app:app", tmp_path) as server:
        for name in ("small.bin", "large.bin"):
            path, whole = f"{PREFIX}/{name}", hashlib.sha256()
            source = blocks(MIB if name == "small.bin" else size, whole)
            assert server.browser.put(f"/{name}", content=source).text == whole.hexdigest()
            server.file(path).unlink()
            from_database = digest_and_size(server.browser, path)
            wait_until(server.file(path).exists)
            assert from_database == digest_and_size(server.browser, path)
            assert from_database[0] == whole.hexdigest()
            if name == "small.bin":
                base = server.peak()
        assert from_database[1] == size
        assert server.peak() - base < 100_000_000
