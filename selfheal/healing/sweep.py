"""Sweep: at its start and every hour, one process of a node stores in the database what is only on its disk."""

import asyncio
import itertools
import json
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from .. import names
from ..disk.directory import UploadsDirectory
from ..disk.listing import Entry, walk
from ..disk.mark import SWEPT
from ..errors import SelfHealError
from ..events import Events, logger
from .background import BackgroundChecks
from .reconcile import Reconciler

START_AFTER = 5.0  # seconds that an app has to start
LOOK_EVERY = 60.0  # seconds between two looks at whether a sweep is due, or another process has left one unfinished
RETRY_AFTER = 10.0  # seconds after the database gave no answer
NAMES_AT_ONCE = 128
REST = 3.0  # times as long as its last step took
SHORTEST_REST, LONGEST_REST = 0.02, 5.0  # seconds
BUSY, BUSY_REST = 0.02, 0.5  # seconds that the event loop is late by if requests keep it busy; seconds for them


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the sweeps of a disk are: all names up to `after` are done; `finished` in seconds since the epoch."""

    after: str = ""
    finished: float = 0.0


@dataclass(eq=False)
class Sweep:
    """Compares every file on disk with the database, slowly. `every`: seconds from the end of one to the next."""

    disk: UploadsDirectory
    reconciler: Reconciler
    background: BackgroundChecks
    events: Events
    every: float

    def __post_init__(self) -> None:
        self._is_due = False

    async def run(self) -> None:
        """Sweep whenever it is due, for ever."""
        await asyncio.sleep(START_AFTER)
        while True:
            pause = min(LOOK_EVERY, self.every)
            try:
                await self._sweep_if_due()
            except (SelfHealError, OSError) as error:
                self.events.log_once(logging.WARNING, "sweep", f"files could not be backed up, tried again: {error}")
                pause = min(RETRY_AFTER, pause)
            await asyncio.sleep(pause)

    def hurry(self) -> None:
        """Sweep soon, although it is not due yet: files changed, and nobody knows which."""
        self._is_due = True

    async def _sweep_if_due(self) -> None:
        with self.disk.only_process(SWEPT) as is_alone:
            if not is_alone:
                return
            found = await self.disk.threads.run(self.disk.read_swept)
            if found is None:
                return
            disk, progress = found[0], parse(found[1])
            if self._is_due:
                progress = Progress()
                await self._remember(disk, progress)  # it is due still if this sweep is broken off
                self._is_due = False
            if not 0 <= time.time() - progress.finished < self.every:
                await self._sweep(disk, "" if progress.finished else progress.after)

    async def _sweep(self, disk: tuple[int, int], after: str) -> None:
        """Go over all names that come later than `after`, in the byte order of names."""
        entries, done, differing = walk(self.disk), os.fsencode(after), 0
        while True:
            started = time.monotonic()
            batch = await self.disk.threads.run(lambda: list(itertools.islice(entries, NAMES_AT_ONCE)))
            if not batch:
                break
            differing += await self._check(entry for entry in batch if os.fsencode(entry.name) > done)
            if os.fsencode(batch[-1].name) > done:
                await self._remember(disk, Progress(batch[-1].name))
            await _rest(time.monotonic() - started)
        await self._remember(disk, Progress(finished=time.time()))
        if differing:
            logger.info(
                "%d files in %s differed from the database, and were compared with it", differing, self.disk.path
            )

    async def _check(self, entries: Iterable[Entry]) -> int:
        """Compare files with their records, few at a time; return how many differed from them."""
        valid = [entry for entry in entries if not entry.fault and names.is_valid(entry.name)]
        judged = await asyncio.gather(*(self.reconciler.agrees(entry.name, entry.identity) for entry in valid))
        differing = [
            entry.name
            for entry, known in zip(valid, judged, strict=True)
            if known is None and not self.reconciler.exclusions.covers(entry.name)
        ]
        for name in differing:
            started = time.monotonic()
            await self.background.compare(name)
            await _rest(time.monotonic() - started)
        return len(differing)

    async def _remember(self, disk: tuple[int, int], progress: Progress) -> None:
        await self.disk.threads.run(self.disk.write_swept, disk, json.dumps(asdict(progress)))


async def _rest(worked: float) -> None:
    """Sleep longer than the work took, and longer again if requests keep the event loop busy."""
    pause = min(max(REST * worked, SHORTEST_REST), LONGEST_REST)
    until = time.monotonic() + pause
    await asyncio.sleep(pause)
    if time.monotonic() - until >= BUSY:
        await asyncio.sleep(BUSY_REST)


def parse(text: str) -> Progress:
    """Return the progress that a text says; the beginning if it says none."""
    try:
        found = json.loads(text)
        return Progress(str(found["after"]), float(found["finished"]))
    except (ValueError, KeyError, TypeError):
        return Progress()
