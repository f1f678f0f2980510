"""A small app under uvicorn, on a machine on which something fails: `FAULTS` in the environment says what, as JSON.

The wrapped app answers `POST` and `DELETE /upload/NAME`, `GET /state` (what this process holds and has done) and
`/holding` (all that it holds), `POST` and `DELETE /descriptors` (use up all but so many, give them back), `/pool` (the
same with connections) and `/heart` (begin to measure how late the loop is; how late it was), and 404.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import logging
import os
import platform
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from starlette.types import Receive, Scope, Send

from selfheal import DatabaseUnavailable, Event, SelfHealMiddleware, UploadStore
from tests.support.heartbeat import Heart
from tests.support.sides import statements


@dataclass(frozen=True)
class Faults:
    """What fails. A call is one of the module `os`: link, fsync, pwrite, pread, preadv."""

    directory: str = ""
    database: str = ""
    socket: int = -1
    deadline: float = 5.0
    require_marker: bool = False
    fail: dict[str, str] = field(default_factory=dict)
    """Call → the name of the error with which it always fails."""
    bad_file: int = -1
    """The inode of a file that cannot be read (EIO) from `bad_from` on."""
    bad_from: int = 0
    slow: dict[str, float] = field(default_factory=dict)
    """Call → seconds that it takes."""
    hold: dict[str, str] = field(default_factory=dict)
    """Call → a file; while it exists the call waits, and says so by making the same with `.met`."""
    kill_at: str = ""
    """The process kills itself (SIGKILL) when it comes to this call, or to its `commit:N`-th commit."""
    syncs: str = ""
    """A file to which the inode of every fsync is appended."""
    has_unnamed_files: bool = True
    file_size: int = 0
    descriptors: int = 0
    is_privileged: bool = True
    pool: int = 0
    """Connections of the app's own engine; 0: the store makes its engine itself."""
    notes_statements: bool = True
    """Whether `/state` knows every statement: a cost in time and memory that some tests cannot bear."""
    cancels: bool = False
    """Who hangs up takes the request down, as under Hypercorn or Starlette's BaseHTTPMiddleware; uvicorn goes on."""
    workers: int = 0
    """Workers that are forked after the store was used; 0: none."""

    def to_env(self) -> str:
        """As the server process reads it."""
        return json.dumps(asdict(self))


# -- faults ---------------------------------------------------------------------------------------------------------


def break_disk(faults: Faults) -> None:
    """Put every fault of the disk in place."""
    for call in ("link", "fsync", "pwrite", "pread", "preadv"):
        _wrap(call, faults)
    if not faults.has_unnamed_files:
        del os.O_TMPFILE  # type: ignore[misc]
    if faults.file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (faults.file_size, resource.RLIM_INFINITY))
    if faults.descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (faults.descriptors, faults.descriptors))
    if not faults.is_privileged and os.geteuid() == 0:
        _drop_privileges()


def _wrap(call: str, faults: Faults) -> None:
    real = getattr(os, call)

    def faulty(*arguments: Any, **named: Any) -> Any:
        if faults.kill_at == call:
            os.kill(os.getpid(), signal.SIGKILL)
        if call == "fsync" and faults.syncs:
            with Path(faults.syncs).open("a") as file:
                file.write(f"{os.fstat(arguments[0]).st_ino}\n")
        time.sleep(faults.slow.get(call, 0))
        _hold(faults.hold.get(call))
        if call in faults.fail:
            _fail(faults.fail[call])
        if call in ("pread", "preadv") and os.fstat(arguments[0]).st_ino == faults.bad_file:
            size = arguments[1] if call == "pread" else sum(len(buffer) for buffer in arguments[1])
            if arguments[2] + size > faults.bad_from:
                _fail("EIO")
        return real(*arguments, **named)

    setattr(os, call, faulty)


def _fail(name: str) -> None:
    number = getattr(errno, name)
    raise OSError(number, os.strerror(number))


def _hold(gate: str | None) -> None:
    if gate is None:
        return
    if Path(gate).exists():
        Path(f"{gate}.met").touch()
    end = time.monotonic() + 30
    while Path(gate).exists() and time.monotonic() < end:
        time.sleep(0.01)


