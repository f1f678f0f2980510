"""Options of every command, the settings that they make, and a store to work with."""

import asyncio
import os
import threading
from collections import ChainMap
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import names
from ..aio.tasks import run_to_end
from ..aio.threads import THREAD_NAME
from ..bulk.process_pool import ProcessPool, available_cpus
from ..errors import DatabaseUnavailable, SelfHealError, SettingsError
from ..settings import DATABASE_FROM, Settings
from ..sql.backends import shown, url_of
from ..store import UploadStore
from .imports import import_store
from .reporting import Output, show_failure, show_stop

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
VARIABLES = {
    "directory": "SELFHEAL_DIRECTORY",
    "database": "SELFHEAL_DATABASE_URL",
    "table_prefix": "SELFHEAL_TABLE_PREFIX",
    "schema": "SELFHEAL_SCHEMA",
    "prefix": "SELFHEAL_PREFIX",
}


def example(line: str) -> str:
    """Return the end of a command's help."""
    return f"\b\nExample:\n  {line}"


def common(function: F) -> F:
    """Add the options of every command; its `store`, not open yet, is made of them and of the environment."""

    @wraps(function)
    def with_store(app: str | None, **rest: Any) -> Any:
        flags = {flag: rest.pop(flag) for flag in VARIABLES if flag in rest}
        try:
            store = store_of(settings_of(**flags)) if app is None else store_of_app(app, **flags)
            return function(store=store, **rest)
        except KeyboardInterrupt as stop:
            show_stop(as_json=rest["as_json"], quiet=rest["quiet"])
            raise click.exceptions.Exit(130) from stop
        except (SelfHealError, OSError) as error:
            show_failure(str(error), as_json=rest["as_json"], quiet=rest["quiet"])
            raise

    for option in (
        click.option("--quiet", is_flag=True, help="Print no progress and no summary; errors go to standard error."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output, and no more."),
    ):
        with_store = option(with_store)
    app = click.option("--app", metavar="MODULE:STORE", help="The app's own UploadStore, or a function that makes one.")
    return where(app(with_store))  # type: ignore[return-value]


def where(function: F) -> F:
    """Add the options that say where disk and database are."""
    for option in (
        click.option(
            "--schema",
            metavar="NAME",
            help="The tables' schema (PostgreSQL only). Default: the database's own. [env: SELFHEAL_SCHEMA]",
        ),
        click.option(
            "--table-prefix",
            metavar="TEXT",
            help="The start of the names of the tables. Default: none. [env: SELFHEAL_TABLE_PREFIX]",
        ),
        click.option(
            "--database",
            metavar="URL",
            help="The database. Default: sqlite:///selfheal.db. [env: SELFHEAL_DATABASE_URL, DATABASE_URL]",
        ),
        click.option(
            "--directory",
            metavar="DIR",
            help="The uploads directory. Default: app/static/uploads. [env: SELFHEAL_DIRECTORY]",
        ),
    ):
        function = option(function)
    return function


def settings_of(**flags: str | None) -> Settings:
    """Return the settings: from the given flags, else from the environment. Raises `SettingsError`."""
    for flag, value in flags.items():
        if value is not None and not value.strip():
            raise SettingsError(f"--{flag.replace('_', '-')} is empty; was it a variable that is not set?")
    given = {VARIABLES[flag]: value for flag, value in flags.items() if value is not None}
    given |= {DATABASE_FROM: "--database"} if flags.get("database") else {}
    settings = Settings.from_env(ChainMap(given, os.environ))
    if settings.is_in_memory:
        raise SettingsError("a database in memory ends with the command and keeps nothing; name a file or a server")
    return settings


def on_store(function: Callable[..., Coroutine[Any, Any, int]]) -> Callable[..., int]:
    """Make a command of an async function: of a store, an `Output`, and the command's own arguments."""

    @wraps(function)
    def command(store: UploadStore, *, as_json: bool, quiet: bool, **arguments: Any) -> int:
        for name in arguments.get("given", [arguments["name"]] if "name" in arguments else ()):
            names.check(name)
        refuse_missing_database(store)
        return run_on(store, lambda store: function(store, Output(as_json, quiet), **arguments))

    return common(command)


def run_on(store: UploadStore, work: Callable[[UploadStore], Coroutine[Any, Any, T]]) -> T:
    """Run `work` on a store, and close the store."""
    before = set(threading.enumerate())

    async def and_close() -> T:
        try:
            return await work(_settled(store))
        finally:
            await run_to_end(_close(store, before))

    return asyncio.run(and_close())


def _settled(store: UploadStore) -> UploadStore:
    """Let a store live on the running loop: a command works with its inside."""
    store.home.settle()
    return store


async def _close(store: UploadStore, before: set[threading.Thread]) -> None:
    """Wait for the drivers' threads: one that calls a closed loop costs the user a traceback."""
    await store.close()
    if store.database.app_engine is not None:
        await store.database.app_engine.dispose()
    for _ in range(1000):
        started = set(threading.enumerate()) - before
        if all(thread.name.startswith(THREAD_NAME) for thread in started):  # ours call no loop after the close
            return
        await asyncio.sleep(0.001)


def store_of(settings: Settings) -> UploadStore:
    """Make a store, not open yet; a command waits longer for the database than a server."""
    return UploadStore.from_settings(settings, deadline=60.0, make_directory=False)


def store_of_app(
    app: str,
    *,
    directory: str | None,
    database: str | None,
    table_prefix: str | None = None,
    schema: str | None = None,
) -> UploadStore:
    """Import the store of an app. Raises `SettingsError` if a flag contradicts it, or it could not be a setting."""
    store = import_store(app)
    url = store.database.url
    Settings(store.disk.path, url.render_as_string(hide_password=False))
    if directory is not None and Path(directory).resolve() != store.disk.path.resolve():
        raise SettingsError(
            f"--directory is {directory!r}, but the store of --app has {store.disk.path}; leave one out"
        )
    if database is not None and url_of(database) != url:
        raise SettingsError(f"--database is another one than {shown(url)}, which the store of --app has; leave one out")
    if table_prefix is not None or schema is not None:
        raise SettingsError("the store of --app has its own tables; leave out --table-prefix and --schema")
    return store


def process_pool_for(store: UploadStore, jobs: int) -> AbstractContextManager[ProcessPool | None]:
    """Make a pool of at most one process more than there are processors; None if one is enough."""
    count = min(jobs, available_cpus() + 1)
    has_threads = threading.active_count() > 1  # of the app's: a fork copies their locks, but not them
    if has_threads or available_cpus() == 1 or count == 1 or store.database.backend.is_in_memory(store.database.url):
        return nullcontext()
    count = store.database.share_connections(count + 1) - 1  # this process has some as well
    return ProcessPool(lambda: _settled(store), count) if count > 1 else nullcontext()


def refuse_missing_database(store: UploadStore) -> None:
    """Raise `DatabaseUnavailable` if the SQLite file is missing: only `migrate` makes one."""
    if missing_file(store) is not None:
        raise DatabaseUnavailable(
            f"there is no database {store.database.where}; name yours with --database, or `selfheal migrate` makes it"
        )


def missing_file(store: UploadStore) -> Path | None:
    """Return the path of the SQLite file if it is missing; SQLite itself would make it."""
    file = store.database.backend.file(store.database.url)
    return None if file is None or file.exists() else file
