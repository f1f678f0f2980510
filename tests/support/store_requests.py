"""The work of a server with a store for one request: a hit, or a miss that is restored."""

from __future__ import annotations

from selfheal import UploadStore


def hit(store: UploadStore, name: str) -> None:
    """Open a file that is on disk, as for an answer, and report it to the store, which checks it in the background."""
    file = store.disk.open(name)
    assert file is not None
    file.close()
    store.background.hit(name, file.identity, adopt=True)


async def hit_and_settle(store: UploadStore, name: str) -> None:
    """Do a hit, and wait until the background work that it started is done."""
    hit(store, name)
    await store.tasks.drain(30)


async def restored_bytes(store: UploadStore, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
    """Return the bytes that a visitor gets for a name whose file is missing, or None if there is no such name."""
    body = await store.restorer.restore(name)
    if body is None:
        return None
    try:
        return b"".join([piece async for piece in body.pieces(start, body.size if stop is None else stop)])
    finally:
        body.close()
