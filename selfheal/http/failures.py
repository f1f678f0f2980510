"""Failures: the status of the answer when a file could not be opened or restored, and what is reported of it."""

import errno
import logging

from ..errors import CorruptBlob, DatabaseUnavailable, DiskUnwritable, NotAFile, SchemaError
from ..events import Events, Kind

FAILURES = (DatabaseUnavailable, DiskUnwritable, CorruptBlob, NotAFile, OSError)
"""What opening a name raises."""
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def status_of(error: Exception, name: str, events: Events) -> int | None:
    """Report one of `FAILURES`, and return its status; None if the wrapped app answers."""
    if isinstance(error, NotAFile):
        return None
    if isinstance(error, CorruptBlob):
        return 500
    if isinstance(error, OSError):
        events.emit(Kind.UNREADABLE, name, detail=str(error))
        events.log_once(logging.ERROR, f"errno {error.errno}", f"{name!r} cannot be read: {error}")
        return 503 if error.errno in _OUT_OF_RESOURCES else 500
    level = logging.CRITICAL if isinstance(error, SchemaError) else logging.WARNING
    events.log_once(level, type(error).__name__, str(error))
    events.emit(Kind.UNKNOWN, name, detail=str(error))
    return 503
