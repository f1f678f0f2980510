"""Images of every kind that browsers show, as programs and cameras write them."""

from __future__ import annotations

import functools
import io
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image, features

from tests.support.requirements import needs

SOI, EOI = b"\xff\xd8", b"\xff\xd9"


def image(side: int = 48, mode: str = "RGB") -> Image.Image:
    """Return noise as a Pillow image, the same at every run."""
    pixels = random.Random(side).randbytes(side * side * 3)
    return Image.frombytes("RGB", (side, side), pixels).convert(mode)


@functools.cache
def picture(kind: str, side: int = 48, mode: str = "RGB", **options: Any) -> bytes:
    """Return a picture as Pillow writes it."""
    if kind == "AVIF" and not features.check("avif"):
        needs("AVIF in Pillow", "pip install --upgrade pillow")
    out = io.BytesIO()
    image(side, mode).save(out, kind, **options)
    return out.getvalue()


@functools.cache
def animation(kind: str, **options: Any) -> bytes:
    """Return three pictures in one file."""
    if kind == "AVIF" and not features.check("avif"):
        needs("AVIF in Pillow", "pip install --upgrade pillow")
    out = io.BytesIO()
    image(48).save(out, kind, save_all=True, append_images=[image(47).resize((48, 48)), image(48, "L")], **options)
    return out.getvalue()


def segment(marker: int, payload: bytes) -> bytes:
    """Return a segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """Return a JPEG with segments after its SOI marker."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def exif_with_thumbnail(thumbnail: bytes) -> bytes:
    """Return an APP1 segment as cameras write it: no tags, and a second directory with a JPEG."""
    entries = [(0x0103, 3, 1, 6), (0x0201, 4, 1, 56), (0x0202, 4, 1, len(thumbnail))]
    second = struct.pack("<H", 3) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    tiff = b"II*\0" + struct.pack("<IHI", 8, 0, 14) + second
    return segment(0xE1, b"Exif\0\0" + tiff.ljust(56, b"\0") + thumbnail)


def photoshop_thumbnail(thumbnail: bytes) -> bytes:
    """Return an APP13 segment as Photoshop writes it, with a JPEG."""
    resource = bytes(28) + thumbnail
    return segment(0xED, b"Photoshop 3.0\08BIM\x04\x0c\0\0" + struct.pack(">I", len(resource)) + resource)


PLAIN_JPEG = picture("JPEG")
THUMBNAIL = picture("JPEG", 16)
CAMERA_JPEG = with_segments(PLAIN_JPEG, exif_with_thumbnail(THUMBNAIL))
EDITED_JPEG = with_segments(PLAIN_JPEG, exif_with_thumbnail(THUMBNAIL), photoshop_thumbnail(THUMBNAIL))
JPEG_WITH_MARKERS = with_segments(PLAIN_JPEG, segment(0xFE, b"an end " + EOI + b" and another " + EOI + SOI))
SVG = b"""<?xml version="1.0" encoding="UTF-8"?>
<!-- drawn by hand -->
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle r="4"/></svg>
"""

IMAGES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "JPEG": ("jpg", lambda: PLAIN_JPEG),
    "JPEG, progressive": ("jpeg", lambda: picture("JPEG", progressive=True)),
    "JPEG, restart markers": ("jpe", lambda: picture("JPEG", restart_marker_blocks=2)),
    "JPEG, grey": ("jfif", lambda: picture("JPEG", mode="L")),
    "JPEG, CMYK": ("jpg", lambda: picture("JPEG", mode="CMYK")),
    "JPEG of a camera, with a thumbnail": ("jpg", lambda: CAMERA_JPEG),
    "JPEG of an editor, with two thumbnails": ("jpg", lambda: EDITED_JPEG),
    "JPEG, EOI markers in a comment": ("jpg", lambda: JPEG_WITH_MARKERS),
    "JPEG, several pictures": ("jpg", lambda: animation("MPO")),
    "PNG": ("png", lambda: picture("PNG")),
    "PNG, palette": ("png", lambda: picture("PNG", mode="P")),
    "PNG, animated": ("png", lambda: animation("PNG", duration=40)),
    "APNG": ("apng", lambda: animation("PNG", duration=40)),
    "GIF": ("gif", lambda: picture("GIF")),
    "GIF, animated": ("gif", lambda: animation("GIF", duration=40, loop=0)),
    "GIF, with a comment": ("gif", lambda: picture("GIF", comment=b"one; two; three;" * 40)),
    "WebP": ("webp", lambda: picture("WEBP")),
    "WebP, lossless": ("webp", lambda: picture("WEBP", lossless=True)),
    "WebP, animated": ("webp", lambda: animation("WEBP", duration=40)),
    "BMP": ("bmp", lambda: picture("BMP")),
    "ICO": ("ico", lambda: picture("ICO", sizes=((16, 16), (32, 32)))),
    "AVIF": ("avif", lambda: picture("AVIF")),
    "AVIF, animated": ("avif", lambda: animation("AVIF", duration=40)),
    "TIFF": ("tif", lambda: picture("TIFF")),
    "TIFF, packed": ("tiff", lambda: picture("TIFF", compression="tiff_lzw")),
    "TIFF, big": ("tiff", lambda: picture("TIFF", big_tiff=True)),
    "TIFF, several pages": ("tiff", lambda: animation("TIFF")),
    "SVG": ("svg", lambda: SVG),
    "SVG without a prologue": ("svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "SVG with a byte order mark": ("svg", lambda: b"\xef\xbb\xbf" + SVG),
}


def each(names: list[str] | dict[str, Any]) -> pytest.MarkDecorator:
    """Run a test for each name of an image."""
    return pytest.mark.parametrize("name", list(names))


def sample(name: str) -> tuple[str, bytes]:
    """Return the extension and the bytes of one of the `IMAGES`."""
    end, make = IMAGES[name]
    return end, make()
