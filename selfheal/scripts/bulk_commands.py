"""The three bulk runs as commands: migrate, verify, restore."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

import click

from .. import bulk
from ..bulk.outcomes import Outcome, Result
from ..bulk.process_pool import Executor
from ..db import ImageStorage
from ..disk.syscalls import keep_freed_memory
from ..errors import SchemaError, SettingsError
from ..store import UploadStore
from .options import F, common, example, missing_file, process_pool_for, refuse_missing_database, run_on
from .reporting import Report, has_progress, progress, show
from .summary import is_directory_right

JOBS = click.IntRange(1, 64)


def _bulk(function: F) -> F:
    for option in (
        click.option(
            "--exclude",
            metavar="GLOB",
            multiple=True,
            help="Leave these names alone, such as '*.tmp'; can be given several times.",
        ),
        click.option("--jobs", type=JOBS, default=4, show_default=True, metavar="N", help="Number of files at a time."),
        click.option("--dry-run", is_flag=True, help="Report what would be done; change nothing."),
    ):
        function = option(function)
    return common(function)


@click.command(epilog=example("selfheal migrate --directory app/static/uploads --database sqlite:///app.db"))
@click.option(
    "--prefer",
    type=click.Choice(["disk"]),
    help="If disk and database differ, take the bytes on disk. Default: report it and change nothing.",
)
@_bulk
def migrate(store: UploadStore, *, prefer: str | None, dry_run: bool, **rest: Any) -> int:
    """Create the tables and store the files on disk in the database.

    Names that are already recorded are compared; damaged bytes in the database are repaired from the disk.
    """
    if not store.disk.path.is_dir():
        raise SettingsError(
            f"there is no directory {store.disk.path} to migrate from; name it with --directory, or make it"
        )
    if dry_run and missing_file(store):
        store.database = ImageStorage("sqlite+aiosqlite:///:memory:")  # to open the file would make it
    start = partial(bulk.migrate, prefer_disk=prefer == "disk", dry_run=dry_run)
    return _run_bulk(store, Report("migrate", dry_run), start, **rest)


@click.command(epilog=example("selfheal verify --drill --database sqlite:///app.db"))
@click.option("--drill", is_flag=True, help="Also restore everything into a temporary directory, and compare.")
@_bulk
def verify(store: UploadStore, *, drill: bool, dry_run: bool, **rest: Any) -> int:
    """Check that every file is backed up and can be restored.

    Reads every byte on disk and in the database; changes nothing.
    """
    refuse_missing_database(store)
    return _run_bulk(store, Report("verify", dry_run), partial(bulk.verify, drill=drill), **rest)


@click.command(epilog=example("selfheal restore --quiet --database sqlite:///app.db"))
@click.option("--verify", "compare", is_flag=True, help="Also hash the files on disk, and replace those that differ.")
@_bulk
def restore(store: UploadStore, *, compare: bool, dry_run: bool, **rest: Any) -> int:
    """Restore every file that is missing on disk. Run it in deploys."""
    refuse_missing_database(store)
    start = partial(bulk.restore, verify=compare, dry_run=dry_run)
    return _run_bulk(store, Report("restore", dry_run), start, **rest)


COMMANDS = (migrate, verify, restore)


async def _question(store: UploadStore, report: Report) -> str:
    """Return a question for people if `migrate` or `verify` found no upload on disk, but the database has some."""
    missing = report.counts[Outcome.MISSING_ON_DISK]
    if report.command == "restore" or report.examined > missing:
        return ""
    recorded = missing
    if report.command == "migrate":
        with suppress(SchemaError):  # a dry run before the first one
            recorded = await store.database.count()
    directory = store.disk.path
    return is_directory_right(str(directory), exists=directory.is_dir(), recorded=recorded) if recorded else ""


def _run_bulk(
    store: UploadStore,
    report: Report,
    start: Callable[..., AsyncGenerator[Result, None]],
    *,
    exclude: tuple[str, ...],
    jobs: int,
    as_json: bool,
    quiet: bool,
) -> int:
    click.get_current_context().obj = report  # printed also if the run fails
    may_change = report.command != "verify" and not report.dry_run

    async def work(store: UploadStore, executor: Executor | None) -> None:
        if may_change:
            await store.open()
        is_known = report.command != "migrate" and has_progress(quiet=quiet)
        total = await store.database.catalogue.total() if is_known else None
        with progress(report.command, total, quiet=quiet) as draw:
            async with aclosing(start(store, exclude=exclude, jobs=jobs, executor=executor)) as results:
                async for result in results:
                    report.add(result)
                    draw(result)
        report.question = await _question(store, report)

    keep_freed_memory()  # a twelfth of a large run
    with process_pool_for(store, jobs) as executor:
        run_on(store, lambda store: work(store, executor))
    show(report, as_json=as_json, quiet=quiet)
    return 0 if report.ok else 1
