"""Truncated images: formats are parsed part by part as their bytes come, without decoding, up to their end.

Browsers load a picture without its end marker, or with a wrong size field. So there are two ends: the file may end when
all image data has come; strictly, it ends where its format says.
"""

import re
import struct
from collections.abc import Callable, Generator
from io import BytesIO

Walk = Generator[int | re.Pattern[bytes] | None, bytes, None]
"""A parser: yields how many bytes it reads (above 0) or skips (below 0), or a pattern to search; returns at the end.

None comes before a part that no image data is in: the file may end there.
"""

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_NEXT_BYTE = re.compile(rb"(?=.)", re.DOTALL)
_SVG_END = re.compile(rb"</(?:[\w.-]+:)?svg\s*>|<(?:[\w.-]+:)?svg\b[^<>]*/>", re.IGNORECASE)
_OVERLAP = 4096
_ENDLESS = 1 << 62
_LARGEST_TABLE = 1 << 16
_SCAN = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class EndDetector:
    """Reads the pieces of a file with the extension `end` and detects whether its end has come."""

    def __init__(self, end: str) -> None:
        make = _WALKS.get(end)
        self._walk = make() if make is not None else None
        self._wants = next(self._walk) if self._walk is not None else None
        self._buffer = b""
        self._at = 0
        self.may_be_here = False
        """Whether all image data has come, as far as that can be told, although its format's end has not."""

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
                self.may_be_here = self._wants is None
                self._wants = self._walk.send(part)
        except StopIteration:
            self._walk = None
            self._buffer = b""

    def _take(self) -> bytes | None:
        left = len(self._buffer) - self._at
        if self._wants is None:
            return b""
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


def _big(part: bytes) -> int:
    return int.from_bytes(part, "big")


def _little(part: bytes) -> int:
    return int.from_bytes(part, "little")


def _jpeg() -> Walk:
    """JPEG (ITU T.81, annex B): segments with a length, and scans in which 0xFF begins only restart markers.

    In the last scan, missing bytes cannot be told from a missing end marker. Which one is the last, the frame tells.
    """
    yield 2
    missing: dict[int, int] = {}  # bits of the 64 coefficients of each component that no scan has had in full precision
    while (marker := (yield _MARKER)[1]) != 0xD9:
        if marker in {0x01, 0xD8}:
            continue
        size = _big((yield 2)) - 2
        if size <= 0 or (marker != _SCAN and marker not in _FRAMES):
            yield from _skip(size)
            continue
        part = (yield size) + bytes(600)  # a damaged one may be too short for what it says
        if marker in _FRAMES:
            missing = dict.fromkeys(part[6 : 6 + 3 * part[5] : 3], (1 << 64) - 1)
            continue
        names = 2 * part[0] + 1
        first, last, precision = part[names : names + 3]
        for component in missing.keys() & part[1:names:2] if precision & 15 == 0 else ():
            missing[component] &= ~((2 << last) - (1 << first))
        if missing and not any(missing.values()):
            yield _NEXT_BYTE  # of the last scan
            yield None


def _png() -> Walk:
    yield 8
    while True:
        head = yield 8
        yield from _skip(_big(head[:4]) + 4)
        if head[4:] == b"IEND":
            return


def _gif() -> Walk:
    """GIF89a: blocks of sub-blocks, up to the trailer. Browsers need no trailer, and stop at an unknown block."""
    yield from _skip(_colours((yield 13)[10]))
    has_image = False
    while True:
        if has_image:
            yield None
        kind = yield 1
        if kind == b";":
            return
        if kind == b",":
            yield from _skip(_colours((yield 9)[8]) + 1)
        elif kind == b"!":
            yield 1
        else:
            if has_image:
                yield None
            yield -_ENDLESS  # nothing after this is read
        while size := (yield 1)[0]:
            yield -size
        has_image |= kind == b","


