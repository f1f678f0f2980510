"""A minimal ASGI app: `/` answers hello, `/state` the counts of the hooks, every other path a 404."""

from __future__ import annotations

import json
from typing import Any

HELLO = b"hello, world\n"
state: dict[str, object] = {}


async def plain(scope: Any, receive: Any, send: Any) -> None:
    """Answer a request."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    status, body = {"/": (200, HELLO), "/state": (200, json.dumps(state).encode())}.get(scope["path"], (404, b""))
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def make() -> Any:
    """Return the app."""
    return plain
