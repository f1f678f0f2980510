"""Several processes stage at the same time, or are killed while they stage."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from selfheal.disk import staged_file, temporary
from selfheal.disk.temporary import sweep
from tests.support.staging import MODIFIED, NEW, OLD, Root, in_a_process, open_root, publish_once


def publish_many(path: str, letter: str) -> None:
    """Wait for a line on standard input, publish fifty names, and print the numbers of those that were free."""
    root = open_root(path)
    print("ready", flush=True)
    sys.stdin.readline()
    won = []
    for number in range(50):
        with root.stage(f"{number}.png") as staged:
            staged.write(letter.encode() * 50_000)
            staged.seal(MODIFIED, 0o644)
            if staged.publish():
                won.append(number)
    print(json.dumps(won))


def test_of_processes_that_publish_one_name_one_wins(root: Root, way: str) -> None:
    """If two processes publish the same fifty names at once, each name has the bytes of the one process that got it."""
    processes = {letter: in_a_process(publish_many, str(root.path), letter, way=way) for letter in "AB"}
    for process in processes.values():
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    won: dict[str, list[int]] = {}
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for letter, process in processes.items():
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        won[letter] = json.loads(out)
    assert sorted(won["A"] + won["B"]) == list(range(50))
    for letter, numbers in won.items():
        for number in numbers:
            assert (root.path / f"{number}.png").read_bytes() == letter.encode() * 50_000
    assert root.entries() == sorted(f"{number}.png" for number in range(50))


def is_killed_at(line: int, work: Callable[[], None]) -> bool:
    """Run `work` in a fork that is killed before it runs line number `line` of staged_file or temporary; return whether
    it was killed.
    """
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = itertools.count(line, -1)

    def trace(frame: Any, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in (staged_file.__file__, temporary.__file__):
            return None
        if event == "line" and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    try:
        sys.settrace(trace)
        work()
    finally:
        os._exit(0)


def kill_at_every_line(path: str) -> None:
    """Print what is found after a kill at each line: of publishing under a free name, and under a taken one."""
    root = open_root(path)
    print(json.dumps([kills(root, publish_once, taken=False), kills(root, publish_once, taken=True)]))


def kills(root: Root, work: Callable[[Root], None], *, taken: bool) -> list[dict[str, Any]]:
    """Kill a fork at each line in turn; return what is at the name, and what is left after a sweep."""
    name = root.path / "tom.png"
    found: list[dict[str, Any]] = []
    killed = True
    while killed:
        if taken:
            name.write_bytes(OLD)
        killed = is_killed_at(len(found), functools.partial(work, root))
        data = name.read_bytes() if name.exists() else None
        names = root.names()
        swept = sweep(root.fd)
        found.append(
            {
                "state": {None: "absent", OLD: "old", NEW: "new"}.get(data, "torn"),
                "swept": swept,
                "names": names,
                "left": root.entries(),
            }
        )
        name.unlink(missing_ok=True)
    return found


def test_a_kill_at_any_line_leaves_a_name_absent_or_whole(root: Root, way: str) -> None:
    """After SIGKILL at any line of staging, the name is as before or as after, and a sweep removes the rest."""
    process = in_a_process(kill_at_every_line, str(root.path), way=way)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    found = json.loads(out)
    assert [{kill["state"] for kill in case} for case in found] == [{"absent", "new"}, {"old"}]
    for kill in itertools.chain(*found):
        wanted = [] if kill["state"] == "absent" else ["tom.png"]
        assert (kill["names"], kill["left"]) == (wanted, wanted)
    swept = [max(kill["swept"] for kill in case) for case in found]
    assert swept == ([0, 0] if way.startswith("unnamed") else [1, 1]), "temporary files to sweep"
