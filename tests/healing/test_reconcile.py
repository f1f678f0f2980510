"""When the two sides of a name differ: who wins, what is kept of the other, and when nobody may touch anything."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from selfheal.errors import NotStored, Unsettled
from tests.support.sides import (
    BrokenDisk,
    execute,
    files_below,
    hit,
    in_database,
    in_quarantine,
    locked,
    looked_behind,
    noise,
    on_both_sides,
    on_disk,
    resize,
    statements,
)
from tests.support.waiting import eventually

NAME = "cats/tom.jpg"
OTHER = "dogs/rex.jpg"
OLD, NEW, THIRD = b"the old bytes", b"the new bytes, which are others", b"yet another picture"
A_DAY = 86_400 * 10**9


@pytest.fixture
async def elsewhere(store: UploadStore, tmp_path: Path) -> AsyncIterator[UploadStore]:
    """Another node: a disk of its own, the same database."""
    async with UploadStore(tmp_path / "elsewhere" / "uploads", store.database.url) as other:
        yield other


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> BrokenDisk:
    """A disk that can be broken and mended."""
    return BrokenDisk(monkeypatch)


def laid(store: UploadStore, data: bytes, modified_ns: int, name: str = NAME) -> Path:
    """A file put on disk by something that is not selfheal, in place of what was there, with an mtime of its own."""
    path = store.disk.path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    other = path.with_name("being-laid")
    other.write_bytes(data)
    os.utime(other, ns=(modified_ns, modified_ns))
    other.rename(path)
    return path


async def after_start(store: UploadStore) -> int:
    """A moment after the process began and after every record, which has held still for long enough, in ns."""
    await asyncio.sleep(0.02)
    now = time.time_ns()
    await asyncio.sleep(1.0)
    return now


async def history_of(store: UploadStore, name: str = NAME) -> list[bytes]:
    """The bytes of what a name was before, newest first."""
    versions = await store.database.history(name)
    return [b"".join([chunk async for chunk in store.database.read(version)]) for version in versions]


async def generation_of(store: UploadStore, name: str = NAME) -> int:
    """How often a name was changed; 0 if it has no record."""
    record = await store.database.find(name)
    return 0 if record is None else record.generation


# -- the database wins ----------------------------------------------------------------------------------------------

LAID: dict[str, Callable[[int], int]] = {
    "older than the record": lambda recorded: recorded - A_DAY,
    "newer than the record, older than the process": lambda recorded: recorded + A_DAY // 24,
    "at the beginning of time": lambda _: 0,
    "before the beginning of time": lambda _: -A_DAY,
}


@pytest.mark.parametrize("when", LAID.values(), ids=LAID)
async def test_old_bytes_that_a_deploy_lays_go_to_quarantine(
    sqlite_store: UploadStore, directory: Path, when: Callable[[int], int]
) -> None:
    """A file older than this process is no overwrite, whatever its mtime and size: the record's bytes come back."""
    recorded = time.time_ns() - A_DAY
    for data in (THIRD, NEW[::-1], b""):
        await sqlite_store.database.store_image(NAME, NEW, modified_ns=recorded)
        laid(sqlite_store, data, when(recorded))
        async with UploadStore(directory, sqlite_store.database.url) as started_later:
            await looked_behind(started_later, NAME)
            assert await on_both_sides(started_later, NAME) == NEW
            assert data in in_quarantine(started_later)
            assert started_later.disk.path_of(NAME).stat().st_mtime_ns == recorded
    assert await generation_of(sqlite_store) == 1
    assert await history_of(sqlite_store) == []


async def test_the_database_wins_over_an_old_copy(store: UploadStore, elsewhere: UploadStore) -> None:
    """A node that was away holds what was overwritten elsewhere: the newer record comes to its disk."""
    await store.save(NAME, OLD)
    await elsewhere.save(NAME, NEW)
    assert on_disk(store, NAME) == OLD
    await looked_behind(store, NAME)
    assert await on_both_sides(store, NAME) == NEW
    assert await history_of(store) == [OLD]
    assert await generation_of(store) == 2


async def test_the_quarantine_is_private_and_keeps_everything(store: UploadStore) -> None:
    """It lies outside the uploads with mode 0700, and a second copy of a name does not replace the first."""
    saved = await store.save(NAME, NEW)
    for data in (OLD, THIRD):
        laid(store, data, saved.modified_ns - A_DAY)
        await looked_behind(store, NAME)
    assert sorted(in_quarantine(store)) == sorted([OLD, THIRD])
    assert not store.disk.quarantine_path.is_relative_to(store.disk.path)
    assert store.disk.quarantine_path.stat().st_mode & 0o7777 == 0o700
    assert files_below(store.disk.path) == [NAME]


