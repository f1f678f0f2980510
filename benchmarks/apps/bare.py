"""The same bytes from the same tables with the bare driver: the minimum that a restore has to do.

It reads the chunks of a name in one query, joins them and sends them: with sqlite3 in a thread, or with asyncpg. With
`BENCH_DIRECTORY` it also restores the file in plain Python, in the same order as selfheal: look for the file, read the
bytes, write and hash the file, read the record again. It checks no name, and only one client may request a name.
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
    """SQLite, with one connection per thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._own = threading.local()

    async def read(self, name: str) -> bytes:
        """Return all bytes of a name."""
        return await asyncio.to_thread(self._read, name)

    async def restore(self, name: str, path: Path) -> bytes:
        """Return all bytes of a name and write its file, in one call of a thread."""
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
    """PostgreSQL, with a pool of connections."""

    def __init__(self, url: str) -> None:
        self._url = url.replace("+asyncpg", "")
        self._pool: Any = None

    async def read(self, name: str) -> bytes:
        """Return all bytes of a name."""
        return b"".join(row[0] for row in await self._ask(QUERY, name))

    async def restore(self, name: str, path: Path) -> bytes:
        """Return all bytes of a name and write its file."""
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
    """Write a file without a name, hash it, and only then name it."""
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
    """Return the app."""
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
