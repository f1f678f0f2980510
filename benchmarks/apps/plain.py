"""The least an ASGI app can be: `/` says hello, `/state` says what the hooks counted, everything else is a 404."""

from __future__ import annotations

import json
from typing import Any

HELLO = b"hello, world\n"
state: dict[str, object] = {}


async def plain(scope: Any, receive: Any, send: Any) -> None:
    """The app."""
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
    """The app alone."""
    return plain
