"""A world (uploads and a catalogue) in which one deed is done by another process, which is killed, or refused, at any
one of its system calls; and the laws by which the world is judged afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from selfheal import SelfHealError, UploadStore, bulk
from tests.support import environment
from tests.support.one_shot import Deed, do
from tests.support.postgres import PostgresServer
from tests.support.sides import execute, files_below, in_database, in_quarantine, on_disk

SECONDS = 40.0
"""How long a deed may take before it counts as hung."""
CHANGES = (
    "openat,openat2,write,pwrite64,pwritev,pwritev2,fsync,fdatasync,sync_file_range,syncfs,linkat,rename,renameat,"
    "renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,ftruncate,fallocate,utimensat,fchmod,fchmodat,flock,fcntl,close,sendfile,"
    "copy_file_range"
)
"""Every system call that changes or syncs what is on a disk, or the locks on it."""
MESSAGES = f"{CHANGES},sendto,sendmsg"
"""The same where the database is at the other end of a socket."""
QUESTIONS = "read,pread64,preadv,preadv2,newfstatat,fstat,stat,lstat,statx,getdents64,dup"
"""Calls that change nothing, and may fail like the others."""
ERRORS = {
    "openat": ["EMFILE", "ENFILE", "ENOMEM", "EACCES", "EIO", "ENOSPC", "EDQUOT", "EROFS", "EINTR"],
    "openat2": ["EMFILE", "ENFILE", "ENOMEM", "EACCES", "EIO", "EINTR", "EAGAIN"],
    "write": ["ENOSPC", "EIO", "EDQUOT", "EFBIG", "EINTR"],
    "fsync": ["EIO", "ENOSPC", "EDQUOT", "EROFS", "EINTR"],
    "syncfs": ["EIO", "ENOSPC", "EDQUOT"],
    "link": ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOMEM", "EMLINK"],
    "rename": ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "EPERM"],
    "unlink": ["EIO", "EROFS", "EACCES", "EPERM", "EBUSY"],
    "mkdir": ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "EMLINK"],
    "ftruncate": ["EIO", "EINTR", "EPERM"],
    "fchmod": ["EIO", "EPERM", "EROFS"],
    "flock": ["ENOLCK", "EINTR"],
    "F_DUPFD": ["EMFILE"],
    "F_SETLK": ["EAGAIN", "EACCES", "EIO", "ENOLCK", "EINTR"],
    "close": ["EIO", "ENOSPC", "EDQUOT"],
    "read": ["EIO", "EINTR"],
    "stat": ["EIO", "EACCES", "ENOMEM"],
    "getdents64": ["EIO"],
}
"""What a call may answer on a broken, full, protected or busy machine."""
_ALIKE = {
    "pwrite64": "write", "pwritev": "write", "pwritev2": "write", "fdatasync": "fsync", "linkat": "link",
    "renameat": "rename", "renameat2": "rename", "unlinkat": "unlink", "rmdir": "unlink", "mkdirat": "mkdir",
    "fallocate": "ftruncate", "utimensat": "fchmod", "fchmodat": "fchmod", "pread64": "read", "preadv": "read",
    "preadv2": "read", "newfstatat": "stat", "fstat": "stat", "lstat": "stat", "statx": "stat",
}  # fmt: skip
ROUTINE = frozenset({"pwrite64", "write", "fcntl", "close", "openat", "openat2", "pread64", "read", "fstat"})
"""Calls of which there are many: what comes between two of the others is seldom worth a kill."""
_CALL = re.compile(r"^(\d+) +(\w+)\((.*)$")


# -- the other process ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A system call of a deed: the `nth` (from 1 on) of its name in the `thread` (from 0 on)."""

    thread: int
    nth: int
    name: str
    arguments: str = ""

    @property
    def errors(self) -> list[str]:
        """What it may answer."""
        if self.name == "fcntl":
            return next((errors for command, errors in ERRORS.items() if command in self.arguments), [])
        return ERRORS.get(_ALIKE.get(self.name, self.name), [])

    def __str__(self) -> str:
        return f"{self.name}({self.arguments[:120]} [call {self.nth} of thread {self.thread}]"


