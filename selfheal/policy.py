"""What an app takes from strangers: how much, which extensions, and bytes that are what the extension says.

Nothing is decoded: types are told by their first bytes and ends by their last, so that a decompression bomb is only
ever a small file here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from .content_types import IMAGE_EXTENSIONS, content_type, extension
from .errors import MissingExtra, UploadIncomplete, UploadTooLarge, UploadTypeRefused

MIB = 1024 * 1024
_HEAD = 8192
_TAIL = 64
_SAME = {
    "audio/x-flac": "audio/flac",
    "audio/x-wav": "audio/wav",
    "image/apng": "image/png",
    "image/heif": "image/heic",
    "video/x-m4v": "video/mp4",
}
_DECLARES = {"image/svg+xml": b"<svg"}


@dataclass(frozen=True, slots=True)
class UploadPolicy:
    """What `save_uploaded_file` accepts: at most `max_bytes` bytes, only `extensions` (lower case, no dot; None: any),
    and with `check_contents` only bytes that are what their extension says (needs the extra `validate`).
    """

    max_bytes: int = 50 * MIB
    extensions: frozenset[str] | None = IMAGE_EXTENSIONS
    check_contents: bool = True

    def check_extension(self, filename: str) -> str:
        """The extension of a client's file name, lower case; raises `UploadTypeRefused` if it is not allowed."""
        end = extension(filename)
        if not (end.isascii() and end.isalnum()) or len(end) > 10:
            end = ""
        if self.extensions is not None and end not in self.extensions:
            raise UploadTypeRefused(
                f"files of type {end or 'none'!r} are not accepted; allowed: {_list(self.extensions)}"
            )
        return end

    async def watch(self, end: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Hand `chunks` on while they keep to the policy.

        Raises `UploadTooLarge`, `UploadTypeRefused` or `UploadIncomplete`; what raised has stored nothing.
        """
        size, end_mark = 0, _EndMark(_kind(end))
        async for chunk in chunks:
            if not size and self.check_contents:
                check_head(end, chunk[:_HEAD])
            size += len(chunk)
            if size > self.max_bytes:
                raise UploadTooLarge(f"the upload is larger than {self.max_bytes} bytes")
            end_mark.feed(chunk)
            yield chunk
        if not size:
            raise UploadIncomplete("the upload is empty")
        if self.check_contents and not end_mark.reached():
            raise UploadIncomplete("the upload is not whole: its end is missing")


def check_head(end: str, head: bytes) -> None:
    """Raise `UploadTypeRefused` unless a file that begins with `head` may have the extension `end`."""
    try:
        import filetype  # noqa: PLC0415 - an extra, imported where it is used
    except ImportError as error:
        raise MissingExtra("validate", "filetype") from error
    said, guess = _kind(end), filetype.guess(head)
    found = None if guess is None else _SAME.get(guess.mime, guess.mime)
    if found is None:
        known = {_SAME.get(known.mime, known.mime) for known in filetype.types}
        if said in known or _DECLARES.get(said, b"") not in head.lower():
            raise UploadTypeRefused(f"the bytes are not {said}")
    elif found != said:
        raise UploadTypeRefused(f"the bytes are {found}, not {said}")


class _EndMark:
    """Looks, without decoding, for the mark by which a format says that it has ended."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._size = 0
        self._head = b""
        self._tail = b""
        self._jpeg_starts = self._jpeg_ends = 0

    def feed(self, chunk: bytes) -> None:
        if self._kind == "image/jpeg":
            seam = self._tail[-1:] + chunk
            self._jpeg_starts += seam.count(b"\xff\xd8")
            self._jpeg_ends += seam.count(b"\xff\xd9")
        self._size += len(chunk)
        self._head = self._head or chunk[:16]
        self._tail = (self._tail + chunk[-_TAIL:])[-_TAIL:]

    def reached(self) -> bool:
        if self._kind == "image/jpeg":  # a thumbnail ends inside the picture; phones append films after its end
            return self._jpeg_ends >= min(self._jpeg_starts, 2)
        if self._kind == "image/png":
            return b"IEND\xaeB`\x82" in self._tail
        if self._kind == "image/gif":
            return self._tail.rstrip(b"\0\r\n").endswith(b";")
        if self._kind == "image/webp":
            return self._size >= int.from_bytes(self._head[4:8], "little") + 8
        return True


def _kind(end: str) -> str:
    kind = content_type(f"x.{end}").partition(";")[0]
    return _SAME.get(kind, kind)


def _list(extensions: frozenset[str]) -> str:
    return ", ".join(sorted(extensions))
