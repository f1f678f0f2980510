"""Upload policy: the largest size, the accepted extensions, and the type and the end of the contents.

Nothing is decoded: the first bytes show the type, the last ones the end. A decompression bomb is only a small file.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ..errors import UploadIncomplete, UploadTooLarge, UploadTypeRefused
from .content_types import IMAGE_EXTENSIONS, UNKNOWN, content_type, extension
from .signatures import HEAD, has_signature, recognise
from .truncation import EndDetector

MIB = 1024 * 1024
_SLICE = 16 * 1024
_BYTE_ORDER_MARKS = b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"  # of UTF-16 and UTF-32, in which text has zero bytes


@dataclass(frozen=True, slots=True)
class UploadPolicy:
    """What `save_uploaded_file` accepts: at most `max_bytes`, and only `extensions` (lower case, no dot; None: any).

    With `check_contents` the bytes must not be truncated, and of an allowed type, whose extension the saved name gets.
    With `strict` they must be what the client's extension says, with an end marker and true sizes.
    """

    max_bytes: int = 50 * MIB
    extensions: frozenset[str] | None = IMAGE_EXTENSIONS
    check_contents: bool = True
    strict: bool = False

    def check_extension(self, filename: str) -> str:
        """Return the lower-case extension of a client's file name. Raises `UploadTypeRefused` if it is not allowed."""
        end = extension(filename)
        if not (end.isascii() and end.isalnum()) or len(end) > 10:
            end = ""
        if not self._allows(end):
            allowed = ", ".join(sorted(self.extensions or ()))
            raise UploadTypeRefused(f"files of type {end or 'none'!r} are not accepted; allowed: {allowed}")
        return end

    async def check(self, filename: str, chunks: AsyncIterator[bytes]) -> tuple[str, AsyncIterator[bytes]]:
        """Return the extension for the saved name, and the chunks, which are checked while they are read.

        Raises `UploadRefused`, from here or from the chunks; nothing is stored then.
        """
        end = self.check_extension(filename)
        first = await anext(chunks, b"")
        if not first:
            raise UploadIncomplete("the upload is empty")
        if self.check_contents:
            end = self.true_extension(end, first[:HEAD])
        return end, self._checked(end, first, chunks)

    def true_extension(self, end: str, head: bytes) -> str:
        """Return the extension of a file that begins with `head` and is called `end` by the client.

        That is `end`, if the bytes can be such a file, else the usual extension of the bytes' type. Raises
        `UploadTypeRefused` if that is not allowed.
        """
        said = content_type(f"x.{end}").partition(";")[0]
        if said == UNKNOWN:
            return end  # an unknown extension promises nothing about the bytes
        found = recognise(head)
        if found is None:
            if has_signature(end) or not _may_be(said, head):
                raise UploadTypeRefused(f"the bytes are not {said}")
            return end
        if end in found.own or end in found.others:
            return end
        allowed = [] if self.strict else [own for own in found.own if self._allows(own)]
        if not allowed:
            raise UploadTypeRefused(f"the bytes are {found.content_type}, not {said}")
        return allowed[0]

    def _allows(self, end: str) -> bool:
        return self.extensions is None or end in self.extensions

    async def _checked(self, end: str, chunk: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        size, end_detector = 0, EndDetector(end)
        while chunk:
            size += len(chunk)
            if size > self.max_bytes:
                raise UploadTooLarge(f"the upload is larger than {self.max_bytes} bytes")
            if self.check_contents:
                await _feed(end_detector, chunk)
            yield chunk
            chunk = await anext(chunks, b"")
        if self.check_contents and not (end_detector.is_reached or (end_detector.may_be_here and not self.strict)):
            raise UploadIncomplete("the upload is not whole: its end is missing")


async def _feed(end_detector: EndDetector, chunk: bytes) -> None:
    """Feed a chunk in slices: a hostile one has thousands of parts, and others must run meanwhile."""
    for start in range(0, len(chunk), _SLICE):
        if not end_detector.is_reached:
            end_detector.feed(chunk[start : start + _SLICE])
            await asyncio.sleep(0)


def _may_be(kind: str, head: bytes) -> bool:
    """Whether bytes without a signature may be of a type that has none."""
    if kind == "image/svg+xml":
        return b"<svg" in head.lower()
    return not kind.startswith("text/") or b"\0" not in head or head.startswith(_BYTE_ORDER_MARKS)
