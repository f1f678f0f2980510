"""One process of a hammer run: everything that apps do to a few names, at random, for some seconds.

Run as a module with a directory, a URL, a seed and the seconds; prints every exception that a caller must not get.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
import traceback
from pathlib import Path

from selfheal import UploadStore
from selfheal.errors import DatabaseUnavailable, FileChanged, NotStored
from tests.support.sample_data import noise
from tests.support.store_requests import restored_bytes

NAMES = ("cats/tom.jpg", "cats/felix.jpg", "rex.jpg", "deep/er/name.png", "large.bin")
SIZES = (0, 10, 4000, 300_000, 900_000)
FAIR = (NotStored, FileChanged, DatabaseUnavailable)
"""What a caller may be told: deleted by another, written by another, a database that is too busy."""


async def hammer(store: UploadStore, chance: random.Random, until: float) -> list[str]:
    """Do things until a moment; return the traceback of each that failed in a way that no caller expects."""
    wrong: list[str] = []
    while time.monotonic() < until:
        name, data = chance.choice(NAMES), noise(chance.choice(SIZES)) + b"%d" % chance.randrange(6)
        try:
            await _step(store, chance.randrange(9), name, data)
        except FAIR:
            pass
        except Exception:
            wrong.append(f"{name}: {traceback.format_exc()}")
    return wrong


async def _step(store: UploadStore, what: int, name: str, data: bytes) -> None:
    path = store.disk.path_of(name)
    if what in (0, 1):
        await store.save(name, data)
    elif what == 2:
        await store.delete(name)
    elif what == 3:
        await store.undo(name)
    elif what == 4:
        _lose(path)
    elif what == 5:
        _overwrite(path, data)
    elif what == 6:
        store.background._follow_from = 0.0
        store.background.follow()
    elif what == 7:
        await _visit(store, name)
    else:
        await store.reconciler.check(name)


async def _visit(store: UploadStore, name: str) -> None:
    file = await store.threads.run(store.disk.open, name)
    if file is None:
        await restored_bytes(store, name)
        return
    with file:
        store.background.hit(name, file.identity, adopt=True)
        await store.threads.run(file.sha256)


def _lose(path: Path) -> None:
    path.unlink(missing_ok=True)


def _overwrite(path: Path, data: bytes) -> None:
    """As an app does: a file beside, and a rename."""
    beside = path.with_name(f"{path.name}-{os.getpid()}.part")
    try:
        beside.write_bytes(data)
        beside.rename(path)
    except FileNotFoundError:  # the directory went with its last file
        pass


async def _main(directory: str, url: str, seed: int, seconds: float) -> None:
    async with UploadStore(directory, url, settled_after=0.05) as store:
        for problem in await hammer(store, random.Random(seed), time.monotonic() + seconds):
            print(problem)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
