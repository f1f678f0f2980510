"""The same bytes from the same tables with the bare driver, and no more: what any restore has to do at least.

The chunks of a name in one query, put together and sent: sqlite3 in a thread, or asyncpg. With a `BENCH_DIRECTORY` it
restores them, too, in plain Python and in the order in which selfheal does: is the file there, the bytes, the file and
its hash, and has the record changed meanwhile. Nothing of it is guarded, and nobody else may ask for the same name.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

import asyncpg

from .plain import plain

PREFIX = "/static/uploads/"
QUERY = """SELECT c.data FROM image_storage s JOIN image_chunk c ON c.sha256 = s.sha256
WHERE s.name = {} AND s.deleted_at IS NULL ORDER BY c.position"""
RECORD = "SELECT sha256, modified_ns, generation FROM image_storage WHERE name = {}"


class FromSqlite:
    """One connection per thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._own = threading.local()

    async def read(self, name: str) -> bytes:
        """All bytes of a name."""
        return await asyncio.to_thread(self._read, name)

    async def restore(self, name: str, path: Path) -> bytes:
        """The same, and its file; who asks sqlite3 needs no other thread for that."""
        await asyncio.to_thread(path.exists)
        return await asyncio.to_thread(self._restore, name, path)

    def _restore(self, name: str, path: Path) -> bytes:
        sha256, modified_ns, _ = self._ask(RECORD, name)[0]
        data = self._read(name)
        write(path, data, sha256, modified_ns)
        self._ask(RECORD, name)
        return data

    def _read(self, name: str) -> bytes:
        return b"".join(row[0] for row in self._ask(QUERY, name))

    def _ask(self, query: str, name: str) -> list[Any]:
        if not hasattr(self._own, "connection"):
            self._own.connection = sqlite3.connect(self._path)
        rows: list[Any] = self._own.connection.execute(query.format("?"), (name,)).fetchall()
        return rows


class FromPostgres:
    """A pool of connections."""

    def __init__(self, url: str) -> None:
        self._url = url.replace("+asyncpg", "")
        self._pool: Any = None

    async def read(self, name: str) -> bytes:
        """All bytes of a name."""
        return b"".join(row[0] for row in await self._ask(QUERY, name))

    async def restore(self, name: str, path: Path) -> bytes:
        """The same, and its file."""
        await asyncio.to_thread(path.exists)
        rows = await self._ask(QUERY.replace("c.data", "c.data, s.sha256, s.modified_ns"), name)
        data = b"".join(row[0] for row in rows)
        await asyncio.to_thread(write, path, data, *rows[0][1:])
        await self._ask(RECORD, name)
        return data

    async def _ask(self, query: str, name: str) -> list[Any]:
        if self._pool is None:
            self._pool = await asyncpg.create_pool(self._url, min_size=1)
        rows: list[Any] = await self._pool.fetch(query.format("$1"), name)
        return rows


def write(path: Path, data: bytes, sha256: str, modified_ns: int) -> None:
    """A file without a name, hashed, and only then named."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o644, dir_fd=parent)
    os.pwrite(fd, data, 0)
    assert hashlib.sha256(data).hexdigest() == sha256
    os.utime(fd, ns=(modified_ns, modified_ns))
    os.link(f"/proc/self/fd/{fd}", path.name, src_dir_fd=-100, dst_dir_fd=parent, follow_symlinks=True)
    os.close(fd)
    os.close(parent)


def make() -> Any:
    """The app."""
    url, directory = os.environ["BENCH_DATABASE"], os.environ.get("BENCH_DIRECTORY")
    source = FromSqlite(url.partition("///")[2]) if url.startswith("sqlite") else FromPostgres(url)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await plain(scope, receive, send)
            return
        name = scope["path"][len(PREFIX) :]
        body = await (source.read(name) if directory is None else source.restore(name, Path(directory, name)))
        headers = [(b"content-type", b"image/jpeg"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
