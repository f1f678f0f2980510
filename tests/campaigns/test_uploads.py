"""Hostile uploads through the form of real apps: too large, cut off, bombs, two formats in one, floods of fields.

A refused upload is neither on disk nor in the database; an accepted one is served so that it does no harm.
"""

from __future__ import annotations

import io
import random
import re
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import httpx
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message

from selfheal import InvalidName, SelfHealMiddleware, UploadStore
from selfheal.disk.temporary import TEMPORARY
from tests.support.asgi import scope_of
from tests.support.example_apps import APPS, MIB, Server, serving
from tests.support.store_state import files_below
from tests.support.waiting import wait_until

Times = Callable[[int, int], int]
BOUNDARY = b"a-boundary"
SANDBOX = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:"


@pytest.fixture(scope="module")
def galleries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Server, Path]]]:
    """Both example apps, each with a directory of its own."""
    homes = {name: tmp_path_factory.mktemp(name) for name in APPS}
    with serving("examples.starlette_app:app", homes[APPS[0]]) as first:
        with serving("examples.fastapi_app:app", homes[APPS[1]]) as second:
            yield {APPS[0]: (first, homes[APPS[0]]), APPS[1]: (second, homes[APPS[1]])}


@pytest.fixture(params=APPS)
def gallery(request: pytest.FixtureRequest, galleries: dict[str, tuple[Server, Path]]) -> Server:
    """Every example app."""
    return galleries[request.param][0]


@pytest.fixture
def home(gallery: Server, galleries: dict[str, tuple[Server, Path]]) -> Path:
    """The directory that holds everything of an app."""
    return next(home for server, home in galleries.values() if server is gallery)


def kept(directory: Path) -> list[str]:
    """Return the files below the directory of a living server, without the temporary one that it may have just now."""
    return [file for file in files_below(directory) if TEMPORARY not in file]


def picture(kind: str, size: int = 64) -> bytes:
    """Return a picture of random pixels in a format of Pillow."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (size, size), random.Random(kind).randbytes(size * size * 3)).save(buffer, kind)
    return buffer.getvalue()


PICTURES = {
    "jpg": picture("JPEG"),
    "png": picture("PNG"),
    "gif": picture("GIF"),
    "webp": picture("WEBP"),
    "bmp": picture("BMP"),
    "ico": picture("ICO"),
    "avif": picture("AVIF"),
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0L9 9"/></svg>',
}
SCAN = PICTURES["jpg"].index(b"\xff\xda")
NEEDED = {
    "jpg": SCAN + 2 + int.from_bytes(PICTURES["jpg"][SCAN + 2 : SCAN + 4], "big") + 1,
    "gif": len(PICTURES["gif"]) - 1,
    "webp": 20 + int.from_bytes(PICTURES["webp"][16:20], "little"),
    "svg": PICTURES["svg"].rindex(b">"),
}
"""The smallest size that is accepted, if it is not the whole: a byte of a JPEG's scan, a GIF without trailer."""
TYPES = {"jpg": "image/jpeg", "svg": "image/svg+xml", "ico": "image/x-icon"}


def refused(answer: httpx.Response) -> dict[str, str]:
    """Return the refused files that a page shows, and the reasons."""
    found = re.findall(r"<p role=alert><b>([^<]*)</b>: ([^<]*)", answer.text)
    return {name: why.strip() for name, why in found}


def part(headers: bytes, data: bytes) -> bytes:
    """Return one part of a form with raw header lines."""
    return b"--" + BOUNDARY + b"\r\n" + headers + b"\r\n\r\n" + data + b"\r\n"


