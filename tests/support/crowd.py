"""Clients of a server whose workers die, and what each of them knows for certain of every name."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import environment
from tests.support.faulty_app import Faults
from tests.support.serving import SECONDS, Answer, Server
from tests.support.sides import files_below, noise
from tests.support.sockets import free_port

WORKERS = 4


@dataclass
class Entry:
    """What was sent for a name: sizes of `noise`, None for a deletion. From number `sure` on, any may be its state."""

    states: list[int | None]
    sure: int = 0
    is_settled: bool = True

    def allows(self, since: int) -> list[int | None]:
        """What may be answered to who asked when number `since` was sure."""
        return self.states[since:]


@dataclass
class Book:
    """Every name, what was done, and what was broken, in words."""

    entries: dict[str, Entry] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    breaches: list[str] = field(default_factory=list)

    def judge(self, name: str, answer: Answer, since: int) -> None:
        """Whether an answer to a GET is one that may be given."""
        allowed = self.entries[name].allows(since)
        if answer.status == 200:
            bodies = [noise(size) for size in allowed if size is not None]
            right = answer.body in bodies if answer.is_whole else any(body.startswith(answer.body) for body in bodies)
            self.done["read" if answer.is_whole else "cut off"] += 1
            if not right:
                self.breaches.append(f"{name}: {len(answer.body)} wrong bytes, allowed are {allowed}")
        elif answer.status == 404:
            self.done["absent"] += 1
            if None not in allowed:
                self.breaches.append(f"{name}: 404, allowed are {allowed}")
        elif answer.status == 503 or not answer.status:
            self.done["unknown" if answer.status else "cut off"] += 1
        else:
            self.breaches.append(f"{name}: {answer.status}")


class Crowd:
    """Writers, each with names of its own, readers of all of them, and somebody who wipes the disk."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.book = Book()
        self._server = server
        self._directory = directory
        self._sizes = itertools.count(1)
        self._names = itertools.count(1)

    @asynccontextmanager
    async def at_work(self, writers: int = 6, readers: int = 4) -> AsyncIterator[None]:
        """All of them, meanwhile."""
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

    async def look_at_everything(self) -> None:
        """What everybody gets once nobody changes anything any more."""
        for name, entry in self.book.entries.items():
            answer = await self._server.get(name)
            while answer.status in (0, 503):
                await asyncio.sleep(0.1)
                answer = await self._server.get(name)
            self.book.judge(name, answer, entry.sure)

    # -- one of them ----------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        """Names that were deleted, or of which nobody knows what became, are left alone."""
        mine: list[str] = []
        while True:
            living = [name for name in mine[-20:] if self.book.entries[name].states[-1] and self._is_settled(name)]
            chance = random.random()
            if not living or chance < 0.5:
                name = f"{random.choice('abc')}/{next(self._names)}.jpg"
                mine.append(name)
                await self._change(name, self._size())
            else:
                await self._change(random.choice(living), self._size() if chance < 0.8 else None)

    async def _change(self, name: str, size: int | None) -> None:
        entry = self.book.entries.setdefault(name, Entry([None]))
        entry.is_settled = False
        entry.states.append(size)
        while True:
            if size is None:
                answer = await self._ask("DELETE", name)
            else:
                answer = await self._ask("POST", name, noise(size))
            if answer.status in (200, 201):
                entry.sure, entry.is_settled = len(entry.states) - 1, True
                self.book.done["deleted" if size is None else "saved"] += 1
                return
            if answer.status != 503:
                break
            self.book.done["put off"] += 1
        if answer.status:
            self.book.breaches.append(f"{name}: {answer.status} {answer.body[:200]!r}")
        self.book.done["nobody knows"] += 1

    async def _ask(self, method: str, name: str, body: bytes = b"") -> Answer:
        try:
            answer = await self._server.ask(method, f"/upload/{name}", body)
        except ConnectionError:
            return Answer(0, {}, b"")
        return answer if answer.is_whole else Answer(0, {}, b"")

    async def _read(self) -> None:
        """Whoever asks for a name before it is there makes a worker remember for a moment that it is not."""
        while True:
            known = [name for name, entry in self.book.entries.items() if entry.sure]
            if not known:
                await asyncio.sleep(0.05)
                continue
            name = random.choice(known[-100:] if random.random() < 0.7 else known)
            since = self.book.entries[name].sure
            with contextlib.suppress(ConnectionError):
                self.book.judge(name, await self._server.get(name), since)

    async def _wipe(self) -> None:
        while True:
            await asyncio.sleep(random.uniform(0.05, 0.5))
            if random.random() < 0.1:
                await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):  # a directory that went while it was looked into
                    files = await asyncio.to_thread(files_below, self._directory)
                    for file in random.sample(files, len(files) // 4):
                        (self._directory / file).unlink()
            self.book.done["wiped"] += 1

    def _is_settled(self, name: str) -> bool:
        return self.book.entries[name].is_settled

    def _size(self) -> int:
        """No two alike; now and then several chunks."""
        return next(self._sizes) + random.choice((0, 0, 10_000, 100_000, 700_000))


@asynccontextmanager
async def workers(base: Path, faults: Faults) -> AsyncIterator[Server]:
    """uvicorn with as many workers; it starts a new one for each that dies."""
    log = base / "workers.log"
    port = free_port()
    flags = ["--factory", "--workers", str(WORKERS), "--port", str(port), "--no-access-log"]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", *flags, "--log-level", "warning", "tests.support.workers_app:app"],
            env=environment(FAULTS=faults.to_env()),
            stderr=errors,
        )
    server = Server(faults, port, process, log)
    try:
        await _is_up(server)
        yield server
    except BaseException:
        print(f"the server said:\n{server.said()[-5000:]}")
        raise
    finally:
        server.terminate()
        await server.wait()


async def _is_up(server: Server) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            async with asyncio.timeout(SECONDS):
                if (await server.ask("GET", "/state")).status == 200:
                    return
        except OSError:
            assert server.process.poll() is None, server.said()
            assert time.monotonic() < end, server.said()
            await asyncio.sleep(0.1)


def workers_of(server: Server) -> list[int]:
    """The processes that serve."""
    found = []
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    for child in children:
        with contextlib.suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def kill_one(server: Server) -> bool:
    """SIGKILL for one worker, whichever; False if there is none just now."""
    alive = workers_of(server)
    if alive:
        os.kill(random.choice(alive), signal.SIGKILL)
    return bool(alive)
