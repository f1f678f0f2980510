"""Images of three sizes, and checks of what a server answers for them."""

from __future__ import annotations

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from tests.support.faulty_server import FaultyServer
from tests.support.sample_data import noise
from tests.support.waiting import eventually
from tests.support.wire import Reply

NAME = "cats/tom.jpg"
SMALL, MEDIUM, LARGE = 1000, 3 * CHUNK + 77, 20 * 2**20 + 77
"""Bytes of a file of one chunk, of several chunks, and of a file that is sent while it is restored."""


async def save_and_lose(store: UploadStore, *sizes: int) -> list[str]:
    """Save an image of each size, delete the files, and return the names: only the database has them then."""
    names = []
    for size in sizes:
        saved = await store.save(f"cats/{size}.jpg", noise(size))
        saved.path.unlink()
        names.append(saved.name)
    return names


def is_unknown(answer: Reply) -> bool:
    """Whether this is a 503 with `Retry-After`."""
    return answer.status == 503 and int(answer.headers["retry-after"]) > 0


def is_image(answer: Reply, size: int) -> bool:
    """Whether this is the whole image of a size."""
    return answer.status == 200 and answer.is_whole and answer.body == noise(size)


def is_not_stored(answer: Reply) -> bool:
    """Whether the answer forbids caches to store it."""
    return answer.headers["cache-control"] == "no-store"


async def wait_until_served(server: FaultyServer, name: str, size: int) -> None:
    """Return as soon as the server sends the whole image, within 30 s."""

    async def is_served() -> bool:
        return is_image(await server.get(name), size)

    await eventually(is_served)


async def wait_until_no_connection(server: FaultyServer) -> None:
    """Return as soon as no database connection is in use; the server uses one now and then to follow other nodes."""

    async def uses_none() -> bool:
        return (await server.state())["connections"] == 0

    await eventually(uses_none)


async def wait_for_open_files(server: FaultyServer, number: int) -> None:
    """Return as soon as so many uploads are open; the server opens one now and then to compare it with its record."""

    async def are_open() -> bool:
        return len((await server.state())["files"]) == number

    await eventually(are_open)
