"""Names of other apps (URLs, paths, backslashes) as names in the grammar: the same one every time."""

import re
from urllib.parse import unquote

from .. import names

_URL = re.compile(r"[a-z][a-z0-9+.-]+://[^/?#]*([^?#]*).*", re.IGNORECASE | re.DOTALL)
_DRIVE = re.compile(r"[a-z]:[/\\]", re.IGNORECASE)
_BAD = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffd]")
_TRICKS = re.compile(r"::|:\$|^[a-z]:|%(?=(?:25)*(?:2e|2f|5c|00))", re.IGNORECASE)


def to_name(given: object) -> str:
    """Return the name for what a column holds; the caller checks it: it may be empty or too long.

    A URL loses its host and its query, a path its root, its drive and its `..`; what the grammar excludes becomes `_`.
    """
    text = given.decode(errors="replace") if isinstance(given, bytes) else "" if given is None else str(given)
    if names.is_valid(text):
        return text
    if url := _URL.fullmatch(text):
        text = unquote(url[1])
    elif _DRIVE.match(text):
        text = text[2:]
    parts: list[str] = []
    for part in _BAD.sub("_", text).replace("\\", "/").split("/"):
        if part == "..":
            del parts[-1:]
        elif part.strip(" ."):
            parts.append(_to_part(part))
    return "/".join(parts)


def with_digest(name: str, sha256: str) -> str:
    """Return another name for other bytes than those that a name has already: `tom-3fa2b1c4.jpg`."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.rpartition(".")
    base, end = (stem, f".{extension}") if dot else (last, "")
    return f"{folder}{slash}{base}-{sha256[:8]}{end}"


def _to_part(part: str) -> str:
    part = _TRICKS.sub(lambda found: "_" * len(found[0]), part.rstrip(". "))
    is_valid = names.is_valid(part) or len(part.encode()) > names.MAX_PART_BYTES
    return part if is_valid else f"_{part}"
