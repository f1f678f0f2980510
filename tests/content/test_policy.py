"""What an app takes from strangers: real pictures, broken ones, disguised ones, and too much."""

from __future__ import annotations

import asyncio
import functools
import io
import random
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from starlette.datastructures import UploadFile

from selfheal import (
    MissingExtra,
    UploadIncomplete,
    UploadPolicy,
    UploadRefused,
    UploadStore,
    UploadTooLarge,
    UploadTypeRefused,
)
from selfheal.aio.threads import Threads
from selfheal.content.content_types import IMAGE_EXTENSIONS, can_run_script, content_type
from selfheal.content.policy import MIB, check_head
from selfheal.content.sources import CHUNK, Source, chunks
from tests.conftest import needs

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
ANY = UploadPolicy(extensions=None)


# -- pictures ---------------------------------------------------------------------------------------------------------


def image(side: int = 48, mode: str = "RGB") -> Image.Image:
    """Noise, the same at every run, so that every format has something to say."""
    pixels = random.Random(side).randbytes(side * side * 3)
    return Image.frombytes("RGB", (side, side), pixels).convert(mode)


@functools.cache
def picture(kind: str, side: int = 48, mode: str = "RGB", **options: Any) -> bytes:
    """A picture as Pillow writes it."""
    if kind == "AVIF" and not features.check("avif"):
        needs("AVIF in Pillow", "pip install --upgrade pillow")
    out = io.BytesIO()
    image(side, mode).save(out, kind, **options)
    return out.getvalue()


@functools.cache
def film(kind: str, **options: Any) -> bytes:
    """Three pictures in one file."""
    if kind == "AVIF" and not features.check("avif"):
        needs("AVIF in Pillow", "pip install --upgrade pillow")
    out = io.BytesIO()
    image(48).save(out, kind, save_all=True, append_images=[image(47).resize((48, 48)), image(48, "L")], **options)
    return out.getvalue()


def segment(marker: int, payload: bytes) -> bytes:
    """One of a JPEG's segments."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """A JPEG with segments put in behind its beginning."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def exif_with_thumbnail(thumbnail: bytes) -> bytes:
    """An APP1 segment as cameras write it: no tags, and a second directory with a JPEG inside."""
    entries = [(0x0103, 3, 1, 6), (0x0201, 4, 1, 56), (0x0202, 4, 1, len(thumbnail))]
    second = struct.pack("<H", 3) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    tiff = b"II*\0" + struct.pack("<IHI", 8, 0, 14) + second
    return segment(0xE1, b"Exif\0\0" + tiff.ljust(56, b"\0") + thumbnail)


def photoshop_thumbnail(thumbnail: bytes) -> bytes:
    """An APP13 segment as Photoshop writes it, with a JPEG of its own inside."""
    resource = bytes(28) + thumbnail
    return segment(0xED, b"Photoshop 3.0\08BIM\x04\x0c\0\0" + struct.pack(">I", len(resource)) + resource)


def mp4(size: int) -> bytes:
    """A film as phones append it to a photo; somewhere in it are bytes that look like JPEG's."""
    return b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + random.Random(size).randbytes(size)


PLAIN_JPEG = picture("JPEG")
THUMBNAIL = picture("JPEG", 16)
CAMERA_JPEG = with_segments(PLAIN_JPEG, exif_with_thumbnail(THUMBNAIL))
EDITED_JPEG = with_segments(PLAIN_JPEG, exif_with_thumbnail(THUMBNAIL), photoshop_thumbnail(THUMBNAIL))
TALKING_JPEG = with_segments(PLAIN_JPEG, segment(0xFE, b"an end " + EOI + b" and another " + EOI + SOI))
TRAILERS = {
    "a zero": b"\0",
    "a line's end": b"\n",
    "zeros": bytes(1000),
    "a beginning": SOI,
    "beginnings": SOI * 3,
    "an end": EOI,
    "a beginning and an end": SOI + EOI,
    "another picture": THUMBNAIL,
    "half another picture": THUMBNAIL[:-2],
    "fill bytes": b"\xff" * 9,
    "an archive": b"PK\3\4" * 9,
}
SVG = b"""<?xml version="1.0" encoding="UTF-8"?>
<!-- drawn by hand -->
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle r="4"/></svg>
"""

