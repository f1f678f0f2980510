"""Calls that are handed to the home loop, and are broken off."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from selfheal.aio.home import HomeLoop
from tests.support.command_line import SECONDS, environment


class Opened:
    """What is to be closed, such as an open file."""

    is_closed = False

    def close(self) -> None:
        """Note that."""
        self.is_closed = True


@pytest.fixture
def home() -> Iterator[HomeLoop]:
    """A home in a thread of its own."""
    home = HomeLoop()
    yield home
    home.leave_waiting()


async def test_a_result_that_a_cancelled_caller_does_not_take(home: HomeLoop) -> None:
    """What the work opened is closed if its caller on another loop is cancelled at that moment."""
    opened = Opened()

    async def work() -> Opened:
        return opened

    caller = asyncio.create_task(home.run(work))
    await asyncio.sleep(0)
    time.sleep(0.3)  # the work ends, and this loop does not hear of it yet
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert opened.is_closed


SCRIPT = """if True:
    import asyncio, signal
    from selfheal.aio.home import HomeLoop
    from selfheal.sync import iterate

    async def items():
        yield 1
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.5)

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        for _ in iterate(HomeLoop(), items()):
            pass
    except BaseException as error:
        print(type(error).__name__)
"""


def test_an_interrupted_iteration() -> None:
    """A signal that ends a synchronous loop over what comes from home is what the caller gets."""
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    assert (done.stdout, done.stderr, done.returncode) == ("KeyboardInterrupt\n", "", 0)
