"""Disks that take no file: what errors of writing mean, and a pause before the next try."""

import contextlib
import errno
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import DiskUnwritable

REFUSED_FOR = 30.0  # seconds without any write after the disk refused one for a lasting reason

_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_LASTING = (errno.EROFS, errno.EACCES, errno.EPERM)


class Refusals:
    """What the disk below `path` refused, and when."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = ("", -REFUSED_FOR)

    def check(self) -> None:
        """Raise `DiskUnwritable` if the disk gave a lasting reason less than `REFUSED_FOR` seconds ago."""
        why, since = self._last
        if time.monotonic() - since < REFUSED_FOR:
            raise DiskUnwritable(why)

    def meaning(self, error: OSError) -> OSError | DiskUnwritable:
        """Return `DiskUnwritable`, or the error itself if the process lacks descriptors or memory."""
        if error.errno in _OUT_OF_RESOURCES:
            return error
        why = f"{self._path} takes no file: {error.strerror or error}"
        if error.errno in _LASTING:
            self._last = (why, time.monotonic())
        return DiskUnwritable(why)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raise the meaning of an `OSError` in its place."""
        try:
            yield
        except OSError as error:
            meaning = self.meaning(error)
            if meaning is error:
                raise
            raise meaning from error
