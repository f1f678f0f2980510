"""Stand-ins for system calls that fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any


def fails(code: int) -> Callable[..., Any]:
    """Return a function that takes any arguments and raises the `OSError` of an errno."""

    def fail(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


no_unnamed_files = fails(errno.EOPNOTSUPP)
"""Replaces `syscalls.open_unnamed`: a file system without O_TMPFILE."""
