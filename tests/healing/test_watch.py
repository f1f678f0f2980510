"""`watch=True`: what the app does to its files while it runs is done to the database; a loss stays a loss."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from uuid import uuid4

import pytest
import watchfiles  # noqa: F401 - a test as another user may not import it later

from selfheal import MissingExtra, UploadStore
from selfheal.healing.watch import Change, Watch
from tests.support import environment
from tests.support.asgi import ask
from tests.support.constants import set_constants
from tests.support.files import write_file
from tests.support.middleware import PREFIX, wrapping
from tests.support.raw_sql import execute
from tests.support.store_requests import restored_bytes
from tests.support.store_state import in_database, on_disk, on_disk_and_in_database
from tests.support.uploads import NAME, NEW, OLD, OTHER_NAME, history_of
from tests.support.waiting import eventually

QUIET = 0.8
Event = tuple[int, str]
NOTED = set[Event]()
"""Which watch has noted an event of which path."""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vanished is decided soon."""
    set_constants(
        monkeypatch, QUIET=QUIET, TICK=100, LAST_EVENTS=0.3, RESTART_AFTER=0.1, RETRY=0.2, PAUSE=0.2, FIRST_RETRY=0.2
    )
    monkeypatch.setattr("selfheal.healing.reconcile.OVERWRITES_FROM", 0.1)
    real = Watch._note

    async def note(watch: Watch, changes: Iterable[Change]) -> None:
        await real(watch, changes)
        NOTED.update((id(watch), path) for _, path in changes)

    monkeypatch.setattr(Watch, "_note", note)


@pytest.fixture
async def watching(directory: Path, database_tables: str) -> AsyncIterator[UploadStore]:
    """A store that watches its directory, over every kind of database."""
    async with UploadStore(directory, database_tables, watch=True) as store:
        store.upkeep.start()
        await watches(store)
        yield store


async def watches(store: UploadStore) -> None:
    """Return once a file that is written is noticed: the watch has begun."""
    await _notices(store)
    await settled(store)


async def settled(store: UploadStore) -> None:
    """Wait until all that happened so far is noticed, and decided; some tests leave what cannot be decided."""
    await _notices(store, or_is_lost=True)
    with contextlib.suppress(AssertionError):
        await eventually(lambda: not _is_busy(_watch_of(store)), 2 * QUIET)
    await store.tasks.drain(10)


async def _notices(store: UploadStore, *, or_is_lost: bool = False) -> None:
    """Make events until one is noticed; those from before it were, as they come in order."""
    watch, made = _watch_of(store), set[Event]()

    async def is_noticed() -> bool:
        path = store.disk.path / f".{uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            path.touch()
            path.unlink()
        made.add((id(watch), str(path)))
        await asyncio.sleep(0.1)
        return bool(made & NOTED) or (or_is_lost and not store.disk.path.exists())

    await eventually(is_noticed)


def _watch_of(store: UploadStore) -> Watch:
    return store.upkeep._works[-1].__self__  # type: ignore[attr-defined, no-any-return]


def _is_busy(watch: Watch) -> bool:
    vanished = watch.vanished
    is_losing = time.monotonic() < vanished._lost_until
    is_writing = bool(watch._written or watch._workers or watch._unsettled._names)
    return is_losing or is_writing or bool(vanished._vanished or vanished._deleted)


async def save_many(store: UploadStore, count: int, folder: str = "many") -> list[str]:
    """Save files, and wait until they are settled."""
    names = [f"{folder}/{number}.jpg" for number in range(count)]
    for name in names:
        await store.save(name, name.encode())
    await settled(store)
    return names


async def alive(store: UploadStore, names: list[str]) -> int:
    """Return how many of these names are not deleted."""
    found = await store.database.catalogue.find(names)
    return sum(not record.is_deleted for record in found.values())


# -- deletions --------------------------------------------------------------------------------------------------------


async def test_a_file_that_the_app_deletes_is_deleted(
    watching: UploadStore, other_store: UploadStore, caplog: pytest.LogCaptureFixture
) -> None:
    """An `os.remove` by the app deletes the name on every node; the log says so, and `undo` brings it back."""
    path = (await watching.save(NAME, OLD)).path
    await settled(watching)
    path.unlink()
    await eventually(lambda: _is_deleted(watching, NAME))
    assert (await ask(wrapping(watching, True), f"{PREFIX}/{NAME}")).status == 404
    assert await restored_bytes(other_store, NAME) is None
    assert f"{NAME!r} was deleted by the app" in caplog.text
    await watching.undo(NAME)
    await settled(watching)
    assert await on_disk_and_in_database(watching, NAME) == OLD


