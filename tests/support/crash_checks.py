"""Check the laws of a deployment after an operation was interrupted in it."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256

from selfheal import SelfHealError, UploadStore, bulk
from tests.support.crash_scenarios import Deployment, Scenario
from tests.support.operation_runner import RunResult
from tests.support.operations import Operation, perform
from tests.support.raw_sql import execute, sql
from tests.support.store_state import drain_quarantine, files_below, in_database, in_quarantine, on_disk

VIOLATIONS = ("torn", "lost", "resurrected", "litter", "not mended", "wrong answer")
ORPHANED_CHUNKS = "SELECT count(*) FROM image_chunk WHERE sha256 NOT IN (SELECT sha256 FROM image_blob)"
UNREFERENCED_BLOBS = (
    "SELECT count(*) FROM image_blob WHERE sha256 NOT IN (SELECT sha256 FROM image_history)"
    " AND sha256 NOT IN (SELECT sha256 FROM image_storage WHERE deleted_at IS NULL)"
)


@dataclass
class CrashReport:
    """The number of interrupted operations, and the laws that they have violated."""

    kills: int = 0
    errors: int = 0
    violations: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in VIOLATIONS})

    def __str__(self) -> str:
        return ", ".join(f"{kind} {len(found)}" for kind, found in self.violations.items())

    @property
    def text(self) -> str:
        """Every violation, one per line."""
        return "\n".join(f"{kind}: {words}" for kind, found in self.violations.items() for words in found)


class CrashChecker:
    """Looks at one deployment after one interruption, and adds every violation to the report."""

    def __init__(
        self, scenario: Scenario, deployment: Deployment, result: RunResult, report: CrashReport, interruption: str
    ) -> None:
        self._scenario = scenario
        self._deployment = deployment
        self._is_done = result.is_acknowledged
        self._report = report
        self._interruption = interruption

    def check_answer(self, result: RunResult, right: object) -> None:
        """Check that the answer is the usual one, or an error other than "no such name": every name here exists."""
        output = result.output
        if not result.is_clean or output.get("raised") == "NotStored":
            self._add("wrong answer", f"it ended with {result}")
        elif isinstance(right, list):
            wrong = [one for one in output.get("answer", []) if one not in right and one[1] != "failed"]
            if wrong or (result.is_acknowledged and sorted(output["answer"]) != sorted(right)):
                self._add("wrong answer", f"it answered {output['answer']}")
        elif result.is_acknowledged and output["answer"] != right:
            self._add("wrong answer", f"it answered {output['answer']}")

    async def check(self, *, repeat_first: bool) -> None:
        """Check the disk as it was left, what a new process serves, and the state after a repetition and after mending.

        `repeat_first` repeats the operation before anything is mended.
        """
        self._check_disk("as it was left")
        async with self._deployment.store() as store:
            self._check_for_litter(store)
            await self._check_visits(store)
            if not repeat_first:
                await self._mend(store)
                await self._check_disk_and_database(store, "after mending")
            await self._repeat(store)
            await self._mend(store)
            await self._check_disk_and_database(store, "after a repetition and mending", is_done=True)
            await self._check_visits(store)
            await self._check_that_nothing_is_thrown_away(store)
            await self._check_for_leftovers(store)

    def _add(self, kind: str, words: str) -> None:
        self._report.violations[kind].append(f"{self._scenario.title}, {self._interruption}: {words}")

    def _allowed(self, name: str) -> set[bytes | None]:
        expected = self._scenario.expected[name]
        return {expected.after} if self._is_done else {expected.before, expected.after}

    def _check_bytes(self, name: str, data: bytes | None, where: str, *also_allowed: bytes | None) -> None:
        """Add a violation if the bytes are neither those before nor those after the operation."""
        expected = self._scenario.expected[name]
        if data in {*self._allowed(name), *also_allowed}:
            return
        if data is None:
            self._add("lost", f"{name} is absent {where}")
        elif data not in (expected.before, expected.after, expected.other_on_disk):
            self._add("torn", f"{name} has {len(data)} bytes that were never saved {where}")
        elif expected.after is None:
            self._add("resurrected", f"{name} is back {where}")
        else:
            self._add("lost", f"{name} has old bytes {where}")

    def _check_disk(self, when: str) -> None:
        for file in files_below(self._deployment.directory):
            if file.startswith((".selfheal-tmp/", ".selfheal-quarantine/")):
                continue
            if file not in self._scenario.expected:
                self._add("litter", f"{file} {when}")
                continue
            expected = self._scenario.expected[file]
            data = (self._deployment.directory / file).read_bytes()
            if data not in (expected.before, expected.after, expected.other_on_disk):
                self._add("torn", f"{file} has {len(data)} bytes that were never saved, {when}")

    def _check_for_litter(self, store: UploadStore) -> None:
        for file in files_below(self._deployment.directory):
            if file not in self._scenario.expected and not file.startswith(".selfheal-quarantine/"):
                self._add("litter", f"{file} after a new process has started")
        if (self._deployment.directory / ".selfheal-tmp").exists():
            self._add("litter", "the temporary directory after a new process has started")
        versions = [(one.before, one.after, one.other_on_disk) for one in self._scenario.expected.values()]
        whole = {data for version in versions for data in version}
        if any(data not in whole for data in in_quarantine(store)):
            self._add("torn", "a file in quarantine")

    async def _check_visits(self, store: UploadStore) -> None:
        """Check what visitors get at once, before anything is mended."""
        for name, expected in self._scenario.expected.items():
            is_healed = self._is_done and self._scenario.operation.action == "heal all"
            also_allowed = () if is_healed else (expected.other_on_disk,)
            try:
                digest = await perform(store, Operation("visit", "", "", name))
            except (SelfHealError, OSError) as error:
                self._add("lost", f"{name} cannot be read: {error!r}")
                continue
            versions = (expected.before, expected.after, expected.other_on_disk)
            data = next((data for data in versions if _digest(data) == digest), b"torn")
            self._check_bytes(name, data, "for a visitor", *also_allowed)
        await store.tasks.drain(30)

    async def _check_disk_and_database(self, store: UploadStore, when: str, *, is_done: bool = False) -> None:
        self._is_done = self._is_done or is_done
        for name in self._scenario.expected:
            try:
                recorded = await in_database(store, name)
            except (SelfHealError, AssertionError) as error:
                self._add("torn", f"{name} in the database, {when}: {error}")
                continue
            self._check_bytes(name, recorded, f"in the database, {when}")
            if on_disk(store, name) != recorded:
                self._add("not mended", f"{name} differs between disk and database, {when}")

    async def _repeat(self, store: UploadStore) -> None:
        """Perform the operation again, except an undo that is done: a second one would go back."""
        if self._scenario.operation.action == "undo":
            name = self._scenario.operation.name
            if await in_database(store, name) == self._scenario.expected[name].after:
                return
        try:
            await perform(store, self._scenario.operation_in(self._deployment))
        except (SelfHealError, OSError) as error:
            self._add("not mended", f"the operation fails when it is repeated: {error!r}")

    async def _mend(self, store: UploadStore) -> None:
        for run in (bulk.restore(store, verify=True), bulk.migrate(store), bulk.verify(store)):
            async with aclosing(run) as results:
                for result in [result async for result in results]:
                    if result.is_problem:
                        self._add("not mended", f"{run.__qualname__} reports {result}")

    async def _check_that_nothing_is_thrown_away(self, store: UploadStore) -> None:
        """Check that copies that differed are versions of their names, once what was moved away is drained."""
        if left := await drain_quarantine(store):
            self._add("not mended", f"in quarantine stays {left}")
        for name, expected in self._scenario.expected.items():
            if expected.other_on_disk is not None:
                kept = {_digest(on_disk(store, name)), *(one.sha256 for one in await store.database.history(name))}
                if _digest(expected.other_on_disk) not in kept:
                    self._add("lost", f"{name}: the other bytes on disk are not a version")

    async def _check_for_leftovers(self, store: UploadStore) -> None:
        """Check that a purge, for which every upload is old, leaves no unreferenced bytes."""
        await store.database.purge(timedelta(days=30), grace=timedelta(seconds=-2))
        for query in (ORPHANED_CHUNKS, UNREFERENCED_BLOBS):
            [(count,)] = await sql(store.database.url, query)
            if count:
                self._add("litter", f"{count} rows are left by a purge: {query}")
        if store.database.url.get_backend_name() == "sqlite":
            [(answer,)] = await sql(store.database.url, "PRAGMA integrity_check")
            if answer != "ok":
                self._add("torn", f"the database itself: {answer}")
        for name in self._scenario.expected:
            self._check_bytes(name, await in_database(store, name), "after a purge")


def _digest(data: bytes | None) -> str | None:
    return None if data is None else sha256(data).hexdigest()


async def damage(store: UploadStore, name: str) -> None:
    """Overwrite the chunks of a name's record with other bytes."""
    record = await store.database.find(name)
    assert record is not None
    await execute(store, "UPDATE image_chunk SET data = :data WHERE sha256 = :key", data=b"bad", key=record.sha256)
