"""A process is killed, or gets an error, at any of its system calls: every name stays absent or whole, acknowledged
saves and deletions last, and the next run mends the rest.
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
from tests.support.crash_checks import CrashChecker, CrashReport, damage
from tests.support.crash_scenarios import DeploymentTemplate, ExpectedBytes, Scenario
from tests.support.load import LoadClients
from tests.support.operation_runner import OperationRunner
from tests.support.operations import Operation
from tests.support.postgres import PostgresServer
from tests.support.process_faults import Faults
from tests.support.raw_sql import execute
from tests.support.requirements import needs
from tests.support.run_script import run_script
from tests.support.sample_data import noise
from tests.support.store_state import drain_quarantine, files_below
from tests.support.strace import CHANGES, FREQUENT, MESSAGES, READS, Call, commits_at, named_before_synced, names_at
from tests.support.workers import kill_a_worker, running_workers

NAME = "cats/tom.jpg"
OLD, NEW = noise(1000), noise(1001)
MIDDLE, LARGE = noise(3 * CHUNK + 77), noise(4 * 2**20 + CHUNK + 78)
"""Several chunks; more chunks than one transaction writes."""
MANY = {f"cats/{number}.jpg": noise(2000 + number) for number in range(5)} | {"dogs/rex.jpg": MIDDLE}


# -- the states before ----------------------------------------------------------------------------------------------


async def nothing(store: UploadStore) -> None:
    """Leave everything empty: there is no uploads directory."""


def saved(*versions: bytes, is_on_disk: bool = True) -> Callable[[UploadStore], Any]:
    """Return a function that saves the name once or several times."""

    async def prepare(store: UploadStore) -> None:
        for version in versions:
            await store.save(NAME, version)
        if not is_on_disk:
            store.disk.path_of(NAME).unlink()

    return prepare


async def saved_and_deleted(store: UploadStore) -> None:
    """Leave a tombstone."""
    await store.save(NAME, OLD)
    await store.delete(NAME)


async def only_in_database(store: UploadStore) -> None:
    """Save many files, and lose the whole disk."""
    for name, data in MANY.items():
        await store.save(name, data)
    shutil.rmtree(store.disk.path)


async def deleted_and_on_disk(store: UploadStore) -> None:
    """Leave a tombstone whose file is on the disk again."""
    await saved_and_deleted(store)
    path = store.disk.path_of(NAME)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(OLD)


async def differing_on_disk(store: UploadStore) -> None:
    """Save many files, and overwrite two of them on the disk."""
    for name, data in MANY.items():
        await store.save(name, data)
    for name in DIFFERING:
        store.disk.path_of(name).write_bytes(bytes(len(MANY[name])))


async def only_on_disk(store: UploadStore) -> None:
    """Put many files on the disk without a save, one of them large, and one of them deleted before."""
    await store.save(NAME, OLD)
    await store.delete(NAME)
    for name, data in (MANY | {"large.jpg": LARGE, NAME: OLD}).items():
        store.disk.path_of(name).parent.mkdir(parents=True, exist_ok=True)
        store.disk.path_of(name).write_bytes(data)


async def damaged_in_database(store: UploadStore) -> None:
    """Save a file, and damage its bytes in the database."""
    await store.save(NAME, MIDDLE)
    await damage(store, NAME)


async def one_on_disk(store: UploadStore) -> None:
    """Put one file on the disk without a save."""
    store.disk.path_of(NAME).parent.mkdir(parents=True)
    store.disk.path_of(NAME).write_bytes(MIDDLE)


async def full_of_leftovers(store: UploadStore) -> None:
    """Overwrite and delete names, and leave the chunks of an upload that broke off."""
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


# -- the scenarios --------------------------------------------------------------------------------------------------


def scenario(title: str, action: str, expected: ExpectedBytes, prepare: Any, *, variant: str = "") -> Scenario:
    """Return a scenario with one name."""
    size = len(expected.after or b"")
    return Scenario(title, Operation(action, "", "", NAME, size, variant), {NAME: expected}, prepare)


def scenario_of_many(title: str, action: str, prepare: Any, more: dict[str, ExpectedBytes]) -> Scenario:
    """Return a scenario with many names."""
    expected = {name: ExpectedBytes(data, data) for name, data in MANY.items()}
    return Scenario(title, Operation(action, "", ""), expected | more, prepare)


SAME_OLD, SAME_MIDDLE, SAME_LARGE = ExpectedBytes(OLD, OLD), ExpectedBytes(MIDDLE, MIDDLE), ExpectedBytes(LARGE, LARGE)
NEW_FILE, OVERWRITTEN, DELETED = ExpectedBytes(None, NEW), ExpectedBytes(OLD, NEW), ExpectedBytes(OLD, None)
DELETED_ON_DISK = ExpectedBytes(None, None, OLD)
DIFFERING = {
    name: ExpectedBytes(MANY[name], MANY[name], bytes(len(MANY[name]))) for name in ("cats/1.jpg", "dogs/rex.jpg")
}

SCENARIOS = [
    scenario("save", "save", NEW_FILE, nothing),
    scenario("save over", "save", OVERWRITTEN, saved(OLD)),
    scenario("save large", "save", ExpectedBytes(None, LARGE), nothing),
    scenario("save large over", "save", ExpectedBytes(MIDDLE, LARGE), saved(MIDDLE)),
    scenario("save, no unnamed files", "save", ExpectedBytes(None, MIDDLE), nothing, variant="named"),
    scenario("save over, no unnamed files", "save", OVERWRITTEN, saved(OLD), variant="named"),
    scenario("save what was deleted", "save", NEW_FILE, saved_and_deleted),
    scenario("restore", "restore", SAME_OLD, saved(OLD, is_on_disk=False)),
    scenario("restore chunks", "restore", SAME_MIDDLE, saved(MIDDLE, is_on_disk=False)),
    scenario("restore, no unnamed files", "restore", SAME_MIDDLE, saved(MIDDLE, is_on_disk=False), variant="named"),
    scenario("visit", "visit", SAME_OLD, saved(NEW, OLD, is_on_disk=False)),
    scenario("visit large", "visit", SAME_MIDDLE, saved(MIDDLE, is_on_disk=False), variant="streamed"),
    scenario("delete", "delete", DELETED, saved(OLD)),
    scenario("delete what is only on disk", "delete", ExpectedBytes(MIDDLE, None), one_on_disk),
    scenario("undo an overwrite", "undo", ExpectedBytes(NEW, OLD), saved(OLD, NEW)),
    scenario("undo a deletion", "undo", ExpectedBytes(None, OLD), saved_and_deleted),
    scenario("adopt", "adopt", SAME_MIDDLE, one_on_disk),
    scenario("purge", "purge", ExpectedBytes(NEW, NEW), full_of_leftovers),
    scenario("migrate damage away", "migrate", SAME_MIDDLE, damaged_in_database),
    scenario_of_many("restore all", "restore all", only_in_database, {}),
    scenario_of_many("heal all", "heal all", differing_on_disk, DIFFERING),
    scenario_of_many("migrate", "migrate", only_on_disk, {"large.jpg": SAME_LARGE, NAME: DELETED_ON_DISK}),
]
REMOVE = scenario("remove what was deleted", "heal all", DELETED_ON_DISK, deleted_and_on_disk)
WITH_POSTGRES = [one for one in SCENARIOS if one.title in ("save large over", "delete", "undo an overwrite", "migrate")]
LOOKUPS = ("openat", "openat2", "newfstatat", "stat", "lstat", "statx", "getdents64")
"""The calls that tell whether a file exists."""


# -- fixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperationRunner]:
    """A runner of operations under strace."""
    if shutil.which("strace") is None:
        needs("strace", "apt-get install strace")
    with OperationRunner(tmp_path_factory.mktemp("runner")) as runner:
        yield runner


@pytest.fixture(scope="module")
def total() -> CrashReport:
    """The figures of all tests of this module."""
    return CrashReport()


@pytest.fixture
def template(tmp_path: Path) -> DeploymentTemplate:
    """A deployment with SQLite."""
    return DeploymentTemplate(tmp_path)


@pytest.fixture
def postgres_template(tmp_path: Path, postgres: PostgresServer) -> DeploymentTemplate:
    """A deployment with PostgreSQL."""
    return DeploymentTemplate(tmp_path, postgres)


def some_of(calls: list[Call], most: int) -> list[Call]:
    """Return at most `most` calls, two thirds of them rare ones."""
    calls = [call for call in calls if not call.arguments.startswith(("0<", "1<", "2<"))]
    if len(calls) <= most:
        return calls
    rare = [call for call in calls if call.name not in FREQUENT]
    chosen = random.sample(rare, min(len(rare), most * 2 // 3))
    left = [call for call in calls if call not in set(chosen)]
    return chosen + random.sample(left, most - len(chosen))


def figures(report: CrashReport, total: CrashReport) -> str:
    """Add the figures of one test to the total, and return both as text."""
    total.kills += report.kills
    total.errors += report.errors
    return f"{report.kills} kills, {report.errors} errors; {report} (in all {total.kills} and {total.errors})"


# -- kills ----------------------------------------------------------------------------------------------------------


async def kill_at_calls(
    runner: OperationRunner, template: DeploymentTemplate, scenario: Scenario, most: int, calls: str
) -> tuple[CrashReport, int]:
    """Kill the operation at up to `most` of its calls and check after each; return a report and the number of calls."""
    report = CrashReport()
    await scenario.set_up(template)
    with template.copy() as deployment:
        all_calls, _ = runner.trace(scenario.operation_in(deployment), calls)
    for number, call in enumerate(some_of(all_calls, most)):
        with template.copy() as deployment:
            result = runner.run_with_fault(scenario.operation_in(deployment), call, "signal=KILL")
            report.kills += result.is_killed
            assert result.is_killed or result.is_acknowledged, result
            checker = CrashChecker(scenario, deployment, result, report, f"killed before {call}")
            await checker.check(repeat_first=number % 2 == 0)
    return report, len(all_calls)


@pytest.mark.parametrize("scenario", [*SCENARIOS, REMOVE], ids=str)
async def test_a_kill_at_any_step_leaves_every_name_absent_or_whole_and_the_next_run_mends_the_rest(
    scenario: Scenario,
    runner: OperationRunner,
    template: DeploymentTemplate,
    total: CrashReport,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """After a SIGKILL before any call that changes or syncs something, no name is torn, nothing acknowledged is lost,
    nothing deleted comes back, no litter stays, and a repetition mends everything.
    """
    report, steps = await kill_at_calls(runner, template, scenario, times(1, 90), CHANGES)
    record_property(f"of {steps} steps", figures(report, total))
    assert report.text == ""


@pytest.mark.parametrize("scenario", WITH_POSTGRES, ids=str)
async def test_a_kill_at_any_step_is_survived_with_postgres(
    scenario: Scenario,
    runner: OperationRunner,
    postgres_template: DeploymentTemplate,
    total: CrashReport,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """The same holds with PostgreSQL, where every message to the server is a step as well."""
    report, steps = await kill_at_calls(runner, postgres_template, scenario, times(2, 60), MESSAGES)
    record_property(f"of {steps} steps", figures(report, total))
    assert report.text == ""


# -- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", [one for one in SCENARIOS if "large" not in one.title], ids=str)
async def test_no_file_has_its_name_before_the_disk_has_its_bytes(
    scenario: Scenario, runner: OperationRunner, template: DeploymentTemplate
) -> None:
    """Every file is synced after its last write and before it gets its name: a power cut, unlike a kill, needs this."""
    await scenario.set_up(template)
    with template.copy() as deployment:
        calls, _ = runner.trace(scenario.operation_in(deployment))
        assert named_before_synced(calls, deployment.directory) == []


@pytest.mark.parametrize("title", ["save", "save over", "delete", "undo an overwrite", "undo a deletion"])
async def test_the_record_is_committed_before_the_name_appears_or_goes(
    title: str, runner: OperationRunner, template: DeploymentTemplate
) -> None:
    """The last commit comes before the file appears or goes: the record is the one commit point."""
    scenario = next(one for one in SCENARIOS if one.title == title)
    await scenario.set_up(template)
    with template.copy() as deployment:
        calls, _ = runner.trace(scenario.operation_in(deployment))
    assert names_at(calls, NAME)
    assert commits_at(calls)
    assert max(commits_at(calls)) < min(names_at(calls, NAME))


@pytest.mark.parametrize("title", ["save", "save, no unnamed files", "restore", "restore chunks", "restore all"])
async def test_a_file_that_could_not_be_synced_never_gets_its_name(
    title: str, runner: OperationRunner, template: DeploymentTemplate
) -> None:
    """A file is thrown away if fsync or syncfs fails with EIO, because its bytes on the disk are then unknown."""
    scenario = next(one for one in SCENARIOS if one.title == title)
    await scenario.set_up(template)
    with template.copy() as deployment:
        calls, _ = runner.trace(scenario.operation_in(deployment))
        syncs = [call for call in calls if "sync" in call.name and str(deployment.directory) in call.arguments]
    assert syncs
    for sync in syncs:
        with template.copy() as deployment:
            result = runner.run_with_fault(scenario.operation_in(deployment), sync, "error=EIO")
            assert result.is_clean
            left = files_below(deployment.directory)
            assert set(left) < set(scenario.expected)
            assert NAME not in left


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
async def test_an_error_of_any_call_ends_in_success_or_in_a_clean_error(
    scenario: Scenario,
    runner: OperationRunner,
    template: DeploymentTemplate,
    total: CrashReport,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """On a full, broken, read-only or busy disk, or with too many open files, an operation returns a right answer or
    raises an error: never a torn file, a wrong answer, a hang or "no such name". Afterwards the laws hold as after a
    kill.
    """
    report = CrashReport()
    await scenario.set_up(template)
    with template.copy() as deployment:
        calls, right = runner.trace(scenario.operation_in(deployment), f"{CHANGES},{READS}")
    for number, call in enumerate(some_of([call for call in calls if call.errors], times(1, 80))):
        error = random.choice(call.errors)
        with template.copy() as deployment:
            result = runner.run_with_fault(scenario.operation_in(deployment), call, f"error={error}")
            report.errors += 1
            checker = CrashChecker(scenario, deployment, result, report, f"{error} from {call}")
            checker.check_answer(result, right)
            await checker.check(repeat_first=number % 2 == 0)
    record_property(f"of {len(calls)} calls", figures(report, total))
    assert report.text == ""


async def test_a_deleted_file_that_cannot_be_looked_at_is_reported(
    runner: OperationRunner, template: DeploymentTemplate
) -> None:
    """A restore reports a problem if it cannot tell whether the file of a deleted name is still on the disk."""
    await REMOVE.set_up(template)
    with template.copy() as deployment:
        calls, _ = runner.trace(REMOVE.operation_in(deployment), f"{CHANGES},{READS}")
    lookups = [call for call in calls if call.name in LOOKUPS and f"{deployment.directory}" in call.arguments]
    assert lookups
    for lookup in lookups:
        with template.copy() as deployment:
            output = runner.run_with_fault(REMOVE.operation_in(deployment), lookup, "error=EIO").output
            if files_below(deployment.directory):
                assert "raised" in output or any(is_problem for _, _, is_problem in output["answer"])


# -- workers --------------------------------------------------------------------------------------------------------


async def test_workers_that_die_under_load_take_nothing_acknowledged_with_them(
    tmp_path: Path,
    directory: Path,
    database_url: str,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """While workers are killed again and again and the disk is wiped, every acknowledged upload stays readable to the
    byte, every acknowledged deletion stays, and no answer is wrong.
    """
    async with UploadStore(directory, database_url, settled_after=0.0) as store:
        await store.database.create_tables()
    kills = 0
    async with running_workers(tmp_path, Faults(directory=str(directory), database=database_url)) as server:
        clients = LoadClients(server, directory)
        journal = clients.journal
        async with clients.running():
            while kills < times(4, 220):
                await asyncio.sleep(random.uniform(0.2, 0.8))
                kills += kill_a_worker(server)
                assert journal.violations == []
        await asyncio.sleep(2.5)  # the negative cache of a worker keeps a name for 2 s
        await clients.check_every_name()
    record_property("kills", f"{kills}; {dict(journal.counts)}; violations {len(journal.violations)}")
    assert journal.violations == []
    assert journal.counts["saved"] > kills // 4
    assert run_script("restore_images", "--verify", directory=directory, database=database_url)[0] == 0
    code, report = run_script("test_image_storage", directory=directory, database=database_url)
    assert (code, report["problems"]) == (0, [])
    async with UploadStore(directory, database_url) as store:
        assert await drain_quarantine(store) == []  # a killed worker may have moved a copy away
    assert set(files_below(directory)) <= set(journal.names)
