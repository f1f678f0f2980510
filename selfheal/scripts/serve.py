"""`selfheal serve`: uvicorn around an app and its uploads."""

import os
from typing import Any

from starlette.applications import Starlette

from ..errors import MissingExtra, SelfHealError, SettingsError
from ..middleware import SelfHealMiddleware
from ..settings import Settings
from .imports import import_object

_APP = "SELFHEAL_SERVE_APP"
_MAKE_APP = "selfheal.scripts.serve:make_app"


def serve(settings: Settings, app: str | None, *, host: str, port: int, workers: int) -> None:
    """Serve until stopped. Raises `SettingsError`, or `SelfHealError` if the server does not start."""
    try:
        import uvicorn  # noqa: PLC0415 - an extra, imported where it is used
    except ImportError as error:
        raise MissingExtra("server", "uvicorn") from error
    export(settings, app)
    load(app)
    processes = workers if workers > 1 else None
    try:
        uvicorn.run(_MAKE_APP, factory=True, host=host, port=port, workers=processes, access_log=False)
    except SystemExit as stop:
        raise SelfHealError("the server did not start; what it said is above") from stop
    if workers == 1:
        raise KeyboardInterrupt  # uvicorn returns after SIGINT; SIGTERM ends the process


def export(settings: Settings, app: str | None) -> None:
    """Put the settings into the environment: worker processes are new interpreters and read them there."""
    os.environ.update(
        SELFHEAL_DIRECTORY=str(settings.directory),
        SELFHEAL_DATABASE_URL=settings.database,
        SELFHEAL_PREFIX=settings.prefix,
        SELFHEAL_TABLE_PREFIX=settings.table_prefix,
        SELFHEAL_SCHEMA=settings.schema or "",
        SELFHEAL_DATABASE_FROM=settings.database_from,
        SELFHEAL_POOL_SIZE=str(settings.pool_size),
        **{_APP: app or ""},
    )


def make_app() -> SelfHealMiddleware:
    """Make the app of a worker, from the environment."""
    return SelfHealMiddleware(load(os.environ.get(_APP) or None))


def load(app: str | None) -> Any:
    """Import the ASGI app `module:attribute`; without one, return an empty app. Raises `SettingsError`."""
    if app is None:
        return Starlette()
    found = import_object(app, "app", "app")
    if not callable(found):
        raise SettingsError(f"{app!r} is a {type(found).__name__}, not an ASGI app; name it as module:attribute")
    return found
