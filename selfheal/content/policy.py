"""Upload policy: the largest size, the accepted extensions, and contents that match the extension.

Nothing is decoded: the first bytes show the type, the last ones the end. A decompression bomb is only a small file.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from ..errors import MissingExtra, UploadIncomplete, UploadTooLarge, UploadTypeRefused
from .content_types import IMAGE_EXTENSIONS, UNKNOWN, content_type, extension
from .truncation import EndDetector

MIB = 1024 * 1024
_HEAD = 8192
_SAME = {
    "application/font-sfnt": "font/sfnt",
    "application/font-woff": "font/woff",
    "audio/webm": "video/webm",
    "audio/x-flac": "audio/flac",
    "audio/x-wav": "audio/wav",
    "font/otf": "font/sfnt",
    "font/ttf": "font/sfnt",
    "font/woff2": "font/woff",
    "image/apng": "image/png",
    "image/heif": "image/heic",
    "video/x-m4v": "video/mp4",
}
_BEGINNINGS = [
    (0, b"\xff\x0a", "image/jxl"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "image/jxl"),
    (0, b"II+\0", "image/tiff"),
    (0, b"MM\0+", "image/tiff"),
    (4, b"ftypavis", "image/avif"),
    (4, b"ftypheix", "image/heic"),
    (4, b"ftyphevc", "image/heic"),
]
"""Formats that `filetype` does not know: offset, first bytes, content type."""
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
        """Return the lower-case extension of a client's file name. Raises `UploadTypeRefused` if it is not allowed."""
        end = extension(filename)
        if not (end.isascii() and end.isalnum()) or len(end) > 10:
            end = ""
        if self.extensions is not None and end not in self.extensions:
            raise UploadTypeRefused(
                f"files of type {end or 'none'!r} are not accepted; allowed: {', '.join(sorted(self.extensions))}"
            )
        return end

    async def checked(self, end: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield `chunks` while they keep to the policy. Raises `UploadRefused`; nothing is stored then."""
        size, end_detector = 0, EndDetector(_kind(end))
        async for chunk in chunks:
            if not size and self.check_contents:
                check_head(end, chunk[:_HEAD])
            size += len(chunk)
            if size > self.max_bytes:
                raise UploadTooLarge(f"the upload is larger than {self.max_bytes} bytes")
            end_detector.feed(chunk)
            yield chunk
        if not size:
            raise UploadIncomplete("the upload is empty")
        if self.check_contents and not end_detector.is_reached:
            raise UploadIncomplete("the upload is not whole: its end is missing")


def check_head(end: str, head: bytes) -> None:
    """Raise `UploadTypeRefused` unless a file that begins with `head` may have the extension `end`."""
    try:
        import filetype  # noqa: PLC0415 - an extra, imported where it is used
    except ImportError as error:
        raise MissingExtra("validate", "filetype") from error
    said = _kind(end)
    if said == UNKNOWN:
        return  # an unknown extension promises nothing about the bytes
    found = next((kind for at, mark, kind in _BEGINNINGS if head.startswith(mark, at)), None)
    found = found or getattr(filetype.guess(head), "mime", None)
    if found is None:
        known = {_SAME.get(known.mime, known.mime) for known in filetype.types} | {kind for _, _, kind in _BEGINNINGS}
        if said in known or _DECLARES.get(said, b"") not in head.lower():
            raise UploadTypeRefused(f"the bytes are not {said}")
    elif _SAME.get(found, found) != said:
        raise UploadTypeRefused(f"the bytes are {found}, not {said}")


def _kind(end: str) -> str:
    kind = content_type(f"x.{end}").partition(";")[0]
    return _SAME.get(kind, kind)
