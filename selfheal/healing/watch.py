"""Watch: what the app writes, overwrites or deletes on its disk while it runs is stored or deleted at once.

Events say where to look, and nothing more: selfheal's own changes raise them too. What is there decides.
"""

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import names
from ..aio.tasks import Tasks
from ..disk.directory import UploadsDirectory
from ..disk.mark import MARK
from ..errors import DatabaseUnavailable, MissingExtra
from ..events import logger
from .background import BackgroundChecks
from .evidence import NEVER
from .pace import Pace
from .vanished import QUIET, VanishedFiles

TICK = 500  # milliseconds between two looks at what is to be decided
RESTART_AFTER = 1.0  # seconds until a directory is watched again that was lost, or could not be watched
LAST_EVENTS, DECIDED_AFTER = 0.5, 1.5  # seconds, at the end, that events take, and a decision that is due
WRITTEN_AT_MOST = 10_000  # names to be compared; with more, the whole disk is
WORKERS = 4  # files compared at once
FIRST_RETRY, LONGEST_RETRY = 2.0, 60.0  # seconds until a file is compared again that changed meanwhile, or failed

DELETED = 3  # the value of `watchfiles.Change.deleted`
Change = tuple[int, str]
Life = tuple[int, ...]
"""Which directory and which mark are at the path of the root."""


@dataclass(eq=False)
class Watch:
    """Watches the uploads directory. `rescan` is called when nobody knows which files changed."""

    disk: UploadsDirectory
    background: BackgroundChecks
    vanished: VanishedFiles
    tasks: Tasks
    rescan: Callable[[], None]

    def __post_init__(self) -> None:
        self._changes = _watcher()
        self._written: dict[str, None] = {}
        self._unsettled = Pace(FIRST_RETRY, LONGEST_RETRY)
        self._workers = 0

    async def run(self) -> None:
        """Watch for ever."""
        self._workers = 0  # those of another event loop have ended with it
        while True:
            try:
                await self._watch()
            except* (OSError, RuntimeError) as errors:  # such as the system's limit of watches; `awatch` raises groups
                why = errors.exceptions[0]
                logger.warning("%s cannot be watched, tried again in %g s: %s", self.disk.path, LONGEST_RETRY, why)
                self.vanished.lose("as the watch ended")
                await asyncio.sleep(LONGEST_RETRY)
            else:
                self.vanished.lose("with the uploads directory")
                await asyncio.sleep(RESTART_AFTER)
            self.rescan()

    async def finish(self) -> None:
        """Wait until what vanished just now is decided: the next process does not know of it."""
        await asyncio.sleep(LAST_EVENTS)
        await self.vanished.decided(QUIET + DECIDED_AFTER)

    async def _watch(self) -> None:
        """Watch the root for as long as it is the same one."""
        life = await self.disk.threads.run(_life, self.disk)
        if not life:
            return
        with contextlib.suppress(FileNotFoundError):  # it is lost already
            try:
                await self._follow([self.disk.path], life)
            except PermissionError:  # for a folder, such as `lost+found`: the others are named one by one
                await self._follow(await self.disk.threads.run(_readable_folders, self.disk.path), life)

    async def _follow(self, folders: list[Path], life: Life) -> None:
        is_partial = len(folders) > 1
        options = {"watch_filter": None, "rust_timeout": TICK, "yield_on_timeout": True}
        evidence = self.background.reconciler.evidence
        evidence.watching_from_ns = time.time_ns()
        try:
            async with aclosing(self._changes(*folders, ignore_permission_denied=is_partial, **options)) as changes:
                async for batch in changes:
                    if await self.disk.threads.run(_life, self.disk) != life:
                        return
                    await self._note(batch)
                    await self.vanished.decide()
        finally:
            evidence.watching_from_ns = NEVER

    async def _note(self, changes: Iterable[Change]) -> None:
        vanished = {path for kind, path in changes if kind == DELETED}
        there, gone, back = await self.disk.threads.run(_look, self.disk, {path for _, path in changes}, vanished)
        await self.vanished.note(gone, back)
        self._written |= dict.fromkeys([*there, *self._unsettled.due()])
        if len(self._written) > WRITTEN_AT_MOST:
            self._written.clear()
            self.rescan()
        while self._workers < min(WORKERS, len(self._written)):
            self._workers += 1
            self.tasks.start(self._work())

    async def _work(self) -> None:
        try:
            while self._written:
                await self._compare(self._written.popitem()[0])
        finally:
            self._workers -= 1

    async def _compare(self, name: str) -> None:
        self._unsettled.slow_down(name)
        with contextlib.suppress(DatabaseUnavailable):
            if await self.background.compare(name):
                self._unsettled.forget(name)


def _look(disk: UploadsDirectory, paths: set[str], vanished: set[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the names of the files that are at paths, of what is not, and of what vanished and is back."""
    there, gone = set[str](), set[str]()
    for path in paths:
        try:
            is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            gone.add(path)
        except OSError:
            continue  # it can be neither stored nor deleted; the sweep reports it
        else:
            # files that are written to a new directory at once, or come with it, have no events
            there.update(_files_below(path) if is_folder else [path])
    return _names(disk, there), _names(disk, gone), _names(disk, vanished - gone)


def _names(disk: UploadsDirectory, paths: Iterable[str]) -> list[str]:
    return [name for path in paths if names.is_valid(name := path.removeprefix(f"{disk.path}/"))]


def _files_below(folder: str) -> list[str]:
    return [os.path.join(above, file) for above, _, files in os.walk(folder) for file in files]


def _readable_folders(root: Path) -> list[Path]:
    """Return all directories of which this user may list the entries."""
    return [Path(folder) for folder, _, _ in os.walk(root)]


def _life(disk: UploadsDirectory) -> Life:
    """Return what changes when the directory is lost, also if another one is at its path by now; empty without one."""
    life: list[int] = []
    if not disk.path_of(MARK).exists():  # a look at it by the root would keep the root open
        disk.marked_ns()  # makes it
    for path in (disk.path, disk.path_of(MARK)):
        try:
            found = os.stat(path)
        except OSError:
            continue
        life += (found.st_dev, found.st_ino, 0 if stat.S_ISDIR(found.st_mode) else found.st_mtime_ns)
    return tuple(life)


def _watcher() -> Any:
    try:
        from watchfiles import awatch  # noqa: PLC0415 - an extra, imported where it is used
    except ImportError as error:
        raise MissingExtra("watch", "watchfiles") from error
    return awatch