@dataclass
class Ending:
    """How a process came off: `said` is what it wrote."""

    said: dict[str, Any] = field(default_factory=dict)
    code: int | None = None

    @property
    def is_acknowledged(self) -> bool:
        """Whether it said that the deed was done, all of it."""
        done = self.said.get("done")
        problems = [one for one in done if one[2] and one[1] != "deleted"] if isinstance(done, list) else []
        return "done" in self.said and not problems

    @property
    def is_clean(self) -> bool:
        """Whether it came to an end, with an answer or an error that a caller can be expected to handle."""
        return self.code == 0 and "unclean" not in self.said and bool(self.said.keys() & {"done", "raised"})

    @property
    def is_killed(self) -> bool:
        """Whether it was."""
        return self.code == -signal.SIGKILL


class Doer:
    """Does deeds, each in a process of its own (`one_shot.py`)."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._heard = b""
        self._log = (base / "doer.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.one_shot"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def do(self, deed: Deed) -> Ending:
        """Undisturbed."""
        return self._do(deed, lambda _process, _threads: contextlib.nullcontext())

    def watch(self, deed: Deed, calls: str = CHANGES) -> tuple[list[Call], object]:
        """The calls of a deed in the order in which they began, all of threads that were there; and its answer."""
        log = self._base / "calls"
        seen: list[int] = []

        def strace(process: int, threads: list[int]) -> contextlib.AbstractContextManager[None]:
            seen.extend(threads)
            return _strace("-f", "-y", "-s", "64", "-o", str(log), "-e", f"trace={calls}", process=process)

        ending = self._do(deed, strace)
        assert ending.is_acknowledged, ending
        found, counts = [], Counter[tuple[int, str]]()
        for line in log.read_text(errors="replace").splitlines():
            if match := _CALL.match(line):
                assert int(match[1]) in seen, f"a thread that was not there when the deed began: {line}"
                thread = seen.index(int(match[1]))
                counts[thread, match[2]] += 1
                found.append(Call(thread, counts[thread, match[2]], match[2], match[3]))
        return found, ending.said["done"]

    def spoil(self, deed: Deed, call: Call, effect: str) -> Ending:
        """Do a deed and have one call spoiled: `signal=KILL`, which comes before it is carried out, or `error=EIO`.

        strace counts the calls of each name, and those of each thread, by themselves.
        """
        inject = f"inject={call.name}:{effect}:when={call.nth}"

        def strace(_: int, threads: list[int]) -> contextlib.AbstractContextManager[None]:
            return _strace("-o", "/dev/null", "-e", f"trace={call.name}", "-e", inject, process=threads[call.thread])

        return self._do(deed, strace)

    def _do(self, deed: Deed, meanwhile: Callable[[int, list[int]], contextlib.AbstractContextManager[None]]) -> Ending:
        self._say(json.dumps(asdict(deed)))
        here = self._hear()
        assert "process" in here, self._complaint(here)
        ending = Ending()
        with meanwhile(here["process"], here["threads"]):
            self._say("go")
            try:
                while ending.code is None:
                    said = self._hear()
                    ending.code = said.pop("ended", None)
                    ending.said |= said
            except TimeoutError:
                os.kill(here["process"], signal.SIGKILL)
                ending = Ending({"hung": True}, self._hear()["ended"])
        return ending

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        end = time.monotonic() + SECONDS
        while b"\n" not in self._heard:
            if not select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            more = os.read(self._process.stdout.fileno(), 65536)
            assert more, self._complaint("it has gone")
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        heard: dict[str, Any] = json.loads(line)
        return heard

    def _complaint(self, of: object) -> str:
        return f"{of}; it said:\n{(self._base / 'doer.log').read_text()}"


@contextlib.contextmanager
def _strace(*options: str, process: int) -> Iterator[None]:
    """strace on a process or on one thread: from here on no call is missed."""
    tracer = subprocess.Popen(["strace", *options, "-p", str(process)], stderr=subprocess.PIPE)
    assert tracer.stderr is not None
    try:
        first = tracer.stderr.readline()
        assert b"attached" in first, first + tracer.stderr.read()
        yield
        tracer.wait(SECONDS)
    finally:
        tracer.kill()
        tracer.communicate()


_WRITES = ("write", "pwrite64", "pwritev", "pwritev2")
_FILE_WITH_PATH = re.compile(r"(\d+)<([^>]+)>")
_NAMED = re.compile(r'.*"([^"]+)"')


def named_unsynced(calls: list[Call], directory: Path) -> list[Call]:
    """Calls that give a file below a directory its name while the disk may not hold all of its bytes."""
    unsynced: set[str] = set()
    paths: dict[str, str] = {}
    found = []
    for call in calls:
        match = _FILE_WITH_PATH.match(call.arguments)
        fd, path = match.groups() if match else ("", "")
        paths[fd] = path
        if call.name in _WRITES and path.startswith(f"{directory}/"):
            unsynced.add(path)
        elif call.name in ("fsync", "fdatasync"):
            unsynced.discard(path)
        elif call.name == "syncfs":
            unsynced.clear()
        elif call.name in ("linkat", "renameat", "renameat2"):
            first = call.arguments.split('"')[1]
            source = paths.get(first.rpartition("/")[2]) if first.startswith("/proc/self/fd/") else f"{path}/{first}"
            if source in unsynced:
                found.append(call)
    return found


def names_at(calls: list[Call], name: str) -> list[int]:
    """Where among the calls a name is given, or taken away."""
    kinds = ("linkat", "renameat", "renameat2", "unlinkat")
    ends = [(number, _NAMED.match(call.arguments)) for number, call in enumerate(calls) if call.name in kinds]
    return [number for number, match in ends if match and match[1] == name.rpartition("/")[2]]


def commits_at(calls: list[Call]) -> list[int]:
    """Where among the calls SQLite commits: its journal goes, or its log is synced."""
    return [
        number
        for number, call in enumerate(calls)
        if (call.name == "unlink" and '-journal"' in call.arguments)
        or (call.name == "fdatasync" and "-wal>" in call.arguments)
    ]


# -- the world ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The two halves."""

    base: Path
    database: str

    @property
    def directory(self) -> Path:
        """The uploads."""
        return self.base / "app" / "static" / "uploads"

    def store(self) -> UploadStore:
        """A store over both, in this process."""
        return UploadStore(self.directory, self.database)


