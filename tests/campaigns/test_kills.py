"""A process that is killed, or refused, at any of its system calls: every name stays absent or whole, what was
acknowledged stays, what was deleted stays deleted, and the next run mends the rest.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from tests.support.crowd import Crowd, kill_one, workers
from tests.support.faulty_app import Faults
from tests.support.killing import (
    CHANGES,
    MESSAGES,
    QUESTIONS,
    ROUTINE,
    Call,
    Doer,
    Fate,
    Judge,
    Story,
    Tally,
    Worlds,
    commits_at,
    damage,
    named_unsynced,
    names_at,
)
from tests.support.one_shot import Deed
from tests.support.postgres import PostgresServer
from tests.support.requirements import needs
from tests.support.serving import command
from tests.support.sides import execute, files_below, noise

NAME = "cats/tom.jpg"
OLD, NEW = noise(1000), noise(1001)
MIDDLE, LARGE = noise(3 * CHUNK + 77), noise(4 * 2**20 + CHUNK + 78)
"""Several chunks; more chunks than one transaction takes."""
MANY = {f"cats/{number}.jpg": noise(2000 + number) for number in range(5)} | {"dogs/rex.jpg": MIDDLE}


# -- stories --------------------------------------------------------------------------------------------------------


async def nothing(store: UploadStore) -> None:
    """An empty world: not even the directory is there."""


def saved(*versions: bytes, is_on_disk: bool = True) -> Callable[[UploadStore], Any]:
    """The name, saved once or several times."""

    async def prepare(store: UploadStore) -> None:
        for version in versions:
            await store.save(NAME, version)
        if not is_on_disk:
            store.disk.path_of(NAME).unlink()

    return prepare


async def saved_and_deleted(store: UploadStore) -> None:
    """A tombstone."""
    await store.save(NAME, OLD)
    await store.delete(NAME)


async def only_in_database(store: UploadStore) -> None:
    """Many files, and all of them lost."""
    for name, data in MANY.items():
        await store.save(name, data)
    shutil.rmtree(store.disk.path)


async def deleted_and_laid_back(store: UploadStore) -> None:
    """A tombstone, and its file on the disk all the same."""
    await saved_and_deleted(store)
    store.disk.path_of(NAME).write_bytes(OLD)


async def spoiled_on_disk(store: UploadStore) -> None:
    """Many files, two of which have other bytes on the disk."""
    for name, data in MANY.items():
        await store.save(name, data)
    for name in SPOILED:
        store.disk.path_of(name).write_bytes(bytes(len(MANY[name])))


async def only_on_disk(store: UploadStore) -> None:
    """Many files that nobody has saved, a large one among them; and one that is deleted, laid back."""
    await store.save(NAME, OLD)
    await store.delete(NAME)
    for name, data in (MANY | {"large.jpg": LARGE, NAME: OLD}).items():
        store.disk.path_of(name).parent.mkdir(parents=True, exist_ok=True)
        store.disk.path_of(name).write_bytes(data)


async def spoiled_in_database(store: UploadStore) -> None:
    """A good file, and a damaged record of it."""
    await store.save(NAME, MIDDLE)
    await damage(store, NAME)


async def one_on_disk(store: UploadStore) -> None:
    """A file that nobody has saved."""
    store.disk.path_of(NAME).parent.mkdir(parents=True)
    store.disk.path_of(NAME).write_bytes(MIDDLE)


async def full_of_leftovers(store: UploadStore) -> None:
    """Names overwritten and deleted, and an upload that never came to its end."""
    await saved(OLD, MIDDLE, NEW)(store)
    await store.save("dogs/rex.jpg", MIDDLE + b"!")
    await store.delete("dogs/rex.jpg")
    await execute(store, "UPDATE image_history SET replaced_at = '2020-01-01 00:00:00'")
    await execute(
        store,
        "INSERT INTO image_chunk (sha256, position, digest, data, stored_at)"
        " SELECT 'upload-lost', position, digest, data, stored_at FROM image_chunk WHERE sha256 = :key",
        key=sha256(MIDDLE).hexdigest(),
    )


LOOKS = ("openat", "openat2", "newfstatat", "stat", "lstat", "statx", "getdents64")


def story(title: str, action: str, fate: Fate, prepare: Any, *, how: str = "") -> Story:
    """A story about the one name."""
    size = len(fate.after or b"")
    return Story(title, Deed(action, "", "", NAME, size, how), {NAME: fate}, prepare)


def story_of_many(title: str, action: str, prepare: Any, more: dict[str, Fate]) -> Story:
    """A story about many names."""
    fates = {name: Fate(data, data) for name, data in MANY.items()}
    return Story(
        title, Deed(action, "", ""), fates | {name.replace("_", "/"): fate for name, fate in more.items()}, prepare
    )


SAME_OLD, SAME_MIDDLE, SAME_LARGE, GONE = Fate(OLD, OLD), Fate(MIDDLE, MIDDLE), Fate(LARGE, LARGE), Fate(OLD, None)
SPOILED = {name: Fate(MANY[name], MANY[name], bytes(len(MANY[name]))) for name in ("cats/1.jpg", "dogs/rex.jpg")}

STORIES = [
    story("save", "save", Fate(None, NEW), nothing),
    story("save over", "save", Fate(OLD, NEW), saved(OLD)),
    story("save large", "save", Fate(None, LARGE), nothing),
    story("save large over", "save", Fate(MIDDLE, LARGE), saved(MIDDLE)),
    story("save, no unnamed files", "save", Fate(None, MIDDLE), nothing, how="named"),
    story("save over, no unnamed files", "save", Fate(OLD, NEW), saved(OLD), how="named"),
    story("save what was deleted", "save", Fate(None, NEW), saved_and_deleted),
    story("restore", "restore", SAME_OLD, saved(OLD, is_on_disk=False)),
    story("restore chunks", "restore", SAME_MIDDLE, saved(MIDDLE, is_on_disk=False)),
    story("restore, no unnamed files", "restore", SAME_MIDDLE, saved(MIDDLE, is_on_disk=False), how="named"),
    story("visit", "visit", SAME_OLD, saved(NEW, OLD, is_on_disk=False)),
    story("visit large", "visit", SAME_MIDDLE, saved(MIDDLE, is_on_disk=False), how="streamed"),
    story("delete", "delete", GONE, saved(OLD)),
    story("delete what is only on disk", "delete", Fate(MIDDLE, None), one_on_disk),
    story("undo an overwrite", "undo", Fate(NEW, OLD), saved(OLD, NEW)),
    story("undo a deletion", "undo", Fate(None, OLD), saved_and_deleted),
    story("adopt", "adopt", SAME_MIDDLE, one_on_disk),
    story("purge", "purge", Fate(NEW, NEW), full_of_leftovers),
    story("migrate damage away", "migrate", SAME_MIDDLE, spoiled_in_database),
    story_of_many("restore all", "restore all", only_in_database, {}),
    story_of_many("heal all", "heal all", spoiled_on_disk, SPOILED),
    story_of_many("migrate", "migrate", only_on_disk, {"large.jpg": SAME_LARGE, NAME: Fate(None, None, OLD)}),
]
REMOVE = story("remove what was deleted", "heal all", Fate(None, None, OLD), deleted_and_laid_back)
OVER_A_SOCKET = [one for one in STORIES if one.title in ("save large over", "delete", "undo an overwrite", "migrate")]


# -- fixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doer]:
    """Who does the deeds."""
    if shutil.which("strace") is None:
        needs("strace", "apt-get install strace")
    with Doer(tmp_path_factory.mktemp("doer")) as doer:
        yield doer


@pytest.fixture(scope="module")
def in_all() -> Tally:
    """What all the tests of this file did."""
    return Tally()


@pytest.fixture
def worlds(tmp_path: Path) -> Worlds:
    """Worlds with SQLite."""
    return Worlds(tmp_path)


@pytest.fixture
def distant_worlds(tmp_path: Path, postgres: PostgresServer) -> Worlds:
    """Worlds with PostgreSQL."""
    return Worlds(tmp_path, postgres)


def some_of(calls: list[Call], most: int) -> list[Call]:
    """As many calls as are wanted; first of all those of which there are few."""
    calls = [call for call in calls if not call.arguments.startswith(("0<", "1<", "2<"))]
    if len(calls) <= most:
        return calls
    rare = [call for call in calls if call.name not in ROUTINE]
    chosen = random.sample(rare, min(len(rare), most * 2 // 3))
    left = [call for call in calls if call not in set(chosen)]
    return chosen + random.sample(left, most - len(chosen))


def told(tally: Tally, in_all: Tally) -> str:
    """The figures of one test, and of all up to now."""
    in_all.kills += tally.kills
    in_all.refusals += tally.refusals
    return f"{tally.kills} kills, {tally.refusals} errors; {tally} (in all {in_all.kills} and {in_all.refusals})"


# -- kills ----------------------------------------------------------------------------------------------------------


async def kill_at_calls(doer: Doer, worlds: Worlds, story: Story, most: int, calls: str) -> tuple[Tally, int]:
    """Kill at so many calls, and judge after each; the tally, and how many calls there are."""
    tally = Tally()
    await story.begin(worlds)
    with worlds.copy() as world:
        all_calls, _ = doer.watch(story.deed_in(world), calls)
    for number, call in enumerate(some_of(all_calls, most)):
        with worlds.copy() as world:
            ending = doer.spoil(story.deed_in(world), call, "signal=KILL")
            tally.kills += ending.is_killed
            assert ending.is_killed or ending.is_acknowledged, ending
            await Judge(story, world, ending, tally, f"killed before {call}").judge(again_first=number % 2 == 0)
    return tally, len(all_calls)


@pytest.mark.parametrize("story", [*STORIES, REMOVE], ids=str)
async def test_a_kill_at_any_step_leaves_every_name_absent_or_whole_and_the_next_run_mends_the_rest(
    story: Story,
    doer: Doer,
    worlds: Worlds,
    in_all: Tally,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """SIGKILL before any call that changes or syncs anything: no name is torn, nothing acknowledged is lost, nothing
    deleted comes back, nothing is left lying about, and running it again mends all.
    """
    tally, steps = await kill_at_calls(doer, worlds, story, times(1, 90), CHANGES)
    record_property(f"of {steps} steps", told(tally, in_all))
    assert tally.found == ""


@pytest.mark.parametrize("story", OVER_A_SOCKET, ids=str)
async def test_a_kill_at_any_step_is_survived_with_a_database_elsewhere(
    story: Story,
    doer: Doer,
    distant_worlds: Worlds,
    in_all: Tally,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """The same with PostgreSQL, whose every message is a step."""
    tally, steps = await kill_at_calls(doer, distant_worlds, story, times(2, 60), MESSAGES)
    record_property(f"of {steps} steps", told(tally, in_all))
    assert tally.found == ""


# -- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("story", [one for one in STORIES if "large" not in one.title], ids=str)
async def test_no_file_has_its_name_before_the_disk_has_its_bytes(story: Story, doer: Doer, worlds: Worlds) -> None:
    """What a kill cannot show, but a power cut would: every file is synced after its last write and before its name."""
    await story.begin(worlds)
    with worlds.copy() as world:
        calls, _ = doer.watch(story.deed_in(world))
        assert named_unsynced(calls, world.directory) == []


@pytest.mark.parametrize("title", ["save", "save over", "delete", "undo an overwrite", "undo a deletion"])
async def test_the_record_is_committed_before_the_name_appears_or_goes(title: str, doer: Doer, worlds: Worlds) -> None:
    """The catalogue is the one commit point: the disk follows it, and nothing is committed after that."""
    story = next(one for one in STORIES if one.title == title)
    await story.begin(worlds)
    with worlds.copy() as world:
        calls, _ = doer.watch(story.deed_in(world))
    assert names_at(calls, NAME)
    assert commits_at(calls)
    assert max(commits_at(calls)) < min(names_at(calls, NAME))


@pytest.mark.parametrize("title", ["save", "save, no unnamed files", "restore", "restore chunks", "restore all"])
async def test_a_file_that_could_not_be_synced_never_gets_its_name(title: str, doer: Doer, worlds: Worlds) -> None:
    """EIO from fsync or syncfs: nobody knows what the disk holds, so the file is thrown away."""
    story = next(one for one in STORIES if one.title == title)
    await story.begin(worlds)
    with worlds.copy() as world:
        calls, _ = doer.watch(story.deed_in(world))
        syncs = [call for call in calls if "sync" in call.name and str(world.directory) in call.arguments]
    assert syncs
    for sync in syncs:
        with worlds.copy() as world:
            ending = doer.spoil(story.deed_in(world), sync, "error=EIO")
            assert ending.is_clean
            left = files_below(world.directory)
            assert set(left) < set(story.fates)
            assert NAME not in left


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("story", STORIES, ids=str)
async def test_an_error_of_any_call_ends_in_success_or_in_a_clean_error(
    story: Story,
    doer: Doer,
    worlds: Worlds,
    in_all: Tally,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """A full, broken, protected or busy disk, too many open files: a right answer or an error, never a torn file, a
    wrong answer, a hang, or "no such name"; and afterwards the laws hold as after a kill.
    """
    tally = Tally()
    await story.begin(worlds)
    with worlds.copy() as world:
        calls, right = doer.watch(story.deed_in(world), f"{CHANGES},{QUESTIONS}")
    for number, call in enumerate(some_of([call for call in calls if call.errors], times(1, 80))):
        error = random.choice(call.errors)
        with worlds.copy() as world:
            ending = doer.spoil(story.deed_in(world), call, f"error={error}")
            tally.refusals += 1
            judge = Judge(story, world, ending, tally, f"{error} from {call}")
            judge.judge_answer(ending, right)
            await judge.judge(again_first=number % 2 == 0)
    record_property(f"of {len(calls)} calls", told(tally, in_all))
    assert tally.found == ""


async def test_a_deleted_file_that_cannot_be_looked_at_is_reported(doer: Doer, worlds: Worlds) -> None:
    """A restore that could not tell whether a deleted name is still on the disk says so; it is not "all is well"."""
    await REMOVE.begin(worlds)
    with worlds.copy() as world:
        calls, _ = doer.watch(REMOVE.deed_in(world), f"{CHANGES},{QUESTIONS}")
    looks = [call for call in calls if call.name in LOOKS and f"{world.directory}" in call.arguments]
    assert looks
    for look in looks:
        with worlds.copy() as world:
            said = doer.spoil(REMOVE.deed_in(world), look, "error=EIO").said
            if files_below(world.directory):
                assert "raised" in said or any(is_problem for _, _, is_problem in said["done"])


# -- workers --------------------------------------------------------------------------------------------------------


async def test_workers_that_die_under_load_take_nothing_acknowledged_with_them(
    tmp_path: Path,
    directory: Path,
    database_url: str,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """Four workers, one of them killed again and again, and the disk wiped meanwhile: every acknowledged upload stays
    readable to the byte, every acknowledged deletion stays, and no answer is wrong.
    """
    async with UploadStore(directory, database_url) as store:
        await store.database.create_tables()
    kills = 0
    async with workers(tmp_path, Faults(directory=str(directory), database=database_url)) as server:
        crowd = Crowd(server, directory)
        async with crowd.at_work():
            while kills < times(4, 220):
                await asyncio.sleep(random.uniform(0.2, 0.8))
                kills += kill_one(server)
                assert crowd.book.breaches == []
        await asyncio.sleep(2.5)  # a worker remembers for 2 s that a name is not there
        await crowd.look_at_everything()
    record_property("kills", f"{kills}; {dict(crowd.book.done)}; breaches {len(crowd.book.breaches)}")
    assert crowd.book.breaches == []
    assert crowd.book.done["saved"] > kills // 4
    assert command("restore_images", "--verify", directory=directory, database=database_url)[0] == 0
    code, report = command("test_image_storage", directory=directory, database=database_url)
    assert (code, report["problems"]) == (0, [])
    assert set(files_below(directory)) <= set(crowd.book.entries)
