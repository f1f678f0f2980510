"""Commands for single names, and for the history: save, delete, list, history, undo, purge."""

import asyncio
import json
import os
import select
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from ..content.sources import CHUNK
from ..errors import NotStored
from ..store import UploadStore
from .options import example, on_store
from .reporting import Output, moment, plain, printable
from .summary import human_size

DAYS = click.IntRange(0, 36_500)
GENERATION = click.IntRange(1, 10**9)


@click.command(epilog=example("selfheal save cats/tom.jpg tom.jpg"))
@click.argument("name")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@on_store
async def save(store: UploadStore, output: Output, name: str, file: str) -> int:
    """Save FILE (- for standard input) as NAME, on disk and in the database."""
    record = await store.save(name, _standard_input() if file == "-" else Path(file))
    output.answer(f"saved {name}: {human_size(record.size)}", **plain(record))
    return 0


@click.command(epilog=example("selfheal delete cats/tom.jpg"))
@click.argument("given", metavar="NAME...", nargs=-1, required=True)
@on_store
async def delete(store: UploadStore, output: Output, given: tuple[str, ...]) -> int:
    """Delete names on disk and in the database. Only a new save or undo brings them back."""
    done = {name: await store.delete(name) for name in given}
    deleted = [name for name in done if done[name]]
    missing = [name for name in done if not done[name]]
    text = "\n".join(f"deleted {name}" for name in deleted)
    output.answer(text, ok=not missing, deleted=deleted, missing=missing)
    for name in missing:
        click.echo(f"no such name: {name}", err=True)
    return 1 if missing else 0


@click.command("list", epilog=example("selfheal list --deleted"))
@click.option("--deleted", is_flag=True, help="List the deleted names instead.")
@on_store
async def list_names(store: UploadStore, output: Output, *, deleted: bool) -> int:
    """List the recorded names: size in bytes, time of last modification (UTC), name."""
    found: list[dict[str, Any]] = []
    async with aclosing(store.database.pages(deleted=deleted)) as pages:
        async for page in pages:
            for record in page:
                if output.as_json:
                    found.append(plain(record))
                elif not output.quiet:
                    click.echo(f"{record.size:>12}  {moment(record.modified_ns)}  {printable(record.name)}")
    if output.as_json:
        click.echo(json.dumps({"command": "list", "ok": True, "names": found}))
    return 0


@click.command(epilog=example("selfheal history cats/tom.jpg"))
@click.argument("name")
@on_store
async def history(store: UploadStore, output: Output, name: str) -> int:
    """List the earlier versions of NAME, newest first, with the times (UTC) of the changes."""
    record, versions = await store.database.find(name), await store.database.history(name)
    if record is None:
        raise NotStored(f"{name!r} is not in the database")
    state = "deleted" if record.is_deleted else f"{record.size} bytes"
    row = "{:>5}  {:%Y-%m-%d %H:%M:%S}  {}".format
    lines = [row(record.generation, record.changed_at, f"now: {state}")]
    for one in versions:
        why = f"set aside ({one.reason})" if one.reason else "until then"
        lines.append(row(one.generation, one.replaced_at, f"{why}: {one.size} bytes"))
    output.answer("\n".join(lines), now=plain(record), versions=[plain(one) for one in versions])
    return 0


@click.command(epilog=example("selfheal undo cats/tom.jpg"))
@click.argument("name")
@click.option(
    "--generation", type=GENERATION, metavar="N", help="Restore this generation (see history). Default: the last one."
)
@on_store
async def undo(store: UploadStore, output: Output, name: str, *, generation: int | None) -> int:
    """Undo the last overwrite or deletion of NAME."""
    record = await store.undo(name, generation)
    output.answer(f"{name} is back: {human_size(record.size)}, generation {record.generation}", **plain(record))
    return 0


@click.command(epilog=example("selfheal purge --keep-days 90 --dry-run"))
@click.option("--keep-days", type=DAYS, default=30, show_default=True, metavar="N", help="Days of history to keep.")
@click.option("--dry-run", is_flag=True, help="Report what would be dropped; drop nothing.")
@click.option("--vacuum", is_flag=True, help="Also rewrite a SQLite file, without its free space.")
@on_store
async def purge(store: UploadStore, output: Output, *, keep_days: int, dry_run: bool, vacuum: bool) -> int:
    """Drop versions older than --keep-days, and bytes that nothing refers to. Gives the space back to the disk."""
    if vacuum:
        store.database.backend.check_vacuum()
    gone, freed = await store.database.purge(timedelta(days=keep_days), dry_run=dry_run), 0
    if vacuum and not dry_run:
        freed = await store.database.vacuum()
    freed += gone.freed
    mode = "would drop" if dry_run else "dropped"
    text = f"{mode} {gone.versions} old versions and {gone.blobs} blobs, {human_size(gone.size)}"
    text += f"; the database is {human_size(freed)} smaller" if freed else ""
    mark = {"dry_run": True} if dry_run else {}
    output.answer(text, versions=gone.versions, blobs=gone.blobs, bytes=gone.size, freed=freed, **mark)
    return 0


COMMANDS = (save, delete, list_names, history, undo, purge)


async def _standard_input() -> AsyncIterator[bytes]:
    """Yield standard input; the wait for it can be interrupted."""
    fd = sys.stdin.fileno()
    while True:
        ready, _, _ = await asyncio.to_thread(select.select, [fd], [], [], 0.2)
        if ready:
            piece = await asyncio.to_thread(os.read, fd, CHUNK)
            if not piece:
                return
            yield piece