async def test_a_disk_copy_damaged_in_size_is_restored(store: UploadStore) -> None:
    """A file that was cut short, or has grown, goes to quarantine; the whole one is back with its own mtime."""
    for size in (1000, 11 * CHUNK + 3):
        saved = await store.save(NAME, noise(size))
        for damaged in (noise(size)[:-1], b"", noise(size) + b"x"):
            saved.path.write_bytes(damaged)
            os.utime(saved.path, ns=(saved.modified_ns, saved.modified_ns))
            await looked_behind(store, NAME)
            assert await on_both_sides(store, NAME) == noise(size)
            assert saved.path.stat().st_mtime_ns == saved.modified_ns
            assert damaged in in_quarantine(store)
    assert await generation_of(store) == 2


# -- what another node did ------------------------------------------------------------------------------------------


async def until_followed(store: UploadStore, holds: Callable[[], bool]) -> None:
    """Visitors come, for whatever, until something holds."""

    async def visited() -> bool:
        store.follow()
        await store.tasks.settle(30)
        return holds()

    await eventually(visited)


@pytest.fixture
async def seen_on_both(store: UploadStore, elsewhere: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names that both nodes have, and know to be right."""
    resize(monkeypatch, FOLLOWED_EVERY=0.05, QUIET_FOR=0.2)
    for name in (NAME, OTHER):
        await store.save(name, OLD)
        await elsewhere.restore(name)
        for node in (store, elsewhere):
            await looked_behind(node, name)


@pytest.mark.usefixtures("seen_on_both")
async def test_a_deletion_reaches_other_disks_without_a_visitor(store: UploadStore, elsewhere: UploadStore) -> None:
    """What one node deletes goes from the disk of another that has seen it, though nobody asks for that name."""
    await elsewhere.delete(NAME)
    assert on_disk(store, NAME) == OLD
    await until_followed(store, lambda: on_disk(store, NAME) is None)
    assert on_disk(store, OTHER) == OLD


@pytest.mark.usefixtures("seen_on_both")
async def test_changes_reach_other_disks_one_after_the_other(store: UploadStore, elsewhere: UploadStore) -> None:
    """Every later change of the same name is followed as well, an overwrite, an undo and a deletion."""
    await elsewhere.save(NAME, NEW)
    await until_followed(store, lambda: on_disk(store, NAME) == NEW)
    await elsewhere.undo(NAME)
    await until_followed(store, lambda: on_disk(store, NAME) == OLD)
    await elsewhere.delete(NAME)
    await until_followed(store, lambda: on_disk(store, NAME) is None)
    assert in_quarantine(store) == []


@pytest.mark.usefixtures("seen_on_both")
async def test_a_change_in_a_long_transaction_is_followed(store: UploadStore, elsewhere: UploadStore) -> None:
    """A change is found however long before its commit its transaction began, and whatever was followed meanwhile."""
    if store.database.url.get_backend_name() == "sqlite":
        pytest.skip("one writer at a time: nothing is changed meanwhile")
    engine = create_async_engine(store.database.url)
    async with engine.begin() as connection:
        await elsewhere.save(NAME, NEW, connection=connection)
        await elsewhere.save(OTHER, THIRD)
        await until_followed(store, lambda: on_disk(store, OTHER) == THIRD)
        assert on_disk(store, NAME) == OLD
    await engine.dispose()
    await until_followed(store, lambda: on_disk(store, NAME) == NEW)


@pytest.mark.usefixtures("seen_on_both")
async def test_too_many_changes_to_follow(
    store: UploadStore, elsewhere: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where more was changed than a node wants to hold, it takes nothing for seen: a visitor is enough for each."""
    resize(monkeypatch, CHANGES_AT_MOST=2)
    for name in ("x.jpg", "y.jpg", NAME):
        await elsewhere.save(name, THIRD)
        await elsewhere.delete(name)

    async def gone() -> bool:
        store.follow()
        await looked_behind(store, NAME)
        return on_disk(store, NAME) is None

    await eventually(gone)


@pytest.mark.usefixtures("seen_on_both")
async def test_followed_again_after_an_outage(store: UploadStore, elsewhere: UploadStore) -> None:
    """A database that gave no answer is left alone for a while; then what happened meanwhile is followed."""
    await elsewhere.delete(NAME)
    await execute(store, "ALTER TABLE image_storage RENAME TO away")
    await until_followed(store, lambda: True)
    await execute(store, "ALTER TABLE away RENAME TO image_storage")
    await until_followed(store, lambda: on_disk(store, NAME) is None)


@pytest.mark.usefixtures("seen_on_both")
async def test_following_that_is_broken_off(
    store: UploadStore, elsewhere: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was still to be looked at then is not taken for seen either: a visitor is enough for each."""
    resize(monkeypatch, SETTLED_AFTER=1e9)  # the first look never ends
    for name in (NAME, OTHER):
        await elsewhere.delete(name)
    for _ in range(30):
        store.follow()
        await asyncio.sleep(0.06)
    await store.tasks.settle(0)
    resize(monkeypatch, SETTLED_AFTER=0.0)
    for name in (NAME, OTHER):
        await looked_behind(store, name)
        assert on_disk(store, name) is None


@pytest.mark.usefixtures("seen_on_both")
async def test_nobody_follows_a_name_outside_the_grammar(
    store: UploadStore, elsewhere: UploadStore, directory: Path
) -> None:
    """A record that others wrote leads to no file outside the uploads, and hides no other change."""
    outside = directory.parent / "outside.jpg"
    outside.write_bytes(THIRD)
    await elsewhere.save("z.jpg", THIRD)
    await elsewhere.delete("z.jpg")
    await execute(store, "UPDATE image_storage SET name = '../outside.jpg' WHERE name = 'z.jpg'")
    await elsewhere.delete(NAME)
    await until_followed(store, lambda: on_disk(store, NAME) is None)
    assert outside.read_bytes() == THIRD


async def test_following_reads_no_more_than_the_changes(store: UploadStore) -> None:
    """An index holds the changed names alone; a table that an earlier selfheal made gets it by `create_tables`."""
    await execute(store, "DROP INDEX ix_image_storage_changed_at")
    await store.database.create_tables()
    question = "SELECT name FROM image_storage WHERE generation > 1 AND changed_at >= '2026-01-01 00:00:00'"
    engine = create_async_engine(store.database.url)
    async with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            question = f"QUERY PLAN {question}"
        else:
            await connection.execute(text("SET enable_seqscan = off"))  # of an empty table it would read the one page
        plan = (await connection.execute(text(f"EXPLAIN {question}"))).all()
    await engine.dispose()
    assert "ix_image_storage_changed_at" in str(plan)


# -- a copy of an earlier generation --------------------------------------------------------------------------------


@pytest.mark.parametrize("was_hit_before", [False, True])
async def test_a_stale_copy_never_comes_back_over_a_newer_record(store: UploadStore, was_hit_before: bool) -> None:
    """The disk still holds the generation before, because the newer one was saved in the app's own transaction."""
    await store.save(NAME, OLD)
    if was_hit_before:
        await looked_behind(store, NAME)
    engine = create_async_engine(store.database.url)
    async with engine.begin() as connection:
        await store.save(NAME, NEW, connection=connection)
    await engine.dispose()
    await looked_behind(store, NAME)
    assert await in_database(store, NAME) == NEW
    assert await generation_of(store) == 2
    assert await on_both_sides(store, NAME) == NEW


async def test_a_copy_of_any_earlier_generation_is_known(store: UploadStore) -> None:
    """A backup lays back, with its mtime, what the name was long ago: the record stays, and nothing is set aside."""
    first = await store.save(NAME, OLD)
    for data in (THIRD, NEW):
        await store.save(NAME, data)
    laid(store, OLD, first.modified_ns)
    await looked_behind(store, NAME)
    assert await on_both_sides(store, NAME) == NEW
    assert await generation_of(store) == 3
    assert in_quarantine(store) == []


async def test_a_copy_saved_after_the_process_began_is_known_too(store: UploadStore) -> None:
    """An undo goes back to older bytes; the newer copy, laid back with its mtime, does not win over the undo."""
    await store.save(NAME, OLD)
    second = await store.save(NAME, NEW)
    await store.undo(NAME)
    await asyncio.sleep(0.02)
    laid(store, NEW, second.modified_ns)
    await looked_behind(store, NAME)
    assert await on_both_sides(store, NAME) == OLD
    assert await generation_of(store) == 3


# -- the app's own overwrite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 3 * CHUNK + 5])
async def test_the_apps_own_overwrite_is_the_next_generation(store: UploadStore, size: int) -> None:
    """A file modified after this process began was overwritten by the app: it is adopted, the history keeps the old."""
    await store.save(NAME, OLD)
    written = laid(store, noise(size), await after_start(store)).stat().st_mtime_ns
    await looked_behind(store, NAME)
    assert await on_both_sides(store, NAME) == noise(size)
    record = await store.database.find(NAME)
    assert record is not None
    assert (record.generation, record.modified_ns) == (2, written)
    assert await history_of(store) == [OLD]
    assert in_quarantine(store) == []


async def test_an_overwrite_that_was_served_before_is_seen(store: UploadStore) -> None:
    """A name that was compared already is compared anew once its file is another."""
    await store.save(NAME, OLD)
    await looked_behind(store, NAME)
    laid(store, NEW, await after_start(store))
    await looked_behind(store, NAME)
    assert await on_both_sides(store, NAME) == NEW


async def _append(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(b"x" * 1000)


async def _append_on_a_server_whose_clock_is_ahead(path: Path) -> None:
    await _append(path)
    ahead = time.time_ns() + A_DAY
    os.utime(path, ns=(ahead, ahead))


@pytest.mark.parametrize("write", [_append, _append_on_a_server_whose_clock_is_ahead], ids=["here", "clock ahead"])
@pytest.mark.parametrize("is_new", [False, True], ids=["overwrite", "new"])
async def test_a_file_is_not_taken_while_it_is_being_written(
    sqlite_store: UploadStore, write: Callable[[Path], Coroutine[Any, Any, None]], is_new: bool
) -> None:
    """However often it is asked for meanwhile, only the whole file becomes a generation."""
    if not is_new:
        await sqlite_store.save(NAME, OLD)
    before = await generation_of(sqlite_store)
    await asyncio.sleep(0.02)
    path = laid(sqlite_store, b"", time.time_ns())
    for _ in range(24):
        await write(path)
        hit(sqlite_store, NAME)
        await asyncio.sleep(0.1)
    assert await generation_of(sqlite_store) == before

    async def is_taken() -> bool:
        hit(sqlite_store, NAME)
        return await in_database(sqlite_store, NAME) == b"x" * 24_000

    await eventually(is_taken)
    await sqlite_store.tasks.settle(30)
    assert await generation_of(sqlite_store) == before + 1


@pytest.fixture(params=[30.0, 0.0], ids=["read twice", "read once"])
def settled_after(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Whether a file that was laid a moment ago is taken for one that holds still."""
    resize(monkeypatch, SETTLED_AFTER=request.param)
    return request.param


@pytest.mark.usefixtures("settled_after")
async def test_a_file_that_moves_while_it_is_read_is_unsettled(sqlite_store: UploadStore) -> None:
    """Whoever wants a file adopted that is replaced at this very moment is told to try again; nothing is stored."""
    path = laid(sqlite_store, noise(64 * CHUNK), time.time_ns() - A_DAY)
    adopting = asyncio.create_task(sqlite_store.adopt(NAME))
    for number in range(200):
        if adopting.done():
            break
        laid(sqlite_store, noise(64 * CHUNK + number + 1), time.time_ns() - A_DAY)
        await asyncio.sleep(0)
    with pytest.raises(Unsettled):
        await adopting
    assert await sqlite_store.database.find(NAME) is None
    assert path.exists()


@pytest.mark.usefixtures("settled_after")
async def test_large_bytes_are_adopted_while_they_are_saved(store: UploadStore) -> None:
    """The same bytes come under two names at once, from the disk and from a client: both are stored."""
    data = noise(60 * CHUNK)
    for number in range(3):
        laid(store, data, time.time_ns() - A_DAY, f"{number}.png")
        await asyncio.gather(store.adopt(f"{number}.png"), store.save(f"other-{number}.png", data))
        assert await in_database(store, f"{number}.png") == await in_database(store, f"other-{number}.png") == data


@pytest.mark.usefixtures("settled_after")
async def test_many_large_files_are_adopted_at_once(sqlite_store: UploadStore) -> None:
    """However many wait for the database's one writer, a few are held in memory meanwhile; all of them get there."""
    old = time.time_ns() - A_DAY
    files = {f"{number}.png": noise(30 * CHUNK + number) for number in range(8)}
    for name, data in files.items():
        laid(sqlite_store, data, old, name)
    tracemalloc.start()
    async with locked(sqlite_store):
        adopting = [asyncio.create_task(sqlite_store.adopt(name)) for name in files]
        await asyncio.sleep(1)
        held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    await asyncio.gather(*adopting)
    assert held < 3 * 31 * CHUNK
    for name, data in files.items():
        assert await in_database(sqlite_store, name) == data


@pytest.mark.parametrize("size", [40 * CHUNK, 3 * CHUNK + 1], ids=["large", "small"])
@pytest.mark.parametrize("is_old_again", [False, True], ids=["", "its time set back"])
@pytest.mark.usefixtures("settled_after")
async def test_a_file_that_is_overwritten_in_place_while_it_is_read(
    sqlite_store: UploadStore, disk: BrokenDisk, size: int, is_old_again: bool
) -> None:
    """Half old, half new is no picture: whoever wants it adopted is told to try again, and nothing is stored."""
    modified = time.time_ns() - A_DAY
    path = laid(sqlite_store, noise(size), modified)
    held = disk.hold("pread", after=2)
    adopting = asyncio.create_task(sqlite_store.adopt(NAME))
    await held.met()
    with path.open("r+b") as file:
        file.write(b"new at its beginning")
    if is_old_again:
        os.utime(path, ns=(modified, modified))
    held.release()
    with pytest.raises(Unsettled):
        await adopting
    assert await sqlite_store.database.find(NAME) is None
    record = await sqlite_store.adopt(NAME)
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert await in_database(sqlite_store, NAME) == path.read_bytes()


@pytest.mark.parametrize("is_known", [True, False], ids=["saved", "forgotten"])
async def test_a_save_that_is_committed_while_two_sides_are_compared(
    store: UploadStore, elsewhere: UploadStore, disk: BrokenDisk, is_known: bool
) -> None:
    """Bytes are compared with the record of now: those of a save that was faster are no overwrite and no damage."""
    await store.save(NAME, OLD)
    written = laid(store, NEW, time.time_ns() - A_DAY).stat().st_mtime_ns
    held = disk.hold("pread")
    checking = asyncio.create_task(store.check(NAME))
    await held.met()
    if is_known:
        await elsewhere.database.store_image(NAME, NEW, modified_ns=written)
    else:
        await execute(store, "DELETE FROM image_storage")
    held.release()
    await checking
    assert await on_both_sides(store, NAME) == NEW
    assert store.disk.path_of(NAME).stat().st_mtime_ns == written
    assert await generation_of(store) == (2 if is_known else 1)
    assert in_quarantine(store) == []


async def test_a_file_that_vanishes_while_it_is_compared(sqlite_store: UploadStore, disk: BrokenDisk) -> None:
    """A file that differed and is gone the next moment is nobody's: nothing changes, and its name is restored."""
    saved = await sqlite_store.save(NAME, OLD)
    laid(sqlite_store, NEW, saved.modified_ns - A_DAY)
    held = disk.hold("stat", after=1, done_first=True)
    checking = asyncio.create_task(sqlite_store.check(NAME))
    await held.met()
    saved.path.unlink()
    held.release()
    await checking
    assert on_disk(sqlite_store, NAME) is None
    assert await in_database(sqlite_store, NAME) == OLD
    assert in_quarantine(sqlite_store) == []


async def test_what_is_not_on_the_disk_cannot_be_taken_over(sqlite_store: UploadStore) -> None:
    """Without a file there is nothing that could become the next generation, and the record stays."""
    saved = await sqlite_store.save(NAME, OLD)
    saved.path.unlink()
    with pytest.raises(NotStored):
        await sqlite_store.take_over(NAME)
    assert await in_database(sqlite_store, NAME) == OLD
    assert await generation_of(sqlite_store) == 1


# -- the same bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-A_DAY, A_DAY], ids=["earlier", "later"])
async def test_the_same_bytes_get_the_records_mtime(store: UploadStore, offset: int) -> None:
    """A copy that differs in nothing but its mtime gets the record's, so that its ETag is the same everywhere."""
    saved = await store.save(NAME, NEW)
    laid(store, NEW, saved.modified_ns + offset)
    await looked_behind(store, NAME)
    assert saved.path.stat().st_mtime_ns == saved.modified_ns
    assert await on_both_sides(store, NAME) == NEW
    assert await generation_of(store) == 1
    assert in_quarantine(store) == []


# -- only one side is sure ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 11 * CHUNK + 3])
@pytest.mark.parametrize(
    "damage",
    ["UPDATE image_chunk SET digest = data, data = digest", "DELETE FROM image_chunk"],
    ids=["other bytes", "no bytes"],
)
async def test_a_disk_copy_is_left_alone_if_the_database_copy_is_damaged(
    store: UploadStore, size: int, damage: str
) -> None:
    """A healer that cannot decide keeps both: the copy that differs stays where it is, as it is, and the record too."""
    saved = await store.save(NAME, noise(size))
    await execute(store, damage)
    for data in (OLD, noise(size)[:-1]):
        before = laid(store, data, saved.modified_ns - A_DAY).stat()
        await looked_behind(store, NAME)
        assert on_disk(store, NAME) == data
        assert (saved.path.stat().st_ino, saved.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert in_quarantine(store) == []
    assert files_below(store.disk.path) == [NAME]
    assert await generation_of(store) == 1


async def test_nothing_is_settled_without_an_answer(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that gives no answer changes nothing on disk; asked again later, the two sides agree."""
    monkeypatch.setattr("selfheal.healing.reconcile.QUIET_FOR", 0.1)
    saved = await store.save(NAME, NEW)
    async with UploadStore(store.disk.path, store.database.url, deadline=0.5) as hurried:
        laid(hurried, OLD, saved.modified_ns - A_DAY)
        async with locked(store):
            await looked_behind(hurried, NAME)
            assert on_disk(hurried, NAME) == OLD

        async def agrees() -> bool:
            hit(hurried, NAME)
            return on_disk(hurried, NAME) == NEW

        await eventually(agrees)
        await hurried.tasks.settle(30)
    assert in_quarantine(store) == [OLD]


async def test_while_the_database_is_quiet_it_is_left_alone(store: UploadStore) -> None:
    """Once it gave no answer, hits ask it nothing for a while."""
    await store.save(NAME, NEW)
    async with UploadStore(store.disk.path, store.database.url, deadline=0.5) as hurried:
        async with locked(store):
            await looked_behind(hurried, NAME)
        with statements() as asked:
            for _ in range(20):
                await looked_behind(hurried, NAME)
        assert asked == []


# -- behind hits ----------------------------------------------------------------------------------------------------


async def test_what_agrees_is_asked_about_once(store: UploadStore) -> None:
    """A file that this process has seen is never asked about again, however often it is hit."""
    await store.save(NAME, NEW)
    await looked_behind(store, NAME)
    with statements() as asked:
        for _ in range(50):
            await looked_behind(store, NAME)
    assert asked == []
    assert await on_both_sides(store, NAME) == NEW


async def test_many_files_are_asked_about_together(store: UploadStore) -> None:
    """The first hits of many files are few questions."""
    for number in range(40):
        await store.save(f"{number}.jpg", b"%d" % number)
    with statements() as asked:
        for number in range(40):
            hit(store, f"{number}.jpg")
        await store.tasks.settle(30)
    assert len(asked) < 20


async def test_only_so_many_files_are_looked_at_behind(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of first hits does not become a flood of tasks: what is left out is looked at behind a later hit."""
    monkeypatch.setattr("selfheal.healing.reconcile.BEHIND_AT_ONCE", 3)
    names = [f"{number}.jpg" for number in range(5)]
    for name in names:
        await sqlite_store.save(name, NEW)
    for known in (3, 5):
        with statements() as asked:
            for name in names * 3:
                hit(sqlite_store, name)
            await sqlite_store.tasks.settle(30)
        assert sum(statement.count(".jpg") for statement in asked) == (3 if known == 3 else 2)
    with statements() as asked:
        for name in names:
            hit(sqlite_store, name)
        await sqlite_store.tasks.settle(30)
    assert asked == []


async def test_what_cannot_be_settled_is_not_asked_about_at_every_hit(
    sqlite_store: UploadStore, disk: BrokenDisk
) -> None:
    """A copy that differs from a damaged record, or cannot be read, is compared once, until it changes."""
    saved = await sqlite_store.save(NAME, NEW)
    await execute(sqlite_store, "UPDATE image_chunk SET data = digest")
    laid(sqlite_store, OLD, saved.modified_ns - A_DAY)
    await looked_behind(sqlite_store, NAME)
    with statements() as asked:
        await looked_behind(sqlite_store, NAME)
    assert asked == []
    laid(sqlite_store, THIRD, saved.modified_ns - A_DAY)
    disk.fail("pread", errno.EIO)
    for is_asked in (True, False):
        with statements() as asked:
            await looked_behind(sqlite_store, NAME)
        assert bool(asked) == is_asked
    assert on_disk(sqlite_store, NAME) == THIRD


async def test_what_was_seen_takes_bounded_memory(sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many files are hit, only so many are remembered; of the others the database is asked again."""
    monkeypatch.setattr("selfheal.healing.reconcile.SEEN_AT_MOST", 3)
    names = [f"{number}.jpg" for number in range(4)]

    async def is_asked(name: str) -> bool:
        with statements() as asked:
            await looked_behind(sqlite_store, name)
        return bool(asked)

    for name in names:
        await sqlite_store.save(name, NEW)
    assert [await is_asked(name) for name in names[:3] * 2] == [True] * 3 + [False] * 3
    assert [await is_asked(name) for name in (names[3], names[3], names[0])] == [True, False, True]


async def test_expected_changes_take_bounded_memory(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the many changes that were expected, those are forgotten whose time is over, and no others."""
    monkeypatch.setattr("selfheal.healing.reconcile.CHANGING_AT_MOST", 2)
    engine = create_async_engine(store.database.url)

    async def expect(name: str, seconds: float) -> None:
        monkeypatch.setattr("selfheal.healing.reconcile.CHANGING_FOR", seconds)
        async with engine.begin() as connection:
            await store.save(name, NEW, connection=connection)

    await expect("short.jpg", 0.0)
    for name in ("long.jpg", "last.jpg"):
        await expect(name, 60.0)
    await engine.dispose()
    assert len(store._reconciler._changing) == 2
    for name, is_asked in (("short.jpg", False), ("long.jpg", True), ("last.jpg", True)):
        await store.restore(name)
        await looked_behind(store, name)
        with statements() as asked:
            await looked_behind(store, name)
        assert bool(asked) == is_asked, name


@pytest.mark.parametrize("adopt", [True, False])
async def test_a_file_that_only_the_disk_has(store: UploadStore, adopt: bool) -> None:
    """It is adopted behind its first hit, with its mtime, unless that is not wanted; the file itself stays as it is."""
    before = laid(store, NEW, time.time_ns() - A_DAY).stat()
    file = store.disk.open(NAME)
    assert file is not None
    file.close()
    store.noticed(NAME, file.identity, adopt=adopt)
    await store.tasks.settle(30)
    assert await in_database(store, NAME) == (NEW if adopt else None)
    after = store.disk.path_of(NAME).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


async def test_two_nodes_adopt_one_name(store: UploadStore, elsewhere: UploadStore) -> None:
    """Two disks with other bytes under one new name: one of them is the record, the other is kept in quarantine."""
    laid(store, OLD, time.time_ns() - A_DAY)
    laid(elsewhere, NEW, time.time_ns() - A_DAY)
    await asyncio.gather(looked_behind(store, NAME), looked_behind(elsewhere, NAME))
    for node in (store, elsewhere):
        await node.check(NAME)
    final = await on_both_sides(store, NAME)
    assert final in (OLD, NEW)
    assert await on_both_sides(elsewhere, NAME) == final
    kept = in_quarantine(store) + in_quarantine(elsewhere) + await history_of(store)
    assert kept == [OLD if final == NEW else NEW]


async def test_a_file_that_vanishes_is_nobodys_harm(store: UploadStore) -> None:
    """A hit whose file is gone by the time it is looked at changes nothing in the database."""
    saved = await store.save(NAME, NEW)
    hit(store, NAME)
    saved.path.unlink()
    await store.tasks.settle(30)
    await store.check(NAME)
    assert await in_database(store, NAME) == NEW
    assert await generation_of(store) == 1


async def test_no_healing_on_a_disk_that_takes_no_file(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the right bytes cannot be written, the wrong copy is not taken away for nothing, nor adopted."""
    saved = await store.save(NAME, NEW)
    laid(store, OLD, saved.modified_ns - A_DAY)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        await looked_behind(store, NAME)
    assert await in_database(store, NAME) == NEW
    assert OLD in [on_disk(store, NAME), *in_quarantine(store)]
    assert await generation_of(store) == 1
