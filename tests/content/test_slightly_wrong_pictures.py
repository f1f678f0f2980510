"""Slightly wrong pictures: what browsers load is accepted, unless it can be told that the upload was cut off.

Chromium 150 and Firefox ESR load every picture that is accepted here, except the WebP that says too little.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from selfheal import UploadIncomplete, UploadRefused
from tests.support.checked_uploads import STRICT, WITH_SVG, checked_as
from tests.support.sample_images import EOI, IMAGES, PLAIN_JPEG, animation, each, picture, sample

SCAN = b"\xff\xda"


def patched(data: bytes, at: int, form: str, change: Callable[[int], int]) -> bytes:
    """Return the data with another number at a position."""
    (old,) = struct.unpack_from(form, data, at)
    return data[:at] + struct.pack(form, change(old)) + data[at + struct.calcsize(form) :]


def webp(change: Callable[[int], int], **options: bool) -> bytes:
    """Return a WebP whose RIFF header has another size."""
    return patched(picture("WEBP", **options), 4, "<I", change)


def bmp(change: Callable[[int], int]) -> bytes:
    """Return a BMP whose header has another size of the file."""
    return patched(picture("BMP"), 2, "<I", change)


def avif(change: Callable[[int], int], kind: bytes = b"mdat") -> bytes:
    """Return an AVIF one of whose boxes has another size."""
    data = picture("AVIF")
    return patched(data, data.index(kind) - 4, ">I", change)


def os2_bmp() -> bytes:
    """Return a BMP with the short header of OS/2, two by two pixels, without a size of the file."""
    return struct.pack("<2sIHHIIHHHH", b"BM", 0, 0, 0, 26, 12, 2, 2, 1, 24) + bytes(14)


SLIGHTLY_WRONG: dict[str, tuple[str, Callable[[], bytes]]] = {
    "JPEG without its end marker": ("jpg", lambda: PLAIN_JPEG[:-2]),
    "JPEG with half an end marker": ("jpg", lambda: PLAIN_JPEG[:-1]),
    "JPEG with zeros as its end": ("jpg", lambda: PLAIN_JPEG[:-2] + bytes(500)),
    "JPEG, progressive, without its end marker": ("jpg", lambda: picture("JPEG", progressive=True)[:-2]),
    "JPEG, grey, without its end marker": ("jpg", lambda: picture("JPEG", mode="L")[:-2]),
    "GIF without its trailer": ("gif", lambda: picture("GIF")[:-1]),
    "GIF with another trailer": ("gif", lambda: picture("GIF")[:-1] + bytes(3)),
    "GIF, animated, without its trailer": ("gif", lambda: animation("GIF", duration=40, loop=0)[:-1]),
    "WebP, one byte too large": ("webp", lambda: webp(lambda size: size + 1)),
    "WebP, 1,000 bytes too large": ("webp", lambda: webp(lambda size: size + 1000)),
    "WebP, much too large": ("webp", lambda: webp(lambda size: size + 2_000_000)),
    "WebP, animated, too large": ("webp", lambda: patched(animation("WEBP"), 4, "<I", lambda size: size + 10)),
    "WebP without its last padding": ("webp", lambda: sample("WebP, lossless")[1][:-1]),
    "BMP, one byte too large": ("bmp", lambda: bmp(lambda size: size + 1)),
    "BMP, much too large": ("bmp", lambda: bmp(lambda size: size + 1_000_000)),
    "AVIF, a box one byte too large": ("avif", lambda: avif(lambda size: size + 1)),
    "AVIF, a box much too large": ("avif", lambda: avif(lambda size: size + 1_000_000)),
}
"""Refused strictly, and accepted otherwise."""
WRONG_EITHER_WAY: dict[str, tuple[str, Callable[[], bytes]]] = {
    "BMP of size 0": ("bmp", lambda: bmp(lambda _: 0)),
    "BMP, too small": ("bmp", lambda: bmp(lambda size: size - 1000)),
    "BMP of OS/2": ("bmp", os2_bmp),
    "BMP, top down": ("bmp", lambda: patched(picture("BMP"), 22, "<i", lambda height: -height)),
    "AVIF, a box up to the end of the file": ("avif", lambda: avif(lambda _: 0)),
    "AVIF, a box too small": ("avif", lambda: avif(lambda size: size - 1)),
    "WebP, too small": ("webp", lambda: webp(lambda size: size - 1)),
    "PNG with a wrong checksum": ("png", lambda: picture("PNG")[:-4] + b"abcd"),
}
"""Accepted by either policy."""


@each(SLIGHTLY_WRONG)
async def test_slightly_wrong_pictures(name: str) -> None:
    """A picture whose image data is all there is accepted as it is, and refused strictly (422)."""
    end, make = SLIGHTLY_WRONG[name]
    assert await checked_as(WITH_SVG, end, make()) == (end, make())
    with pytest.raises(UploadIncomplete, match="not whole") as caught:
        await checked_as(STRICT, end, make())
    assert caught.value.status == 422


@each(WRONG_EITHER_WAY)
async def test_pictures_with_another_size(name: str) -> None:
    """A size that says less than there is makes no picture incomplete, strictly or not."""
    end, make = WRONG_EITHER_WAY[name]
    for policy in (WITH_SVG, STRICT):
        assert await checked_as(policy, end, make()) == (end, make())


@each(SLIGHTLY_WRONG | WRONG_EITHER_WAY)
async def test_slightly_wrong_pictures_that_are_cut_off(name: str) -> None:
    """A picture with a wrong size is incomplete if it is cut off, except in the last scan of a JPEG."""
    end, make = (SLIGHTLY_WRONG | WRONG_EITHER_WAY)[name]
    data = make()
    if end == "jpg":
        lengths = range(100, data.index(SCAN) + 2, 50)
    else:
        lengths = range(100, len(data) - 600 if len(data) > 1000 else len(data) - 1, max(len(data) // 9, 1))
    for length in lengths:
        with pytest.raises(UploadIncomplete):
            await checked_as(WITH_SVG, end, data[:length])


@each(["JPEG", "JPEG, CMYK", "JPEG of a camera, with a thumbnail"])
async def test_a_jpeg_cut_off_before_its_image_data(name: str) -> None:
    """A JPEG that ends in its headers or right after them is incomplete; one byte of its only scan is accepted."""
    _, data = sample(name)
    scan = data.rindex(SCAN)
    begin = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    for length in (scan - 50, scan, scan + 2, scan + 5, begin - 1, begin):
        with pytest.raises(UploadIncomplete):
            await checked_as(WITH_SVG, "jpg", data[:length])
    assert await checked_as(WITH_SVG, "jpg", data[: begin + 1]) == ("jpg", data[: begin + 1])


@pytest.mark.parametrize("mode", ["L", "RGB"])
async def test_a_progressive_jpeg_cut_off_before_its_last_scans(mode: str) -> None:
    """A JPEG of several scans is incomplete until all coefficients of all components have come in full precision."""
    data = picture("JPEG", mode=mode, progressive=True)
    last = data.rindex(SCAN)
    for length in range(100, last, 97):
        with pytest.raises(UploadIncomplete):
            await checked_as(WITH_SVG, "jpg", data[:length])
    assert (await checked_as(WITH_SVG, "jpg", data[: last + 20]))[0] == "jpg"


async def test_a_scan_without_a_frame() -> None:
    """A JPEG without a frame header needs its end marker: nothing says which scan is the last one."""
    data = b"\xff\xd8\xff\xe0\0\4ab" + SCAN + b"\0\x08\1\1\0\0\x3f\0" + bytes(200)
    with pytest.raises(UploadIncomplete):
        await checked_as(WITH_SVG, "jpg", data)
    assert await checked_as(WITH_SVG, "jpg", data + EOI) == ("jpg", data + EOI)


async def test_an_animation_cut_off_in_a_frame() -> None:
    """An animation that ends in a frame is incomplete, although browsers show the frames before it."""
    for kind, options in {
        "GIF": {"duration": 40, "loop": 0},
        "WEBP": {"duration": 40},
        "AVIF": {"duration": 40},
    }.items():
        data = animation(kind, **options)
        for length in (len(data) * 6 // 10, len(data) - 20):
            with pytest.raises(UploadIncomplete):
                await checked_as(WITH_SVG, kind.lower(), data[:length])


@pytest.mark.parametrize(("version", "method"), [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)])
async def test_every_form_of_the_table_of_items(version: int, method: int) -> None:
    """The table of items is read in each version, and only items in the file say where it ends."""
    number, kind = ">I" if version == 2 else ">H", struct.pack(">H", method) if version else b""
    items = struct.pack(number, 1) + struct.pack(number, 7) + kind + struct.pack(">HIHII", 0, 100, 1, 250, 150)
    table = struct.pack(">BxxxBB", version, 0x44, 0x40) + items
    iloc = struct.pack(">I4s", len(table) + 8, b"iloc") + table
    meta = struct.pack(">I4sI", len(iloc) + 12, b"meta", 0) + iloc
    head = struct.pack(">I4s4sI", 16, b"ftyp", b"avif", 0) + meta
    data = head + struct.pack(">I4s", 9999, b"mdat")
    whole = data + bytes(500 - len(data))
    if method:
        with pytest.raises(UploadIncomplete):
            await checked_as(WITH_SVG, "avif", whole + bytes(1000))
        return
    assert await checked_as(WITH_SVG, "avif", whole) == ("avif", whole)
    with pytest.raises(UploadIncomplete):
        await checked_as(WITH_SVG, "avif", whole[:-1])


@each([name for name, (end, _) in IMAGES.items() if end in {"jpg", "png", "gif", "webp", "bmp", "avif", "ico"}])
async def test_half_a_picture_under_another_extension(name: str) -> None:
    """A picture with another extension is checked as what it is: without its second half it is incomplete."""
    end, data = sample(name)
    if end == "jpg":
        data = data[: 2 * data.find(SCAN)]
    with pytest.raises(UploadRefused) as caught:
        await checked_as(WITH_SVG, "jxl", data[: len(data) // 2])
    assert caught.value.status == 422
