"""Clients that write, read and wipe the disk of a server, and that check each answer against what they have sent."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.faulty_server import FaultyServer
from tests.support.sample_data import noise
from tests.support.store_state import files_below
from tests.support.wire import Reply


@dataclass
class SentStates:
    """The states that were sent for one name: sizes of `noise`, and None for a deletion.

    The server has acknowledged number `acknowledged`; it may also be in any later state.
    """

    states: list[int | None]
    acknowledged: int = 0
    is_settled: bool = True
    """Whether no request for the name is open, or was lost."""

    def allowed(self, since: int) -> list[int | None]:
        """Return the states that an answer may show, if number `since` was acknowledged before the request."""
        return self.states[since:]


@dataclass
class Journal:
    """The states that were sent for every name, counts of requests by their end, and the answers that were wrong."""

    names: dict[str, SentStates] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def check(self, name: str, answer: Reply, since: int) -> None:
        """Record a violation if this answer to a GET is not allowed."""
        allowed = self.names[name].allowed(since)
        if answer.status == 200:
            bodies = [noise(size) for size in allowed if size is not None]
            right = answer.body in bodies if answer.is_whole else any(body.startswith(answer.body) for body in bodies)
            self.counts["read" if answer.is_whole else "cut off"] += 1
            if not right:
                self.violations.append(f"{name}: {len(answer.body)} wrong bytes, allowed are {allowed}")
        elif answer.status == 404:
            self.counts["absent"] += 1
            if None not in allowed:
                self.violations.append(f"{name}: 404, allowed are {allowed}")
        elif answer.status == 503 or not answer.status:
            self.counts["unknown" if answer.status else "cut off"] += 1
        else:
            self.violations.append(f"{name}: {answer.status}")


class LoadClients:
    """Writers, each with its own names, readers of all names, and a task that wipes the disk."""

    def __init__(self, server: FaultyServer, directory: Path) -> None:
        self.journal = Journal()
        self._server = server
        self._directory = directory
        self._sizes = itertools.count(1)
        self._names = itertools.count(1)

    @asynccontextmanager
    async def running(self, writers: int = 6, readers: int = 4) -> AsyncIterator[None]:
        """Run all of them inside the block."""
        tasks = [asyncio.create_task(self._write()) for _ in range(writers)]
        tasks += [asyncio.create_task(self._read()) for _ in range(readers)]
        tasks.append(asyncio.create_task(self._wipe()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome

    async def check_every_name(self) -> None:
        """Read every name once nothing changes any more, and check its answer."""
        for name, sent in self.journal.names.items():
            answer = await self._server.get(name)
            while answer.status in (0, 503):
                await asyncio.sleep(0.1)
                answer = await self._server.get(name)
            self.journal.check(name, answer, sent.acknowledged)

    # -- one client -----------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        """Save new names, and overwrite or delete own names, except those that are deleted or not settled."""
        mine: list[str] = []
        while True:
            living = [name for name in mine[-20:] if self.journal.names[name].states[-1] and self._is_settled(name)]
            chance = random.random()
            if not living or chance < 0.5:
                name = f"{random.choice('abc')}/{next(self._names)}.jpg"
                mine.append(name)
                await self._change(name, self._size())
            else:
                await self._change(random.choice(living), self._size() if chance < 0.8 else None)

    async def _change(self, name: str, size: int | None) -> None:
        """Send a save or a deletion until it is answered; a name whose answer was lost stays unsettled."""
        sent = self.journal.names.setdefault(name, SentStates([None]))
        sent.is_settled = False
        sent.states.append(size)
        while True:
            if size is None:
                answer = await self._ask("DELETE", name)
            else:
                answer = await self._ask("POST", name, noise(size))
            if answer.status in (200, 201):
                sent.acknowledged, sent.is_settled = len(sent.states) - 1, True
                self.journal.counts["deleted" if size is None else "saved"] += 1
                return
            if answer.status != 503:
                break
            self.journal.counts["unavailable"] += 1
        if answer.status:
            self.journal.violations.append(f"{name}: {answer.status} {answer.body[:200]!r}")
        self.journal.counts["lost"] += 1

    async def _ask(self, method: str, name: str, body: bytes = b"") -> Reply:
        try:
            answer = await self._server.ask(method, f"/upload/{name}", body)
        except ConnectionError:
            return Reply(0, {}, b"")
        return answer if answer.is_whole else Reply(0, {}, b"")

    async def _read(self) -> None:
        """Read names that were acknowledged: a read before that would fill the negative cache of a worker."""
        while True:
            known = [name for name, sent in self.journal.names.items() if sent.acknowledged]
            if not known:
                await asyncio.sleep(0.05)
                continue
            name = random.choice(known[-100:] if random.random() < 0.7 else known)
            since = self.journal.names[name].acknowledged
            with contextlib.suppress(ConnectionError):
                self.journal.check(name, await self._server.get(name), since)

    async def _wipe(self) -> None:
        """Delete a quarter of the files, or everything, again and again."""
        while True:
            await asyncio.sleep(random.uniform(0.05, 0.5))
            if random.random() < 0.1:
                await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):  # a restore or another process changes the directory
                    files = await asyncio.to_thread(files_below, self._directory)
                    for file in random.sample(files, len(files) // 4):
                        (self._directory / file).unlink()
            self.journal.counts["wiped"] += 1

    def _is_settled(self, name: str) -> bool:
        return self.journal.names[name].is_settled

    def _size(self) -> int:
        """Return a new size; for some of them the file has several chunks."""
        return next(self._sizes) + random.choice((0, 0, 10_000, 100_000, 700_000))