class Worlds:
    """A world as it is before a deed, and as many copies of it as are wanted."""

    def __init__(self, base: Path, postgres: PostgresServer | None = None) -> None:
        self._base = base
        self._postgres = postgres
        self._template = uuid4().hex[:12]
        self.first = self._make(self._template)
        self.first.base.mkdir()
        if postgres is not None:
            postgres.sql(f"CREATE DATABASE w{self._template}")

    @contextlib.contextmanager
    def copy(self) -> Iterator[World]:
        """One that is thrown away."""
        name = uuid4().hex[:12]
        world = self._make(name)
        shutil.copytree(self.first.base, world.base)
        if self._postgres is not None:
            self._postgres.sql(f"CREATE DATABASE w{name} TEMPLATE w{self._template}")
        try:
            yield world
        finally:
            shutil.rmtree(world.base)
            if self._postgres is not None:
                self._postgres.sql(f"DROP DATABASE w{name} WITH (FORCE)")

    def _make(self, name: str) -> World:
        base = self._base / name
        if self._postgres is not None:
            return World(base, self._postgres.url(f"w{name}"))
        return World(base, f"sqlite+aiosqlite:///{base}/catalogue.db")


@dataclass(frozen=True)
class Fate:
    """What a visitor may get for a name before and after a deed (None: 404), and what may lie on the disk besides."""

    before: bytes | None
    after: bytes | None
    besides: bytes | None = None


@dataclass(frozen=True)
class Story:
    """A deed, the world it needs, and what it does to each name."""

    title: str
    deed: Deed
    fates: dict[str, Fate]
    prepare: Callable[[UploadStore], Awaitable[None]]

    def __str__(self) -> str:
        return self.title

    def deed_in(self, world: World) -> Deed:
        """The deed, there."""
        return replace(self.deed, directory=str(world.directory), database=world.database)

    async def begin(self, worlds: Worlds) -> None:
        """Make the world as it is before."""
        async with worlds.first.store() as store:
            await store.database.create_tables()
            await self.prepare(store)


