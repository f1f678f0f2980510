"""A small app under uvicorn in a process with faults: FAULTS in the environment says which, as JSON.

The wrapped app answers, and everything else is its 404:

| request | answer |
|---|---|
| `POST`, `DELETE /upload/NAME` | saves, deletes |
| `GET /state` | what this process has open and has done |
| `GET /resources` | all descriptors, tasks and connections of this process |
| `POST`, `DELETE /descriptors?free=N` | uses up all descriptors except N, releases them |
| `POST`, `DELETE /pool` | uses up all connections of the app's engine, releases them |
| `POST`, `GET /latency` | starts to measure how late the event loop is, says how late it was |
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from starlette.types import Receive, Scope, Send

from selfheal import DatabaseUnavailable, Event, SelfHealMiddleware, UploadStore
from tests.support.disk_files import MARKS
from tests.support.latency import LatencyMonitor
from tests.support.open_files import open_targets
from tests.support.plain_asgi import answer_lifespan, send_wrapped
from tests.support.process_faults import Faults, break_disk, kill_at_commit
from tests.support.recorded_statements import recorded_statements


class App:
    """The wrapped app. Its 404 shows that a request reached it."""

    def __init__(self, store: UploadStore, engine: AsyncEngine | None, statements: list[str]) -> None:
        self.store = store
        self.engine = engine
        self.statements = statements
        self.descriptors: list[int] = []
        self.connections: list[AsyncConnection] = []
        self.latency = LatencyMonitor()

    @property
    def in_use(self) -> int:
        """The number of connections that the pool has handed out, without the idle ones kept for reading."""
        connections = self.store.database._engine._connections
        if connections.engine is None:
            return 0
        pool: Any = connections.engine.pool
        return int(pool.checkedout()) - len(getattr(connections.reader, "_kept", ()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await answer_lifespan(receive, send)
            return
        _, first, *rest = scope["path"].split("/")
        route = f"{scope['method']} {first}"
        body: object = "wrapped"
        status = 404
        if route == "GET state":
            status, body = 200, self.state()
        elif route == "GET resources":
            status, body = 200, self.resources()
        elif first == "upload":
            status, body = await self._change(scope["method"], "/".join(rest), receive)
        elif first == "descriptors":
            free = int(parse_qs(scope["query_string"].decode()).get("free", ["0"])[0])
            status, body = 200, self._use_up(free) if route.startswith("POST") else self._release()
        elif first == "pool":
            status, body = 200, await (self._use_up_pool() if route.startswith("POST") else self._release_pool())
        elif first == "latency":
            status, body = 200, self.latency.start() if route.startswith("POST") else await self.latency.stop()
        await send_wrapped(scope, send, status, json.dumps(body).encode())

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
        """Return what this process has open, and what it has done."""
        return {
            "pid": os.getpid(),
            "files": sorted(
                path
                for path in open_targets()
                if path.startswith(f"{self.store.disk.path}/") and not path.endswith(MARKS)  # which a sweep has open
            ),
            "statements": self.statements,
            "events": {str(kind): count for kind, count in self.store.events.counters.items()},
            "connections": self.in_use,
        }

    def resources(self) -> dict[str, object]:
        """Return all descriptors, the number of tasks, and the number of connections that are checked out."""
        return {"descriptors": open_targets(), "tasks": len(asyncio.all_tasks()), "connections": self.in_use}

    def _use_up(self, free: int) -> int:
        with contextlib.suppress(OSError):
            while True:
                self.descriptors.append(os.open("/dev/null", os.O_RDONLY))
        for fd in self.descriptors[len(self.descriptors) - free :]:
            os.close(fd)
        del self.descriptors[len(self.descriptors) - free :]
        return len(self.descriptors)

    def _release(self) -> int:
        while self.descriptors:
            os.close(self.descriptors.pop())
        return 0

    async def _use_up_pool(self) -> int:
        assert self.engine is not None
        for _ in range(self.engine.pool.size()):  # type: ignore[attr-defined]
            self.connections.append(await self.engine.connect())
        return len(self.connections)

    async def _release_pool(self) -> int:
        while self.connections:
            await self.connections.pop().close()
        return 0


class CancelOnDisconnect:
    """Cancels the request of a client that disconnects."""

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


def serve(faults: Faults, app: Callable[..., Any]) -> None:
    """Serve on the socket that this process inherited."""
    config = uvicorn.Config(app, lifespan="on", access_log=False, log_level="warning")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=faults.socket)])


async def use(store: UploadStore) -> None:
    """Query the database, as an app that reads its uploads while it is imported."""
    await store.database.count()


def fork_workers(faults: Faults, store: UploadStore, app: Callable[..., Any]) -> None:
    """Use the store, fork, let every worker serve, and end when they end."""
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
    os._exit(0)  # an app, too, keeps its store until its process ends


def log_event(event: Event) -> None:
    """Log every event except hits, to explain a test that failed."""
    if event.kind != "hit":
        logging.getLogger("events").info("%s", event)


def main() -> None:
    """Serve until SIGTERM."""
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
        listeners=[log_event],
    )
    break_disk(faults)
    kill_at_commit(faults)
    with recorded_statements() if faults.records_statements else contextlib.nullcontext([]) as statements:
        app: Callable[..., Any] = SelfHealMiddleware(App(store, engine, statements), store)
        if faults.cancels:
            app = CancelOnDisconnect(app)
        if faults.workers:
            fork_workers(faults, store, app)
        else:
            serve(faults, app)


if __name__ == "__main__":
    main()
