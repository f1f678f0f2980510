"""Files in memory, each sent in one message: the maximum that an app can reach on uvicorn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .plain import plain

PREFIX = "/static/uploads/"


def make() -> Any:
    """Return an app that reads the files of a directory once, and sends only the necessary headers."""
    directory = Path(os.environ["BENCH_DIRECTORY"])
    files = {PREFIX + str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.jpg")}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = files.get(scope.get("path"))
        if body is None:
            await plain(scope, receive, send)
            return
        headers = [(b"content-type", b"image/jpeg"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
