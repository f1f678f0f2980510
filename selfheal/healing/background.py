"""Background checks: files that were served, and names that other nodes changed, are compared with their records."""

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass

from .. import names
from ..aio.tasks import Tasks
from ..disk.directory import UploadsDirectory
from ..disk.listing import Entry, walk
from ..disk.open_file import Identity, identity_of
from ..errors import DatabaseUnavailable, FileChanged, SelfHealError
from ..events import Events, logger
from ..sql.models import Record
from .changes import Follower
from .disk_copies import DiskCopies
from .newest import NewestRecords
from .pace import Pace
from .reconcile import Judged, Reconciler

PAUSE = 5.0  # seconds without questions after the database gave no answer
FOLLOW_EVERY = 2.0  # seconds, at least, between two questions for the changes of other nodes
CHANGING_FOR = 60.0
"""Seconds in which every hit of a name is compared that a caller's own transaction changes; later it is followed."""
CHANGING_AT_MOST = 10_000
SEEN_FOR = 900.0  # seconds after which a file that was compared is compared again
SEEN_AT_MOST = 200_000
CHECKS_AT_ONCE = 256
DRAIN_EVERY = 300.0  # seconds between two looks into the quarantine


@dataclass(eq=False)
class BackgroundChecks:
    """Compares files with their records, in tasks that no request waits for."""

    disk: UploadsDirectory
    reconciler: Reconciler
    copies: DiskCopies
    follower: Follower
    events: Events
    tasks: Tasks

    def __post_init__(self) -> None:
        self._seen: dict[str, Judged] = {}
        self._seen_before: dict[str, Judged] = {}
        self._seen_until = time.monotonic() + SEEN_FOR
        self._newest = NewestRecords()
        self._changing: dict[str, float] = {}
        self._forget_tasks()
        self.tasks.home.on_new_loop(self._forget_tasks)
        self._pace = Pace()
        self._paused_until = self._follow_from = 0.0
        self._changed_meanwhile: set[str] = set()
        self._must_sweep = False
        self._drain_from = 0.0

    def hit(self, name: str, identity: Identity, *, adopt: bool) -> None:
        """A file was served: compare it with its record, if this process has not done so yet."""
        judged = self._seen.get(name)
        if judged is None or judged.identity != identity:
            self.tasks.home.soon(self._compare, name, identity, adopt=adopt)

    def judged(self, name: str, identity: Identity) -> Judged | None:
        """Return what is known of a file: None unless this process has found that it agrees with its record."""
        judged = self._seen.get(name)
        return judged if judged is not None and judged.identity == identity else None

    def follow(self, *, adopt: bool = True) -> None:
        """A request came: ask for the changes of other nodes, if the last time is `FOLLOW_EVERY` seconds ago."""
        now = time.monotonic()
        if now >= self._follow_from and now >= self._paused_until:
            self.tasks.home.soon(self._start_following, adopt=adopt)

    def forget(self, name: str) -> None:
        """A name was changed: compare its file again at the next hit, and later if it is being compared now."""
        self._seen.pop(name, None)
        if name in self._checking:
            self._changed_meanwhile.add(name)

    def expect(self, name: str) -> None:
        """A name will be changed when the caller's own transaction commits: compare its file at every hit."""
        now = time.monotonic()
        if len(self._changing) >= CHANGING_AT_MOST:
            self._changing = {name: until for name, until in self._changing.items() if until > now}
        self._changing[name] = now + CHANGING_FOR

    def compare_now(self, name: str) -> None:
        """A caller's own transaction that changed a name was committed."""
        self.forget(name)
        self.tasks.start(self._check_all([name], adopt=False))

    def retry(self, name: str) -> None:
        """The copy of a name could not be cleared: try it again later, whether it is hit or not."""
        self._pace.slow_down(name)

    async def compare(self, name: str) -> bool:
        """Compare a name's file with its record now, whether it is hit or not; False if that has to be done again.

        Raises `DatabaseUnavailable` if the database gave no answer.
        """
        if name in self._checking:  # it may have begun before the file was changed
            await asyncio.wait((self._checking[name],))
        await self._check_all([name], adopt=True)
        if name in self._checking:
            await asyncio.wait((self._checking[name],))
        self._raise_if_paused()
        return self._pace.is_due(name)

    def know(self, record: Record) -> None:
        """A record was saved: a database that lacks it later went back in time."""
        self._newest.know(record.name, Judged((0, 0, 0, 0), record.generation, record.changed_at))

    def _forget_tasks(self) -> None:
        self._checking: dict[str, asyncio.Task[None]] = {}
        self._following: asyncio.Task[None] | None = None

    def _compare(self, name: str, identity: Identity, *, adopt: bool) -> None:
        if len(self._checking) < CHECKS_AT_ONCE and time.monotonic() >= self._paused_until and self._pace.is_due(name):
            self._start(name, identity, adopt=adopt)

    def _start_following(self, *, adopt: bool) -> None:
        if time.monotonic() >= self._seen_until:
            self._forget_all()
        if self._following is None or self._following.done():
            self._following = self.tasks.start(self._follow(adopt=adopt))

    async def _follow(self, *, adopt: bool) -> None:
        try:
            if await self.follower.went_back(self._newest.generations()):
                logger.warning("the database went back in time: what this node's disk has is compared with it again")
                self._forget_all()
                self._newest.clear()
                self._must_sweep = True
            if self._must_sweep:
                self._must_sweep = not await self._sweep(adopt=adopt)
            async with aclosing(self.follower.pages()) as pages:
                async for page in pages:
                    for name in page:  # all of them first: the rest may be cancelled
                        self.forget(name)
                    await self._check_all(page, adopt=False)
            await self._check_all(self._pace.due(), adopt=adopt)
            if not self._must_sweep:
                await self.follower.remember(self._newest.generations())
            if time.monotonic() >= self._drain_from:
                self._drain_from = time.monotonic() + DRAIN_EVERY
                await self.copies.drain()
        except DatabaseUnavailable:
            self._paused_until = time.monotonic() + PAUSE
        except OSError as error:
            self.events.log_once(logging.WARNING, "follow", f"the changes of other nodes cannot be followed: {error}")
        finally:
            self._follow_from = time.monotonic() + FOLLOW_EVERY

    async def _sweep(self, *, adopt: bool) -> bool:
        """Compare every file on disk, one process of a node at a time; False if another one does it now."""
        with self.disk.only_process() as is_alone:
            if is_alone and not await self.follower.is_remembered():
                entries = walk(self.disk)
                while batch := await self.disk.threads.run(_next_names, entries):
                    await self._check_all(batch, adopt=adopt)
            return is_alone

    async def _check_all(self, changed: Iterable[str], *, adopt: bool) -> None:
        """Start to compare the files of names that are on the disk; wait for none of them, but not to have too many.

        Raises `DatabaseUnavailable` if the database stopped answering: then the rest has to be compared later.
        """
        there, failed = await self.disk.threads.run(_identities, self.disk, wanted := list(changed))
        for name in failed:
            self._pace.slow_down(name)
        for name in wanted:
            if name in there:
                await self._start_soon(name, there[name], adopt=adopt)
            elif name not in failed:
                self._pace.forget(name)

    async def _start_soon(self, name: str, identity: Identity, *, adopt: bool) -> None:
        if len(self._checking) >= CHECKS_AT_ONCE:
            await asyncio.wait(self._checking.values(), return_when=asyncio.FIRST_COMPLETED)
        self._raise_if_paused()
        self._start(name, identity, adopt=adopt)

    def _raise_if_paused(self) -> None:
        if time.monotonic() < self._paused_until:
            raise DatabaseUnavailable("the database stopped answering while files were compared")

    def _start(self, name: str, identity: Identity, *, adopt: bool) -> None:
        if name not in self._checking:
            self._checking[name] = self.tasks.start(self._check(name, identity, adopt=adopt))

    async def _check(self, name: str, identity: Identity, *, adopt: bool) -> None:
        try:
            judged = await self.reconciler.agrees(name, identity)
            before = self._seen.get(name) or self._seen_before.get(name)
            if judged is None:
                judged = await self.reconciler.check(name, adopt=adopt, before=before)
        except FileChanged:
            self._pace.slow_down(name)
        except DatabaseUnavailable:
            self._paused_until = time.monotonic() + PAUSE
            self._pace.slow_down(name)
        except (SelfHealError, OSError) as error:
            why = f"{name!r} could not be compared with its record: {error}"
            self.events.log_once(logging.WARNING, f"compare {type(error).__name__}", why)
            self._pace.slow_down(name)
        else:
            self._pace.forget(name)
            if name in self._changed_meanwhile:
                self._pace.slow_down(name)
            elif judged is not None:
                self._remember(name, judged)
        finally:
            self._checking.pop(name, None)
            self._changed_meanwhile.discard(name)

    def _remember(self, name: str, judged: Judged) -> None:
        self._newest.know(name, judged)
        if self._changing.get(name, 0.0) > time.monotonic():
            return
        if len(self._seen) >= SEEN_AT_MOST:
            self._forget_all()
        self._seen[name] = judged

    def _forget_all(self) -> None:
        self._seen, self._seen_before = {}, self._seen
        self._seen_until = time.monotonic() + SEEN_FOR


def _next_names(entries: Iterable[Entry]) -> list[str]:
    batch = itertools.islice(entries, CHECKS_AT_ONCE)
    return [entry.name for entry in batch if not entry.fault and names.is_valid(entry.name)]


def _identities(disk: UploadsDirectory, wanted: Iterable[str]) -> tuple[dict[str, Identity], set[str]]:
    """Return the identities of the files that are there, and the names that cannot be looked for now."""
    found, failed = {}, set()
    for name in wanted:
        try:
            there = disk.stat(name)
        except OSError:
            failed.add(name)
            continue
        if there is not None:
            found[name] = identity_of(there)
    return found, failed
