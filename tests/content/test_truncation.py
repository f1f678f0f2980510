"""Whole and truncated images: a whole one passes unchanged, one without its end is refused."""

from __future__ import annotations

import io
import random
import re
import struct
import zlib

import pytest
from PIL import Image

from selfheal import UploadIncomplete, UploadPolicy, UploadRefused
from selfheal.content.policy import MIB
from selfheal.content.sources import CHUNK
from tests.support.checked_uploads import STRICT, WITH_SVG, checked, in_pieces
from tests.support.sample_images import (
    CAMERA_JPEG,
    EDITED_JPEG,
    EOI,
    IMAGES,
    JPEG_WITH_MARKERS,
    PLAIN_JPEG,
    SOI,
    THUMBNAIL,
    each,
    picture,
    sample,
    segment,
    with_segments,
)

TRAILERS = {
    "a zero": b"\0",
    "a newline": b"\n",
    "zeros": bytes(1000),
    "SOI": SOI,
    "several SOI": SOI * 3,
    "EOI": EOI,
    "SOI and EOI": SOI + EOI,
    "another picture": THUMBNAIL,
    "half another picture": THUMBNAIL[:-2],
    "fill bytes": b"\xff" * 9,
    "an archive": b"PK\3\4" * 9,
}
MARKED = [
    name
    for name, (end, _) in IMAGES.items()
    if end in {"jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "webp"} and name != "JPEG, several pictures"
]
"""Formats with a marker at their end, or with their size at the beginning."""
MEASURED = ["BMP", "ICO", "AVIF", "AVIF, animated", "SVG"]
"""Formats that store the positions of their parts."""


def mp4(size: int) -> bytes:
    """Return a film as phones append it to a photo, with bytes that look like JPEG markers."""
    return b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + random.Random(size).randbytes(size)


# -- whole images -----------------------------------------------------------------------------------------------------


@each(IMAGES)
async def test_whole_pictures_pass(name: str) -> None:
    """A real picture, as programs and cameras write it, passes unchanged."""
    end, data = sample(name)
    assert await checked(WITH_SVG, end, data) == data


@each([name for name in IMAGES if "SVG" not in name])
def test_the_pictures_are_real(name: str) -> None:
    """The pictures of these tests can be decoded."""
    with Image.open(io.BytesIO(sample(name)[1])) as opened:
        opened.load()
        assert opened.size == (48, 48) or name == "ICO"


@each([*MARKED, "BMP", "ICO", "TIFF", "SVG"])
async def test_odd_pieces(name: str) -> None:
    """A picture passes unchanged in pieces of any size, empty ones too."""
    end, data = sample(name)
    for sizes in ((1, 2, 3, 0, 5, 7), (8191,), (8193, 1), (64, 63, 65)):
        assert await checked(WITH_SVG, end, in_pieces(data, *sizes)) == data


async def test_a_photo_followed_by_a_film() -> None:
    """A photo with a long film after its end is whole, whatever bytes the film has."""
    data = CAMERA_JPEG + mp4(3 * MIB)
    assert await checked(WITH_SVG, "jpg", data) == data


@each(TRAILERS)
async def test_bytes_after_the_end(name: str) -> None:
    """Bytes after the end of a JPEG, even SOI markers, do not make it incomplete."""
    for jpeg in (PLAIN_JPEG, CAMERA_JPEG, EDITED_JPEG, picture("JPEG", progressive=True)):
        data = jpeg + TRAILERS[name]
        assert await checked(WITH_SVG, "jpg", data) == data


# -- truncated images -------------------------------------------------------------------------------------------------


async def assert_incomplete(policy: UploadPolicy, end: str, data: bytes) -> None:
    """Fail unless the data, truncated at several places, is incomplete (422), or too short to be recognised (415)."""
    size = len(data)
    for length in (*range(40, size, size // 12), size - 40, size - 12, size - 5, size - 2, size - 1):
        with pytest.raises(UploadIncomplete if length >= 100 else UploadRefused):
            await checked(policy, end, data[:length])


@each(MARKED)
async def test_truncated_pictures(name: str) -> None:
    """Strictly, a picture truncated anywhere, even by one byte, is incomplete (422), in pieces of any size."""
    end, data = sample(name)
    await assert_incomplete(STRICT, end, data)
    with pytest.raises(UploadIncomplete, match="not whole"):
        await checked(STRICT, end, in_pieces(data[:-1], 8191, 1, 64))


@each([*(name for name in MARKED if name.startswith(("PNG", "APNG", "WebP, animated"))), *MEASURED])
async def test_pictures_shorter_than_their_header_says(name: str) -> None:
    """A picture that is shorter than its own parts say is incomplete (422), strictly or not."""
    end, data = sample(name)
    for policy in (WITH_SVG, STRICT):
        await assert_incomplete(policy, end, data.rstrip() if end == "svg" else data)


@pytest.mark.parametrize("jpeg", [CAMERA_JPEG, EDITED_JPEG, JPEG_WITH_MARKERS], ids=["one", "two", "comment"])
async def test_the_end_of_a_thumbnail_is_not_the_end(jpeg: bytes) -> None:
    """A truncated photo is incomplete, although the thumbnails in it have EOI markers."""
    beginning, scan = jpeg.rindex(PLAIN_JPEG[2:40]), jpeg.rindex(b"\xff\xda")
    for length in range(beginning, len(jpeg), 97):
        for policy in (WITH_SVG, STRICT) if length < scan else (STRICT,):
            with pytest.raises(UploadIncomplete):
                await checked(policy, "jpg", jpeg[:length])


async def test_a_gif_truncated_after_a_semicolon() -> None:
    """A GIF truncated after a byte that equals its end marker is incomplete."""
    data = picture("GIF", 96)
    semicolons = [match.end() for match in re.finditer(rb";", data[1000:-1])]
    assert semicolons
    for length in semicolons:
        with pytest.raises(UploadIncomplete):
            await checked(WITH_SVG, "gif", data[: 1000 + length])


@pytest.mark.parametrize("over", range(-1, 14))
@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "webp"])
async def test_an_end_marker_split_between_chunks(kind: str, over: int) -> None:
    """An end marker that is split between two chunks is found; without its last byte the picture is incomplete."""
    data = sized(kind, CHUNK + over)
    assert len(data) == CHUNK + over
    assert await checked(WITH_SVG, kind, data) == data
    with pytest.raises(UploadIncomplete):
        await checked(STRICT, kind, data[:-1])


def sized(kind: str, size: int) -> bytes:
    """Return a whole picture of exactly `size` bytes."""
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
    """Return `total` as a sum of numbers of about `most`, none of them tiny."""
    count = total // most + 1
    return [total // count + (number < total % count) for number in range(count)]
