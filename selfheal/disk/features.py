"""What a disk can do. Odd ones refuse modes, times, links or syncs: files are published without, and it is logged."""

import errno
import os
from collections.abc import Callable
from typing import ParamSpec

from ..events import logger
from .kept_times import KeptTimes

P = ParamSpec("P")

NOT_SUPPORTED = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""Errors of a disk that lacks a feature; SMB, FAT, FUSE and sandboxes answer with different ones."""


class DiskFeatures:
    """What the disk below `path` refused so far, and how exactly it keeps times."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.times = KeptTimes()
        self._path = path
        self._lacks: set[str] = set()

    def attempt(self, what: str, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Call `work`; return False if the disk lacks it. Any other `OSError` (EIO, ENOSPC, EROFS) is raised."""
        try:
            work(*args, **kwargs)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            self.note(what, error)
            return False
        return True

    def note(self, what: str, error: OSError) -> None:
        """Remember that the disk lacks something; it is logged once."""
        if what not in self._lacks:
            self._lacks.add(what)
            why = error.strerror or error
            logger.warning("%s: the disk cannot %s (%s); files are published all the same", self._path, what, why)

    def lacks(self, what: str) -> bool:
        """Whether that was noted."""
        return what in self._lacks
