"""Objects of the user's own code, named as `module:attribute`, as servers name apps."""

import contextlib
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..store import UploadStore

_MODULE_AND_ATTRIBUTE = re.compile(r"\w+(?:\.\w+)*(?::\w+(?:\.\w+)*)?")


def import_object(spec: str, kind: str, default: str) -> Any:
    """Import `module:attribute`, or the `default` attribute of `module`. Raises `SettingsError` if that fails.

    Modules are searched in the current directory first. What they print goes to standard error.
    """
    if not _MODULE_AND_ATTRIBUTE.fullmatch(spec):
        raise SettingsError(f"{spec!r} names no {kind}; name it as module:attribute")
    module, _, attribute = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with _reporting(f"the {kind} {spec!r} cannot be imported"), contextlib.redirect_stdout(sys.stderr):
        found = import_module(module)
        for part in (attribute or default).split("."):
            found = getattr(found, part)
    return found


def import_store(spec: str) -> UploadStore:
    """Import an `UploadStore`, or a function that makes one. Raises `SettingsError` if it is none."""
    found = import_object(spec, "store", "uploads")
    if callable(found):
        with _reporting(f"{spec!r} makes no store"), contextlib.redirect_stdout(sys.stderr):
            found = found()
    if not isinstance(found, UploadStore):
        if hasattr(found, "close") and hasattr(found, "__await__"):
            found.close()  # of an async function: it is not awaited
        raise SettingsError(
            f"{spec!r} is of type {type(found).__name__}; name an UploadStore, or a function that makes one"
        )
    return found


@contextlib.contextmanager
def _reporting(what: str) -> Any:
    """Raise `SettingsError` for whatever the user's code raises."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise SettingsError(f"{what}: {type(error).__name__}: {error}; name it as module:attribute") from error
