"""Several processes that use one database at the same moment."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import sys

import anyio

from selfheal import ImageStorage
from tests.support import environment

PROCESSES = 8
TURNS = 4


async def create_tables(url: str, number: int) -> None:
    """Create the tables, and store a file."""
    images = ImageStorage(url)
    await images.create_tables()
    await images.store_image(f"{number}.png", b"%d" % number)
    await images.close()


async def upload(url: str, number: int) -> None:
    """Store files of this process, a shared name, and shared bytes."""
    images = ImageStorage(url)
    for turn in range(TURNS):
        await images.store_image(f"{number}/{turn}.png", random.Random(f"{number}/{turn}").randbytes(200_000))
        await images.store_image("shared.png", b"%d of %d" % (turn, number))
        await images.store_image(f"{number}/same.png", b"same" * turn)
    await images.close()


WORKS = {"create_tables": create_tables, "upload": upload}


def run_in_forks(work: str, url: str) -> None:
    """Run one of the works in several processes at the same moment; exit with the number of processes that failed."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(PROCESSES)

    def member(number: int) -> None:
        barrier.wait(60)
        asyncio.run(WORKS[work](url, number))

    members = [context.Process(target=member, args=(number,)) for number in range(PROCESSES)]
    for process in members:
        process.start()
    for process in members:
        process.join()
    sys.exit(sum(process.exitcode != 0 for process in members))


async def in_processes(work: str, url: str) -> None:
    """Run one of the works in several processes at once; fail with the output of those that fail."""
    command = [sys.executable, "-W", "error", "-m", "tests.support.storage_processes", work, url]
    done = await anyio.run_process(command, check=False, env=environment())
    errors = done.stderr.decode()
    assert done.returncode == 0, errors
    assert "Warning" not in errors, errors


if __name__ == "__main__":
    run_in_forks(sys.argv[1], sys.argv[2])
