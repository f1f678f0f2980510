"""Files that are served from every place: from disk, from the database, and past a disk that accepts no file."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

from starlette.applications import Starlette
from starlette.responses import FileResponse
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from selfheal import UploadStore
from tests.support.asgi import Answer, ask
from tests.support.http_cases import MODIFIED_NS
from tests.support.middleware import Wrapping, wrapping

PREFIX = "/static/uploads"
ON_DISK, IN_DATABASE, WITHOUT_DISK = "on disk", "only in the database", "past a disk that accepts no file"
PLACES = (ON_DISK, IN_DATABASE, WITHOUT_DISK)


@lru_cache
def content(size: int) -> bytes:
    """Return `size` pseudo-random bytes."""
    return random.Random(size).randbytes(size)


def starlette_headers(path: Path) -> dict[str, str]:
    """Return the headers of Starlette's `FileResponse` for a file."""
    return dict(FileResponse(path, stat_result=path.stat()).headers)


class ServedFiles:
    """Files that can be in every place, and the headers that Starlette gives them."""

    def __init__(self, store: UploadStore, without_disk: UploadStore, wrapping: Wrapping = wrapping) -> None:
        self.root = store.disk.path
        self.no_root = without_disk.disk.path
        served = wrapping(store, True)
        self.apps: dict[str, ASGIApp] = {
            ON_DISK: served,
            IN_DATABASE: served,
            WITHOUT_DISK: wrapping(without_disk, True),
        }
        self.root.mkdir(parents=True, exist_ok=True)
        static = Starlette(routes=[Mount(PREFIX, StaticFiles(directory=self.root))])
        self.handed_on = wrapping(store, False, static)
        self.store = store

    async def put(self, name: str, data: bytes, modified_ns: int = MODIFIED_NS) -> dict[str, str]:
        """Store a file in the database and on disk, and return Starlette's headers for it."""
        await self.store.database.store_image(name, data, modified_ns=modified_ns)
        path = (await self.store.restore(name)).path
        return starlette_headers(path)

    async def ask(self, place: str, name: str, *, method: str = "GET", headers: list[tuple[str, str]]) -> Answer:
        """Return the answer to a request for a file that is in `place`."""
        await self.move_to(place, name)
        answer = await ask(self.apps[place], f"{PREFIX}/{name}", method=method, headers=headers)
        if place == WITHOUT_DISK:
            assert not self.no_root.exists(), "something was written below the mount point"
        else:
            await self.store.tasks.drain(30)
            assert (self.root / name).is_file(), "the file was not restored"
        return answer

    async def move_to(self, place: str, name: str) -> None:
        """Delete the file if it must be only in the database, once the last restore has finished."""
        await self.store.tasks.drain(30)
        if place == IN_DATABASE:
            (self.root / name).unlink()
