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
from ..settings import Settings
from ..store import UploadStore
from .reporting import Output, show_failure

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
VARIABLES = {"directory": "SELFHEAL_DIRECTORY", "database": "SELFHEAL_DATABASE_URL", "prefix": "SELFHEAL_PREFIX"}


def common(function: F) -> F:
    """Add the options of every command; its `settings` are made of them and of the environment."""

    @wraps(function)
    def with_settings(directory: str | None, database: str | None, **rest: Any) -> Any:
        try:
            return function(settings=settings_of(directory=directory, database=database), **rest)
        except (SelfHealError, OSError, KeyboardInterrupt) as error:
            show_failure(str(error) or "stopped by the user", as_json=rest["as_json"], quiet=rest["quiet"])
            raise

    for option in (
        click.option("--quiet", is_flag=True, help="Print no progress and no summary; errors go to standard error."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output, and no more."),
        click.option("--database", metavar="URL", help="The database. [env: SELFHEAL_DATABASE_URL, DATABASE_URL]"),
        click.option("--directory", metavar="DIR", help="The uploads directory. [env: SELFHEAL_DIRECTORY]"),
    ):
        with_settings = option(with_settings)
    return with_settings  # type: ignore[return-value]


def settings_of(**flags: str | None) -> Settings:
    """Return the settings: from the given flags, else from the environment."""
    for flag, value in flags.items():
        if value is not None and not value.strip():
            raise SettingsError(f"--{flag} is empty; was it a variable that is not set?")
    given = {VARIABLES[flag]: value for flag, value in flags.items() if value is not None}
    return Settings.from_env(ChainMap(given, os.environ))


def on_store(function: Callable[..., Coroutine[Any, Any, int]]) -> Callable[..., int]:
    """Make a command of an async function: of a store, an `Output`, and the command's own arguments."""

    @wraps(function)
    def command(settings: Settings, *, as_json: bool, quiet: bool, **arguments: Any) -> int:
        for name in arguments.get("given", [arguments["name"]] if "name" in arguments else ()):
            names.check(name)
        refuse_missing_database(settings)
        return run_on(store_of(settings), lambda store: function(store, Output(as_json, quiet), **arguments))

    return common(command)


def run_on(store: UploadStore, work: Callable[[UploadStore], Coroutine[Any, Any, T]]) -> T:
    """Run `work` on a store, and close the store."""
    before = set(threading.enumerate())

    async def and_close() -> T:
        try:
            return await work(store)
        finally:
            await run_to_end(_close(store, before))

    return asyncio.run(and_close())


async def _close(store: UploadStore, before: set[threading.Thread]) -> None:
    """Wait for the drivers' threads: one that calls a closed loop costs the user a traceback."""
    await store.close()
    for _ in range(1000):
        started = set(threading.enumerate()) - before
        if all(thread.name.startswith(THREAD_NAME) for thread in started):  # ours call no loop after the close
            return
        await asyncio.sleep(0.001)


def store_of(settings: Settings) -> UploadStore:
    """Make a store, not open yet; a command waits longer for the database than a server."""
    return UploadStore(settings.directory, settings.database, deadline=60.0)


def process_pool_for(store: UploadStore, jobs: int) -> AbstractContextManager[ProcessPool | None]:
    """Make a pool of at most one process more than there are processors; None if one is enough."""
    count = min(jobs, available_cpus() + 1)
    if available_cpus() == 1 or count == 1 or store.database.backend.is_in_memory(store.database.url):
        return nullcontext()
    return ProcessPool(lambda: store, count)


def refuse_missing_database(settings: Settings) -> None:
    """Raise `DatabaseUnavailable` if the SQLite file is missing: only `migrate` makes one."""
    file = missing_file(settings)
    if file is not None:
        raise DatabaseUnavailable(f"there is no database {file}; `selfheal migrate` makes it")


def missing_file(settings: Settings) -> Path | None:
    """Return the path of the SQLite file if it is missing; SQLite itself would make it."""
    file = settings.database_file
    return None if file is None or file.exists() else file
