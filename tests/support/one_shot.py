"""Does one deed of a store in a process of its own, which can be killed at any of its system calls.

Read from standard input, one JSON line each: a `Deed`; then, once its process says who it is, anything for "go".
Written to standard output: its process and threads, what became of it (an answer, or an error), and how the process
ended. Each deed is done by a fork of a process that has imported everything: only the deed itself is on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import traceback
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from selfheal import SelfHealError, UploadStore, bulk
from selfheal import store as store_module
from selfheal.aio.threads import Threads
from selfheal.healing import restore as restoration
from tests.support.sides import noise

CONNECTIONS = 3
"""Of which a bulk run, that asks ahead, takes two."""


@dataclass(frozen=True)
class Deed:
    """What is to be done, to which name, with `noise(size)`, where; `how` says what is unlike other machines."""

    action: str
    directory: str
    database: str
    name: str = ""
    size: int = 0
    how: str = ""
    """`named`: the file system has no unnamed files. `streamed`: every file of several chunks is a large one."""


async def do(store: UploadStore, deed: Deed) -> object:
    """Do it; what can be said of the outcome in JSON."""
    return await ACTIONS[deed.action](store, deed)


async def _save(store: UploadStore, deed: Deed) -> object:
    return (await store.save(deed.name, noise(deed.size))).sha256


async def _restore(store: UploadStore, deed: Deed) -> object:
    return (await store.restore(deed.name)).sha256


async def _visit(store: UploadStore, deed: Deed) -> object:
    """What a visitor gets: the digest of the bytes, or None for a 404."""
    body = await store.threads.run(store.disk.open, deed.name) or await store.bring_back(deed.name)
    if body is None:
        return None
    digest = hashlib.sha256()
    try:
        async with aclosing(body.pieces(0, body.size)) as pieces:
            async for piece in pieces:
                digest.update(piece)
    finally:
        body.close()
    await store.tasks.settle(30)
    return digest.hexdigest()


async def _delete(store: UploadStore, deed: Deed) -> object:
    return await store.delete(deed.name)


async def _undo(store: UploadStore, deed: Deed) -> object:
    return (await store.undo(deed.name)).sha256


async def _adopt(store: UploadStore, deed: Deed) -> object:
    return (await store.adopt(deed.name)).sha256


async def _purge(store: UploadStore, deed: Deed) -> object:
    """As if everything had been done long ago."""
    return (await store.database.purge(timedelta(seconds=-2), grace=timedelta(seconds=-2))).blobs


async def _restore_all(store: UploadStore, deed: Deed) -> object:
    return [[one.name, one.outcome, one.is_problem] async for one in bulk.restore(store, jobs=1)]


async def _heal_all(store: UploadStore, deed: Deed) -> object:
    return [[one.name, one.outcome, one.is_problem] async for one in bulk.restore(store, verify=True, jobs=1)]


async def _migrate(store: UploadStore, deed: Deed) -> object:
    return [[one.name, one.outcome, one.is_problem] async for one in bulk.migrate(store, jobs=1)]


ACTIONS: dict[str, Callable[[UploadStore, Deed], Awaitable[object]]] = {
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


# -- the process ----------------------------------------------------------------------------------------------------


def _say(**what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _hear() -> bytes:
    """One line; nothing at the end. What follows is for another process, and is left in the pipe."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def _one_thread_for_the_disk() -> None:
    """Every call then belongs to a thread that is there before the deed begins."""
    store_module.Threads = lambda: Threads(1)  # type: ignore[attr-defined]


def _prepare(how: str) -> None:
    if how == "named":
        del os.O_TMPFILE  # type: ignore[misc]
    elif how == "streamed":
        restoration.WHOLE_FIRST = 0


async def _perform(deed: Deed) -> None:
    async with UploadStore(deed.directory, deed.database) as store:
        # a bulk run asks ahead: as many connections as it takes; `open` made the thread for the disk
        await asyncio.gather(*(store.database.count() for _ in range(CONNECTIONS)))
        _say(process=os.getpid(), threads=sorted(int(tid) for tid in os.listdir("/proc/self/task")))
        _hear()
        try:
            answer = await do(store, deed)
        except (SelfHealError, OSError) as error:
            _say(raised=type(error).__name__, says=str(error))
        except Exception as error:
            _say(raised=type(error).__name__, says=traceback.format_exc(), unclean=True)
        else:
            _say(done=answer)


def _child(deed: Deed) -> None:
    _one_thread_for_the_disk()
    _prepare(deed.how)
    try:
        asyncio.run(_perform(deed))
    except (SelfHealError, OSError) as error:  # while closing
        _say(closing=str(error))


def main() -> None:
    """Deed after deed, until nobody asks for more."""
    while line := _hear():
        deed = Deed(**json.loads(line))
        child = os.fork()
        if not child:
            code = errno.EPERM
            with contextlib.suppress(BrokenPipeError):
                _child(deed)
                code = 0
            os._exit(code)
        _, status = os.waitpid(child, 0)
        _say(ended=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    assert Path("/proc/self/task").exists()
    main()
