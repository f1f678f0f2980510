"""The threads: answers, failures, and askers that go away while a thread is at work for them."""

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
from selfheal.disk.directory import OpenFile, UploadsDirectory

PATIENCE = 30.0
"""Seconds after which a thread of a test gives up by itself, so that a failure does not hang the run."""

AFTER_A_FORK = """
import asyncio, os, signal, sys
from selfheal.aio.threads import Threads

threads = Threads(2)
assert asyncio.run(threads.run(os.getpid)) == os.getpid()
child = os.fork()
if child == 0:
    signal.alarm(20)  # a call that waits for the parent's threads waits for ever
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
    """Work that waits in its thread until the test opens the gate."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.left = threading.Event()

    def __call__(self, result: Any = None) -> Any:
        """Wait for the gate; return `result`, or raise it if it is an error."""
        self.entered.set()
        assert self.opened.wait(PATIENCE)
        self.left.set()
        if isinstance(result, BaseException):
            raise result
        return result

    async def is_entered(self) -> None:
        """Wait until a thread stands at the gate."""
        while not self.entered.is_set():
            await asyncio.sleep(0.01)


@pytest.fixture
def threads() -> Iterator[Threads]:
    """Four threads."""
    threads = Threads(4)
    yield threads
    threads.close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate, open at the end whatever happened."""
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
async def complaints() -> list[dict[str, Any]]:
    """What the event loop complained about, such as failures that nobody ever asked for."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    return told


def open_descriptors(path: Path) -> int:
    """How many descriptors of this process are open on a file."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link) == str(path) for link in links if os.path.lexists(link))


async def cancelled_at(gate: Gate, threads: Threads, result: Any = None) -> asyncio.Task[Any]:
    """An asker whose call stands at the gate, and that was cancelled."""
    asker = asyncio.create_task(threads.run(gate, result))
    await gate.is_entered()
    asker.cancel()
    return asker


async def assert_still_waiting(asker: asyncio.Task[Any]) -> None:
    """However many turns the loop takes, the asker is not done."""
    for _ in range(20):
        await asyncio.sleep(0.005)
        assert not asker.done()


async def test_the_answer_comes_from_another_thread(threads: Threads) -> None:
    """A call gets its arguments, its answer comes back, and it runs in a thread of this pool, not in the loop's."""

    def work(*args: int, **kwargs: int) -> tuple[Any, ...]:
        return args, kwargs, threading.current_thread()

    args, kwargs, thread = await threads.run(work, 1, 2, three=3)
    assert (args, kwargs) == ((1, 2), {"three": 3})
    assert thread is not threading.current_thread()
    assert thread.name.startswith("selfheal")


async def test_a_failure_reaches_the_asker(threads: Threads) -> None:
    """What the call raises is what the asker gets, the very same error."""
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


async def test_a_cancelled_asker_waits_for_the_end(threads: Threads, gate: Gate) -> None:
    """An asker that is cancelled ends only after its thread has: until then nobody closes what the thread works on."""
    asker = await cancelled_at(gate, threads)
    await assert_still_waiting(asker)
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await asker
    assert gate.left.is_set()


async def test_cancelled_again_and_again(threads: Threads, gate: Gate) -> None:
    """An asker that is cancelled once more while it waits for its thread still waits."""
    asker = await cancelled_at(gate, threads)
    for _ in range(5):
        await asyncio.sleep(0.01)
        asker.cancel()
    await assert_still_waiting(asker)
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await asker
    assert gate.left.is_set()


async def test_a_deadline_waits_for_the_end(threads: Threads, gate: Gate) -> None:
    """A deadline that passes while a thread is at work is told after the thread's end."""
    opener = threading.Timer(0.3, gate.opened.set)
    opener.start()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await threads.run(gate)
    assert gate.left.is_set()
    opener.join()


async def test_no_number_is_given_away_under_a_thread(threads: Threads, gate: Gate, tmp_path: Path) -> None:
    """A cancelled asker does not close the descriptor that its thread writes to: another file would get its bytes."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    fd = os.open(mine, os.O_WRONLY | os.O_CREAT)

    async def asker() -> None:
        try:
            await threads.run(lambda: (gate(), os.write(fd, b"mine")))
        finally:
            os.close(fd)

    task = asyncio.create_task(asker())
    await gate.is_entered()
    task.cancel()
    await asyncio.sleep(0.05)
    stranger = os.open(other, os.O_WRONLY | os.O_CREAT)
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    os.close(stranger)
    assert (mine.read_bytes(), other.read_bytes()) == (b"mine", b"")


async def test_a_failure_that_nobody_asks_for(threads: Threads, gate: Gate, complaints: list[dict[str, Any]]) -> None:
    """A call that fails after its asker was cancelled is cancelled for the asker, and nobody complains of it later."""
    asker = await cancelled_at(gate, threads, OSError(5, "Input/output error"))
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await asker
    del asker
    gc.collect()
    await asyncio.sleep(0.01)
    assert complaints == []


async def test_a_cancelled_asker_leaves_no_descriptor_open(threads: Threads, gate: Gate, tmp_path: Path) -> None:
    """CVE-2026-54280: a client that goes away while its file is being opened leaves no descriptor open behind it."""
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    disk = UploadsDirectory(tmp_path, threads=threads)

    def slow_open() -> OpenFile | None:
        gate()
        return disk.open("a.png")

    asker = asyncio.create_task(threads.run(slow_open))
    await gate.is_entered()
    asker.cancel()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await asker
    del asker
    gc.collect()
    disk.close()
    assert open_descriptors(path) == 0


async def test_only_so_many_at_once() -> None:
    """No more calls run at once than there are workers; the others wait for their turn, and all are answered."""
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
    """Closing waits for nobody, lets what is under way end, may be done twice, and a later call starts new threads."""
    slow = asyncio.create_task(threads.run(gate, "slow"))
    await gate.is_entered()
    threads.close()
    threads.close()
    assert await threads.run(str, 5) == "5"
    assert not slow.done()
    gate.opened.set()
    assert await slow == "slow"


async def test_closed_threads_end(threads: Threads) -> None:
    """A closed pool leaves no thread behind."""
    thread = await threads.run(threading.current_thread)
    threads.close()
    await asyncio.to_thread(thread.join, PATIENCE)
    assert not thread.is_alive()


def test_one_pool_for_several_loops() -> None:
    """The same threads serve one event loop after another."""
    threads = Threads(2)
    assert [asyncio.run(threads.run(str, number)) for number in range(3)] == ["0", "1", "2"]
    threads.close()


@pytest.mark.parametrize("first", ["run", "close"])
def test_each_process_has_its_own(first: str) -> None:
    """A child that was forked off has none of its parent's threads: it makes its own, and leaves the parent's alone."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", AFTER_A_FORK, first]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (7, "")
