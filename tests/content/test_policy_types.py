"""The upload policy: the bytes of an upload must be what its extension says."""

from __future__ import annotations

import asyncio
import io
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfheal import UploadPolicy, UploadRefused, UploadTooLarge, UploadTypeRefused
from selfheal.content.content_types import IMAGE_EXTENSIONS, UNKNOWN, can_run_script, content_type
from selfheal.content.signatures import signatures
from tests.support.checked_uploads import STRICT, WITH_SVG, checked, checked_as
from tests.support.sample_images import IMAGES, PLAIN_JPEG, each, picture, sample, segment, with_segments

ANY = UploadPolicy(extensions=None)
ANY_STRICT = UploadPolicy(extensions=None, strict=True)
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
TRUE_TYPES = {"apng": "image/png"}
"""An animated PNG begins like any other, and is saved as one."""


# -- pictures under other extensions ----------------------------------------------------------------------------------


@each(IMAGES)
async def test_a_picture_under_another_extension(name: str) -> None:
    """A picture under the extension of another type is saved under its own; strictly, it is refused (415)."""
    own, data = sample(name)
    same = next((kind for kind in SAME_TYPE if own in kind), {own})
    for end in sorted(IMAGE_EXTENSIONS - same):
        if own == "svg":
            with pytest.raises(UploadTypeRefused, match=r"the bytes are not image/"):
                await checked(WITH_SVG, end, data)
        else:
            true_end, passed = await checked_as(WITH_SVG, end, data)
            assert (content_type(f"x.{true_end}"), passed) == (TRUE_TYPES.get(own, content_type(f"x.{own}")), data)
        with pytest.raises(UploadTypeRefused, match=r"the bytes are ") as caught:
            await checked(STRICT, end, data)
        assert caught.value.status == 415


@each(IMAGES)
async def test_a_picture_under_an_extension_of_its_type(name: str) -> None:
    """A picture keeps the extension of the client if its type has that one."""
    own, data = sample(name)
    for end in next((kind for kind in SAME_TYPE if own in kind), {own}):
        for policy in (WITH_SVG, STRICT):
            assert await checked_as(policy, end, data) == (end, data)


@pytest.mark.parametrize(
    ("extensions", "end", "saved"),
    [
        ({"png", "jpg"}, "png", "jpg"),
        ({"png", "jpeg"}, "png", "jpeg"),
        ({"png", "jfif", "jpe"}, "png", "jpe"),
        (None, "png", "jpg"),
        (None, "txt", "jpg"),
        (None, "html", "jpg"),
    ],
)
async def test_the_true_extension_is_an_allowed_one(extensions: set[str] | None, end: str, saved: str) -> None:
    """A JPEG with another extension gets the first extension of JPEG that the policy allows."""
    policy = UploadPolicy(extensions=extensions and frozenset(extensions))
    assert await checked_as(policy, end, PLAIN_JPEG) == (saved, PLAIN_JPEG)


async def test_a_true_type_that_is_not_allowed() -> None:
    """Neither an extension of the client nor a true type that is not allowed is accepted (415)."""
    with pytest.raises(UploadTypeRefused, match="the bytes are image/jpeg, not image/png"):
        await checked(UploadPolicy(extensions=frozenset({"png"})), "png", PLAIN_JPEG)
    with pytest.raises(UploadTypeRefused, match="files of type 'png' are not accepted"):
        await checked(UploadPolicy(extensions=frozenset({"jpg"})), "png", PLAIN_JPEG)


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
    """A picture with a script in it or after it is never saved as a document that would run the script."""
    own, data = sample(name)
    data += b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    assert await checked_as(ANY, end, data) == (own, data)
    with pytest.raises(UploadTypeRefused):
        await checked(ANY_STRICT, end, data)
    if name == "JPEG":
        data = with_segments(data, segment(0xFE, b"<svg><script>alert(1)</script></svg>"))
        assert await checked_as(ANY, end, data) == ("jpg", data)


def test_no_signature_leads_to_a_document_that_runs_scripts() -> None:
    """No file is saved under an extension that can run script because of its first bytes."""
    ends = [end for signature in signatures() for end in (*signature.own, *signature.others)]
    assert [end for end in ends if can_run_script(content_type(f"x.{end}"))] == []
    assert [end for end in ends if content_type(f"x.{end}") == UNKNOWN] == []


