"""The process pool of the bulk runs: processes share the work, report its errors, and end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from selfheal.bulk.process_pool import InlineExecutor, available_cpus
from tests.support import environment
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@contextmanager
def running(scenario: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a scenario of `tests.support.pool_scenarios` in a session of its own."""
    command = [sys.executable, "-m", "tests.support.pool_scenarios", scenario, str(directory)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        yield process


def run(scenario: str, directory: Path) -> tuple[int, str, str]:
    """Run a scenario to its end; return its exit code, standard output and standard error."""
    with running(scenario, directory) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def pids(directory: Path, what: str) -> set[int]:
    """Return the ids of the processes that have `begun`, or `closed` their resources."""
    return {int(path.name.partition("-")[2]) for path in directory.glob(f"{what}-*")}


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_work_is_shared(tmp_path: Path) -> None:
    """Both processes take part, results reach their callers, and each process closes its resource before it ends."""
    assert run("share", tmp_path) == (0, "[0, 1, 4, 9, 16, 25, 36, 49, 64, 81] 2\n", "")
    assert len(pids(tmp_path, "begun")) == 2
    assert pids(tmp_path, "closed") == pids(tmp_path, "begun")
    assert not any(map(is_alive, pids(tmp_path, "begun")))


def test_an_error_is_raised_where_the_work_was_given(tmp_path: Path) -> None:
    """The caller gets an error of the same type, and the process goes on with other work."""
    assert run("go_on", tmp_path) == (0, "it is down\n[0, 1, 4, 9, 16, 25, 36, 49, 64, 81] 2\n", "")
    assert len(pids(tmp_path, "begun")) == 2


@pytest.mark.parametrize("scenario", ["lose_one", "lose_one_reporting"])
def test_a_process_that_is_killed_is_reported(tmp_path: Path, scenario: str) -> None:
    """Work whose process was killed raises an error that says what to do; the others close their resources."""
    code, _, err = run(scenario, tmp_path)
    assert code == 1
    assert err.endswith("SelfHealError: a process of this run was killed; run it again, it goes on from there\n")
    assert len(pids(tmp_path, "closed")) == 1


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    """When the parent process is killed, no process of the pool goes on."""
    with running("wait_long", tmp_path) as process:
        wait_until((tmp_path / "working").exists)
        process.kill()
        process.communicate()
    begun = pids(tmp_path, "begun")
    wait_until(lambda: not any(map(is_alive, begun)), seconds=0.5)
    assert not (tmp_path / "worked").exists()


def test_ctrl_c_cancels_running_work(tmp_path: Path) -> None:
    """A terminal interrupts all processes at once; running work is cancelled, and all processes end."""
    with running("wait_longer", tmp_path) as process:
        wait_until((tmp_path / "working").exists)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in err
    assert (tmp_path / "ended").exists()
    assert pids(tmp_path, "closed") == pids(tmp_path, "begun")


def test_a_caller_that_is_cancelled(tmp_path: Path) -> None:
    """The work of a cancelled caller is cancelled in its process, which goes on with other work."""
    assert run("stop_one", tmp_path) == (0, "cancelled\n[0, 1, 4, 9, 16, 25, 36, 49, 64, 81] 2\n", "")
    assert (tmp_path / "ended").exists()


def test_ctrl_c_waits_for_work_that_cannot_be_cancelled(tmp_path: Path) -> None:
    """Work that blocks its process, as a slow disk does, is finished before all processes end."""
    with running("wait_long", tmp_path) as process:
        wait_until((tmp_path / "working").exists)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    assert (tmp_path / "worked").exists()
    assert pids(tmp_path, "closed") == pids(tmp_path, "begun")


INTERRUPTED_FORK = """if True:
    import os, signal
    from selfheal.bulk.process_pool import ProcessPool
    from tests.support.pool_scenarios import Resource

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)

    os.register_at_fork(after_in_parent=interrupt, after_in_child=interrupt)
    try:
        with ProcessPool(Resource, 2):
            print("it was lost")
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_ctrl_c_during_the_fork(tmp_path: Path) -> None:
    """SIGINT in the middle of a fork is neither lost nor a traceback: the parent is interrupted when all are forked."""
    command = [sys.executable, "-c", INTERRUPTED_FORK, "", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


async def test_inline_executor() -> None:
    """The inline executor runs a function in this process, with its resource."""

    class Resource:
        async def close(self) -> None: ...

    async def work(resource: Resource, number: int, *, more: int) -> tuple[Resource, int]:
        return resource, number + more

    resource = Resource()
    assert await InlineExecutor(resource).run(work, 1, more=2) == (resource, 3)


def test_available_cpus() -> None:
    """It is the number of processors that this process may use."""
    assert available_cpus() == len(os.sched_getaffinity(0))
