"""The operations of a store that `operation_process` runs and kills, each described by values that fit into JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta

from selfheal import UploadStore, bulk
from tests.support.sample_data import noise


@dataclass(frozen=True)
class Operation:
    """An action on a name, with the bytes `noise(size)`, in an uploads directory and a database."""

    action: str
    directory: str
    database: str
    name: str = ""
    size: int = 0
    variant: str = ""
    """`named`: the file system has no O_TMPFILE. `streamed`: every file of several chunks counts as a large one."""


async def perform(store: UploadStore, operation: Operation) -> object:
    """Perform an operation, and return its result as a value that fits into JSON."""
    return await ACTIONS[operation.action](store, operation)


async def _save(store: UploadStore, operation: Operation) -> object:
    return (await store.save(operation.name, noise(operation.size))).sha256


async def _restore(store: UploadStore, operation: Operation) -> object:
    return (await store.restore(operation.name)).sha256


async def _visit(store: UploadStore, operation: Operation) -> object:
    """Return the digest of the bytes that a visitor gets, or None for a 404."""
    body = await store.threads.run(store.disk.open, operation.name) or await store.restorer.restore(operation.name)
    if body is None:
        return None
    digest = hashlib.sha256()
    try:
        async with aclosing(body.pieces(0, body.size)) as pieces:
            async for piece in pieces:
                digest.update(piece)
    finally:
        body.close()
    await store.tasks.drain(30)
    return digest.hexdigest()


async def _delete(store: UploadStore, operation: Operation) -> object:
    return await store.delete(operation.name)


async def _undo(store: UploadStore, operation: Operation) -> object:
    return (await store.undo(operation.name)).sha256


async def _adopt(store: UploadStore, operation: Operation) -> object:
    return (await store.adopt(operation.name)).sha256


async def _purge(store: UploadStore, operation: Operation) -> object:
    """Purge as if every version and every upload were old."""
    return (await store.database.purge(timedelta(seconds=-2), grace=timedelta(seconds=-2))).blobs


async def _restore_all(store: UploadStore, operation: Operation) -> object:
    return [[one.name, one.outcome, one.is_problem] async for one in bulk.restore(store, jobs=1)]


async def _heal_all(store: UploadStore, operation: Operation) -> object:
    return [[one.name, one.outcome, one.is_problem] async for one in bulk.restore(store, verify=True, jobs=1)]


async def _migrate(store: UploadStore, operation: Operation) -> object:
    return [[one.name, one.outcome, one.is_problem] async for one in bulk.migrate(store, jobs=1)]


ACTIONS: dict[str, Callable[[UploadStore, Operation], Awaitable[object]]] = {
    "save": _save,
    "restore": _restore,
    "visit": _visit,
    "delete": _delete,
    "undo": _undo,
    "adopt": _adopt,
    "purge": _purge,
    "restore all": _restore_all,
    "heal all": _heal_all,
    "migrate": _migrate,
}
