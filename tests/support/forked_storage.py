"""Use a storage in a process and in its forked child: `python -m tests.support.forked_storage URL`."""

from __future__ import annotations

import asyncio
import os
import sys
import traceback

from selfheal import ImageStorage
from tests.support.records import bytes_of


def fork_and_use(url: str) -> None:
    """Use a storage in this process, and then in a forked child and again in this process."""

    async def parent() -> None:
        images = ImageStorage(url)
        await images.create_tables()
        await images.store_image("a.png", b"parent")
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(use_in_child(images))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, "the child failed"
        for _ in range(3):
            assert await bytes_of(images, "a.png") == b"child"
        await images.store_image("a.png", b"parent again")
        assert await bytes_of(images, "a.png") == b"parent again"
        await images.close()

    asyncio.run(parent())


async def use_in_child(images: ImageStorage) -> None:
    """Use a storage that was created and used before the fork, as a worker does."""
    assert await bytes_of(images, "a.png") == b"parent"
    await images.store_image("a.png", b"child")
    assert await bytes_of(images, "a.png") == b"child"
    await images.close()


if __name__ == "__main__":
    fork_and_use(sys.argv[1])
