"""The command `selfheal`. Exit: 0 all is well, 1 some file is wrong, 2 bad usage, 3 no database, 130 stopped."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import select
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from datetime import timedelta
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

import click

from .. import bulk, names
from ..bulk.outcomes import Result
from ..bulk.process_pool import Workers
from ..content.sources import CHUNK
from ..disk.syscalls import keep_freed_memory
from ..errors import DatabaseUnavailable, InvalidName, MissingExtra, NotStored, SelfHealError, SettingsError
from ..settings import Settings
from ..sql.models import Record, Version
from ..store import UploadStore
from .common import (
    F,
    common,
    missing_file,
    refuse_missing_database,
    run_on,
    run_with,
    settings_of,
    store_of,
    workers_for,
)
from .reporting import (
    Report,
    answer,
    has_progress,
    megabytes,
    moment,
    plain,
    printable,
    progress,
    show,
    tell,
)

JOBS = click.IntRange(1, 64)
DAYS = click.IntRange(0, 36_500)
GENERATION = click.IntRange(1, 2**63 - 1)
HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


def run(command: str | None = None) -> None:
    """Run the command line, or one of its commands under the name of its module; never returns."""
    gc.freeze()  # what was imported stays: looking through it again and again took a tenth of a large run
    gc.enable()
    sys.setswitchinterval(0.0001)  # those who read, hash and write take turns; a third of the time of a large run
    chosen: click.Command = selfheal if command is None else selfheal.commands[command]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a terminal that was opened to be read as well cannot be changed
            cast(TextIOWrapper, stream).reconfigure(
                errors="backslashreplace"
            )  # a name that this terminal cannot show ends no run
    try:
        code = chosen.main(standalone_mode=False, **HELP)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        code = _complain(f"{error.format_message().rstrip('.')}; see --help", 2)
    except (SettingsError, MissingExtra, InvalidName) as error:
        code = _complain(error, 2)
    except DatabaseUnavailable as error:
        code = _complain(error, 3)
    except (SelfHealError, OSError) as error:
        code = _complain(error, 1)
    except (click.Abort, KeyboardInterrupt):
        code = 130
    sys.exit(code or 0)


def _complain(error: object, code: int) -> int:
    click.echo(f"selfheal: {' '.join(str(error).splitlines())}", err=True)
    return code


@click.group(no_args_is_help=False)
@click.version_option(package_name="selfheal")
def selfheal() -> None:
    """Uploads live on disk and in the database; each side brings the other back."""


def _bulk(function: F) -> F:
    for option in (
        click.option("--jobs", type=JOBS, default=4, show_default=True, metavar="N", help="How many files at once."),
        click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing on either side."),
    ):
        function = option(function)
    return common(function)


# -- the bulk runs --------------------------------------------------------------------------------------------------


@selfheal.command()
@click.option("--prefer", type=click.Choice(["disk"]), help="Where the two sides differ, take the disk's bytes.")
@_bulk
def migrate(settings: Settings, *, prefer: str | None, dry_run: bool, jobs: int, **output: bool) -> int:
    """Make the tables, and bring the files on disk into the database.

    What the database knows already is compared, and mended from the disk where it is damaged.
    """
    if not settings.directory.is_dir():
        raise SettingsError(f"there is no directory {settings.directory} to migrate from; name it with --directory")
    if dry_run and missing_file(settings):
        settings = settings.override(database="sqlite+aiosqlite:///:memory:")
    return _run_bulk(
        settings,
        Report("migrate", dry_run),
        partial(bulk.migrate, prefer_disk=prefer == "disk", dry_run=dry_run),
        jobs,
        **output,
    )


@selfheal.command()
@click.option(
    "--drill", is_flag=True, help="Also restore everything into a directory that is thrown away, and compare."
)
@_bulk
def verify(settings: Settings, *, drill: bool, dry_run: bool, jobs: int, **output: bool) -> int:
    """Is everything backed up, and can it be brought back? Reads every byte on both sides and changes nothing."""
    report = Report("verify", dry_run)
    return _run_bulk(settings, report, partial(bulk.verify, drill=drill), jobs, **output)


@selfheal.command()
@click.option("--verify", "compare", is_flag=True, help="Also hash what is on disk, and heal what differs.")
@_bulk
def restore(settings: Settings, *, compare: bool, dry_run: bool, jobs: int, **output: bool) -> int:
    """Bring back every file that is missing on disk. Run it in deploys."""
    return _run_bulk(
        settings,
        Report("restore", dry_run),
        partial(bulk.restore, verify=compare, dry_run=dry_run),
        jobs,
        **output,
    )


def _run_bulk(
    settings: Settings,
    report: Report,
    start: Callable[..., AsyncGenerator[Result, None]],
    jobs: int,
    *,
    as_json: bool,
    quiet: bool,
) -> int:
    click.get_current_context().obj = report  # whatever ends the run, what it did is told
    may_change = report.command != "verify" and not report.dry_run

    async def work(store: UploadStore, workers: Workers | None) -> None:
        if may_change:
            await store.open()
        total = await store.database.count() if report.command != "migrate" and has_progress(quiet=quiet) else None
        with progress(report.command, total, quiet=quiet) as draw:
            async with aclosing(start(store, jobs=jobs, workers=workers)) as results:
                await tell(results, report, draw)

    if report.command != "migrate":
        refuse_missing_database(settings)
    keep_freed_memory()  # a twelfth of a large run
    store = store_of(settings)
    with workers_for(store, jobs) as workers:
        run_on(store, lambda store: work(store, workers))
    show(report, as_json=as_json, quiet=quiet)
    return 0 if report.ok else 1


# -- one name -------------------------------------------------------------------------------------------------------


@selfheal.command()
@click.argument("name")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@common
def save(settings: Settings, name: str, file: str, *, as_json: bool, quiet: bool) -> int:
    """Save FILE (- is standard input) under NAME, on both sides."""
    names.check(name)
    refuse_missing_database(settings)

    async def work(store: UploadStore) -> Record:
        return await store.save(name, _standard_input() if file == "-" else Path(file))

    record = run_with(settings, work)
    answer({"command": "save", "ok": True, **plain(record)}, f"saved {name}: {megabytes(record.size)}", as_json, quiet)
    return 0


@selfheal.command()
@click.argument("given", metavar="NAME...", nargs=-1, required=True)
@common
def delete(settings: Settings, given: tuple[str, ...], *, as_json: bool, quiet: bool) -> int:
    """Delete names on both sides; nothing brings them back but a new save, or undo."""
    for name in given:
        names.check(name)
    refuse_missing_database(settings)

    async def work(store: UploadStore) -> dict[str, bool]:
        return {name: await store.delete(name) for name in given}

    done = run_with(settings, work)
    deleted = [name for name in done if done[name]]
    missing = [name for name in done if not done[name]]
    text = "\n".join(f"deleted {name}" for name in deleted)
    answer({"command": "delete", "ok": not missing, "deleted": deleted, "missing": missing}, text, as_json, quiet)
    for name in missing:
        click.echo(f"no such name: {name}", err=True)
    return 1 if missing else 0


@selfheal.command("list")
@click.option("--deleted", is_flag=True, help="List the deleted names instead.")
@common
def list_names(settings: Settings, *, deleted: bool, as_json: bool, quiet: bool) -> int:
    """List what the database holds: size in bytes, time of last modification, name."""
    refuse_missing_database(settings)
    found: list[dict[str, Any]] = []

    async def work(store: UploadStore) -> None:
        async with aclosing(store.database.pages(deleted=deleted)) as pages:
            async for page in pages:
                for record in page:
                    if as_json:
                        found.append(plain(record))
                    elif not quiet:
                        click.echo(f"{record.size:>12}  {moment(record.modified_ns)}  {printable(record.name)}")

    run_with(settings, work)
    if as_json:
        click.echo(json.dumps({"command": "list", "ok": True, "names": found}))
    return 0


@selfheal.command()
@click.argument("name")
@common
def history(settings: Settings, name: str, *, as_json: bool, quiet: bool) -> int:
    """List what NAME was before each overwrite and deletion, newest first."""
    names.check(name)
    refuse_missing_database(settings)

    async def work(store: UploadStore) -> tuple[Record | None, list[Version]]:
        return await store.database.find(name), await store.database.history(name)

    record, versions = run_with(settings, work)
    if record is None:
        raise NotStored(f"{name!r} is not in the database")
    state = "deleted" if record.is_deleted else f"{record.size} bytes"
    lines = [f"{record.generation:>5}  {record.changed_at:%Y-%m-%d %H:%M:%S}  now: {state}"]
    lines += [
        f"{one.generation:>5}  {one.replaced_at:%Y-%m-%d %H:%M:%S}  until then: {one.size} bytes" for one in versions
    ]
    said = {"command": "history", "ok": True, "now": plain(record), "versions": [plain(one) for one in versions]}
    answer(said, "\n".join(lines), as_json, quiet)
    return 0


@selfheal.command()
@click.argument("name")
@click.option("--generation", type=GENERATION, metavar="N", help="Go back to this generation (see history).")
@common
def undo(settings: Settings, name: str, *, generation: int | None, as_json: bool, quiet: bool) -> int:
    """Undo NAME's last overwrite or deletion."""
    names.check(name)
    refuse_missing_database(settings)

    async def work(store: UploadStore) -> Record:
        return await store.undo(name, generation)

    record = run_with(settings, work)
    text = f"{name} is back: {megabytes(record.size)}, generation {record.generation}"
    answer({"command": "undo", "ok": True, **plain(record)}, text, as_json, quiet)
    return 0


