"""Several processes: they share the work, say what went wrong with it, and end with whoever gave it to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from selfheal.bulk.process_pool import Alone, processors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@contextmanager
def at_work(scenario: str, place: Path) -> Iterator[subprocess.Popen[str]]:
    """A scenario of `pieces.py` under way, in a session of its own."""
    command = [sys.executable, "-m", "tests.support.pieces", scenario, str(place)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        yield process


def run(scenario: str, place: Path) -> tuple[int, str, str]:
    """How a scenario ended: its exit code, and what it said."""
    with at_work(scenario, place) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def pids(place: Path, what: str) -> set[int]:
    """The processes that have begun, or closed their tools."""
    return {int(path.name.partition("-")[2]) for path in place.glob(f"{what}-*")}


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_work_is_shared(tmp_path: Path) -> None:
    """Every process has a part of it, results come to whoever asked, and each closes its tool before it is gone."""
    assert run("share", tmp_path) == (0, "[0, 1, 4, 9, 16, 25, 36, 49, 64, 81] 2\n", "")
    assert len(pids(tmp_path, "begun")) == 2
    assert pids(tmp_path, "closed") == pids(tmp_path, "begun")
    assert not any(map(is_alive, pids(tmp_path, "begun")))


def test_an_error_is_raised_where_the_work_was_given(tmp_path: Path) -> None:
    """It is of the type that the piece raised, and the process that met it goes on with the next piece."""
    assert run("go_on", tmp_path) == (0, "it is down\n[0, 1, 4, 9, 16, 25, 36, 49, 64, 81] 2\n", "")
    assert len(pids(tmp_path, "begun")) == 2


def test_a_process_that_is_killed_is_told(tmp_path: Path) -> None:
    """A piece whose process was killed raises an error that says what to do; the others close their tools."""
    code, _, err = run("lose_one", tmp_path)
    assert code == 1
    assert err.endswith("SelfHealError: a process of this run was killed; run it again, it goes on from there\n")
    assert len(pids(tmp_path, "closed")) == 1


def test_who_gave_the_work_takes_them_along(tmp_path: Path) -> None:
    """When the process that gave the work is killed, none of the others goes on."""
    with at_work("wait_long", tmp_path) as process:
        wait_for(tmp_path / "working")
        process.kill()
        process.communicate()
    begun, end = pids(tmp_path, "begun"), time.monotonic() + 0.5
    while any(map(is_alive, begun)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(is_alive, begun))
    assert not (tmp_path / "worked").exists()


def test_ctrl_c_lets_the_work_under_way_end(tmp_path: Path) -> None:
    """A terminal interrupts all processes at once; what is under way comes to its end, and then all are gone."""
    with at_work("wait_long", tmp_path) as process:
        wait_for(tmp_path / "working")
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    assert (tmp_path / "worked").exists()
    assert pids(tmp_path, "closed") == pids(tmp_path, "begun")


async def test_alone() -> None:
    """One process does the work with the tool that it was given."""

    class Tool:
        async def close(self) -> None: ...

    async def work(tool: Tool, number: int, *, more: int) -> tuple[Tool, int]:
        return tool, number + more

    tool = Tool()
    assert await Alone(tool).run(work, 1, more=2) == (tool, 3)


def test_processors() -> None:
    """As many as this process may use."""
    assert processors() == len(os.sched_getaffinity(0))