async def _is_deleted(store: UploadStore, name: str) -> bool:
    record = await store.database.find(name)
    return record is not None and record.is_deleted


async def test_a_request_at_once(watching: UploadStore) -> None:
    """A visitor who asks before anybody knows of the deletion gets the file, and it is deleted all the same."""
    path = (await watching.save(NAME, OLD)).path
    await settled(watching)
    path.unlink()
    assert await restored_bytes(watching, NAME) == OLD
    await settled(watching)
    assert await _is_deleted(watching, NAME)
    assert on_disk(watching, NAME) is None


async def test_a_file_that_is_written_again(watching: UploadStore) -> None:
    """A file that the app deletes, a visitor restores and the app writes again is no deletion."""
    path = (await watching.save(NAME, OLD)).path
    await settled(watching)
    path.unlink()
    assert await restored_bytes(watching, NAME) == OLD
    path.write_bytes(NEW)
    await settled(watching)
    assert await on_disk_and_in_database(watching, NAME) == NEW


async def test_a_request_right_after_the_deletion(watching: UploadStore) -> None:
    """A visitor who asks before it is decided brings nothing back: the request waits for the decision."""
    path = (await watching.save(NAME, OLD)).path
    await settled(watching)
    path.unlink()
    await asyncio.sleep(0.3)
    answer = await ask(wrapping(watching, True), f"{PREFIX}/{NAME}")
    assert answer.status == 404
    assert await _is_deleted(watching, NAME)


@pytest.mark.parametrize(("count", "gone", "is_deletion"), [(8, 1, True), (8, 5, True), (8, 6, False), (60, 60, False)])
async def test_how_many_are_a_loss(watching: UploadStore, count: int, gone: int, is_deletion: bool) -> None:
    """A handful of files is deleted; more at once, as `git clean` removes them, are lost and come back."""
    names = await save_many(watching, count)
    for name in names[:gone]:
        watching.disk.path_of(name).unlink()
    await settled(watching)
    assert await alive(watching, names) == count - (gone if is_deletion else 0)
    for name in names[:gone]:
        assert (await restored_bytes(watching, name) is None) == is_deletion


async def test_a_loss_that_takes_long(watching: UploadStore) -> None:
    """Files that go one after the other without a pause are a loss, from the first to the last."""
    names = await save_many(watching, 10)
    for name in names:
        watching.disk.path_of(name).unlink()
        await asyncio.sleep(QUIET / 4)
    await settled(watching)
    assert await alive(watching, names) == 10


async def test_deletions_one_after_the_other(watching: UploadStore) -> None:
    """Files that an app deletes from time to time are each a deletion, however many they become."""
    names = await save_many(watching, 6)
    for name in names:
        watching.disk.path_of(name).unlink()
        await eventually(lambda name=name: _is_deleted(watching, name))  # type: ignore[misc]
    assert await alive(watching, names) == 0


async def test_a_temporary_file_is_not_counted(watching: UploadStore) -> None:
    """Files without a record, such as an app's temporary ones, come and go, and are not counted."""
    path = (await watching.save(NAME, OLD)).path
    store = watching
    store.reconciler.settled_after = 30.0
    await settled(watching)
    for number in range(50):
        write_file(store.disk.path_of(f"cats/{number}.tmp.jpg"), NEW).unlink()
    path.unlink()
    await eventually(lambda: _is_deleted(store, NAME))
    assert await store.database.find("cats/7.tmp.jpg") is None


def _remove_root(root: Path) -> None:
    while root.exists():
        shutil.rmtree(root, ignore_errors=True)  # it is written to meanwhile


def _move_root(root: Path) -> None:
    root.rename(root.with_name("away"))


def _replace_root(root: Path) -> None:
    root.rename(root.with_name("away"))
    root.mkdir()


def _remove_above(root: Path) -> None:
    while root.parent.exists():
        shutil.rmtree(root.parent, ignore_errors=True)  # it is written to meanwhile


def _empty_root(root: Path) -> None:
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_folder(root: Path) -> None:
    shutil.rmtree(root / "cats")


