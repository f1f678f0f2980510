"""The app that the real servers of `servers.py` run: two stores, one that works and one whose database is down.

`SERVED` names the directory that holds everything: `dead/uploads` and `live/uploads`, and `live.db` beside them.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

from starlette.types import Receive, Scope, Send

from selfheal import SelfHealMiddleware, UploadStore

DEAD = "/static/uploads"
LIVE = "/live/uploads"


def state() -> dict[str, object]:
    """What this process holds: its tasks, and the descriptors of files below `SERVED`."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    files = [link for link in links if "/uploads/" in link]
    return {"pid": os.getpid(), "tasks": len(asyncio.all_tasks()), "files": sorted(files)}


async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
    """The wrapped app: it knows nothing but `/state`."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            assert message["type"] == "lifespan.startup"
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    assert scope["type"] == "http"
    status, body = (200, json.dumps(state()).encode()) if scope["path"] == "/state" else (404, b"wrapped")
    headers = [(b"content-length", str(len(body)).encode()), (b"x-wrapped", b"yes")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def make_app(base: Path, dead_port: int) -> SelfHealMiddleware:
    """Both prefixes, the one inside the other."""
    dead = UploadStore(base / "dead" / "uploads", f"postgresql+asyncpg://nobody@127.0.0.1:{dead_port}/none")
    live = UploadStore(base / "live" / "uploads", f"sqlite+aiosqlite:///{base}/live.db")
    return SelfHealMiddleware(SelfHealMiddleware(wrapped, live, prefix=LIVE), dead, prefix=DEAD)


def app() -> SelfHealMiddleware:
    """What a server is told to load (a factory)."""
    return make_app(Path(os.environ["SERVED"]), int(os.environ["SERVED_DEAD_PORT"]))
