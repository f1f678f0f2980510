"""The app that every server of `servers.py` runs: two stores, one that works and one whose database is down.

`TWO_STORES` in the environment names the directory that holds everything: `dead/uploads`, `live/uploads`, `live.db`.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

from starlette.types import Receive, Scope, Send

from selfheal import SelfHealMiddleware, UploadStore
from tests.support.disk_files import MARKS
from tests.support.open_files import open_targets
from tests.support.plain_asgi import answer_lifespan, send_wrapped

DEAD = "/static/uploads"
"""The prefix whose database is down."""
LIVE = "/live/uploads"
"""The prefix whose database works."""


def state() -> dict[str, object]:
    """Return the tasks of this process, and the uploads that it has open."""
    files = [target for target in open_targets() if "/uploads/" in target and not target.endswith(MARKS)]
    return {"pid": os.getpid(), "tasks": len(asyncio.all_tasks()), "files": sorted(files)}


async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer `/state`, and 404 to everything else."""
    if scope["type"] == "lifespan":
        await answer_lifespan(receive, send)
        return
    assert scope["type"] == "http"
    status, body = (200, json.dumps(state()).encode()) if scope["path"] == "/state" else (404, b"wrapped")
    await send_wrapped(scope, send, status, body)


def make_app(base: Path, dead_port: int) -> SelfHealMiddleware:
    """Return a middleware for each prefix, one inside the other."""
    dead = UploadStore(base / "dead" / "uploads", f"postgresql+asyncpg://nobody@127.0.0.1:{dead_port}/none")
    live = UploadStore(base / "live" / "uploads", f"sqlite+aiosqlite:///{base}/live.db")
    return SelfHealMiddleware(SelfHealMiddleware(wrapped, live, prefix=LIVE), dead, prefix=DEAD)


def app() -> SelfHealMiddleware:
    """Return the app; servers load this factory."""
    return make_app(Path(os.environ["TWO_STORES"]), int(os.environ["TWO_STORES_DEAD_PORT"]))
