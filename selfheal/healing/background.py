"""Background checks: files that were served, and names that other nodes changed, are compared with their records."""

import asyncio
import contextlib
import time
from dataclasses import dataclass

from ..aio.tasks import Tasks
from ..disk.directory import UploadsDirectory
from ..disk.open_file import Identity, identity_of
from ..errors import DatabaseUnavailable, FileChanged, SelfHealError
from ..events import logger
from .changes import Follower
from .reconcile import SETTLED_AFTER, Reconciler, age

PAUSE = 5.0  # seconds without questions after the database gave no answer
FOLLOW_EVERY = 2.0  # seconds, at least, between two questions for the changes of other nodes
CHANGING_FOR = 60.0
"""Seconds in which every hit of a changed name is compared: how long a caller's own transaction may take."""
CHANGING_AT_MOST = 10_000
SEEN_AT_MOST = 200_000
CHECKS_AT_ONCE = 256


@dataclass(eq=False)
class BackgroundChecks:
    """Compares files with their records, in tasks that no request waits for."""

    disk: UploadsDirectory
    reconciler: Reconciler
    follower: Follower
    tasks: Tasks

    def __post_init__(self) -> None:
        self._seen: dict[str, Identity] = {}
        self._changing: dict[str, float] = {}
        self._checking: set[str] = set()
        self._paused_until = self._follow_from = 0.0
        self._following: asyncio.Task[None] | None = None

    def hit(self, name: str, identity: Identity, *, adopt: bool) -> None:
        """A file was served: compare it with its record, if this process has not done so yet."""
        if self._seen.get(name) == identity or name in self._checking or len(self._checking) >= CHECKS_AT_ONCE:
            return
        if time.monotonic() < self._paused_until:
            return
        self._checking.add(name)
        self.tasks.start(self._check(name, identity, adopt=adopt))

    def follow(self) -> None:
        """A request came: ask for the changes of other nodes, if the last time is `FOLLOW_EVERY` seconds ago."""
        now = time.monotonic()
        if now < self._follow_from or now < self._paused_until:
            return
        if self._following is None or self._following.done():
            self._following = self.tasks.start(self._follow())

    def forget(self, name: str) -> None:
        """A name was changed: compare its file again at the next hit."""
        self._seen.pop(name, None)

    def expect(self, name: str) -> None:
        """A name will be changed when the caller's own transaction commits: compare its file at every hit."""
        now = time.monotonic()
        if len(self._changing) >= CHANGING_AT_MOST:
            self._changing = {name: until for name, until in self._changing.items() if until > now}
        self._changing[name] = now + CHANGING_FOR

    async def _follow(self) -> None:
        try:
            changed = await self.follower.changed()
            if changed is None:
                self._seen.clear()
            for name in changed or ():  # all of them first: the rest may be cancelled
                self.forget(name)
            for name in changed or ():
                with contextlib.suppress(OSError):  # reported at the next hit
                    there = await self.disk.threads.run(self.disk.stat, name)
                    if there is not None:
                        await self._check(name, identity_of(there), adopt=False)
        except DatabaseUnavailable:
            self._paused_until = time.monotonic() + PAUSE
        finally:
            self._follow_from = time.monotonic() + FOLLOW_EVERY

    async def _check(self, name: str, identity: Identity, *, adopt: bool) -> None:
        try:
            if not await self.reconciler.agrees(name, identity):
                await self._wait_until_settled(name, identity)
                await self.reconciler.check(name, adopt=adopt)
        except FileChanged:
            pass  # compared at the next hit
        except DatabaseUnavailable:
            self._paused_until = time.monotonic() + PAUSE
        except (SelfHealError, OSError) as error:
            logger.warning("%r could not be compared with its record: %s", name, error)
            self._remember(name, identity)
        else:
            self._remember(name, identity)
        finally:
            self._checking.discard(name)

    async def _wait_until_settled(self, name: str, identity: Identity) -> None:
        seconds = age(identity[0])
        if seconds < SETTLED_AFTER:  # an mtime in the future says nothing
            await asyncio.sleep(min(SETTLED_AFTER, SETTLED_AFTER - seconds))
            await self.reconciler.raise_if_changed(name, identity)

    def _remember(self, name: str, identity: Identity) -> None:
        if self._changing.get(name, 0.0) > time.monotonic():
            return
        if len(self._seen) >= SEEN_AT_MOST:
            self._seen.clear()
        self._seen[name] = identity
