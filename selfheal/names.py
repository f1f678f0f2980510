"""The grammar of names, and the name that a request's path asks for.

A name is the path below the uploads directory (`cats/tom.jpg`). Only names in the grammar reach disk or database. It
excludes what tricks a file system: traversal (CVE-2021-45452, CVE-2026-28414), device names (CVE-2025-66221), streams,
doubly encoded separators, control characters, and the names of our own temporary files.
"""

import re
from urllib.parse import quote

from .errors import InvalidName

MAX_NAME_BYTES = 512
MAX_PART_BYTES = 255
MAX_RAW_BYTES = 8192  # the longest percent-encoded path of a request; servers and proxies allow no more
OWN_PREFIX = ".selfheal"  # the prefix of selfheal's own files and directories; a dotfile is never a name

_PLAIN = re.compile(
    r"(?:(?:[0-9a-f]{1,40}+|[0-9A-Za-z_-]{5,40}+)/){0,3}+[0-9A-Za-z_-]{5,100}+(?:\.[0-9A-Za-z]{1,10}+)?+"
)
"""Nearly every name: it needs no further check, for device names have four letters at most.

The repetitions are possessive: they never backtrack, which halves the time.
"""
_PLAIN_LINES = re.compile(rf"(?:{_PLAIN.pattern}\n)*+{_PLAIN.pattern}")
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u2028\u2029\ud800-\udfff\ufffd]")
_ENCODED_AGAIN = re.compile(r"%(?:25)*(?:2e|2f|5c|00)", re.IGNORECASE)
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³]) *(?:\.|$)", re.IGNORECASE)
_STREAM = re.compile(r"::|:\$|^[a-z]:", re.IGNORECASE)


def check(name: str) -> str:
    """Return `name` unchanged if it is in the grammar; raise `InvalidName` otherwise."""
    if not is_valid(name):
        raise InvalidName(name, fault(name))
    return name


def is_valid(name: str) -> bool:
    """Whether `name` is in the grammar."""
    return _PLAIN.fullmatch(name) is not None or not fault(name)


def are_valid(lines: str) -> bool:
    """Whether every line is a name in the grammar; three times as fast as a check of each."""
    return _PLAIN_LINES.fullmatch(lines) is not None or all(map(is_valid, lines.split("\n")))


def from_path(path: str, prefix: str, raw_path: bytes | None = None) -> str | None:
    """Return the name that a request asks for; None if its path is not below `prefix` or not in the grammar. `raw_path`
    tells `%2f` from `/`; a sibling such as `/static/uploads_private` is not below the prefix (CVE-2023-29159).
    """
    if len(path) > len(prefix) + 1 + MAX_NAME_BYTES or len(raw_path or b"") > MAX_RAW_BYTES:
        return None  # first of all: servers limit the length of a path late or never
    if not path.startswith(prefix + "/"):
        return None
    if raw_path is not None and b"%" in raw_path and b"%2f" in raw_path.lower():
        return None
    name = path[len(prefix) + 1 :]
    return name if is_valid(name) else None


def to_path(name: str, prefix: str) -> str:
    """Return the percent-encoded URL path of `name`."""
    return quote(f"{prefix}/{name}")


def fault(name: str) -> str:
    """Return why `name` is not in the grammar; empty if it is."""
    if not name:
        return "it is empty"
    if _FORBIDDEN.search(name):
        return "it holds a control character, a backslash or a character that no encoding carries"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"it is longer than {MAX_NAME_BYTES} bytes"
    if _ENCODED_AGAIN.search(name):
        return "it holds a dot, slash, backslash or NUL that was percent-encoded twice"
    return next((why for part in name.split("/") if (why := _fault_of_part(part))), "")


def _fault_of_part(part: str) -> str:
    if not part:
        return "a part of it is empty"
    if part[0] == ".":
        return "a part of it begins with a dot"
    if part[-1] in ". ":
        return "a part of it ends with a dot or a space"
    if len(part.encode()) > MAX_PART_BYTES:
        return f"a part of it is longer than {MAX_PART_BYTES} bytes"
    if _DEVICE.match(part):
        return "a part of it is the name of a device"
    if _STREAM.search(part):
        return "a part of it names a drive or an alternate stream"
    return ""
