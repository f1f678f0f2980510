"""Ranges: the one range that a request asks for (RFC 9110, section 14)."""

import re

_RANGE = re.compile(r"([0-9]*)-([0-9]*)", re.ASCII)


def parse_range(header: str, size: int) -> range | None:
    """Return the range of a Range header, within a body of `size` bytes; None if all of it is to be sent.

    That is so for several ranges, malformed ones, and other units. A range that begins at or past the end starts at
    `size`. Linear in the header (CVE-2025-62727, CVE-2011-3192), in ASCII digits only (CVE-2025-69225), and without a
    number that could overflow (CVE-2017-7529).
    """
    unit, _, ranges = header.partition("=")
    if unit.lower() != "bytes":
        return None
    match = _RANGE.fullmatch(ranges.strip(" \t"))
    if match is None or match[0] == "-":
        return None
    if not match[1]:
        suffix = _number(match[2])
        return range(max(size - suffix, 0) if suffix else size, size)
    if match[2] and _magnitude(match[2]) < _magnitude(match[1]):
        return None
    last = _number(match[2]) if match[2] else size
    return range(_number(match[1]), min(last + 1, size))


def _number(digits: str) -> int:
    """Return a number of any length; one of more than 18 digits is past every end (CVE-2017-7529)."""
    bare = digits.lstrip("0") or "0"
    return int(bare) if len(bare) <= 18 else 10**18


def _magnitude(digits: str) -> tuple[int, str]:
    """Return what compares as the number does, whatever its length."""
    bare = digits.lstrip("0")
    return len(bare), bare