def _drop_privileges() -> None:
    """Stay root, but be refused what the mode of a file refuses (capset: no CAP_DAC_OVERRIDE, no CAP_DAC_READ_SEARCH).

    Threads inherit it from the one that calls.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": (125, 126), "aarch64": (90, 91)}[platform.machine()]
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.syscall(number[0], header, data) == 0
    data[0] &= ~0b110
    assert libc.syscall(number[1], header, data) == 0


def kill_at_commit(faults: Faults) -> None:
    """Die just before a commit reaches the database."""
    kind, _, number = faults.kill_at.partition(":")
    if kind != "commit":
        return
    left = int(number)

    def die(_: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "commit", die)


# -- the app --------------------------------------------------------------------------------------------------------


class App:
    """The wrapped app; its own 404 says that it was asked."""

    def __init__(self, store: UploadStore, engine: AsyncEngine | None, seen: list[str]) -> None:
        self.store = store
        self.engine = engine
        self.statements = seen
        self.held: list[int] = []
        self.connections: list[AsyncConnection] = []
        self.heart = Heart()

    @property
    def in_use(self) -> int:
        """Connections that the pool has handed out, but for those that are kept while nobody asks."""
        engine = self.store.database._engine
        if engine._engine is None:
            return 0
        pool: Any = engine._engine.pool
        return int(pool.checkedout()) - (0 if engine._readers is None else engine._readers.kept)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        _, first, *rest = scope["path"].split("/")
        route = f"{scope['method']} {first}"
        body: object = "wrapped"
        status = 404
        if route == "GET state":
            status, body = 200, self.state()
        elif route == "GET holding":
            status, body = 200, self.holding()
        elif first == "upload":
            status, body = await self._change(scope["method"], "/".join(rest), receive)
        elif first == "descriptors":
            free = int(parse_qs(scope["query_string"].decode()).get("free", ["0"])[0])
            status, body = 200, self._use_up(free) if route.startswith("POST") else self._give_back()
        elif first == "pool":
            status, body = 200, await (self._use_up_pool() if route.startswith("POST") else self._give_back_pool())
        elif first == "heart":
            status, body = 200, self.heart.start() if route.startswith("POST") else await self.heart.stop()
        data = json.dumps(body).encode()
        headers = [(b"content-length", str(len(data)).encode()), (b"x-wrapped", b"yes")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else data})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] != "lifespan.shutdown":
            assert message["type"] == "lifespan.startup"
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    async def _change(self, method: str, name: str, receive: Receive) -> tuple[int, object]:
        async def body() -> AsyncIterator[bytes]:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionResetError("the client has gone")
                more = message.get("more_body", False)
                yield message.get("body", b"")

        try:
            if method == "DELETE":
                return 200, await self.store.delete(name)
            saved = await self.store.save(name, body())
        except DatabaseUnavailable as error:
            return 503, str(error)
        except ConnectionResetError as error:
            return 499, str(error)
        return 201, {"sha256": saved.sha256, "generation": saved.generation}

    def state(self) -> dict[str, object]:
        """What this process holds, and what it has done."""
        return {
            "pid": os.getpid(),
            "files": sorted(path for path in _descriptors() if path.startswith(f"{self.store.disk.path}/")),
            "statements": self.statements,
            "events": {str(kind): count for kind, count in self.store.events.counters.items()},
            "connections": self.in_use,
        }

    def holding(self) -> dict[str, object]:
        """All that this process holds: descriptors, tasks, and connections that are checked out."""
        return {"descriptors": _descriptors(), "tasks": len(asyncio.all_tasks()), "connections": self.in_use}

    def _use_up(self, free: int) -> int:
        with contextlib.suppress(OSError):
            while True:
                self.held.append(os.open("/dev/null", os.O_RDONLY))
        for fd in self.held[len(self.held) - free :]:
            os.close(fd)
        del self.held[len(self.held) - free :]
        return len(self.held)

    def _give_back(self) -> int:
        while self.held:
            os.close(self.held.pop())
        return 0

    async def _use_up_pool(self) -> int:
        assert self.engine is not None
        for _ in range(self.engine.pool.size()):  # type: ignore[attr-defined]
            self.connections.append(await self.engine.connect())
        return len(self.connections)

    async def _give_back_pool(self) -> int:
        while self.connections:
            await self.connections.pop().close()
        return 0


class Cancelling:
    """Cancels a request whose client has gone."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages: asyncio.Queue[Any] = asyncio.Queue(1)
        request = asyncio.create_task(self._app(scope, messages.get, send))
        listener = asyncio.create_task(self._listen(receive, messages, request))
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await request
        finally:
            listener.cancel()

    async def _listen(self, receive: Receive, messages: asyncio.Queue[Any], request: asyncio.Task[None]) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            await messages.put(message)
        request.cancel()


def _descriptors() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def serve(faults: Faults, app: Callable[..., Any]) -> None:
    """Serve on the socket that was handed down."""
    config = uvicorn.Config(app, lifespan="on", access_log=False, log_level="warning")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=faults.socket)])


async def use(store: UploadStore) -> None:
    """What an app does that looks at its uploads while it is imported."""
    await store.database.count()


def fork_workers(faults: Faults, store: UploadStore, app: Callable[..., Any]) -> None:
    """Use the store, fork, and let every worker serve; end with them."""
    asyncio.run(use(store))
    children = []
    for _ in range(faults.workers):
        child = os.fork()
        if not child:
            serve(faults, app)
            os._exit(0)
        children.append(child)

    def stop(*_: Any) -> None:
        for child in children:
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    for child in children:
        os.waitpid(child, 0)
    os._exit(0)  # as what an app has made lives until the end of its process


def note(event_: Event) -> None:
    """A line for everything but hits, for whoever reads the log of a test that failed."""
    if event_.kind != "hit":
        logging.getLogger("events").info("%s", event_)


def main() -> None:
    """Run until SIGTERM."""
    faults = Faults(**json.loads(os.environ["FAULTS"]))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    engine = None
    if faults.pool:
        engine = create_async_engine(faults.database, pool_size=faults.pool, max_overflow=0, pool_timeout=1)
    store = UploadStore(
        faults.directory,
        faults.database if engine is None else engine,
        deadline=faults.deadline,
        require_marker=faults.require_marker,
        listeners=[note],
    )
    break_disk(faults)
    kill_at_commit(faults)
    with statements() if faults.notes_statements else contextlib.nullcontext([]) as seen:
        app: Callable[..., Any] = SelfHealMiddleware(App(store, engine, seen), store)
        if faults.cancels:
            app = Cancelling(app)
        if faults.workers:
            fork_workers(faults, store, app)
        else:
            serve(faults, app)


if __name__ == "__main__":
    main()
