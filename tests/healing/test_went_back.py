"""The database went back in time: every node notices, stores again what its disk has, and deletes nothing for it."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selfheal import UploadStore
from selfheal.sql.backends import backend_of
from tests.support.postgres import PostgresServer
from tests.support.raw_sql import execute
from tests.support.store_requests import hit_and_settle
from tests.support.store_state import on_disk, on_disk_and_in_database
from tests.support.uploads import NAME, NEW, OLD, OTHER_NAME, THIRD, generation_of
from tests.support.waiting import eventually

Backup = tuple[Callable[[], None], Callable[[], None]]


@pytest.fixture
def backup(request: pytest.FixtureRequest, store: UploadStore, tmp_path: Path) -> Iterator[Backup]:
    """Two functions: one makes a backup of the database, the other restores it while the server runs."""
    kept = tmp_path / "backup"
    file = backend_of(store.database.url).file(store.database.url)
    if file is not None:
        yield lambda: _copy(file, kept), lambda: _copy(kept, file)
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    where = ["-h", "127.0.0.1", "-p", str(server.port), "-U", "postgres", "-d", str(store.database.url.database)]

    def dump() -> None:
        kept.write_bytes(_run([str(server.programs / "pg_dump"), *where, "--clean", "--if-exists"]))

    yield dump, lambda: _run([str(server.programs / "psql"), *where, "-Xq", "-f", str(kept)]) and None


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout


def _copy(source: Path, target: Path) -> None:
    with sqlite3.connect(source) as old, sqlite3.connect(target) as new:
        old.backup(new)
    old.close()
    new.close()


async def follow(store: UploadStore) -> None:
    store.background._follow_from = store.background._paused_until = 0.0
    store.background.follow()
    await store.tasks.drain(30)


async def test_a_restored_backup_loses_nothing(store: UploadStore, backup: Backup) -> None:
    """Dump, more uploads and an overwrite, restore of the dump under a running server: the disk's bytes are stored."""
    dump, load = backup
    await store.save(NAME, OLD)
    await follow(store)
    dump()
    await store.save(NAME, NEW)
    for number in range(30):
        await store.save(f"new/{number}.jpg", b"%d" % number)
    await hit_and_settle(store, "new/0.jpg")
    await follow(store)
    load()

    async def is_stored() -> bool:
        await follow(store)
        return await store.database.count() == 31 and await generation_of(store) == 2

    await eventually(is_stored)
    shutil.rmtree(store.disk.path)
    for number in range(30):
        await store.restore(f"new/{number}.jpg")
        assert await on_disk_and_in_database(store, f"new/{number}.jpg") == b"%d" % number
    await store.restore(NAME)
    assert await on_disk_and_in_database(store, NAME) == NEW


async def test_a_restored_backup_and_a_restart(store: UploadStore, backup: Backup) -> None:
    """A process that began after the backup was restored knows from its disk what the database has forgotten."""
    dump, load = backup
    await store.save(NAME, OLD)
    dump()
    await store.save(OTHER_NAME, THIRD)
    await store.save(NAME, NEW)
    await follow(store)
    load()
    async with UploadStore(store.disk.path, store.database.url) as restarted:
        await follow(restarted)
        for name, data in ((NAME, NEW), (OTHER_NAME, THIRD)):
            assert await on_disk_and_in_database(restarted, name) == data


async def test_a_name_that_was_saved_anew_after_an_old_deletion(store: UploadStore, backup: Backup) -> None:
    """An older truth says that a name is deleted: the newer save that this node knows is stored again."""
    dump, load = backup
    await store.save(NAME, OLD)
    await store.delete(NAME)
    dump()
    await store.save(NAME, NEW)
    await hit_and_settle(store, NAME)
    await follow(store)
    load()
    await follow(store)
    assert await on_disk_and_in_database(store, NAME) == NEW


async def test_other_nodes_are_told(store: UploadStore, other_store: UploadStore, backup: Backup) -> None:
    """A node that knows none of the lost records hears of it from one that does."""
    dump, load = backup
    await store.save(NAME, OLD)
    await follow(store)
    dump()
    other_store.disk.path.mkdir(parents=True, exist_ok=True)
    await follow(other_store)
    await other_store.save(OTHER_NAME, THIRD)
    other_store.background._newest.clear()
    await store.save(NAME, NEW)
    await follow(store)
    load()
    await follow(store)
    await follow(other_store)
    assert await on_disk_and_in_database(other_store, OTHER_NAME) == THIRD


async def test_nothing_is_forgotten_while_the_database_only_answers_late(store: UploadStore) -> None:
    """Without an answer nothing is decided: the next question finds the database as it was."""
    await store.save(NAME, OLD)
    await follow(store)
    position = await store.database.changes.position()
    await execute(store, "ALTER TABLE image_schema RENAME TO away")
    await follow(store)
    await execute(store, "ALTER TABLE away RENAME TO image_schema")
    await follow(store)
    assert await store.database.changes.position() == position
    assert on_disk(store, NAME) == OLD


async def test_one_epoch_begins_although_nobody_has_the_bytes(store: UploadStore, backup: Backup) -> None:
    """What the database lost, and no disk has either, is noticed once: nodes do not compare their disks for ever."""
    dump, load = backup
    await store.save(NAME, OLD)
    await follow(store)
    dump()
    (await store.save(NAME, NEW)).path.unlink()
    await store.save(OTHER_NAME, NEW)
    await store.delete(OTHER_NAME)
    await follow(store)
    before = (await store.database.changes.position()).epoch
    load()
    epochs = []
    for _ in range(3):
        await eventually(store.database.count)
        await follow(store)
        epochs.append((await store.database.changes.position()).epoch)
    assert before not in epochs
    assert len(set(epochs)) == 1