WHOLE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "JPEG": ("jpg", lambda: PLAIN_JPEG),
    "JPEG, progressive": ("jpeg", lambda: picture("JPEG", progressive=True)),
    "JPEG, restart markers": ("jpe", lambda: picture("JPEG", restart_marker_blocks=2)),
    "JPEG, grey": ("jfif", lambda: picture("JPEG", mode="L")),
    "JPEG, CMYK": ("jpg", lambda: picture("JPEG", mode="CMYK")),
    "JPEG of a camera, with a thumbnail": ("jpg", lambda: CAMERA_JPEG),
    "JPEG of an editor, with two thumbnails": ("jpg", lambda: EDITED_JPEG),
    "JPEG, marks of an end in a comment": ("jpg", lambda: TALKING_JPEG),
    "JPEG, several pictures": ("jpg", lambda: film("MPO")),
    "PNG": ("png", lambda: picture("PNG")),
    "PNG, palette": ("png", lambda: picture("PNG", mode="P")),
    "PNG, animated": ("png", lambda: film("PNG", duration=40)),
    "APNG": ("apng", lambda: film("PNG", duration=40)),
    "GIF": ("gif", lambda: picture("GIF")),
    "GIF, animated": ("gif", lambda: film("GIF", duration=40, loop=0)),
    "GIF, with a comment": ("gif", lambda: picture("GIF", comment=b"one; two; three;" * 40)),
    "WebP": ("webp", lambda: picture("WEBP")),
    "WebP, lossless": ("webp", lambda: picture("WEBP", lossless=True)),
    "WebP, animated": ("webp", lambda: film("WEBP", duration=40)),
    "BMP": ("bmp", lambda: picture("BMP")),
    "ICO": ("ico", lambda: picture("ICO", sizes=((16, 16), (32, 32)))),
    "AVIF": ("avif", lambda: picture("AVIF")),
    "AVIF, animated": ("avif", lambda: film("AVIF", duration=40)),
    "TIFF": ("tif", lambda: picture("TIFF")),
    "TIFF, packed": ("tiff", lambda: picture("TIFF", compression="tiff_lzw")),
    "TIFF, big": ("tiff", lambda: picture("TIFF", big_tiff=True)),
    "TIFF, several pages": ("tiff", lambda: film("TIFF")),
    "SVG": ("svg", lambda: SVG),
    "SVG without a prologue": ("svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "SVG with a byte order mark": ("svg", lambda: b"\xef\xbb\xbf" + SVG),
}
MARKED = [
    name
    for name, (end, _) in WHOLE.items()
    if end in {"jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "webp"} and name != "JPEG, several pictures"
]
"""Formats with a mark at their end, or their size in front."""
MEASURED = ["BMP", "ICO", "AVIF", "AVIF, animated", "SVG"]
"""Formats whose parts say where they end."""
SAME_KIND = [{"jpg", "jpeg", "jpe", "jfif"}, {"png", "apng"}, {"tif", "tiff"}, {"heic", "heif"}]


def every(names: list[str] | dict[str, Any]) -> pytest.MarkDecorator:
    """A test for each of the pictures."""
    return pytest.mark.parametrize("name", list(names))


def whole(name: str) -> tuple[str, bytes]:
    """The extension and the bytes of one of the pictures."""
    end, make = WHOLE[name]
    return end, make()


async def watched(policy: UploadPolicy, end: str, source: Source, passed: list[bytes] | None = None) -> bytes:
    """What comes through when `source` is watched; also in `passed`, for when it is refused half-way."""
    passed = [] if passed is None else passed
    threads = Threads(2)
    try:
        async for chunk in policy.watch(end, chunks(source, threads)):
            passed.append(chunk)
    finally:
        threads.close()
    return b"".join(passed)


async def in_pieces(data: bytes, *sizes: int) -> AsyncIterator[bytes]:
    """`data` in pieces of these sizes, over and over."""
    start = number = 0
    while start < len(data):
        size = sizes[number % len(sizes)]
        yield data[start : start + size]
        start, number = start + size, number + 1


# -- whole pictures ---------------------------------------------------------------------------------------------------


@every(WHOLE)
async def test_whole_pictures_are_taken(name: str) -> None:
    """A real picture, as programs and cameras write it, comes through unchanged."""
    end, data = whole(name)
    assert await watched(UploadPolicy(), end, data) == data


@every([name for name in WHOLE if "SVG" not in name])
def test_the_pictures_are_real(name: str) -> None:
    """The pictures that these tests are made of can be decoded, so that what is taken deserves it."""
    with Image.open(io.BytesIO(whole(name)[1])) as opened:
        opened.load()
        assert opened.size == (48, 48) or name == "ICO"


@every([*MARKED, "BMP", "ICO", "TIFF", "SVG"])
async def test_odd_pieces(name: str) -> None:
    """However oddly a stream is cut, with empty pieces and all, a picture comes through unchanged."""
    end, data = whole(name)
    for sizes in ((1, 2, 3, 0, 5, 7), (8191,), (8193, 1), (64, 63, 65)):
        assert await watched(UploadPolicy(), end, in_pieces(data, *sizes)) == data


async def test_a_photo_that_moves() -> None:
    """A phone's photo with a long film behind its end is whole, whatever the film's bytes look like."""
    data = CAMERA_JPEG + mp4(3 * MIB)
    assert await watched(UploadPolicy(), "jpg", data) == data


@every(TRAILERS)
async def test_what_stands_behind_the_end(name: str) -> None:
    """What stands behind a JPEG's end, even what looks like a JPEG's beginning, does not make it less whole."""
    for jpeg in (PLAIN_JPEG, CAMERA_JPEG, EDITED_JPEG, picture("JPEG", progressive=True)):
        data = jpeg + TRAILERS[name]
        assert await watched(UploadPolicy(), "jpg", data) == data


# -- pictures without their end ---------------------------------------------------------------------------------------


async def assert_incomplete(end: str, data: bytes) -> None:
    """An upload that broke off at any of these places is incomplete (422), or not even a beginning (415)."""
    size = len(data)
    for length in (*range(40, size, size // 12), size - 40, size - 12, size - 5, size - 2, size - 1):
        with pytest.raises(UploadIncomplete if length >= 100 else UploadRefused):
            await watched(UploadPolicy(), end, data[:length])


@every(MARKED)
async def test_pictures_without_their_end(name: str) -> None:
    """An upload that broke off, early or at its last byte, is incomplete (422), in whatever pieces it came."""
    end, data = whole(name)
    await assert_incomplete(end, data)
    with pytest.raises(UploadIncomplete, match="not whole"):
        await watched(UploadPolicy(), end, in_pieces(data[:-1], 8191, 1, 64))


@every(MEASURED)
async def test_parts_that_are_not_there(name: str) -> None:
    """A picture that says where its parts end, and ends before that, is incomplete (422)."""
    end, data = whole(name)
    await assert_incomplete(end, data.rstrip() if end == "svg" else data)


@pytest.mark.parametrize("jpeg", [CAMERA_JPEG, EDITED_JPEG, TALKING_JPEG], ids=["one", "two", "comment"])
async def test_the_end_of_a_thumbnail_is_not_the_end(jpeg: bytes) -> None:
    """A photo that broke off is incomplete wherever that was, although the thumbnails inside it have their own ends."""
    beginning = jpeg.rindex(PLAIN_JPEG[2:40])
    for length in range(beginning, len(jpeg), 97):
        with pytest.raises(UploadIncomplete):
            await watched(UploadPolicy(), "jpg", jpeg[:length])


async def test_a_gif_that_broke_off_at_a_semicolon() -> None:
    """The byte that ends a GIF occurs inside it, too: one that breaks off there is incomplete all the same."""
    data = picture("GIF", 96)
    semicolons = [match.end() for match in re.finditer(rb";", data[1000:-1])]
    assert semicolons
    for length in semicolons:
        with pytest.raises(UploadIncomplete):
            await watched(UploadPolicy(), "gif", data[: 1000 + length])


@pytest.mark.parametrize("over", range(-1, 14))
@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "webp"])
async def test_an_end_on_the_seam_of_two_chunks(kind: str, over: int) -> None:
    """The mark of an end is found where it lies across two chunks, and missed where its last byte is missing."""
    data = sized(kind, CHUNK + over)
    assert len(data) == CHUNK + over
    assert await watched(UploadPolicy(), kind, data) == data
    with pytest.raises(UploadIncomplete):
        await watched(UploadPolicy(), kind, data[:-1])


def sized(kind: str, size: int) -> bytes:
    """A whole picture of exactly `size` bytes."""
    if kind == "jpg":
        left = size - len(PLAIN_JPEG)
        return with_segments(PLAIN_JPEG, *(segment(0xFE, bytes(length - 4)) for length in _shares(left, 60_000)))
    if kind == "png":
        data = picture("PNG")
        text = b"teXt" + b"x" * (size - len(data) - 12)
        chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
        return data[:33] + chunk + data[33:]
    if kind == "gif":
        data = picture("GIF")
        left = size - len(data)
        blocks = b"".join(bytes([length - 1]) + b"x" * (length - 1) for length in _shares(left - 3, 200))
        return data[:-1] + b"!\xfe" + blocks + b"\0" + data[-1:]
    data = picture("WEBP")
    payload = size - len(data) - 8
    extra = b"XYZW" + struct.pack("<I", payload) + bytes(payload)
    return data[:4] + struct.pack("<I", size - 8) + data[8:] + extra


def _shares(total: int, most: int) -> list[int]:
    """`total` in shares of about `most`, none of them tiny."""
    count = total // most + 1
    return [total // count + (number < total % count) for number in range(count)]


@pytest.mark.parametrize("end", ["jpg", "png", "svg", ""])
@pytest.mark.parametrize("policy", [ANY, UploadPolicy(extensions=None, check_contents=False)], ids=["checked", "not"])
async def test_an_empty_upload(end: str, policy: UploadPolicy) -> None:
    """An upload without a byte is incomplete (422), whether contents are checked or not."""
    for source in (b"", in_pieces(b"", 1), UploadFile(io.BytesIO(), filename=f"a.{end}")):
        with pytest.raises(UploadIncomplete, match="empty") as caught:
            await watched(policy, end, source)
        assert caught.value.status == 422


# -- bytes that are not what the extension says -----------------------------------------------------------------------

STRANGERS = [
    b"<!doctype html><html><script>alert(1)</script></html>",
    b"<?php system($_GET['c']); ?>",
    b"#!/bin/sh\nrm -rf /\n",
    b"MZ\x90\0" + bytes(200),
    b"\x7fELF\2\1\1" + bytes(200),
    b"PK\3\4" + bytes(200),
    b"%PDF-1.7\n" + bytes(200),
    b"<?xml version='1.0'?><rss/>",
    b"hello",
    bytes(200),
    b"\xff",
]


@every(WHOLE)
async def test_a_picture_under_another_name(name: str) -> None:
    """A picture is taken under the extensions of its own kind, and under no other (415)."""
    own, data = whole(name)
    for end in sorted(IMAGE_EXTENSIONS - {"jxl"}):
        if own == end or any({own, end} <= kind for kind in SAME_KIND):
            assert await watched(UploadPolicy(), end, data) == data
        else:
            with pytest.raises(UploadTypeRefused, match=r"the bytes are ") as caught:
                await watched(UploadPolicy(), end, data)
            assert caught.value.status == 415


@pytest.mark.parametrize("end", sorted(IMAGE_EXTENSIONS))
async def test_strangers_are_no_pictures(end: str) -> None:
    """What is no picture at all is refused (415) under every extension that an upload may have."""
    for stranger in STRANGERS:
        with pytest.raises(UploadTypeRefused, match=r"the bytes are ") as caught:
            await watched(UploadPolicy(), end, stranger)
        assert caught.value.status == 415


@pytest.mark.parametrize("end", ["svg", "html", "xml", "xhtml"])
@every(["JPEG", "PNG", "GIF", "WebP", "BMP", "ICO", "AVIF", "TIFF"])
async def test_no_picture_becomes_a_document(name: str, end: str) -> None:
    """A picture with a script in it or behind it is never taken as a document that would run it."""
    data = whole(name)[1] + b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    with pytest.raises(UploadTypeRefused):
        await watched(ANY, end, data)
    if name == "JPEG":
        with pytest.raises(UploadTypeRefused):
            await watched(ANY, end, with_segments(data, segment(0xFE, b"<svg><script>alert(1)</script></svg>")))


async def test_a_picture_with_an_archive_behind_it() -> None:
    """A picture that is also an archive is no archive here; as a picture it is served as one, which runs nothing."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("evil.html", "<script>alert(1)</script>")
    both = PLAIN_JPEG + archive.getvalue()
    with pytest.raises(UploadTypeRefused, match="the bytes are image/jpeg, not application/zip"):
        await watched(ANY, "zip", both)
    assert await watched(UploadPolicy(), "jpg", both) == both
    assert not can_run_script(content_type("both.jpg"))


@pytest.mark.parametrize(
    ("end", "head"),
    [
        ("jxl", b"\xff\x0a" + bytes(64)),
        ("jxl", b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl " + bytes(64)),
        ("heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)),
        ("heif", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(64)),
        ("heic", b"\0\0\0\x18ftypheix\0\0\0\0mif1heix" + bytes(64)),
        ("mp4", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(64)),
        ("m4v", b"\0\0\0\x1cftypM4V \0\0\0\1M4V isommp42" + bytes(64)),
        ("m4a", b"\0\0\0\x1cftypM4A \0\0\0\0M4A mp42isom" + bytes(64)),
        ("mov", b"\0\0\0\x14ftypqt  \0\0\2\0qt  " + bytes(64)),
        ("webm", b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\xf7\x81\1B\xf2\x81\4B\xf3\x81\x08B\x82\x84webm" + bytes(64)),
        ("weba", b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\xf7\x81\1B\xf2\x81\4B\xf3\x81\x08B\x82\x84webm" + bytes(64)),
        ("mkv", b"\x1aE\xdf\xa3\x93B\x82\x88matroska" + bytes(64)),
        ("mp3", b"ID3\4" + bytes(64)),
        ("wav", b"RIFF\x24\0\0\0WAVEfmt " + bytes(64)),
        ("flac", b"fLaC" + bytes(64)),
        ("ogg", b"OggS\0\2" + bytes(64)),
        ("opus", b"OggS\0\2" + bytes(64)),
        ("pdf", b"%PDF-1.7\n"),
        ("rtf", b"{\\rtf1 hello}"),
        ("zip", b"PK\3\4" + bytes(64)),
        ("gz", b"\x1f\x8b\x08" + bytes(64)),
        ("7z", b"7z\xbc\xaf\x27\x1c" + bytes(64)),
        ("ttf", b"\0\1\0\0\0\x0f\0\x80" + bytes(64)),
        ("otf", b"OTTO\0\x0f\0\x80" + bytes(64)),
        ("woff", b"wOFF\0\1\0\0" + bytes(64)),
        ("woff2", b"wOF2\0\1\0\0" + bytes(64)),
        ("txt", b"hello"),
        ("csv", b"a,b\n1,2\n"),
        ("json", b"{}"),
        ("css", b"a{}"),
        ("js", b"let a = 1"),
        ("md", b"# hello"),
        ("html", b"<!doctype html>"),
        ("xml", b"<?xml version='1.0'?><a/>"),
    ],
    ids=lambda value: value if isinstance(value, str) else "beginning",
)
def test_bytes_that_are_what_the_extension_says(end: str, head: bytes) -> None:
    """An app that allows more than images: every type of the table is known by its beginning."""
    check_head(end, head)


@pytest.mark.parametrize("data", [b"hello", bytes(100), PLAIN_JPEG], ids=["text", "zeros", "a picture"])
async def test_an_extension_that_says_nothing(data: bytes) -> None:
    """Where any extension is allowed, one that nobody knows says nothing that the bytes could contradict."""
    for end in ("", "bin", "xyz", "dwg2"):
        assert await watched(ANY, end, data) == data


@pytest.mark.parametrize(
    ("end", "stranger"),
    [("pdf", b"hello"), ("zip", PLAIN_JPEG), ("mp4", b"<html>"), ("txt", PLAIN_JPEG), ("html", picture("GIF"))],
)
def test_other_types_are_checked_too(end: str, stranger: bytes) -> None:
    """An app that allows more than images gets those checked as well."""
    with pytest.raises(UploadTypeRefused):
        check_head(end, stranger)


async def test_unchecked_contents() -> None:
    """Without the check of contents anything passes that is not empty and not too large."""
    policy = UploadPolicy(max_bytes=100, check_contents=False)
    for data in (b"<html>", PLAIN_JPEG[:50], b"x" * 100):
        assert await watched(policy, "jpg", data) == data
    with pytest.raises(UploadTooLarge):
        await watched(policy, "jpg", b"x" * 101)


async def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package that tells types apart, the error says what to install; nothing passes unchecked."""
    monkeypatch.setitem(sys.modules, "filetype", None)
    with pytest.raises(MissingExtra, match=r"pip install 'selfheal\[validate\]'") as caught:
        await watched(UploadPolicy(), "jpg", PLAIN_JPEG)
    assert caught.value.extra == "validate"
    assert await watched(UploadPolicy(check_contents=False), "jpg", PLAIN_JPEG) == PLAIN_JPEG


MAGIC = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\4\0\0\0WEBPVP8 ", b"BM", b"II*\0", b"\0\0\1\0"]
MAGIC += [b"\0\0\0\x20ftypavif", b"\0\0\0\0ftypmif1", b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffacTL", b"PK\3\4", b"<svg"]


@given(st.sampled_from(sorted(IMAGE_EXTENSIONS)), st.sampled_from(MAGIC), st.binary(max_size=300))
@settings(deadline=None, max_examples=150)
def test_whatever_comes(end: str, magic: bytes, rest: bytes) -> None:
    """Whatever bytes come, they pass unchanged or are refused with a status for the client; nothing else is raised."""
    data = magic + rest
    try:
        status, passed = 200, asyncio.run(watched(UploadPolicy(), end, data))
    except UploadRefused as error:
        status, passed = error.status, data
    assert (status in (200, 415, 422), passed) == (True, data)


# -- how much ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1])
async def test_the_exact_limit(limit: int) -> None:
    """As many bytes as the limit are taken, one more is too many (413), and not a byte more than the limit passes."""
    policy = UploadPolicy(max_bytes=limit, check_contents=False)
    assert await watched(policy, "jpg", b"x" * limit) == b"x" * limit
    passed: list[bytes] = []
    with pytest.raises(UploadTooLarge, match=f"larger than {limit} bytes") as caught:
        await watched(policy, "jpg", b"x" * (limit + 1), passed)
    assert caught.value.status == 413
    assert len(b"".join(passed)) <= limit


async def test_a_real_picture_at_the_limit() -> None:
    """The limit holds for pictures as for any bytes: the size of the file, not that of what is in it."""
    assert await watched(UploadPolicy(max_bytes=len(PLAIN_JPEG)), "jpg", PLAIN_JPEG) == PLAIN_JPEG
    with pytest.raises(UploadTooLarge):
        await watched(UploadPolicy(max_bytes=len(PLAIN_JPEG) - 1), "jpg", PLAIN_JPEG)


async def test_a_stream_without_an_end() -> None:
    """An upload that never ends is refused as soon as it is too large; the rest is not read."""
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1000
            yield bytes(1000)

    with pytest.raises(UploadTooLarge):
        await watched(UploadPolicy(max_bytes=3 * MIB, check_contents=False), "jpg", endless())
    assert read <= 3 * MIB + 2 * CHUNK


@pytest.mark.parametrize("said", [0, 3, None])
async def test_what_the_client_says_of_the_size(said: int | None) -> None:
    """The bytes are counted; what the client said of their number is not believed, whether too few or none."""
    upload = UploadFile(io.BytesIO(b"x" * 101), filename="a.jpg", size=said)
    with pytest.raises(UploadTooLarge):
        await watched(UploadPolicy(max_bytes=100, check_contents=False), "jpg", upload)


async def test_a_decompression_bomb_is_a_small_file() -> None:
    """A picture that would be huge once it is decoded is taken for what it is here: a small file."""
    data = picture("PNG", 16)
    header = b"IHDR" + struct.pack(">II", 1_000_000, 1_000_000) + data[24:29]
    bomb = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    assert await watched(UploadPolicy(), "png", bomb) == bomb


async def test_the_default_limit() -> None:
    """Without a word of the app, 50 MiB of images are the most."""
    assert UploadPolicy().max_bytes == 50 * 1024 * 1024
    assert UploadPolicy().extensions == IMAGE_EXTENSIONS


# -- file names -------------------------------------------------------------------------------------------------------

HOSTILE_NAMES = [
    "../../../../etc/cron.d/evil.png",
    "..\\..\\windows\\evil.png",
    "/etc/evil.png",
    "C:\\evil.png",
    "\\\\server\\share\\evil.png",
    "a/b/c.png",
    "..%2f..%2fevil.png",
    "&#46;&#46;&#47;evil.png",
    "CON.png",
    "evil.php\0.png",
    "evil\r\nX-Header: 1.png",
    "\u202egnp.exe.png",
    "~/.ssh/evil.PNG",
    " .png.png",
    "x" * 5000 + ".png",
    "\ud800.png",
]


@pytest.mark.parametrize("filename", HOSTILE_NAMES, ids=lambda name: ascii(name)[:40])
async def test_a_file_name_is_never_a_path(filename: str, sqlite_store: UploadStore, directory: Path) -> None:
    """CVE-2021-28658, CVE-2021-31542: of the client's file name only the extension is kept; the name is ours."""
    data = picture("PNG")
    saved = await sqlite_store.save_uploaded_file(UploadFile(io.BytesIO(data), filename=filename))
    assert re.fullmatch(r"[0-9a-f]{32}\.png", saved.name)
    assert (directory / saved.name).read_bytes() == data
    outside = [path for path in directory.parents[2].rglob("*evil*") if path.is_file()]
    assert outside == []
    assert [path.name for path in directory.rglob("*.png")] == [saved.name]


@pytest.mark.parametrize(
    ("filename", "end"),
    [
        ("tom.jpg", "jpg"),
        ("tom.JPG", "jpg"),
        ("tom.cat.jpeg", "jpeg"),
        ("shell.php.png", "png"),
        ("a/b.d/tom.webp", "webp"),
    ],
)
def test_extensions(filename: str, end: str) -> None:
    """The extension is kept, in lower case; only the last one counts."""
    assert UploadPolicy().check_extension(filename) == end


NOT_ALLOWED = ["", "tom", "tom.", ".png", "png", "tom.exe", "tom.png.php", "tom.png/", "tom.png::$DATA", "tom.png "]
NOT_ALLOWED += [
    "tom.png\0",
    "tom.png\n",
    "tom.p ng",
    "tom.png;a",
    "tom.ｐｎｇ",
    "tom.png\u200b",
    "tom.%70ng",
    "tom.html",
]
NOT_ALLOWED += ["a.png/b", "tom.png."]


@pytest.mark.parametrize("filename", NOT_ALLOWED, ids=ascii)
def test_extensions_that_are_not_allowed(filename: str) -> None:
    """What is not exactly an allowed extension is refused (415), with a list of what is allowed."""
    with pytest.raises(UploadTypeRefused, match="allowed: apng, avif, bmp") as caught:
        UploadPolicy().check_extension(filename)
    assert caught.value.status == 415


@pytest.mark.parametrize(
    ("filename", "end"),
    [
        ("tom", ""),
        ("tom.xyz", "xyz"),
        ("tom.tar.GZ", "gz"),
        ("tom.a-b", ""),
        ("tom.größe", ""),
        ("tom.php::$DATA", ""),
        ("tom. exe", ""),
        ("a." + "x" * 10, "x" * 10),
        ("a." + "x" * 11, ""),
    ],
)
def test_any_extension(filename: str, end: str) -> None:
    """Where any extension is allowed, a short one of ASCII letters and digits is kept, and anything else is dropped."""
    assert ANY.check_extension(filename) == end


def test_only_some_extensions() -> None:
    """An app's own choice of extensions is all that it takes."""
    policy = UploadPolicy(extensions=frozenset({"pdf"}))
    assert policy.check_extension("a.PDF") == "pdf"
    with pytest.raises(UploadTypeRefused, match=r"files of type 'png' are not accepted; allowed: pdf"):
        policy.check_extension("a.png")


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=300)
def test_whatever_the_client_calls_it(filename: str) -> None:
    """Whatever a client calls its file, what is kept of that can stand at the end of a file's name and do no harm."""
    assert re.fullmatch(r"[a-z0-9]{0,10}", ANY.check_extension(filename))


# -- refused means not stored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filename", "data", "error"),
    [
        ("a.exe", b"MZ", UploadTypeRefused),
        ("a.png", PLAIN_JPEG, UploadTypeRefused),
        ("a.jpg", PLAIN_JPEG[:-1], UploadIncomplete),
        ("a.jpg", b"", UploadIncomplete),
        ("a.jpg", PLAIN_JPEG + bytes(3 * CHUNK), UploadTooLarge),
    ],
    ids=["extension", "type", "truncated", "empty", "too large"],
)
async def test_what_is_refused_is_not_stored(
    filename: str, data: bytes, error: type[UploadRefused], directory: Path, sqlite_url: str
) -> None:
    """What is refused leaves nothing behind: no file, no record, no litter."""
    async with UploadStore(directory, sqlite_url, policy=UploadPolicy(max_bytes=2 * CHUNK)) as store:
        await store.database.create_tables()
        with pytest.raises(error):
            await store.save_uploaded_file(UploadFile(io.BytesIO(data), filename=filename))
        assert await store.database.count() == 0
    assert [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size] == []
