"""Truncated images: formats are parsed part by part as their bytes come, without decoding, up to their end."""

import re
from collections.abc import Callable, Generator

Walk = Generator[int | re.Pattern[bytes], bytes, None]
"""A parser: yields how many bytes it reads (above 0) or skips (below 0), or a pattern to search; returns at the end."""

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_SVG_END = re.compile(rb"</(?:[\w.-]+:)?svg\s*>|<(?:[\w.-]+:)?svg\b[^>]*/>", re.IGNORECASE)
_OVERLAP = 4096


class EndDetector:
    """Reads the pieces of a file of content type `kind` and detects whether its end has come."""

    def __init__(self, kind: str) -> None:
        make = _WALKS.get(kind)
        self._walk = make() if make is not None else None
        self._wants = next(self._walk) if self._walk is not None else 0
        self._buffer = b""
        self._at = 0

    @property
    def is_reached(self) -> bool:
        """Whether the end has come; always true for a format that has no detectable end."""
        return self._walk is None

    def feed(self, piece: bytes) -> None:
        """Read the next piece, of any size."""
        if self._walk is None:
            return
        self._buffer, self._at = self._buffer[self._at :] + piece, 0
        try:
            while (part := self._take()) is not None:
                self._wants = self._walk.send(part)
        except StopIteration:
            self._walk = None
            self._buffer = b""

    def _take(self) -> bytes | None:
        left = len(self._buffer) - self._at
        if isinstance(self._wants, re.Pattern):
            found = self._wants.search(self._buffer, self._at)
            if found is None:
                self._at = max(self._at, len(self._buffer) - _OVERLAP)
                return None
            self._at = found.end()
            return found[0]
        if self._wants < 0:
            skipped = min(-self._wants, left)
            self._at += skipped
            self._wants += skipped
            return b"" if self._wants == 0 else None
        if left < self._wants:
            return None
        self._at += self._wants
        return self._buffer[self._at - self._wants : self._at]


def _skip(size: int) -> Walk:
    if size > 0:
        yield -size


def _number(part: bytes) -> int:
    return int.from_bytes(part, "big")


def _jpeg() -> Walk:
    """JPEG (ITU T.81, annex B): segments with a length, and scans in which 0xFF begins only restart markers."""
    yield 2
    while (marker := (yield _MARKER)[1]) != 0xD9:
        if marker not in (0x01, 0xD8):
            yield from _skip(_number((yield 2)) - 2)


def _png() -> Walk:
    yield 8
    while True:
        head = yield 8
        yield from _skip(_number(head[:4]) + 4)
        if head[4:] == b"IEND":
            return


def _gif() -> Walk:
    """GIF89a: blocks of sub-blocks, up to the trailer."""
    yield from _skip(_colours((yield 13)[10]))
    while (kind := (yield 1)) != b";":
        if kind == b",":
            yield from _skip(_colours((yield 9)[8]) + 1)
        else:
            yield 1
        while size := (yield 1)[0]:
            yield -size


def _colours(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _webp() -> Walk:
    yield from _skip(int.from_bytes((yield 8)[4:], "little"))


def _bmp() -> Walk:
    yield from _skip(int.from_bytes((yield 6)[2:], "little") - 6)


def _ico() -> Walk:
    count = int.from_bytes((yield 6)[4:], "little")
    end = at = 6 + 16 * count
    for _ in range(count):
        entry = yield 16
        end = max(end, int.from_bytes(entry[8:12], "little") + int.from_bytes(entry[12:], "little"))
    yield from _skip(end - at)


def _boxes() -> Walk:
    """ISO 14496-12 (AVIF, HEIC): boxes with a length; the file may end after any box once it holds the image data."""
    while True:
        head = yield 8
        size, used = _number(head[:4]), 8
        if size == 1:
            size, used = _number((yield 8)), 16
        yield from _skip(size - used)
        if head[4:] == b"mdat":
            return


def _svg() -> Walk:
    yield _SVG_END


_WALKS: dict[str, Callable[[], Walk]] = {
    "image/avif": _boxes,
    "image/bmp": _bmp,
    "image/gif": _gif,
    "image/heic": _boxes,
    "image/jpeg": _jpeg,
    "image/png": _png,
    "image/svg+xml": _svg,
    "image/webp": _webp,
    "image/x-icon": _ico,
}
