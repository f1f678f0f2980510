"""The databases that selfheal works with; the URL of each, as hosts and apps write it."""

import re

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine

from ..errors import SettingsError
from .backend import Backend
from .postgresql import PostgreSQL
from .sqlite import SQLite

BACKENDS: tuple[Backend, ...] = (SQLite(), PostgreSQL())


def database_url(url: str) -> URL:
    """Return the URL that SQLAlchemy takes for one as hosts write it (`postgres://…`). Raises `SettingsError`."""
    quoted = _quote_at_signs(url)
    try:
        parsed = make_url(quoted)
    except (ArgumentError, ValueError) as error:
        raise SettingsError("the database URL cannot be read; write it as sqlite+aiosqlite:///app.db") from error
    for backend in BACKENDS:
        if parsed.drivername in backend.drivernames:
            return backend.url(parsed)
    supported = ", ".join(backend.drivernames[-1] for backend in BACKENDS)
    raise SettingsError(f"the database {parsed.drivername!r} is not supported; use one of {supported}")


def _quote_at_signs(url: str) -> str:
    """Quote each `@` of a password that is written as it is: the last one before a path or parameters ends it.

    Raises `SettingsError` if one comes after those: it can be of the password, or of them.
    """
    scheme, separator, rest = url.partition("://")
    if rest.startswith("/"):  # a file's path
        return url
    start, _, end = rest.partition("@")
    host = re.split("[/?]", end, maxsplit=1)[0]
    if "@" in end[len(host) :].partition("=")[0]:
        raise SettingsError("the database URL can be read in two ways; write each @ of the password as %40")
    password, at, _ = host.rpartition("@")
    quoted = f"{start}@{password}".replace("@", "%40")
    return f"{scheme}{separator}{quoted}@{end[len(password) + 1 :]}" if at else url


def url_of(database: str | URL | AsyncEngine) -> URL:
    """Return the URL of a database as the driver understands it. Raises `SettingsError`."""
    if isinstance(database, AsyncEngine):
        return database.url
    return database_url(database if isinstance(database, str) else database.render_as_string(hide_password=False))


def shown(url: URL) -> str:
    """Return the database of a URL, for messages: a file's path, or a server's address without the password."""
    backend = backend_of(url)
    address = {key: url.query[key] for key in ("host", "port") if key in url.query}
    file = backend.file(url)
    return url.set(drivername=backend.name, query=address).render_as_string() if file is None else str(file)


def backend_of(url: URL) -> Backend:
    """Return the backend for the URL of an engine. Raises `SettingsError`."""
    for backend in BACKENDS:
        if backend.name == url.get_backend_name():
            return backend
    raise SettingsError(f"the database {url.get_backend_name()!r} is not supported")