@selfheal.command()
@click.option("--keep-days", type=DAYS, default=30, show_default=True, metavar="N", help="History to keep.")
@click.option("--dry-run", is_flag=True, help="Say what would be dropped, and drop nothing.")
@common
def purge(settings: Settings, *, keep_days: int, dry_run: bool, as_json: bool, quiet: bool) -> int:
    """Drop history older than --keep-days, and the bytes that nothing refers to any more."""
    refuse_missing_database(settings)

    async def work(store: UploadStore) -> Any:
        return await store.database.purge(timedelta(days=keep_days), dry_run=dry_run)

    gone = run_with(settings, work)
    mode = "would drop" if dry_run else "dropped"
    text = f"{mode} {gone.versions} old versions and {gone.blobs} blobs, {megabytes(gone.size)}"
    said = {"command": "purge", "ok": True, "versions": gone.versions, "blobs": gone.blobs, "bytes": gone.size}
    answer(said | ({"dry_run": True} if dry_run else {}), text, as_json, quiet)
    return 0


@selfheal.command()
@click.argument("app", metavar="[MODULE:APP]", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port to listen on.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Server processes.")
@click.option("--prefix", metavar="PATH", help="The URL path of the uploads. [env: SELFHEAL_PREFIX]")
@click.option("--directory", metavar="DIR", help="The uploads directory. [env: SELFHEAL_DIRECTORY]")
@click.option("--database", metavar="URL", help="The database. [env: SELFHEAL_DATABASE_URL, DATABASE_URL]")
def serve(
    app: str | None,
    host: str,
    port: int,
    workers: int,
    prefix: str | None,
    directory: str | None,
    database: str | None,
) -> int:
    """Serve an ASGI app with its uploads healed; without an app, the uploads alone."""
    from .serving import serve as run_server  # noqa: PLC0415 - uvicorn is an extra

    settings = settings_of(directory=directory, database=database, prefix=prefix)
    run_server(settings, app, host=host, port=port, workers=workers)
    return 0


async def _standard_input() -> AsyncIterator[bytes]:
    """What comes on standard input; whoever waits for it can be interrupted."""
    fd = sys.stdin.fileno()
    while True:
        ready, _, _ = await asyncio.to_thread(select.select, [fd], [], [], 0.2)
        if ready:
            piece = await asyncio.to_thread(os.read, fd, CHUNK)
            if not piece:
                return
            yield piece