async def test_a_picture_followed_by_an_archive() -> None:
    """A picture followed by a ZIP is saved as a picture, whatever it is called, and runs nothing."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("evil.html", "<script>alert(1)</script>")
    both = PLAIN_JPEG + archive.getvalue()
    with pytest.raises(UploadTypeRefused, match="the bytes are image/jpeg, not application/zip"):
        await checked(ANY_STRICT, "zip", both)
    assert await checked_as(ANY, "zip", both) == ("jpg", both)
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
        ("heic", b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf" + bytes(64)),
        ("avif", b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(64)),
        ("jp2", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64)),
        ("psd", b"8BPS\0\1" + bytes(64)),
        ("3gp", b"\0\0\0\x14ftyp3gp4\0\0\2\0" + bytes(64)),
        ("mov", b"\0\0\0\x14ftypmp42\0\0\2\0" + bytes(64)),
        ("mkv", b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\xf7\x81\1B\xf2\x81\4B\xf3\x81\x08B\x82\x84webm" + bytes(64)),
        ("avi", b"RIFF\x24\0\0\0AVI LIST" + bytes(64)),
        ("ogv", b"OggS\0\2" + bytes(20) + b"\1\x2a\x80theora" + bytes(64)),
        ("ogv", b"OggS\0\2" + bytes(64)),
        ("mp3", b"\xff\xfb\x90\x64" + bytes(64)),
        ("mp3", b"\xff\xf3\x40\xc4" + bytes(64)),
        ("aac", b"\xff\xf1\x50\x80" + bytes(64)),
        ("mid", b"MThd\0\0\0\6\0\1" + bytes(64)),
        ("aiff", b"FORM\0\0\1\0AIFFCOMM" + bytes(64)),
        ("au", b".snd\0\0\0\x18" + bytes(64)),
        ("mpeg", b"\0\0\1\xba" + bytes(64)),
        ("wmv", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(64)),
        ("pdf", b"\xef\xbb\xbf%PDF-1.4\n"),
        ("ps", b"%!PS-Adobe-3.0\n"),
        ("docx", b"PK\3\4" + bytes(64)),
        ("odt", b"PK\3\4" + bytes(64)),
        ("doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(64)),
        ("xlsx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(64)),
        ("bz2", b"BZh91AY&SY" + bytes(64)),
        ("xz", b"\xfd7zXZ\0" + bytes(64)),
        ("zst", b"\x28\xb5\x2f\xfd" + bytes(64)),
        ("rar", b"Rar!\x1a\7\1\0" + bytes(64)),
        ("tar", b"a.txt".ljust(257, b"\0") + b"ustar\x0000" + bytes(64)),
        ("ttc", b"ttcf\0\1\0\0" + bytes(64)),
        ("wasm", b"\0asm\1\0\0\0"),
        ("glb", b"glTF\2\0\0\0" + bytes(64)),
        ("txt", "UTF-16".encode("utf-16")),
        ("vtt", b"WEBVTT\n"),
        ("ics", b"BEGIN:VCALENDAR\n"),
        ("txt", b"BMW is a car maker, and 0TTO is no font\n"),
        ("csv", b"ID3 tags,RIFF files,OggS pages\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "beginning",
)
def test_bytes_that_are_what_the_extension_says(end: str, head: bytes) -> None:
    """A file keeps its extension if its first bytes are those of its type."""
    assert ANY_STRICT.true_extension(end, head) == end


@pytest.mark.parametrize(
    ("end", "head"),
    [("txt", b"MZ\x90\0"), ("csv", bytes(9)), ("vtt", b"a\0b"), ("mp4", b"\0\0\0\x18free"), ("bmp", b"BMW is a car")],
)
def test_bytes_that_are_not_what_the_extension_says(end: str, head: bytes) -> None:
    """Zero bytes are no text, and a type that has a signature needs it (415)."""
    with pytest.raises(UploadTypeRefused, match="the bytes are not "):
        ANY.true_extension(end, head)


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
        ANY_STRICT.true_extension(end, data)


async def test_unchecked_contents() -> None:
    """With `check_contents=False` any bytes pass that are not empty and not too large."""
    policy = UploadPolicy(max_bytes=100, check_contents=False)
    for data in (b"<html>", PLAIN_JPEG[:50], b"x" * 100):
        assert await checked(policy, "jpg", data) == data
    with pytest.raises(UploadTooLarge):
        await checked(policy, "jpg", b"x" * 101)


MAGIC = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\4\0\0\0WEBPVP8 ", b"BM", b"II*\0", b"\0\0\1\0"]
MAGIC += [b"\0\0\0\x20ftypavif", b"\0\0\0\0ftypmif1", b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffacTL", b"PK\3\4", b"<svg"]


@given(st.sampled_from(sorted(WITH_SVG.extensions or ())), st.sampled_from(MAGIC), st.binary(max_size=300))
@settings(max_examples=150)
def test_any_bytes(end: str, magic: bytes, rest: bytes) -> None:
    """Any bytes pass unchanged or are refused with 415 or 422; nothing else is raised."""
    data = magic + rest
    for policy in (WITH_SVG, STRICT):
        try:
            status, passed = 200, asyncio.run(checked(policy, end, data))
        except UploadRefused as error:
            status, passed = error.status, data
        assert (status in (200, 415, 422), passed) == (True, data)