# -- the laws -------------------------------------------------------------------------------------------------------

BREACHES = ("torn", "lost", "resurrected", "litter", "not mended", "wrong answer")


@dataclass
class Tally:
    """What was done, and which laws were broken, in words."""

    kills: int = 0
    refusals: int = 0
    breaches: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in BREACHES})

    def __str__(self) -> str:
        return ", ".join(f"{kind} {len(found)}" for kind, found in self.breaches.items())

    @property
    def found(self) -> str:
        """Every breach, one in a line."""
        return "\n".join(f"{kind}: {words}" for kind, found in self.breaches.items() for words in found)


class Judge:
    """Looks at a world after something happened to it; every breach goes into the tally."""

    def __init__(self, story: Story, world: World, ending: Ending, tally: Tally, what: str) -> None:
        self._story = story
        self._world = world
        self._is_done = ending.is_acknowledged
        self._tally = tally
        self._what = what

    def judge_answer(self, ending: Ending, right: object) -> None:
        """An answer is that of a good day, or an error. "No such name" would be a lie: a good day knows them all."""
        said = ending.said
        if not ending.is_clean or said.get("raised") == "NotStored":
            self._say("wrong answer", f"it came to {ending}")
        elif isinstance(right, list):
            lies = [one for one in said.get("done", []) if one not in right and one[1] != "failed"]
            if lies or (ending.is_acknowledged and sorted(said["done"]) != sorted(right)):
                self._say("wrong answer", f"it says {said['done']}")
        elif ending.is_acknowledged and said["done"] != right:
            self._say("wrong answer", f"it says {said['done']}")

    async def judge(self, *, again_first: bool) -> None:
        """As it lies there; as a new process finds it; as it is once the deed was done again and all was mended."""
        self._look_at_disk("as it was left")
        async with self._world.store() as store:
            self._look_for_litter(store)
            await self._look_through(store)
            if not again_first:
                await self._mend(store)
                await self._look_at_both(store, "mended")
            await self._again(store)
            await self._mend(store)
            await self._look_at_both(store, "done again and mended", is_done=True)
            await self._look_through(store)
            await self._look_for_leftovers(store)

    def _say(self, kind: str, words: str) -> None:
        self._tally.breaches[kind].append(f"{self._story.title}, {self._what}: {words}")

    def _allowed(self, name: str) -> set[bytes | None]:
        fate = self._story.fates[name]
        return {fate.after} if self._is_done else {fate.before, fate.after}

    def _judge_bytes(self, name: str, data: bytes | None, where: str, *besides: bytes | None) -> None:
        """Say what is wrong with bytes that should be those of before or after."""
        fate = self._story.fates[name]
        if data in {*self._allowed(name), *besides}:
            return
        if data is None:
            self._say("lost", f"{name} is absent {where}")
        elif data not in (fate.before, fate.after, fate.besides):
            self._say("torn", f"{name} has {len(data)} bytes that nobody saved {where}")
        elif fate.after is None:
            self._say("resurrected", f"{name} is back {where}")
        else:
            self._say("lost", f"{name} has old bytes {where}")

    def _look_at_disk(self, when: str) -> None:
        for file in files_below(self._world.directory):
            if file.startswith((".selfheal-tmp/", ".selfheal-quarantine/")):
                continue
            if file not in self._story.fates:
                self._say("litter", f"{file} {when}")
                continue
            fate = self._story.fates[file]
            data = (self._world.directory / file).read_bytes()
            if data not in (fate.before, fate.after, fate.besides):
                self._say("torn", f"{file} has {len(data)} bytes that nobody saved, {when}")

    def _look_for_litter(self, store: UploadStore) -> None:
        for file in files_below(self._world.directory):
            if file not in self._story.fates and not file.startswith(".selfheal-quarantine/"):
                self._say("litter", f"{file} after a new process has begun")
        if (self._world.directory / ".selfheal-tmp").exists():
            self._say("litter", "the temporary directory after a new process has begun")
        whole = {data for fate in self._story.fates.values() for data in (fate.before, fate.after, fate.besides)}
        if any(data not in whole for data in in_quarantine(store)):
            self._say("torn", "a file in quarantine")

    async def _look_through(self, store: UploadStore) -> None:
        """What visitors get at once, before anything was mended."""
        for name, fate in self._story.fates.items():
            besides = () if self._is_done and self._story.deed.action == "heal all" else (fate.besides,)
            try:
                digest = await do(store, Deed("visit", "", "", name))
            except (SelfHealError, OSError) as error:
                self._say("lost", f"{name} cannot be read: {error!r}")
                continue
            versions = (fate.before, fate.after, fate.besides)
            data = next((data for data in versions if _digest(data) == digest), b"torn")
            self._judge_bytes(name, data, "to a visitor", *besides)
        await store.tasks.settle(30)

    async def _look_at_both(self, store: UploadStore, where: str, *, is_done: bool = False) -> None:
        self._is_done = self._is_done or is_done
        for name in self._story.fates:
            try:
                recorded = await in_database(store, name)
            except (SelfHealError, AssertionError) as error:
                self._say("torn", f"{name} in the database, {where}: {error}")
                continue
            self._judge_bytes(name, recorded, f"in the database, {where}")
            if on_disk(store, name) != recorded:
                self._say("not mended", f"{name} is not the same on both sides, {where}")

    async def _again(self, store: UploadStore) -> None:
        """Do the deed once more, unless it would undo itself."""
        if self._story.deed.action == "undo":
            name = self._story.deed.name
            if await in_database(store, name) == self._story.fates[name].after:
                return
        try:
            await do(store, self._story.deed_in(self._world))
        except (SelfHealError, OSError) as error:
            self._say("not mended", f"the deed fails when it is done again: {error!r}")

    async def _mend(self, store: UploadStore) -> None:
        for run in (bulk.restore(store, verify=True), bulk.migrate(store), bulk.verify(store)):
            async with aclosing(run) as results:
                for result in [result async for result in results]:
                    if result.is_problem:
                        self._say("not mended", f"{run.__qualname__} says {result}")

    async def _look_for_leftovers(self, store: UploadStore) -> None:
        """Bytes that nothing refers to, once a purge is told that every upload has long ended."""
        await store.database.purge(timedelta(days=30), grace=timedelta(seconds=-2))
        for query in (ORPHANED_CHUNKS, UNWANTED_BLOBS):
            if count := await _ask(store, query):
                self._say("litter", f"{count} rows are left by a purge: {query}")
        if store.database.url.get_backend_name() == "sqlite":
            said = await _ask(store, "PRAGMA integrity_check")
            if said != "ok":
                self._say("torn", f"the database itself: {said}")
        for name in self._story.fates:
            self._judge_bytes(name, await in_database(store, name), "after a purge")


ORPHANED_CHUNKS = "SELECT count(*) FROM image_chunk WHERE sha256 NOT IN (SELECT sha256 FROM image_blob)"
UNWANTED_BLOBS = (
    "SELECT count(*) FROM image_blob WHERE sha256 NOT IN (SELECT sha256 FROM image_history)"
    " AND sha256 NOT IN (SELECT sha256 FROM image_storage WHERE deleted_at IS NULL)"
)


def _digest(data: bytes | None) -> str | None:
    return None if data is None else sha256(data).hexdigest()


async def _ask(store: UploadStore, query: str) -> Any:
    engine = create_async_engine(store.database.url)
    try:
        async with engine.connect() as connection:
            return (await connection.execute(text(query))).scalar_one()
    finally:
        await engine.dispose()


async def damage(store: UploadStore, name: str) -> None:
    """Spoil a chunk of a name's record."""
    record = await store.database.find(name)
    assert record is not None
    await execute(store, "UPDATE image_chunk SET data = :data WHERE sha256 = :key", data=b"bad", key=record.sha256)
