"""Files read from the disk for each request, each in one message: the least that an app that serves files does.

It says as many headers as selfheal does. Nothing is guarded: not the path, not links, not a disk that is slow.
"""

from __future__ import annotations

import os
from typing import Any

from .plain import plain

PREFIX = "/static/uploads/"


def make() -> Any:
    """The files of a directory, each opened, measured, read and closed."""
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
