"""The bytes that a store has for a name: on disk, in quarantine and in the database."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

from selfheal import UploadStore
from selfheal.disk.quarantine import QUARANTINE
from tests.support.disk_files import MARKS, paths_below


def files_below(directory: Path) -> list[str]:
    """Return the relative path of every file below a directory, temporary files included, but not the disk's mark."""
    files = (path for path in paths_below(directory) if not path.is_dir() and not path.name.startswith(MARKS))
    return [str(file.relative_to(directory)) for file in files]


async def set_aside(store: UploadStore, name: str) -> list[bytes]:
    """Return the bytes of every copy that was set aside as a version of a name, oldest first."""
    versions = [version for version in await store.database.history(name) if version.reason]
    return [b"".join([chunk async for chunk in store.database.read(version)]) for version in reversed(versions)]


def on_disk(store: UploadStore, name: str) -> bytes | None:
    """Return the bytes of a name's file, or None if there is no file."""
    path = store.disk.path_of(name)
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def in_quarantine(store: UploadStore) -> list[bytes]:
    """Return the bytes of every file that was moved to the quarantine, or to the one below the uploads."""
    return [path.read_bytes() for _, path in store.disk.quarantined(0.0)]


async def drain_quarantine(store: UploadStore) -> list[Path]:
    """Drain the quarantine as a running server does some time after the last change; return what stays in it."""
    places = (store.disk.quarantine_path, store.disk.path / QUARANTINE)
    for place in places:
        for moved in place.glob("*"):
            os.utime(moved, (0, 0))
    await store.background.copies.drain()
    return [path for place in places for path in (place, *paths_below(place)) if os.path.lexists(path)]


async def in_database(store: UploadStore, name: str) -> bytes | None:
    """Return the bytes of a name's record, or None if it has none or is deleted."""
    record = await store.database.find(name)
    if record is None or record.is_deleted:
        return None
    data = b"".join([chunk async for chunk in store.database.read(record)])
    assert sha256(data).hexdigest() == record.sha256
    return data


async def on_disk_and_in_database(store: UploadStore, name: str) -> bytes | None:
    """Return a name's bytes; fail if the disk and the database do not hold the same ones."""
    data = await in_database(store, name)
    assert on_disk(store, name) == data
    return data
