"""Hostile uploads: read in linear time and in bounded memory, while others are served."""

from __future__ import annotations

import asyncio
import struct
import time
import tracemalloc

from selfheal import UploadPolicy, UploadRefused
from selfheal.content.policy import MIB
from selfheal.content.sources import CHUNK
from selfheal.content.truncation import EndDetector
from tests.support.checked_uploads import checked
from tests.support.sample_images import each

FRAME = b"\xff\xc0\0\x11\x08\0\x30\0\x30\x03\1\0\0\2\0\0\3\0\0"
ITEMS = b"\0\0\0\0\x11\0" + struct.pack(">H", 0xFFFF) + (b"\0\1\0\0\xff\xff" + b"\1\1" * 20_000)
META = bytes(4) + struct.pack(">I", len(ITEMS) + 8) + b"iloc" + ITEMS
HOSTILE: dict[str, tuple[str, bytes, bytes]] = {
    "GIF of tiny blocks": ("gif", b"GIF89a" + bytes(7) + b"!\xfe", b"\1a"),
    "GIF of empty blocks": ("gif", b"GIF89a" + bytes(7), b"!\xfe\0"),
    "GIF of empty images": ("gif", b"GIF89a" + bytes(7), b"," + bytes(11)),
    "PNG of empty chunks": ("png", b"\x89PNG\r\n\x1a\n", bytes(12)),
    "JPEG of markers": ("jpg", b"\xff\xd8", b"\xff\1"),
    "JPEG of empty segments": ("jpg", b"\xff\xd8", b"\xff\xfe\0\2"),
    "JPEG of fill bytes": ("jpg", b"\xff\xd8", b"\xff"),
    "JPEG of frames": ("jpg", b"\xff\xd8", FRAME),
    "JPEG of scans": ("jpg", b"\xff\xd8" + FRAME, b"\xff\xda\0\x0a\2\1\0\2\0\0\x3f\0"),
    "WebP of empty chunks": ("webp", b"RIFF\xff\xff\xff\xffWEBP", b"VP8 \0\0\0\0"),
    "WebP of padding": ("webp", b"RIFF\xff\xff\xff\xffWEBP", b"VP8 \1\0\0\0\0\0"),
    "AVIF of empty boxes": ("avif", b"\0\0\0\x10ftypavif\0\0\0\0", b"\0\0\0\x08free"),
    "AVIF of empty boxes with long lengths": ("avif", b"", b"\0\0\0\1free" + bytes(7) + b"\x10"),
    "AVIF of tables": ("avif", b"", struct.pack(">I", len(META) + 8) + b"meta" + META),
    "AVIF, a table of nothing": ("avif", b"", b"\0\0\0\x1cmeta\0\0\0\0\0\0\0\x10iloc\2\0\0\0\0\0\xff\xff"),
    "ICO of entries": ("ico", b"\0\0\1\0\xff\xff", b"\xff" * 16),
    "SVG of beginnings": ("svg", b"", b"<svg "),
    "SVG of prefixes": ("svg", b"", b"<svg:"),
    "SVG of ends": ("svg", b"", b"</svg "),
    "SVG of slashes": ("svg", b"<svg ", b"/"),
    "SVG of spaces": ("svg", b"</svg", b" "),
    "SVG of one name": ("svg", b"<", b"a"),
}
"""The extension, the beginning, and what is repeated."""


@each(HOSTILE)
def test_hostile_pictures_take_linear_time_and_little_memory(name: str) -> None:
    """A file of a great many parts is read in linear time, and little of it is kept."""
    end, head, part = HOSTILE[name]
    data = head + part * (MIB // 2 // len(part))
    started = time.process_time()
    _read(end, data, CHUNK // 4)
    assert time.process_time() - started < 4
    data = data[: MIB // 4]
    tracemalloc.start()
    try:
        _read(end, data, 2048)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MIB // 8


def _read(end: str, data: bytes, size: int) -> None:
    detector = EndDetector(end)
    for start in range(0, len(data), size):
        detector.feed(data[start : start + size])


@each(["GIF of tiny blocks", "JPEG of scans", "WebP of padding", "AVIF of tables", "SVG of beginnings"])
async def test_others_run_while_a_hostile_picture_is_read(name: str) -> None:
    """The event loop never works for longer than 100 ms on a hostile upload before it turns to others."""
    end, head, part = HOSTILE[name]
    worst, is_over = 0.0, False

    async def watch() -> None:
        nonlocal worst
        while not is_over:
            before = time.thread_time()
            await asyncio.sleep(0)
            worst = max(worst, time.thread_time() - before)

    watching = asyncio.create_task(watch())
    try:
        await checked(UploadPolicy(extensions=None), end, head + part * (MIB // 4 // len(part)))
    except UploadRefused:
        pass
    finally:
        is_over = True
        await watching
    assert worst < 0.1