@pytest.mark.parametrize(
    "lose",
    [_remove_root, _move_root, _replace_root, _remove_above, _empty_root, _remove_folder],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("is_asked", [False, True])
async def test_a_directory_that_goes_is_a_loss(
    watching: UploadStore, lose: Callable[[Path], None], is_asked: bool
) -> None:
    """The uploads directory, one above it, one below it, or its mark takes its files along: they come back."""
    await watching.save(NAME, OLD)
    await settled(watching)
    lose(watching.disk.path)
    for _ in range(5 if is_asked else 0):
        await watching.restorer.restore(NAME)
        await asyncio.sleep(0.1)
    await settled(watching)
    assert await in_database(watching, NAME) == OLD
    assert await restored_bytes(watching, NAME) == OLD


async def test_the_watch_goes_on_after_a_loss(watching: UploadStore) -> None:
    """In the directory that was made after a loss the app's deletions and writes hold as before."""
    await watching.save(NAME, OLD)
    await settled(watching)
    shutil.rmtree(watching.disk.path)
    await watching.restore(NAME)
    await watches(watching)
    watching.disk.path_of(NAME).unlink()
    await eventually(lambda: _is_deleted(watching, NAME))


async def test_a_file_that_was_never_stored(watching: UploadStore) -> None:
    """A file that the database does not have leaves nothing behind when it goes: no tombstone."""
    watching.reconciler.settled_after = 1.0
    path = write_file(watching.disk.path_of(NAME), NEW)
    await asyncio.sleep(0.3)
    path.unlink()
    await settled(watching)
    assert await watching.database.find(NAME) is None


async def test_a_file_that_the_app_moves(watching: UploadStore) -> None:
    """A rename is a deletion of one name, and a new file of another."""
    path = (await watching.save(NAME, OLD)).path
    await settled(watching)
    path.rename(watching.disk.path_of("cats/other.jpg"))
    await eventually(lambda: _is_deleted(watching, NAME))
    assert await on_disk_and_in_database(watching, "cats/other.jpg") == OLD


async def test_a_deletion_while_the_database_is_away(watching: UploadStore) -> None:
    """A deletion that the database does not answer is done when it is back, whoever asks for the file meanwhile."""
    path = (await watching.save(NAME, OLD)).path
    await settled(watching)
    await execute(watching, "ALTER TABLE image_storage RENAME TO away")
    path.unlink()
    await settled(watching)
    await execute(watching, "ALTER TABLE away RENAME TO image_storage")
    assert await restored_bytes(watching, NAME) is None
    assert await _is_deleted(watching, NAME)


async def test_two_workers_watch(watching: UploadStore) -> None:
    """Each worker sees the deletion; it is one deletion, and one version."""
    async with UploadStore(watching.disk.path, watching.database.url, watch=True) as second:
        second.upkeep.start()
        path = (await watching.save(NAME, OLD)).path
        await asyncio.sleep(0.5)
        await settled(watching)
        path.unlink()
        await settled(watching)
        await settled(second)
        assert await _is_deleted(watching, NAME)
        assert await history_of(watching) == [OLD]
        await second.undo(NAME)
        await settled(second)
        assert await on_disk_and_in_database(watching, NAME) == OLD


# -- what the app writes ----------------------------------------------------------------------------------------------


async def test_a_file_that_the_app_writes_is_stored(watching: UploadStore) -> None:
    """A new file, also in a new directory, is stored at once, though nobody asks for it."""
    write_file(watching.disk.path_of("a/b/c/new.jpg"), NEW)
    write_file(watching.disk.path_of("new.jpg"), OLD)
    await eventually(lambda: _has(watching, "a/b/c/new.jpg", NEW))
    await eventually(lambda: _has(watching, "new.jpg", OLD))


async def _has(store: UploadStore, name: str, data: bytes) -> bool:
    return await in_database(store, name) == data


async def test_a_directory_that_is_moved_in(watching: UploadStore, tmp_path: Path) -> None:
    """The files of a directory that the app moves into the uploads are stored."""
    write_file(tmp_path / "made" / "x" / "a.jpg", NEW)
    (tmp_path / "made").rename(watching.disk.path_of("made"))
    await eventually(lambda: _has(watching, "made/x/a.jpg", NEW))


@pytest.mark.parametrize("data", [OLD, NEW], ids=["the same bytes", "other bytes"])
@pytest.mark.parametrize("is_asked", [False, True])
async def test_a_name_that_is_written_anew(watching: UploadStore, data: bytes, is_asked: bool) -> None:
    """A name that the app deleted, and later writes again, is a new file: it stays, whether visitors ask or not."""
    path = (await watching.save(NAME, OLD)).path
    await settled(watching)
    path.unlink()
    await eventually(lambda: _is_deleted(watching, NAME))
    path.write_bytes(data)
    for _ in range(5 if is_asked else 0):
        assert (await ask(wrapping(watching, True), f"{PREFIX}/{NAME}")).body == data
        await asyncio.sleep(0.05)
    await eventually(lambda: _has(watching, NAME, data))
    await settled(watching)
    assert await on_disk_and_in_database(watching, NAME) == data


async def test_an_old_copy_of_a_deleted_name(watching: UploadStore, other_store: UploadStore) -> None:
    """A copy that was there before its name was deleted elsewhere goes, though the app writes its files itself."""
    watching.disk.path_of(NAME).parent.mkdir(parents=True)
    path = write_file(watching.disk.path_of(NAME), OLD)
    await eventually(lambda: _has(watching, NAME, OLD))
    await settled(watching)
    await other_store.delete(NAME)
    path.chmod(0o640)  # an event, but nothing that the app has written
    await eventually(lambda: on_disk(watching, NAME) is None)
    assert await _is_deleted(watching, NAME)


async def test_an_earlier_picture_again(watching: UploadStore) -> None:
    """Bytes that a name had before, and that the app writes again while it runs, are its newest ones."""
    path = watching.disk.path_of("tom.jpg")
    for data in (OLD, NEW, OLD):
        path.write_bytes(data)
        await eventually(lambda data=data: _has(watching, "tom.jpg", data))  # type: ignore[misc]
        await settled(watching)
    assert await on_disk_and_in_database(watching, "tom.jpg") == OLD
    assert await history_of(watching, "tom.jpg") == [NEW, OLD]


async def test_a_file_that_is_moved_over_another(watching: UploadStore) -> None:
    """An older picture that the app moves over another one replaces it: neither is undone, nor lost."""
    path = (await watching.save(NAME, OLD)).path
    os.utime(path, ns=(10**18, 10**18))
    await watching.save(OTHER_NAME, NEW)
    await execute(watching, f"UPDATE image_storage SET modified_ns = {10**18} WHERE name = '{NAME}'")
    await settled(watching)
    path.rename(watching.disk.path_of(OTHER_NAME))
    (watching.disk.path / "cats").mkdir(exist_ok=True)
    await eventually(lambda: _has(watching, OTHER_NAME, OLD))
    await settled(watching)
    assert await on_disk_and_in_database(watching, OTHER_NAME) == OLD
    assert await _is_deleted(watching, NAME)


@pytest.mark.parametrize("way", ["replace", "in place", "delete and write"])
async def test_a_file_that_the_app_overwrites(watching: UploadStore, way: str) -> None:
    """An overwrite is a new version of the name, however the app writes it; it is no deletion."""
    path = (await watching.save(NAME, OLD)).path
    await settled(watching)
    if way == "replace":
        path.with_name(".new").write_bytes(NEW)
        path.with_name(".new").replace(path)
    else:
        if way == "delete and write":
            path.unlink()
        path.write_bytes(NEW)
    await eventually(lambda: _has(watching, NAME, NEW))
    await settled(watching)
    assert await on_disk_and_in_database(watching, NAME) == NEW
    assert OLD in await history_of(watching)


async def test_a_file_that_is_written_slowly(watching: UploadStore) -> None:
    """A file that the app is still writing is stored once it is whole, though nobody asks for it."""
    watching.reconciler.settled_after = 0.5
    path = watching.disk.path_of("slow.jpg")
    with path.open("wb", buffering=0) as file:
        for _ in range(10):
            file.write(b"piece")
            await asyncio.sleep(0.2)
            assert await watching.database.find("slow.jpg") is None
    await eventually(lambda: _has(watching, "slow.jpg", b"piece" * 10))


async def test_more_files_than_are_remembered(watching: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """When more files change than the watch remembers, the sweep compares the whole disk."""
    set_constants(
        monkeypatch, WRITTEN_AT_MOST=10, LOOK_EVERY=0.1, START_AFTER=0.0, REST=0.0, SHORTEST_REST=0.0, BUSY_REST=0.0
    )
    await watching.upkeep.stop()
    watching.upkeep.start()
    await asyncio.sleep(1.0)
    for number in range(100):
        write_file(watching.disk.path_of(f"many/{number}.jpg"), b"%d" % number)

    async def all_stored() -> bool:
        return await alive(watching, [f"many/{number}.jpg" for number in range(100)]) == 100

    await eventually(all_stored)


# -- what selfheal itself does is not the app's -----------------------------------------------------------------------


async def test_what_selfheal_does_itself(watching: UploadStore, other_store: UploadStore) -> None:
    """Saves, overwrites, deletions, undos, restores and healings, here and elsewhere, are never taken for the app's."""
    await watching.save(NAME, OLD)
    await watching.save(NAME, NEW)
    await watching.save(OTHER_NAME, OLD)
    await watching.delete(OTHER_NAME)
    await watching.undo(OTHER_NAME)
    await other_store.save("there.jpg", NEW)
    await watching.restore("there.jpg")
    await settled(watching)
    records = await watching.database.catalogue.find([NAME, OTHER_NAME, "there.jpg"])
    assert {name: record.generation for name, record in records.items()} == {NAME: 2, OTHER_NAME: 3, "there.jpg": 1}
    watching.disk.path_of(NAME).write_bytes(b"")  # as a crash leaves it: it is healed
    await eventually(lambda: on_disk(watching, NAME) == NEW)
    await settled(watching)
    assert await alive(watching, [NAME, OTHER_NAME, "there.jpg"]) == 3


async def test_a_restore_by_another_process(watching: UploadStore) -> None:
    """A whole restore by the command, of lost and of damaged files, deletes none of them."""
    names = await save_many(watching, 30)
    for name in names[:20]:
        watching.disk.path_of(name).unlink()
    await settled(watching)
    for name in names[20:]:
        path = watching.disk.path_of(name)
        times = path.stat()
        path.write_bytes(bytes(times.st_size))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    variables = environment(
        SELFHEAL_DIRECTORY=str(watching.disk.path),
        SELFHEAL_DATABASE_URL=watching.database.url.render_as_string(hide_password=False),
    )
    command = [sys.executable, "-m", "selfheal", "restore", "--verify", "--quiet"]
    await asyncio.to_thread(subprocess.run, command, env=variables, check=False)
    await settled(watching)
    assert await alive(watching, names) == 30
    for name in names:
        assert await on_disk_and_in_database(watching, name) == name.encode()


async def test_an_overwrite_on_a_full_disk(watching: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that the disk does not take removes the old copy: that is no deletion."""
    await watching.save(NAME, OLD)
    await settled(watching)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    await watching.save(NAME, NEW)
    assert on_disk(watching, NAME) is None
    await settled(watching)
    monkeypatch.setattr(os, "pwrite", real)
    assert await in_database(watching, NAME) == NEW


async def test_a_copy_in_quarantine(watching: UploadStore) -> None:
    """A copy that the disk cannot read is set aside: that is no deletion."""
    await watching.save(NAME, OLD)
    await settled(watching)
    await watching.restorer.set_aside_unreadable(NAME)
    await settled(watching)
    assert await in_database(watching, NAME) == OLD
    assert await restored_bytes(watching, NAME) == OLD


# -- the extra --------------------------------------------------------------------------------------------------------


def test_a_missing_extra(directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, `watch=True` says at once which extra brings it; without `watch`, nothing needs it."""
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with pytest.raises(MissingExtra, match=r"selfheal-uploads\[watch\]"):
        UploadStore(directory, sqlite_url, watch=True)
    UploadStore(directory, sqlite_url)


async def test_it_is_off_by_default(sqlite_store: UploadStore) -> None:
    """Without `watch` a file that the app removes itself comes back."""
    path = (await sqlite_store.save(NAME, OLD)).path
    sqlite_store.upkeep.start()
    await asyncio.sleep(0.3)
    path.unlink()
    await asyncio.sleep(QUIET + 1)
    assert await restored_bytes(sqlite_store, NAME) == OLD


async def test_a_directory_that_cannot_be_watched(
    directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system's limit of watches is one log line; everything else goes on, and the watch is tried again."""
    set_constants(monkeypatch, LONGEST_RETRY=0.2)
    async with UploadStore(directory, sqlite_url, watch=True) as store:
        await store.database.create_tables()
        watch = _watch_of(store)
        real = watch._changes

        def refused(*_: object, **__: object) -> None:
            raise OSError(28, "OS file watch limit reached")

        watch._changes = refused
        store.upkeep.start()
        await eventually(lambda: "cannot be watched" in caplog.text)
        watch._changes = real
        await watches(store)


async def test_a_watch_that_fails_while_it_runs(
    watching: UploadStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A watch that fails while it runs is one log line, and begins again: what the app writes and deletes holds."""
    set_constants(monkeypatch, LONGEST_RETRY=0.2)
    with open(os.fsencode(watching.disk.path) + b"/\xff.jpg", "wb"):  # the watch cannot tell of such a name
        await eventually(lambda: "cannot be watched" in caplog.text)
    await asyncio.sleep(0.5)
    path = (await watching.save(NAME, OLD)).path
    await settled(watching)
    path.unlink()
    await eventually(lambda: _is_deleted(watching, NAME))


async def test_work_that_fails_begins_again(watching: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody expected ends neither the watch nor the sweep for good."""
    set_constants(monkeypatch, AGAIN_AFTER=0.2)

    async def fails(*_: object) -> None:
        raise ValueError("nobody expected this")

    with monkeypatch.context() as broken:
        broken.setattr(_watch_of(watching).vanished, "decide", fails)
        await asyncio.sleep(0.5)
    path = (await watching.save(NAME, OLD)).path
    await settled(watching)
    path.unlink()
    await eventually(lambda: _is_deleted(watching, NAME))


async def test_a_folder_that_may_not_be_watched(ordinary_directory: Path) -> None:
    """A directory that this user may not read, such as `lost+found` of a volume, keeps no other from being watched."""
    for folder in ("a", "lost+found", "z/below"):
        (ordinary_directory / "uploads" / folder).mkdir(parents=True)
    (ordinary_directory / "uploads/lost+found").chmod(0o000)
    url = f"sqlite+aiosqlite:///{ordinary_directory}/catalogue.db"
    async with UploadStore(ordinary_directory / "uploads", url, watch=True, settled_after=0.1) as store:
        await store.database.create_tables()
        store.upkeep.start()
        await watches(store)
        for name in ("a/1.jpg", "z/below/1.jpg", "new/1.jpg", "1.jpg"):
            write_file(store.disk.path_of(name), NEW)
            await eventually(lambda name=name: _has(store, name, NEW))  # type: ignore[misc]
            store.disk.path_of(name).unlink()
            await eventually(lambda name=name: _is_deleted(store, name))  # type: ignore[misc]
    (ordinary_directory / "uploads/lost+found").chmod(0o700)


@pytest.mark.parametrize("after", [0.0, 0.4])
async def test_a_deletion_just_before_the_end(watching: UploadStore, other_store: UploadStore, after: float) -> None:
    """A file that the app deletes just before the server stops is deleted, and does not come back."""
    path = (await watching.save(NAME, OLD)).path
    await settled(watching)
    path.unlink()
    await asyncio.sleep(after)
    await watching.close()
    assert await _is_deleted(other_store, NAME)


async def test_a_loss_just_before_the_end(watching: UploadStore, other_store: UploadStore) -> None:
    """Files that go one after the other while the server stops are a loss, as at any other time."""
    names = await save_many(watching, 10)
    closing = asyncio.create_task(watching.close())
    for name in names:
        watching.disk.path_of(name).unlink()
        await asyncio.sleep(0.05)
    await closing
    assert await alive(other_store, names) == 10


async def test_an_idle_watch_keeps_nothing_open(watching: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watched directory that nobody uses is closed: its file system can be unmounted."""
    monkeypatch.setattr("selfheal.disk.root.CLOSED_AFTER", 0.5)
    await eventually(lambda: watching.disk._root._open is None)


async def test_closing_ends_the_watch(directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is closed watches no more, and closing takes no time."""
    before = asyncio.all_tasks()
    store = UploadStore(directory, sqlite_url, watch=True)
    await store.database.create_tables()
    store.upkeep.start()
    await watches(store)
    set_constants(monkeypatch, QUIET=30.0)
    started = time.monotonic()
    await store.close()
    assert time.monotonic() - started < 10
    assert asyncio.all_tasks() <= before
