"""The thread pool: results, errors, and callers that are cancelled while a thread works for them."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selfheal.aio.threads import Threads
from selfheal.disk.directory import UploadsDirectory
from selfheal.disk.open_file import OpenFile
from tests.support.open_files import descriptors_of

GIVE_UP_AFTER = 30.0
"""Seconds after which a thread of a test gives up by itself, so that a failure does not hang the run."""

AFTER_A_FORK = """
import asyncio, os, signal, sys
from selfheal.aio.threads import Threads

threads = Threads(2)
assert asyncio.run(threads.run(os.getpid)) == os.getpid()
child = os.fork()
if child == 0:
    signal.alarm(20)  # a call that waits for the parent's threads never ends
    if sys.argv[1] == "close":
        threads.close()
    found = asyncio.run(threads.run(os.getpid))
    os._exit(7 if found == os.getpid() else 1)
_, status = os.waitpid(child, 0)
assert asyncio.run(threads.run(os.getpid)) == os.getpid()
threads.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Gate:
    """Work that waits in its thread until the test sets `opened`."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.left = threading.Event()

    def __call__(self, result: Any = None) -> Any:
        """Wait; then return `result`, or raise it if it is an error."""
        self.entered.set()
        assert self.opened.wait(GIVE_UP_AFTER)
        self.left.set()
        if isinstance(result, BaseException):
            raise result
        return result

    async def is_entered(self) -> None:
        """Wait until a thread has started the work."""
        while not self.entered.is_set():
            await asyncio.sleep(0.01)


@pytest.fixture
def threads() -> Iterator[Threads]:
    """A pool of four threads."""
    threads = Threads(4)
    yield threads
    threads.close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Work that waits; it ends with the test at the latest."""
    gate = Gate()
    yield gate
    gate.opened.set()


async def cancelled_at(gate: Gate, threads: Threads, result: Any = None) -> asyncio.Task[Any]:
    """Return a cancelled caller whose work waits in its thread."""
    caller = asyncio.create_task(threads.run(gate, result))
    await gate.is_entered()
    caller.cancel()
    return caller


async def assert_still_waiting(caller: asyncio.Task[Any]) -> None:
    """Fail if the caller ends within 0.1 s."""
    for _ in range(20):
        await asyncio.sleep(0.005)
        assert not caller.done()


async def test_the_result_comes_from_another_thread(threads: Threads) -> None:
    """A call gets its arguments, runs in a thread of the pool, and its result is returned."""

    def work(*args: int, **kwargs: int) -> tuple[Any, ...]:
        return args, kwargs, threading.current_thread()

    args, kwargs, thread = await threads.run(work, 1, 2, three=3)
    assert (args, kwargs) == ((1, 2), {"three": 3})
    assert thread is not threading.current_thread()
    assert thread.name.startswith("selfheal")


async def test_an_error_reaches_the_caller(threads: Threads) -> None:
    """The caller gets the error of the call, the same object."""
    error = OSError(28, "No space left on device")

    def work() -> None:
        raise error

    with pytest.raises(OSError, match="No space left") as caught:
        await threads.run(work)
    assert caught.value is error


async def test_the_loop_goes_on(threads: Threads, gate: Gate) -> None:
    """While a call waits for a slow disk, the event loop and other calls go on."""
    slow = asyncio.create_task(threads.run(gate, "slow"))
    await gate.is_entered()
    assert [await threads.run(str, number) for number in range(20)] == [str(number) for number in range(20)]
    assert not slow.done()
    gate.opened.set()
    assert await slow == "slow"


async def test_a_cancelled_caller_waits_for_the_end(threads: Threads, gate: Gate) -> None:
    """A cancelled caller ends only after its thread, so that it cannot close what the thread uses."""
    caller = await cancelled_at(gate, threads)
    await assert_still_waiting(caller)
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert gate.left.is_set()


