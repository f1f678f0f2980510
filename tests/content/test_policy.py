"""The upload policy: sizes, file names, and that a refused upload is not stored."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import UploadFile

from selfheal import UploadIncomplete, UploadPolicy, UploadRefused, UploadStore, UploadTooLarge, UploadTypeRefused
from selfheal.content.content_types import IMAGE_EXTENSIONS
from selfheal.content.policy import MIB
from selfheal.content.sources import CHUNK
from tests.support.checked_uploads import checked, in_pieces
from tests.support.sample_images import PLAIN_JPEG, picture
from tests.support.store_state import files_below

ANY = UploadPolicy(extensions=None)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["jpg", "png", "svg", ""])
@pytest.mark.parametrize("policy", [ANY, UploadPolicy(extensions=None, check_contents=False)], ids=["checked", "not"])
async def test_an_empty_upload(end: str, policy: UploadPolicy) -> None:
    """An upload of 0 bytes is incomplete (422), whether contents are checked or not."""
    for source in (b"", in_pieces(b"", 1), UploadFile(io.BytesIO(), filename=f"a.{end}")):
        with pytest.raises(UploadIncomplete, match="empty") as caught:
            await checked(policy, end, source)
        assert caught.value.status == 422


@pytest.mark.parametrize("limit", [1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1])
async def test_an_upload_of_the_limit(limit: int) -> None:
    """An upload of exactly the limit is accepted; one byte more is refused (413), and no more than the limit passes."""
    policy = UploadPolicy(max_bytes=limit, check_contents=False)
    assert await checked(policy, "jpg", b"x" * limit) == b"x" * limit
    passed: list[bytes] = []
    with pytest.raises(UploadTooLarge, match=f"larger than {limit} bytes") as caught:
        await checked(policy, "jpg", b"x" * (limit + 1), passed)
    assert caught.value.status == 413
    assert len(b"".join(passed)) <= limit


async def test_a_real_picture_at_the_limit() -> None:
    """The limit counts the bytes of the file, for pictures too."""
    assert await checked(UploadPolicy(max_bytes=len(PLAIN_JPEG)), "jpg", PLAIN_JPEG) == PLAIN_JPEG
    with pytest.raises(UploadTooLarge):
        await checked(UploadPolicy(max_bytes=len(PLAIN_JPEG) - 1), "jpg", PLAIN_JPEG)


async def test_an_endless_stream() -> None:
    """An endless upload is refused as soon as it is too large, and the rest is not read."""
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1000
            yield bytes(1000)

    with pytest.raises(UploadTooLarge):
        await checked(UploadPolicy(max_bytes=3 * MIB, check_contents=False), "jpg", endless())
    assert read <= 3 * MIB + 2 * CHUNK


@pytest.mark.parametrize("size", [0, 3, None])
async def test_the_size_that_the_client_sends_is_ignored(size: int | None) -> None:
    """The bytes are counted: the size that the client sends, too small or missing, is ignored."""
    upload = UploadFile(io.BytesIO(b"x" * 101), filename="a.jpg", size=size)
    with pytest.raises(UploadTooLarge):
        await checked(UploadPolicy(max_bytes=100, check_contents=False), "jpg", upload)


async def test_a_decompression_bomb_is_a_small_file() -> None:
    """A picture that would be huge once decoded is accepted: it is a small file, and nothing decodes it."""
    data = picture("PNG", 16)
    header = b"IHDR" + struct.pack(">II", 1_000_000, 1_000_000) + data[24:29]
    bomb = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    assert await checked(UploadPolicy(), "png", bomb) == bomb


async def test_the_default_limit() -> None:
    """By default images of at most 50 MiB are accepted."""
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
    """Only the extension of the client's file name is used; the name is generated (CVE-2021-28658, CVE-2021-31542)."""
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
    """The last extension is kept, in lower case."""
    assert UploadPolicy().check_extension(filename) == end


NOT_ALLOWED = [
    "",
    "tom",
    "tom.",
    ".png",
    "png",
    "tom.exe",
    "tom.png.php",
    "tom.png/",
    "tom.png::$DATA",
    "tom.png ",
    "tom.png\0",
    "tom.png\n",
    "tom.p ng",
    "tom.png;a",
    "tom.ｐｎｇ",
    "tom.png\u200b",
    "tom.%70ng",
    "tom.html",
    "a.png/b",
    "tom.png.",
]


@pytest.mark.parametrize("filename", NOT_ALLOWED, ids=ascii)
def test_extensions_that_are_not_allowed(filename: str) -> None:
    """Any other extension is refused (415); the message lists those that are allowed."""
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
    """If any extension is allowed, a short one of ASCII letters and digits is kept, anything else is dropped."""
    assert ANY.check_extension(filename) == end


def test_only_some_extensions() -> None:
    """An app can choose the extensions that are allowed."""
    policy = UploadPolicy(extensions=frozenset({"pdf"}))
    assert policy.check_extension("a.PDF") == "pdf"
    with pytest.raises(UploadTypeRefused, match=r"files of type 'png' are not accepted; allowed: pdf"):
        policy.check_extension("a.png")


@given(st.text(max_size=40))
@settings(max_examples=300)
def test_any_file_name(filename: str) -> None:
    """Whatever the client's file name is, the extension is safe at the end of a file name."""
    assert re.fullmatch(r"[a-z0-9]{0,10}", ANY.check_extension(filename))


# -- refused uploads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filename", "data", "error"),
    [
        ("a.exe", b"MZ", UploadTypeRefused),
        ("a.png", b"<html>", UploadTypeRefused),
        ("a.png", picture("PNG")[:-1], UploadIncomplete),
        ("a.jpg", b"", UploadIncomplete),
        ("a.jpg", PLAIN_JPEG + bytes(3 * CHUNK), UploadTooLarge),
    ],
    ids=["extension", "type", "truncated", "empty", "too large"],
)
async def test_a_refused_upload_is_not_stored(
    filename: str, data: bytes, error: type[UploadRefused], directory: Path, sqlite_url: str
) -> None:
    """A refused upload leaves no file, no record and no temporary file."""
    async with UploadStore(directory, sqlite_url, policy=UploadPolicy(max_bytes=2 * CHUNK)) as store:
        await store.database.create_tables()
        with pytest.raises(error):
            await store.save_uploaded_file(UploadFile(io.BytesIO(data), filename=filename))
        assert await store.database.count() == 0
    assert files_below(directory) == []
