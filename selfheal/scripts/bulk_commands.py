"""The three bulk runs as commands: migrate, verify, restore."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import click

from .. import bulk
from ..bulk.outcomes import Result
from ..bulk.process_pool import Executor
from ..disk.syscalls import keep_freed_memory
from ..errors import SettingsError
from ..settings import Settings
from ..store import UploadStore
from .options import F, common, missing_file, process_pool_for, refuse_missing_database, run_on, store_of
from .reporting import Report, has_progress, progress, show

JOBS = click.IntRange(1, 64)


def _bulk(function: F) -> F:
    for option in (
        click.option("--jobs", type=JOBS, default=4, show_default=True, metavar="N", help="Number of files at a time."),
        click.option("--dry-run", is_flag=True, help="Report what would be done; change nothing."),
    ):
        function = option(function)
    return common(function)


@click.command()
@click.option("--prefer", type=click.Choice(["disk"]), help="If disk and database differ, take the bytes on disk.")
@_bulk
def migrate(settings: Settings, *, prefer: str | None, dry_run: bool, jobs: int, **output: bool) -> int:
    """Create the tables and store the files on disk in the database.

    Names that are already recorded are compared; damaged bytes in the database are repaired from the disk.
    """
    if not settings.directory.is_dir():
        raise SettingsError(f"there is no directory {settings.directory} to migrate from; name it with --directory")
    if dry_run and missing_file(settings):
        settings = replace(settings, database="sqlite+aiosqlite:///:memory:")
    start = partial(bulk.migrate, prefer_disk=prefer == "disk", dry_run=dry_run)
    return _run_bulk(settings, Report("migrate", dry_run), start, jobs, **output)


@click.command()
@click.option("--drill", is_flag=True, help="Also restore everything into a temporary directory, and compare.")
@_bulk
def verify(settings: Settings, *, drill: bool, dry_run: bool, jobs: int, **output: bool) -> int:
    """Check that every file is stored in the database and can be restored.

    Reads every byte on disk and in the database; changes nothing.
    """
    return _run_bulk(settings, Report("verify", dry_run), partial(bulk.verify, drill=drill), jobs, **output)


@click.command()
@click.option("--verify", "compare", is_flag=True, help="Also hash the files on disk, and replace those that differ.")
@_bulk
def restore(settings: Settings, *, compare: bool, dry_run: bool, jobs: int, **output: bool) -> int:
    """Restore every file that is missing on disk. Run it in deploys."""
    start = partial(bulk.restore, verify=compare, dry_run=dry_run)
    return _run_bulk(settings, Report("restore", dry_run), start, jobs, **output)


COMMANDS = (migrate, verify, restore)


def _run_bulk(
    settings: Settings,
    report: Report,
    start: Callable[..., AsyncGenerator[Result, None]],
    jobs: int,
    *,
    as_json: bool,
    quiet: bool,
) -> int:
    click.get_current_context().obj = report  # printed also if the run fails
    may_change = report.command != "verify" and not report.dry_run

    async def work(store: UploadStore, executor: Executor | None) -> None:
        if may_change:
            await store.open()
        total = await store.database.count() if report.command != "migrate" and has_progress(quiet=quiet) else None
        with progress(report.command, total, quiet=quiet) as draw:
            async with aclosing(start(store, jobs=jobs, executor=executor)) as results:
                async for result in results:
                    report.add(result)
                    draw(result)

    if report.command != "migrate":
        refuse_missing_database(settings)
    keep_freed_memory()  # a twelfth of a large run
    store = store_of(settings)
    with process_pool_for(store, jobs) as executor:
        run_on(store, lambda store: work(store, executor))
    show(report, as_json=as_json, quiet=quiet)
    return 0 if report.ok else 1