def form(*parts: bytes) -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of a form that a client library would not send."""
    body = b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"
    return body, {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}


def file_part(filename: bytes, data: bytes, more: bytes = b"") -> bytes:
    """Return the part of a file whose name is any bytes."""
    return part(b'Content-Disposition: form-data; name="pictures"; filename=' + filename + more, data)


# -- too large --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["no length", "a false length"])
def test_bytes_are_counted(gallery: Server, way: str) -> None:
    """A file over 50 MiB is a 413, even if the body has no length or its part claims to have ten bytes."""
    data = PICTURES["jpg"][:-2] + bytes(50 * MIB)
    false_length = b"\r\nContent-Length: 10" if way == "a false length" else b""
    body, headers = form(file_part(b'"a.jpg"', data, false_length))

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), MIB):
            yield body[start : start + MIB]

    before = kept(gallery.directory)
    answer = gallery.browser.post("/upload", content=pieces() if way == "no length" else body, headers=headers)
    assert answer.status_code == 413
    assert list(refused(answer)) == ["a.jpg"]
    wait_until(lambda: files_below(gallery.directory) == before)


async def test_a_client_that_goes_away(sqlite_store: UploadStore, tmp_path: Path) -> None:
    """A form that breaks off before its promised length leaves nothing on disk and nothing in the database."""

    async def upload(request: Request) -> Response:
        async with request.form() as fields:
            await sqlite_store.save_uploaded_file(fields["pictures"])  # type: ignore[arg-type]
        return Response(status_code=204)

    body, headers = form(file_part(b'"a.png"', PICTURES["png"]))
    messages = [{"type": "http.request", "body": body[:-1], "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        """Ignore the answer."""

    app = SelfHealMiddleware(Starlette(routes=[Route("/", upload, methods=["POST"])]), sqlite_store)
    scope = scope_of("/", method="POST", headers=[*headers.items(), ("content-length", str(len(body)))])
    with pytest.raises(ClientDisconnect):
        await app(scope, receive, send)
    assert await sqlite_store.database.count() == 0
    assert files_below(tmp_path) == ["catalogue.db"]


@pytest.mark.parametrize(
    "parts",
    [
        [part(b'Content-Disposition: form-data; name="x%d"' % number, b"1") for number in range(1100)],
        [file_part(b'"%d.png"' % number, b"") for number in range(1100)],
        [part(b'Content-Disposition: form-data; name="pictures"', bytes(2 * MIB))],
        [part(b'Content-Disposition: form-data; name="' + b"x" * MIB + b'"', b"")],
    ],
    ids=["many fields", "many files", "a long field", "a long name"],
)
def test_a_flood_of_fields(gallery: Server, parts: list[bytes]) -> None:
    """A form with too many fields, files or bytes is refused, and costs no memory (CVE-2024-47874, CVE-2023-30798)."""
    assert gallery.browser.get("/").status_code == 200  # the app has started
    before, peak = kept(gallery.directory), gallery.peak()
    body, headers = form(*parts)
    assert gallery.browser.post("/upload", content=body, headers=headers).status_code in (400, 422)
    wait_until(lambda: files_below(gallery.directory) == before)
    assert gallery.peak() - peak < 32 * MIB
    assert gallery.browser.get("/").status_code == 200


# -- cut off ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_cut_off_anywhere(
    gallery: Server, kind: str, times: Times, record_property: Callable[[str, object], None]
) -> None:
    """A picture that is cut off anywhere, as far as that can be told, is refused; the whole one beside it is kept."""
    whole = PICTURES[kind]
    last = NEEDED.get(kind, len(whole))
    points = range(1, last)
    cuts = sorted({*random.Random(kind).sample(points, min(len(points), times(40, 1500))), 1, 8, 12, 32, last - 1})
    before = gallery.shown()
    for start in range(0, len(cuts), 100):
        files = {f"{cut}.{kind}": whole[:cut] for cut in cuts[start : start + 100] if cut < last}
        answer = gallery.add((f"whole.{kind}", whole), *files.items())
        assert answer.status_code in (415, 422)
        reasons = refused(answer)
        assert reasons.keys() == files.keys()
        for name, why in reasons.items():
            is_headless = int(name.partition(".")[0]) < 100 and "are" in why
            assert is_headless or why == "the upload is not whole: its end is missing", (name, why)
        (added,) = gallery.shown() - before
        assert gallery.browser.get(added).content == whole
        before |= {added}
    record_property(f"{kind} pictures cut off", len(cuts))


# -- bombs ------------------------------------------------------------------------------------------------------------


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a PNG chunk with its length and its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def png_bomb(side: int) -> bytes:
    """Return a PNG of `side` by `side` black pixels, a thousandth of its decoded size."""
    deflate, row = zlib.compressobj(9), bytes(1 + side // 8)
    rows = b"".join(deflate.compress(row) for _ in range(side)) + deflate.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    ends = png_chunk(b"IHDR", header), png_chunk(b"IDAT", rows), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(ends)


@cache
def text_bomb() -> bytes:
    """Return a PNG whose comment is 256 MiB of zeros, compressed twice."""
    deflate = zlib.compressobj(9)
    text = b"".join(deflate.compress(bytes(MIB)) for _ in range(256)) + deflate.flush()
    comment = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(text))
    whole = PICTURES["png"]
    return whole[:33] + comment + whole[33:]


def svg_bomb() -> bytes:
    """Return an SVG with nested entities that expand to a billion words."""
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    return f'<!DOCTYPE svg [<!ENTITY e0 "ha">{entities}]><svg xmlns="http://www.w3.org/2000/svg">&e9;</svg>'.encode()


BOMBS = {"pixels.png": lambda: png_bomb(50_000), "text.png": text_bomb, "laughs.svg": svg_bomb}


@pytest.mark.parametrize("name", BOMBS)
def test_nothing_is_decoded(gallery: Server, name: str) -> None:
    """A bomb is accepted, restored and served in the time and memory of a small file: nothing decodes it."""
    data = BOMBS[name]()
    gallery.added("warm.png", PICTURES["png"])
    peak, began = gallery.peak(), time.monotonic()
    path = gallery.added(name, data)
    gallery.file(path).unlink()
    assert gallery.browser.get(path).content == data
    assert time.monotonic() - began < 5
    assert gallery.peak() - peak < 32 * MIB


# -- two formats in one -----------------------------------------------------------------------------------------------


def archive() -> bytes:
    """Return a ZIP with an HTML page in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("index.html", "<script>alert(1)</script>")
    return buffer.getvalue()


