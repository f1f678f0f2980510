"""What an operator asks first about a store: each answer is one line, with what to do if it is not fine."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

from ..bulk.disk_files import ENTRIES_AT_ONCE, find_records, sort_entries
from ..bulk.survey import survey
from ..bulk.verify import NAMES_AT_ONCE
from ..disk.exclusions import Exclusions
from ..disk.listing import Entry, Listing, walk
from ..disk.mark import MARK
from ..disk.mount_points import file_system_of
from ..distribution import DISTRIBUTION
from ..errors import DatabaseUnavailable, SelfHealError
from ..sql.schema import SCHEMA_VERSION
from ..store import UploadStore
from .options import refuse_missing_database
from .summary import counted, human_size

OK, NOTE, WRONG, UNREACHABLE = "ok", "note", "wrong", "unreachable"
CLOCKS_DIFFER = 5.0  # seconds from which on the clocks of database and node count as different
ALMOST_FULL = 50_000_000  # bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question; `names` are the files that it is about."""

    check: str
    level: str
    text: str
    names: tuple[str, ...] = ()


Answer = tuple[str, str] | tuple[str, str, tuple[str, ...]]


async def examine(store: UploadStore) -> AsyncGenerator[Finding, None]:
    """Yield the answers to all questions; those to a database that gives no answer are left out."""
    is_reached = True
    for title, check, asks_database in CHECKS:
        if asks_database and not is_reached:
            continue
        try:
            yield Finding(title, *await check(store))
        except DatabaseUnavailable as error:
            is_reached = False
            where = store.database.where
            yield Finding(title, UNREACHABLE, str(error) if where in str(error) else f"{where}: {error}")
        except (SelfHealError, OSError) as error:
            yield Finding(title, WRONG, str(error))


async def _versions(_store: UploadStore) -> Answer:
    parts = (DISTRIBUTION, "starlette", "sqlalchemy", "aiosqlite", "asyncpg", "uvicorn")
    there = [(part, version) for part in parts if (version := _version(part))]
    return OK, ", ".join(f"{part} {version}" for part, version in (*there, ("Python", platform.python_version())))


async def _installation(_store: UploadStore) -> Answer:
    if _version("selfheal") is None:
        return OK, "no other distribution has files in the package `selfheal`"
    ways_out = f"`pip uninstall -y selfheal`, then `pip install --force-reinstall --no-deps {DISTRIBUTION}`"
    return WRONG, f"another project called `selfheal` is installed over this one: {ways_out}"


async def _database(store: UploadStore) -> Answer:
    refuse_missing_database(store)
    version, names = await store.database.version(), await store.database.count()
    return OK, f"{store.database.where}; {version}; {counted(names, 'name')}, tables of version {SCHEMA_VERSION}"


async def _clock(store: UploadStore) -> Answer:
    asked = datetime.now(UTC)
    ahead = (await store.database.changes.now() - asked).total_seconds()
    if abs(ahead) < CLOCKS_DIFFER:
        return OK, "the database's is that of this machine"
    side = "ahead of" if ahead > 0 else "behind"
    why = "set both by NTP, for times decide which side is newer"
    return WRONG, f"the database's is {abs(ahead):,.0f} s {side} that of this machine; {why}"


async def _directory(store: UploadStore) -> Answer:
    path = store.disk.path
    if not path.is_dir():
        return NOTE, f"{path} is not there: `selfheal restore` makes it, or is another --directory meant?"
    if not os.access(path, os.W_OK | os.X_OK):
        why = (
            f"user {os.geteuid()} may not write there, so missing files are served from the database; `chown` mends it"
        )
        return WRONG, f"{path}: {why}"
    if not store.disk.is_marked():
        return WRONG, f"{path} lacks its marker file, so nothing is written there: is its mount lost?"
    mark = path / MARK
    if not mark.exists():
        return NOTE, f"{path} has no mark: no server has opened it yet"
    return OK, f"{path}, in use since {datetime.fromtimestamp(mark.stat().st_mtime, UTC):%Y-%m-%d %H:%M:%S} UTC"


async def _disk(store: UploadStore) -> Answer:
    place = next(path for path in (store.disk.path, *store.disk.path.parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    text = f"{file_system_of(place) or 'file system not known'}, {human_size(free)} free"
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return WRONG, f"{text}; it is read-only, so missing files are served from the database; mount it `rw`"
    if free < ALMOST_FULL:
        return WRONG, f"{text}; it is almost full, and missing files will be served from the database; make room"
    root = await store.threads.run(store.disk.root)
    if root is not None and root.minds_case is False:
        return NOTE, f"{text}; it ignores case: of names that differ in case only, one has a file"
    return OK, text


async def _quarantine(store: UploadStore) -> Answer:
    errors = list[OSError]()
    found = await store.threads.run(store.disk.quarantined, 0.0, errors)
    if errors and not found:
        raise errors[0]
    if not found:
        return OK, f"empty ({store.disk.quarantine_path})"
    text = f"{counted(len(found), 'file')} that the database does not have; a running server stores what it can"
    return WRONG, text, tuple(str(path) for _, path in found)


async def _temporary(store: UploadStore) -> Answer:
    count = await store.threads.run(store.disk.temporary_files)
    return (
        (NOTE, f"{count:,}, of running processes; the next start removes those of dead ones") if count else (OK, "none")
    )


async def _missing_on_disk(store: UploadStore) -> Answer:
    listing, nothing, count = Listing(store.disk), Exclusions(()), 0
    async with aclosing(store.database.catalogue.key_ranges(NAMES_AT_ONCE)) as key_ranges:
        async for key_range in key_ranges:
            wanted = await store.database.catalogue.names_in(key_range)
            count += len((await store.threads.run(survey, listing, wanted, nothing)).missing)
    if not count:
        return OK, "every name has its file"
    return NOTE, f"{counted(count, 'missing file')}: each comes back at its first request, all with `selfheal restore`"


async def _missing_in_database(store: UploadStore) -> Answer:
    entries, nothing = walk(store.disk), Exclusions(())
    unknown = deleted = 0
    while batch := await store.threads.run(_next, entries):
        known = await find_records(store, batch)
        for entry in sort_entries(batch, known, store.exclusions, nothing)[0]:
            record = known.records.get(entry.name)
            unknown += record is None
            deleted += record is not None and record.is_deleted
    if unknown:
        return WRONG, f"{counted(unknown, 'file')} not in the database; `selfheal migrate` stores what is missing there"
    if deleted:
        return NOTE, f"{counted(deleted, 'file')} of deleted names; `selfheal restore` removes what was deleted"
    return OK, "every file is in the database"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _next(entries: Iterator[Entry]) -> list[Entry]:
    return list(islice(entries, ENTRIES_AT_ONCE))


CHECKS: tuple[tuple[str, Callable[[UploadStore], Awaitable[Answer]], bool], ...] = (
    ("versions", _versions, False),
    ("installation", _installation, False),
    ("database", _database, True),
    ("clock", _clock, True),
    ("directory", _directory, False),
    ("disk", _disk, False),
    ("quarantine", _quarantine, False),
    ("temporary files", _temporary, False),
    ("files on disk", _missing_on_disk, True),
    ("files in the database", _missing_in_database, True),
)
