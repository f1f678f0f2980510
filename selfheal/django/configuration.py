"""The store of a storage's options and of Django's settings: one for each configuration in a process."""

import os
import threading
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from django.conf import settings
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from sqlalchemy.engine import URL

from ..errors import SettingsError
from ..settings import Settings
from ..store import UploadStore

_CHOOSE = "name one in OPTIONS['database'] of the storage, or in SELFHEAL_DATABASE_URL"
_SQLITE = ("django.db.backends.sqlite3", "django.contrib.gis.db.backends.spatialite")
_POSTGRESQL = ("django.db.backends.postgresql", "django.contrib.gis.db.backends.postgis")
_DJANGOS_OWN = ("cursor_factory", "isolation_level", "pool", "prepare_threshold", "server_side_binding")
_IN_MEMORY = "sqlite+aiosqlite://"

_stores: list[tuple[tuple[dict[str, Any], int], UploadStore]] = []
_lock = threading.RLock()


def store_for(options: Mapping[str, Any], base_url: str) -> UploadStore:
    """Return the store of a storage's options; the settings have what they lack. Raises `ImproperlyConfigured`.

    While Django runs tests (only then is there a `mail.outbox`) the database is by default in memory: a connection to
    Django's test database would not let it be dropped.
    """
    prefix = unquote(urlsplit(base_url).path).rstrip("/")
    wanted = dict(options) | ({"prefix": prefix} if prefix else {})
    wanted["directory"] = os.path.abspath(wanted.get("directory") or settings.MEDIA_ROOT or _no_directory())
    url = wanted.get("database") or os.environ.get("SELFHEAL_DATABASE_URL")
    wanted["database"] = str(url or (_IN_MEMORY if hasattr(mail, "outbox") else derived_url(settings.DATABASES)))
    process = os.getpid() if wanted["database"] == _IN_MEMORY else 0  # a fork has no part in memory of its parent's
    with _lock:
        for known, store in _stores:
            if known == (wanted, process):
                return store
        store = _make_store(**wanted)
        _stores.append(((wanted, process), store))
        return store


def derived_url(databases: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the URL of selfheal's database for Django's `DATABASES`. Raises `ImproperlyConfigured` if none is clear.

    PostgreSQL: the same database. SQLite: a file of its own beside Django's, for SQLite has one writer at a time, and
    what is saved inside `transaction.atomic()` (in the admin, always) would wait for that very transaction.
    """
    database = databases.get("default", {})
    engine, name = database.get("ENGINE", ""), str(database.get("NAME") or "")
    if engine in _POSTGRESQL and name:
        return _postgresql_url(database, name)
    if engine not in _SQLITE or not name:
        raise ImproperlyConfigured(f"DATABASES['default'] ({engine or 'empty'}) is no database for selfheal: {_CHOOSE}")
    if ":memory:" in name or "mode=memory" in name:
        return _IN_MEMORY
    path = Path(name).absolute()
    return _rendered(URL.create("sqlite+aiosqlite", database=f"{path.with_suffix('')}-selfheal{path.suffix}"))


def sqlite_file(store: UploadStore) -> Path | None:
    """Return the path of a store's SQLite file, links resolved; None if it is on a server or in memory."""
    file = store.database.backend.file(store.database.url)
    return None if file is None else file.resolve()


def _make_store(
    directory: str,
    database: str,
    *,
    table_prefix: str | None = None,
    schema: str | None = None,
    pool_size: int | None = None,
    **more: Any,
) -> UploadStore:
    given = {"DIRECTORY": directory, "DATABASE_URL": database}
    given |= {"TABLE_PREFIX": table_prefix or "", "SCHEMA": schema or "", "POOL_SIZE": str(pool_size or "")}
    variables = {f"SELFHEAL_{key}": value for key, value in given.items() if value}
    try:
        checked = Settings.from_env(ChainMap(variables, os.environ))
        more = {"settled_after": checked.settled_after, "pool_size": checked.pool_size} | more
        tables: dict[str, Any] = {"table_prefix": checked.table_prefix, "schema": checked.schema}
        store = UploadStore(checked.directory, checked.database, **tables, **more)
    except (SettingsError, TypeError) as error:
        raise ImproperlyConfigured(f"the storage of uploads: {error}") from error
    if checked.is_in_memory:
        store.sync.database.create_tables()  # nothing else can
    return store


def _postgresql_url(database: Mapping[str, Any], name: str) -> str:
    host, port = str(database.get("HOST") or ""), str(database.get("PORT") or "")
    options = {key: value for key, value in (database.get("OPTIONS") or {}).items() if key not in _DJANGOS_OWN}
    if "," in host or not {"service", "assume_role"}.isdisjoint(options):
        raise ImproperlyConfigured(f"DATABASES['default'] has more than a URL can say: {_CHOOSE}")
    query = {key: str(value) for key, value in options.items()} | ({"host": host} if host.startswith("/") else {})
    url = URL.create(
        "postgresql+asyncpg",
        username=database.get("USER") or None,
        password=database.get("PASSWORD") or None,
        host=None if "host" in query else host or None,
        port=int(port) if port else None,
        database=name,
        query=query,
    )
    return _rendered(url)


def _rendered(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def _no_directory() -> str:
    raise ImproperlyConfigured("the storage of uploads needs a directory: set MEDIA_ROOT, or OPTIONS['directory']")


def _close_stores(*, setting: str, **_: Any) -> None:
    """Tests change settings: the next store may have the same tables for another directory."""
    if setting in {"DATABASES", "MEDIA_ROOT", "STORAGES"}:
        with _lock:
            while _stores:
                _stores.pop()[1].sync.close()


setting_changed.connect(_close_stores)