SCRIPT = b"<script>alert(1)</script>"
GIF = PICTURES["gif"]
POLYGLOTS = {
    "script.gif": GIF[:6] + b"/*" + GIF[8:] + b"*/=1;alert(1)",
    "archive.jpg": PICTURES["jpg"] + archive(),
    "archive.png": PICTURES["png"] + archive(),
    "page.png": PICTURES["png"][:33] + png_chunk(b"tEXt", b"Comment\0" + SCRIPT) + PICTURES["png"][33:],
    "page.jpg": PICTURES["jpg"][:2] + b"\xff\xfe" + struct.pack(">H", len(SCRIPT) + 2) + SCRIPT + PICTURES["jpg"][2:],
    "page.bmp": PICTURES["bmp"] + SCRIPT,
    "page.webp": PICTURES["webp"] + SCRIPT,
    "page.ico": PICTURES["ico"] + SCRIPT,
    "script.svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)">' + SCRIPT + b"</svg>",
    "page.svg": b"<!doctype html><svg></svg>" + SCRIPT,
    "style.svg": b'<?xml-stylesheet href="https://evil.example/x.xsl"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "pdf.png": b"%PDF-1.7\n<html>" + SCRIPT + b"</html>\n%%EOF",
    "pdf.jpg": b"%PDF-1.7\n" + PICTURES["jpg"],
    "page.pdf": b"%PDF-1.7\n" + SCRIPT,
    "page.html": PICTURES["gif"],
    "script.js": GIF[:6] + b"/*" + GIF[8:] + b"*/=1;alert(1)",
    "page.gif": SCRIPT + GIF,
    "picture.svg": PICTURES["png"],
    "page.svgz": zlib.compress(SCRIPT),
    "page.xhtml": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}
REFUSED = {
    "pdf.png",
    "pdf.jpg",
    "page.pdf",
    "page.html",
    "script.js",
    "page.gif",
    "page.svgz",
    "page.xhtml",
}


@pytest.mark.parametrize("name", POLYGLOTS)
def test_two_formats_in_one(gallery: Server, name: str) -> None:
    """A file that is a picture and something else is served only as that picture, or refused with 415."""
    data = POLYGLOTS[name]
    if name in REFUSED:
        assert gallery.add((name, data)).status_code == 415
        return
    path = gallery.added(name, data)
    kind = path.rpartition(".")[2]
    for is_lost in (False, True):
        if is_lost:
            gallery.file(path).unlink()
        answer = gallery.browser.get(path)
        assert answer.content == data
        assert answer.headers["content-type"] == TYPES.get(kind, f"image/{kind}")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers.get("content-security-policy") == (SANDBOX if kind == "svg" else None)


# -- names ------------------------------------------------------------------------------------------------------------

NAMES = [
    b'"../../evil.png"',
    b'"..\\\\..\\\\evil.png"',
    b'"/etc/cron.d/evil.png"',
    b'"%2e%2e%2fevil.png"',
    b'"&#46;&#46;&sol;evil.png"',
    b'"..;/evil.png"',
    b'"evil.png/."',
    b'".."',
    b'"evil.png/../../evil.png"',
    b'"evil\\"; filename=\\"../evil.png"',
    b"../../evil.png",
    b"\"a.png\"; filename*=utf-8''..%2f..%2fevil.png",
    b"\"\"; filename*=utf-8''%2e%2e%2fevil.png",
    b'"evil.png\xff\xfe"',
    b'"\xe2\x80\xae/../gnp.live.png"',
    b'"evil.php;.png"',
    b'"' + b"../" * 2000 + b'evil.png"',
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[2:30])
def test_names_on_the_wire(gallery: Server, home: Path, name: bytes) -> None:
    """No file name in a form becomes a file name on disk, however it is written (CVE-2021-28658, CVE-2021-31542)."""
    shown, before = gallery.shown(), set(kept(home))
    body, headers = form(file_part(name, PICTURES["png"]))
    answer = gallery.browser.post("/upload", content=body, headers=headers)
    assert answer.status_code in (303, 400, 415, 422)
    added = gallery.shown() - shown
    assert len(added) == (answer.status_code == 303)
    assert all(re.fullmatch(r"/static/uploads/[0-9a-f]{32}\.png", path) for path in added)
    new = {f"uploads/{path.rpartition('/')[2]}" for path in added}
    wait_until(lambda: set(files_below(home)) - before - {"gallery.db-journal"} == new)
    assert [path for path in home.parent.rglob("*evil*") if path.is_file()] == []


@pytest.mark.parametrize("folder", ["..", "../../out", "/tmp", "a/../..", "a//b", ".hidden", "a\\b", "CON", "a\0b"])
async def test_a_folder_is_no_way_out(sqlite_store: UploadStore, directory: Path, folder: str) -> None:
    """A folder outside the uploads is refused before a byte is stored on disk or in the database (CVE-2021-45452)."""
    upload = UploadFile(io.BytesIO(PICTURES["png"]), filename="a.png")
    with pytest.raises(InvalidName):
        await sqlite_store.save_uploaded_file(upload, folder=folder)
    assert await sqlite_store.database.count() == 0
    assert files_below(directory.parents[2]) in ([], ["catalogue.db"])
    shutil.rmtree(directory, ignore_errors=True)
