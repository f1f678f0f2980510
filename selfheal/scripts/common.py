"""What every command shares: its flags, the settings that they make, and a store to work with."""

from __future__ import annotations

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

from ..aio.single_flight import to_its_end
from ..bulk.process_pool import Processes, processors
from ..errors import DatabaseUnavailable, SelfHealError, SettingsError
from ..settings import Settings, database_url, is_in_memory, sqlite_file
from ..store import UploadStore
from .reporting import show_failure

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
VARIABLES = {
    "directory": "SELFHEAL_DIRECTORY",
    "database": "SELFHEAL_DATABASE_URL",
    "prefix": "SELFHEAL_PREFIX",
}


def common(function: F) -> F:
    """The flags of every command; `settings` is what they and the environment say."""

    @wraps(function)
    def with_settings(directory: str | None, database: str | None, **rest: Any) -> Any:
        try:
            return function(settings=settings_of(directory=directory, database=database), **rest)
        except (SelfHealError, OSError, KeyboardInterrupt) as error:
            show_failure(str(error) or "stopped by the user", as_json=rest["as_json"], quiet=rest["quiet"])
            raise

    for option in (
        click.option("--quiet", is_flag=True, help="No progress and no summary; errors still on standard error."),
        click.option("--json", "as_json", is_flag=True, help="Standard output is one JSON object and nothing else."),
        click.option("--database", metavar="URL", help="The database. [env: SELFHEAL_DATABASE_URL, DATABASE_URL]"),
        click.option("--directory", metavar="DIR", help="The uploads directory. [env: SELFHEAL_DIRECTORY]"),
    ):
        with_settings = option(with_settings)
    return with_settings  # type: ignore[return-value]


def settings_of(**flags: str | None) -> Settings:
    """What the flags say, and the environment where they are silent."""
    for flag, value in flags.items():
        if value is not None and not value.strip():
            raise SettingsError(f"--{flag} is empty; was it a variable that is not set?")
    given = {VARIABLES[flag]: value for flag, value in flags.items() if value is not None}
    return Settings.from_env(ChainMap(given, os.environ))


def run_with(settings: Settings, work: Callable[[UploadStore], Coroutine[Any, Any, T]]) -> T:
    """Run `work` over a store of its own."""
    return run_on(store_of(settings), work)


def run_on(store: UploadStore, work: Callable[[UploadStore], Coroutine[Any, Any, T]]) -> T:
    """Run `work` over a store, and close that."""

    async def and_close() -> T:
        try:
            return await work(store)
        finally:
            await to_its_end(_close(store))

    return asyncio.run(and_close())


async def _close(store: UploadStore) -> None:
    await store.close()
    await _no_driver_threads()


async def _no_driver_threads() -> None:
    """aiosqlite tells a loop from a thread that a connection which could not be opened has ended, and nobody waits for
    it: a loop that is closed by then costs the user a traceback. A second is enough, unless a file system hangs.
    """
    for _ in range(1000):
        if not any("_connection_worker_thread" in thread.name for thread in threading.enumerate()):
            return
        await asyncio.sleep(0.001)


def store_of(settings: Settings) -> UploadStore:
    """A store that is not open yet; a command gives the database more patience than a server may."""
    return UploadStore(settings.directory, settings.database, deadline=60.0)


def workers_for(store: UploadStore, jobs: int) -> AbstractContextManager[Processes | None]:
    """As many processes as there are files at once and processors, and one more, for while others wait for the disk;
    None if one does it all. Each has this store, which must not be open yet.
    """
    count = min(jobs, processors() + 1)
    if processors() == 1 or count == 1 or is_in_memory(store.database.url):
        return nullcontext()
    return Processes(lambda: store, count)


def refuse_missing_database(settings: Settings) -> None:
    """Raise `DatabaseUnavailable` if the SQLite file is not there: only `migrate` makes one."""
    file = missing_file(settings)
    if file is not None:
        raise DatabaseUnavailable(f"there is no database {file}; `selfheal migrate` makes it")


def missing_file(settings: Settings) -> Path | None:
    """The SQLite file, if there is none yet; asking SQLite itself would make it."""
    file = sqlite_file(database_url(settings.database))
    return None if file is None or file.exists() else file
