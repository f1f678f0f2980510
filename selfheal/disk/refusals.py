"""Disks that take no file: what errors of writing mean, and a pause before the next try."""

import contextlib
import errno
import math
import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from ..errors import DiskUnwritable

REFUSED_FOR = 30.0  # seconds without any write after the disk refused one for a lasting reason

REMEMBERED = 1024  # folders, the last ones

_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_LASTING = (errno.EROFS, errno.EACCES, errno.EPERM)


class Refusals:
    """What the folders below `path` refused, and when. A read-only file system refuses it in all of its folders."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: OrderedDict[str | None, tuple[str, float]] = OrderedDict()

    def check(self, folder: str) -> None:
        """Raise `DiskUnwritable` if a folder gave a lasting reason less than `REFUSED_FOR` seconds ago."""
        for place in (None, folder) if self._last else ():
            why, since = self._last.get(place, ("", -math.inf))
            if time.monotonic() - since < REFUSED_FOR:
                raise DiskUnwritable(why)

    def meaning(self, error: OSError, name: str | None = None) -> OSError | DiskUnwritable:
        """Return `DiskUnwritable`, or the error itself if the process lacks descriptors or memory.

        `name` is the file that was to be written; without it, a lasting reason stops all writes.
        """
        if error.errno in _OUT_OF_RESOURCES:
            return error
        folder = None if name is None else name.rpartition("/")[0]
        if error.errno == errno.EROFS and folder is not None and self._is_on_root(folder):
            folder = None
        why = f"{self._path / (folder or '')} takes no file: {error.strerror or error}"
        if error.errno in _LASTING:
            self._remember(folder, why)
        return DiskUnwritable(why)

    @contextlib.contextmanager
    def raised(self, name: str | None = None) -> Iterator[None]:
        """Raise the meaning of an `OSError` in its place."""
        try:
            yield
        except OSError as error:
            meaning = self.meaning(error, name)
            if meaning is error:
                raise
            raise meaning from error

    def _remember(self, place: str | None, why: str) -> None:
        self._last.pop(place, None)
        if len(self._last) >= REMEMBERED:
            self._last.popitem(last=False)
        self._last[place] = (why, time.monotonic())

    def _is_on_root(self, folder: str) -> bool:
        """Whether a folder is on the file system of the root; so is one that cannot be looked at."""
        try:
            return os.stat(self._path / folder).st_dev == os.stat(self._path).st_dev
        except OSError:
            return True
