"""The same bytes from the same tables with the bare driver, and no more: what any restore has to do at least.

The chunks of a name in one query, put together and sent: sqlite3 in a thread, or asyncpg.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from typing import Any

import asyncpg

from .plain import plain

PREFIX = "/static/uploads/"
QUERY = """SELECT c.data FROM image_storage s JOIN image_chunk c ON c.sha256 = s.sha256
WHERE s.name = {} AND s.deleted_at IS NULL ORDER BY c.position"""


class FromSqlite:
    """One connection per thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._own = threading.local()

    async def read(self, name: str) -> bytes:
        """All bytes of a name."""
        return await asyncio.to_thread(self._read, name)

    def _read(self, name: str) -> bytes:
        if not hasattr(self._own, "connection"):
            self._own.connection = sqlite3.connect(self._path)
        return b"".join(row[0] for row in self._own.connection.execute(QUERY.format("?"), (name,)))


class FromPostgres:
    """A pool of connections."""

    def __init__(self, url: str) -> None:
        self._url = url.replace("+asyncpg", "")
        self._pool: Any = None

    async def read(self, name: str) -> bytes:
        """All bytes of a name."""
        if self._pool is None:
            self._pool = await asyncpg.create_pool(self._url, min_size=1)
        return b"".join(row[0] for row in await self._pool.fetch(QUERY.format("$1"), name))


def make() -> Any:
    """The app."""
    url = os.environ["BENCH_DATABASE"]
    source = FromSqlite(url.partition("///")[2]) if url.startswith("sqlite") else FromPostgres(url)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await plain(scope, receive, send)
            return
        body = await source.read(scope["path"][len(PREFIX) :])
        headers = [(b"content-type", b"image/jpeg"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