async def test_cancelled_again_and_again(threads: Threads, gate: Gate) -> None:
    """A caller that is cancelled several times still waits for its thread."""
    caller = await cancelled_at(gate, threads)
    for _ in range(5):
        await asyncio.sleep(0.01)
        caller.cancel()
    await assert_still_waiting(caller)
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert gate.left.is_set()


async def test_a_deadline_waits_for_the_end(threads: Threads, gate: Gate) -> None:
    """A timeout that expires while the thread works is raised after the thread has ended."""
    opener = threading.Timer(0.3, gate.opened.set)
    opener.start()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await threads.run(gate)
    assert gate.left.is_set()
    opener.join()


async def test_a_descriptor_in_use_is_not_closed(threads: Threads, gate: Gate, tmp_path: Path) -> None:
    """A cancelled caller does not close the descriptor its thread writes to: another file could get its number."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    fd = os.open(mine, os.O_WRONLY | os.O_CREAT)

    async def caller() -> None:
        try:
            await threads.run(lambda: (gate(), os.write(fd, b"mine")))
        finally:
            os.close(fd)

    task = asyncio.create_task(caller())
    await gate.is_entered()
    task.cancel()
    await asyncio.sleep(0.05)
    unrelated = os.open(other, os.O_WRONLY | os.O_CREAT)
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    os.close(unrelated)
    assert (mine.read_bytes(), other.read_bytes()) == (b"mine", b"")


async def test_an_error_without_a_caller_is_not_reported(
    threads: Threads, gate: Gate, reports: list[dict[str, Any]]
) -> None:
    """An error of a call whose caller was cancelled is not reported as never retrieved."""
    caller = await cancelled_at(gate, threads, OSError(5, "Input/output error"))
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    del caller
    gc.collect()
    await asyncio.sleep(0.01)
    assert reports == []


async def test_a_cancelled_caller_leaves_no_descriptor_open(threads: Threads, gate: Gate, tmp_path: Path) -> None:
    """A client that disconnects while its file is opened leaves no descriptor open (CVE-2026-54280)."""
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    disk = UploadsDirectory(tmp_path, threads=threads)

    def slow_open() -> OpenFile | None:
        gate()
        return disk.open("a.png")

    caller = asyncio.create_task(threads.run(slow_open))
    await gate.is_entered()
    caller.cancel()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    del caller
    gc.collect()
    disk.close()
    assert descriptors_of(path) == 0


async def test_the_number_of_threads_is_bounded() -> None:
    """At most as many calls run at once as there are threads; the others wait, and all get their results."""
    threads = Threads(3)
    lock = threading.Lock()
    running: list[int] = []
    most: list[int] = []

    def work(number: int) -> int:
        with lock:
            running.append(number)
            most.append(len(running))
        time.sleep(0.005)
        with lock:
            running.remove(number)
        return number

    assert await asyncio.gather(*(threads.run(work, number) for number in range(30))) == list(range(30))
    assert 1 < max(most) <= 3
    threads.close()


async def test_used_again_after_it_was_closed(threads: Threads, gate: Gate) -> None:
    """`close` does not wait, lets running calls end, may be called twice, and a later call starts new threads."""
    slow = asyncio.create_task(threads.run(gate, "slow"))
    await gate.is_entered()
    threads.close()
    threads.close()
    assert await threads.run(str, 5) == "5"
    assert not slow.done()
    gate.opened.set()
    assert await slow == "slow"


async def test_closed_threads_end(threads: Threads) -> None:
    """The threads of a closed pool end."""
    thread = await threads.run(threading.current_thread)
    threads.close()
    await asyncio.to_thread(thread.join, GIVE_UP_AFTER)
    assert not thread.is_alive()


def test_one_pool_for_several_loops() -> None:
    """One pool serves one event loop after another."""
    threads = Threads(2)
    assert [asyncio.run(threads.run(str, number)) for number in range(3)] == ["0", "1", "2"]
    threads.close()


@pytest.mark.parametrize("first", ["run", "close"])
def test_each_process_has_its_own(first: str) -> None:
    """A forked child makes its own threads and does not stop those of its parent."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", AFTER_A_FORK, first]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (7, "")
