"""`selfheal serve`: uvicorn around an app and its uploads."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from ..errors import MissingExtra, SelfHealError, SettingsError
from ..middleware import SelfHealMiddleware
from ..settings import Settings, database_url, is_in_memory

_APP = "SELFHEAL_SERVE_APP"
_MODULE_AND_APP = re.compile(r"\w+(?:\.\w+)*(?::\w+(?:\.\w+)*)?")


def serve(settings: Settings, app: str | None, *, host: str, port: int, workers: int) -> None:
    """Serve until stopped. Raises `SettingsError` if an app cannot be imported or workers cannot share the database,
    and `SelfHealError` if the server does not start.
    """
    try:
        import uvicorn  # noqa: PLC0415 - an extra, imported where it is used
    except ImportError as error:
        raise MissingExtra("server", "uvicorn") from error
    if workers > 1 and is_in_memory(database_url(settings.database)):
        raise SettingsError("a database in memory cannot be shared by several workers; name a file or a server")
    hand_over(settings, app)
    sys.path.insert(0, str(Path.cwd()))
    load(app)
    try:
        uvicorn.run(
            "selfheal.scripts.serving:make_app",
            factory=True,
            host=host,
            port=port,
            workers=workers if workers > 1 else None,
            access_log=False,
        )
    except SystemExit as stop:
        raise SelfHealError("the server did not start; what it said is above") from stop
    if workers == 1:
        raise KeyboardInterrupt  # uvicorn returns after one; after a SIGTERM it lets that end the process


def hand_over(settings: Settings, app: str | None) -> None:
    """Worker processes are new interpreters: what they are to serve reaches them through the environment."""
    os.environ.update(
        SELFHEAL_DIRECTORY=str(settings.directory),
        SELFHEAL_DATABASE_URL=settings.database,
        SELFHEAL_PREFIX=settings.prefix,
        **{_APP: app or ""},
    )


def make_app() -> SelfHealMiddleware:
    """What each worker serves."""
    return SelfHealMiddleware(load(os.environ.get(_APP) or None))


def load(app: str | None) -> Any:
    """The ASGI app `module:attribute`; without one, an app that has nothing. Raises `SettingsError`."""
    if app is None:
        return Starlette()
    if not _MODULE_AND_APP.fullmatch(app):
        raise SettingsError(f"{app!r} names no app; name it as module:attribute")
    module, _, attribute = app.partition(":")
    try:
        found = import_module(module)
        for part in (attribute or "app").split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"the app {app!r} cannot be imported: {error}; name it as module:attribute") from error
    if not callable(found):
        raise SettingsError(f"{app!r} is a {type(found).__name__}, not an ASGI app; name it as module:attribute")
    return found
