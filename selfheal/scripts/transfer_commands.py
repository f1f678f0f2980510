"""Commands that move everything: import and export."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import click

from .. import bulk
from ..bulk.archives import open_archive
from ..bulk.export_targets import DryRun, target_of
from ..bulk.import_archive import ArchiveSource
from ..bulk.import_database import DatabaseSource
from ..bulk.import_table import TableSource
from ..bulk.importer import ImportSource
from ..bulk.outcomes import Result
from ..db import ImageStorage
from ..errors import SettingsError
from ..sql.foreign_table import ForeignColumns, ForeignTable
from ..sql.table_names import database_of
from ..store import UploadStore
from .options import common, example, missing_file, refuse_missing_database, run_on
from .reporting import Report, progress, show

TIMEOUT = 60.0  # seconds for each statement in the database that is read
Start = Callable[[UploadStore], AsyncGenerator[Result, None]]


@click.command("import", epilog=example("selfheal import --table pictures --name filename --data image_data"))
@click.argument("archive", metavar="[DIR|FILE.tar]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--from",
    "url",
    metavar="URL",
    help="Another database; with --table, the one that has the table. Default: the same database.",
)
@click.option(
    "--from-table-prefix", default="", metavar="TEXT", help="The start of the names of the tables there. Default: none."
)
@click.option(
    "--from-schema", metavar="NAME", help="The tables' schema there (PostgreSQL only). Default: the database's own."
)
@click.option("--table", metavar="NAME", help="A table of another app, with one upload in each row. Default: none.")
@click.option("--name", metavar="COLUMN", help="The column of --table with names, paths or URLs. Default: none.")
@click.option("--data", metavar="COLUMN", help="The column of --table with bytes. Default: none.")
@click.option(
    "--type", "kind", metavar="COLUMN", help="The column of --table with content types. Default: by the names."
)
@click.option(
    "--where", metavar="SQL", help="Take only rows of --table that meet this condition, used as it is. Default: all."
)
@click.option("--dry-run", is_flag=True, help="Report what would be done; change nothing.")
@common
def import_(
    store: UploadStore, *, archive: Path | None, url: str | None, dry_run: bool, as_json: bool, quiet: bool, **rest: Any
) -> int:
    """Copy uploads into the database: from an export, another database, or a table of another app.

    The disk is not touched: a file appears there at its first request, or with `selfheal restore`.
    """
    opened = _source(store, archive, url, **rest)
    if dry_run and missing_file(store):
        store.database = ImageStorage("sqlite+aiosqlite:///:memory:")  # to open the file would make it

    async def start(store: UploadStore) -> AsyncGenerator[Result, None]:
        async with opened as source, aclosing(bulk.import_all(store.database, source, dry_run=dry_run)) as results:
            async for result in results:
                yield result

    return _run(store, Report("import", dry_run), start, as_json=as_json, quiet=quiet)


@click.command(epilog=example("selfheal export backup.tar --database sqlite:///app.db"))
@click.argument("to", metavar="DIR|FILE.tar", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Read everything; write nothing.")
@common
def export(store: UploadStore, *, to: Path, dry_run: bool, as_json: bool, quiet: bool) -> int:
    """Write everything in the database to a directory or a tar file.

    The files have their names and times. A manifest beside them has the records, deletions and history.
    """
    refuse_missing_database(store)
    target = target_of(to.absolute())

    def start(store: UploadStore) -> AsyncGenerator[Result, None]:
        return bulk.export(store.database, DryRun(target) if dry_run else target)

    return _run(store, Report("export", dry_run), start, as_json=as_json, quiet=quiet)


COMMANDS = (import_, export)


def _source(
    store: UploadStore,
    archive: Path | None,
    url: str | None,
    *,
    from_table_prefix: str,
    from_schema: str | None,
    table: str | None,
    name: str | None,
    data: str | None,
    kind: str | None,
    where: str | None,
) -> contextlib.AbstractAsyncContextManager[ImportSource]:
    """Return the source that the flags name. Raises `SettingsError` if they name none, or two."""
    if table is not None:
        if name is None or data is None:
            raise SettingsError("--table needs --name and --data: the columns of the names and of the bytes")
        if archive is not None:
            raise SettingsError("there are two sources: name a directory or tar file, or --table")
        if from_table_prefix:
            raise SettingsError("--from-table-prefix belongs to --from without --table; name the table as it is called")
        return _open_table(store, url, ForeignColumns(table, name, data, kind, where, from_schema))
    if any(one is not None for one in (name, data, kind, where)):
        raise SettingsError("--name, --data, --type and --where belong to --table; name the table too")
    if (archive is None) == (url is None):
        raise SettingsError("name one source: a directory or tar file, --from URL, or --table")
    if url is None:
        if from_table_prefix or from_schema is not None:
            raise SettingsError("--from-table-prefix and --from-schema belong to --from URL; files have neither")
        path, file = archive or Path(), store.database.backend.file(store.database.url)
        if file is not None and file.resolve().is_relative_to(path.resolve()):
            raise SettingsError(f"the database {file} is in {path}: it would be an upload; name another directory")
        return _open_archive(store, path)
    return _open_database(store, url, from_table_prefix, from_schema)


@contextlib.asynccontextmanager
async def _open_table(store: UploadStore, url: str | None, columns: ForeignColumns) -> AsyncIterator[ImportSource]:
    url = store.database.url.render_as_string(hide_password=False) if url is None else url
    table = ForeignTable(url, columns, timeout=TIMEOUT)
    try:
        yield TableSource(table, store.database, store.threads)
    finally:
        await table.close()


@contextlib.asynccontextmanager
async def _open_archive(store: UploadStore, path: Path) -> AsyncIterator[ImportSource]:
    archive = await store.threads.run(open_archive, path)
    try:
        yield ArchiveSource(archive, store.threads)
    finally:
        await store.threads.run(archive.close)


@contextlib.asynccontextmanager
async def _open_database(store: UploadStore, url: str, prefix: str, schema: str | None) -> AsyncIterator[ImportSource]:
    database = ImageStorage(url, table_prefix=prefix, schema=schema, timeout=TIMEOUT)
    try:
        there, here = ((*database_of(one.url), one.tables.records.fullname) for one in (database, store.database))
        if there == here:
            raise SettingsError("--from is the database that is imported into; name another one, or other tables of it")
        yield DatabaseSource(database)
    finally:
        await database.close()


def _run(store: UploadStore, report: Report, start: Start, *, as_json: bool, quiet: bool) -> int:
    click.get_current_context().obj = report  # printed also if the run fails

    async def work(store: UploadStore) -> None:
        with progress(report.command, None, quiet=quiet) as draw:
            async with aclosing(start(store)) as results:
                async for result in results:
                    report.add(result)
                    draw(result)

    run_on(store, work)
    show(report, as_json=as_json, quiet=quiet)
    return 0 if report.ok else 1
