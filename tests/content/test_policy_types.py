"""The upload policy: the bytes of an upload must be what its extension says."""

from __future__ import annotations

import asyncio
import io
import sys
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfheal import MissingExtra, UploadPolicy, UploadRefused, UploadTooLarge, UploadTypeRefused
from selfheal.content.content_types import IMAGE_EXTENSIONS, can_run_script, content_type
from selfheal.content.policy import check_head
from tests.support.checked_uploads import checked
from tests.support.sample_images import IMAGES, PLAIN_JPEG, each, picture, sample, segment, with_segments

ANY = UploadPolicy(extensions=None)
NOT_PICTURES = [
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
SAME_TYPE = [{"jpg", "jpeg", "jpe", "jfif"}, {"png", "apng"}, {"tif", "tiff"}, {"heic", "heif"}]


# -- pictures under other extensions ----------------------------------------------------------------------------------


@each(IMAGES)
async def test_a_picture_under_another_extension(name: str) -> None:
    """A picture is accepted under the extensions of its own type, and refused (415) under any other."""
    own, data = sample(name)
    for end in sorted(IMAGE_EXTENSIONS - {"jxl"}):
        if own == end or any({own, end} <= kind for kind in SAME_TYPE):
            assert await checked(UploadPolicy(), end, data) == data
        else:
            with pytest.raises(UploadTypeRefused, match=r"the bytes are ") as caught:
                await checked(UploadPolicy(), end, data)
            assert caught.value.status == 415


@pytest.mark.parametrize("end", sorted(IMAGE_EXTENSIONS))
async def test_bytes_that_are_no_picture(end: str) -> None:
    """Bytes that are no picture are refused (415) under every extension of an image."""
    for data in NOT_PICTURES:
        with pytest.raises(UploadTypeRefused, match=r"the bytes are ") as caught:
            await checked(UploadPolicy(), end, data)
        assert caught.value.status == 415


@pytest.mark.parametrize("end", ["svg", "html", "xml", "xhtml"])
@each(["JPEG", "PNG", "GIF", "WebP", "BMP", "ICO", "AVIF", "TIFF"])
async def test_no_picture_becomes_a_document(name: str, end: str) -> None:
    """A picture with a script in it or after it is refused as a document that would run the script."""
    data = sample(name)[1] + b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    with pytest.raises(UploadTypeRefused):
        await checked(ANY, end, data)
    if name == "JPEG":
        with pytest.raises(UploadTypeRefused):
            await checked(ANY, end, with_segments(data, segment(0xFE, b"<svg><script>alert(1)</script></svg>")))


async def test_a_picture_followed_by_an_archive() -> None:
    """A picture followed by a ZIP is refused as a ZIP; as a picture it is accepted and runs nothing."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("evil.html", "<script>alert(1)</script>")
    both = PLAIN_JPEG + archive.getvalue()
    with pytest.raises(UploadTypeRefused, match="the bytes are image/jpeg, not application/zip"):
        await checked(ANY, "zip", both)
    assert await checked(UploadPolicy(), "jpg", both) == both
    assert not can_run_script(content_type("both.jpg"))


# -- other types ------------------------------------------------------------------------------------------------------


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
    """Every type of the table is recognised by its first bytes."""
    check_head(end, head)


@pytest.mark.parametrize("data", [b"hello", bytes(100), PLAIN_JPEG], ids=["text", "zeros", "a picture"])
async def test_an_unknown_extension(data: bytes) -> None:
    """If any extension is allowed, an unknown one fits any bytes."""
    for end in ("", "bin", "xyz", "dwg2"):
        assert await checked(ANY, end, data) == data


@pytest.mark.parametrize(
    ("end", "data"),
    [("pdf", b"hello"), ("zip", PLAIN_JPEG), ("mp4", b"<html>"), ("txt", PLAIN_JPEG), ("html", picture("GIF"))],
)
def test_other_types_are_checked_too(end: str, data: bytes) -> None:
    """Types other than images are checked too."""
    with pytest.raises(UploadTypeRefused):
        check_head(end, data)


async def test_unchecked_contents() -> None:
    """With `check_contents=False` any bytes pass that are not empty and not too large."""
    policy = UploadPolicy(max_bytes=100, check_contents=False)
    for data in (b"<html>", PLAIN_JPEG[:50], b"x" * 100):
        assert await checked(policy, "jpg", data) == data
    with pytest.raises(UploadTooLarge):
        await checked(policy, "jpg", b"x" * 101)


async def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package that detects types, the error says what to install, and nothing passes unchecked."""
    monkeypatch.setitem(sys.modules, "filetype", None)
    with pytest.raises(MissingExtra, match=r"pip install 'selfheal\[validate\]'") as caught:
        await checked(UploadPolicy(), "jpg", PLAIN_JPEG)
    assert caught.value.extra == "validate"
    assert await checked(UploadPolicy(check_contents=False), "jpg", PLAIN_JPEG) == PLAIN_JPEG


MAGIC = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\4\0\0\0WEBPVP8 ", b"BM", b"II*\0", b"\0\0\1\0"]
MAGIC += [b"\0\0\0\x20ftypavif", b"\0\0\0\0ftypmif1", b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffacTL", b"PK\3\4", b"<svg"]


@given(st.sampled_from(sorted(IMAGE_EXTENSIONS)), st.sampled_from(MAGIC), st.binary(max_size=300))
@settings(deadline=None, max_examples=150)
def test_any_bytes(end: str, magic: bytes, rest: bytes) -> None:
    """Any bytes pass unchanged or are refused with 415 or 422; nothing else is raised."""
    data = magic + rest
    try:
        status, passed = 200, asyncio.run(checked(UploadPolicy(), end, data))
    except UploadRefused as error:
        status, passed = error.status, data
    assert (status in (200, 415, 422), passed) == (True, data)