def _colours(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _webp() -> Walk:
    """WebP (RFC 9649): a size, and chunks with a size each. The first one is often wrong."""
    end, at, has_image = _little((yield 12)[4:8]) + 8, 12, False
    while at < end:
        if has_image:
            yield None
        head = yield min(8, end - at)
        size = min(_little(head[4:]), end - at - 8)
        yield from _skip(size)
        has_image |= head[:4] in {b"VP8 ", b"VP8L", b"ANMF"}
        at += 8 + size
        if size % 2 and at < end:
            if has_image:
                yield None
            yield 1
            at += 1


def _bmp() -> Walk:
    """BMP: the size of the file is often wrong; the rows of pixels have a known one, unless they are compressed."""
    head = yield 18
    if head[14] == 12:
        width, height, _, bits = struct.unpack("<4H", (yield 8))
        at, compression, size = 26, 0, 0
    else:
        width, height, _, bits, compression, size = struct.unpack("<iiHHII", (yield 20))
        at = 38
    if compression in {0, 3, 6}:
        size = (width * bits + 31) // 32 * 4 * (abs(height) - 1) + (width * bits + 7) // 8
    end = max(_little(head[10:14]) + size, at)
    yield from _skip(end - at)
    yield None
    yield from _skip(_little(head[2:6]) - end)


def _ico() -> Walk:
    count = _little((yield 6)[4:])
    end = at = 6 + 16 * count
    for _ in range(count):
        entry = yield 16
        end = max(end, _little(entry[8:12]) + _little(entry[12:]))
    yield from _skip(end - at)


def _boxes() -> Walk:
    """ISO 14496-12 (AVIF, HEIC): boxes with a length; the file may end after any box once it holds the image data.

    The length of that box may be wrong: where a still picture ends, its table of items tells.
    """
    at, end, is_still = 0, -1, True
    while True:
        head = yield 8
        size, used = _big(head[:4]), 8
        if size == 1:
            size, used = _big((yield 8)), 16
        at, left = at + used, max(size - used, 0)
        if head[4:] == b"mdat":
            break
        if head[4:] == b"meta" and 0 < left <= _LARGEST_TABLE and end < 0:
            end = _end_of_items((yield left))
        else:
            yield from _skip(left)
        is_still &= head[4:] != b"moov"
        at += left
    if end > 0 and is_still:
        yield from _skip(end - at)
        yield None
        left -= max(end - at, 0)
    yield from _skip(left)


def _end_of_items(meta: bytes) -> int:
    """Return where the last item of a meta box ends in the file; 0 if that is unknown (ISO 14496-12, 8.11.3)."""
    at = 4
    while at + 8 <= len(meta):
        size = _big(meta[at : at + 4])
        if meta[at + 4 : at + 8] == b"iloc":
            return _end_of_extents(BytesIO(meta[at + 8 : at + size]))
        at += max(size, 8)
    return 0


def _end_of_extents(table: BytesIO) -> int:
    def number(size: int) -> int:
        return _big(table.read(size))

    version, sizes = number(4) >> 24, number(2)
    if sizes >> 8 == 0:
        return 0
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    wide, end = 4 if version == 2 else 2, 0
    for _ in range(min(number(wide), _LARGEST_TABLE // 6)):
        number(wide)  # the item's number
        in_file = version == 0 or number(2) & 15 == 0
        number(2)  # 0: in this file
        base = number(base_size)
        for _ in range(number(2)):
            number(index_size if version else 0)
            item_end = base + number(offset_size) + number(length_size)
            end = max(end, item_end) if in_file else end
    return end


def _svg() -> Walk:
    yield _SVG_END


_WALKS: dict[str, Callable[[], Walk]] = {
    end: walk
    for ends, walk in {
        "avif heic heif": _boxes,
        "bmp": _bmp,
        "gif": _gif,
        "ico": _ico,
        "jpg jpeg jpe jfif": _jpeg,
        "png apng": _png,
        "svg": _svg,
        "webp": _webp,
    }.items()
    for end in ends.split()
}
