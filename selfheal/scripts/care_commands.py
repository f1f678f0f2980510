"""Commands that look after a store: stats, doctor."""

from contextlib import aclosing
from dataclasses import asdict
from datetime import timedelta

import click

from .. import names
from ..disk.listing import walk
from ..store import UploadStore
from .doctor import UNREACHABLE, WRONG, Finding, examine
from .name_commands import DAYS
from .options import common, example, on_store, run_on
from .reporting import Output, printable
from .summary import counted, human_size


@click.command(epilog=example("selfheal stats --database sqlite:///app.db"))
@click.option("--keep-days", type=DAYS, default=30, show_default=True, metavar="N", help="As in purge.")
@on_store
async def stats(store: UploadStore, output: Output, *, keep_days: int) -> int:
    """Show how much disk and database hold, what is saved, and what purge would free."""
    found = await store.database.statistics(timedelta(days=keep_days))
    files, size = await store.threads.run(_files, store)
    versions, purgeable = (counted(one, "version") for one in (found.versions, found.purgeable_versions))
    lines = (
        ("disk", f"{counted(files, 'file')}, {human_size(size)} ({store.disk.path})"),
        ("database", f"{counted(found.names, 'name')}, {human_size(found.size)} ({store.database.where})"),
        ("history", f"{versions}, {human_size(found.version_size)}; {counted(found.deleted, 'deleted name')}"),
        ("stored", f"{counted(found.blobs, 'different content')}, {human_size(found.stored)}"),
        ("saved", f"{human_size(found.saved)}, because equal bytes are stored once"),
        ("on disk", f"{human_size(found.file_bytes)} of the database, {human_size(found.free_bytes)} of them free"),
        ("purge", f"would drop {purgeable} and free {human_size(found.purgeable_size)}"),
    )
    disk = {"files": files, "bytes": size}
    output.answer("\n".join(f"{name:<10}{text}" for name, text in lines), disk=disk, database=asdict(found))
    return 0


@click.command(epilog=example("selfheal doctor --database sqlite:///app.db"))
@common
def doctor(store: UploadStore, *, as_json: bool, quiet: bool) -> int:
    """Look at database, disk and installation, and say for each what is fine, what is not, and what to do."""
    findings = run_on(store, _examine)
    wrong = [one for one in findings if one.level in (WRONG, UNREACHABLE)]
    lines = "\n".join(_line(one) for one in (wrong if quiet else findings))
    if as_json:
        Output(as_json, quiet).answer("", ok=not wrong, checks=[asdict(one) for one in findings])
    elif lines:
        click.echo(lines, err=quiet)
    return 3 if any(one.level == UNREACHABLE for one in wrong) else 1 if wrong else 0


COMMANDS = (stats, doctor)


async def _examine(store: UploadStore) -> list[Finding]:
    async with aclosing(examine(store)) as findings:
        return [one async for one in findings]


def _line(finding: Finding) -> str:
    return "\n    ".join((f"{finding.level:<12}{finding.check}: {finding.text}", *map(printable, finding.names)))


def _files(store: UploadStore) -> tuple[int, int]:
    """Return the number of files on disk that can be uploads, and their bytes."""
    sizes = [
        entry.size
        for entry in walk(store.disk)
        if not entry.fault and names.is_valid(entry.name) and not store.exclusions.covers(entry.name)
    ]
    return len(sizes), sum(sizes)
