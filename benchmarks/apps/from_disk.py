"""Files read from disk for each request and sent in one message: the minimum of an app that serves files.

It sends as many headers as selfheal. It checks neither path nor links, and a slow disk blocks its event loop.
"""

from __future__ import annotations

import os
from typing import Any

from .plain import plain

PREFIX = "/static/uploads/"


def make() -> Any:
    """Return an app that opens, measures, reads and closes the file of each request."""
    directory = os.environ["BENCH_DIRECTORY"] + "/"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if not path.startswith(PREFIX):
            await plain(scope, receive, send)
            return
        fd = os.open(directory + path[len(PREFIX) :], os.O_RDONLY)
        measured = os.fstat(fd)
        body = os.read(fd, measured.st_size)
        os.close(fd)
        headers = [
            (b"content-type", b"image/jpeg"),
            (b"accept-ranges", b"bytes"),
            (b"content-length", str(len(body)).encode()),
            (b"last-modified", b"Thu, 26 Nov 2026 12:00:00 GMT"),
            (b"etag", f'"{measured.st_mtime_ns:032x}"'.encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
