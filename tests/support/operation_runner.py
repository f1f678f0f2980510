"""Runs operations in processes of their own, with a system call that is killed or that fails."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.support import environment
from tests.support.operations import Operation
from tests.support.strace import CHANGES, SECONDS, Call, attached, read_calls


@dataclass
class RunResult:
    """The end of a process: its output, and its exit code."""

    output: dict[str, Any] = field(default_factory=dict)
    code: int | None = None

    @property
    def is_acknowledged(self) -> bool:
        """Whether it reported that the whole operation succeeded."""
        answer = self.output.get("answer")
        problems = [one for one in answer if one[2] and one[1] != "deleted"] if isinstance(answer, list) else []
        return "answer" in self.output and not problems

    @property
    def is_clean(self) -> bool:
        """Whether it ended with an answer, or with an error that a caller can handle."""
        return self.code == 0 and "unexpected" not in self.output and bool(self.output.keys() & {"answer", "raised"})

    @property
    def is_killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.code == -signal.SIGKILL


class OperationRunner:
    """Runs operations, each in a process of its own (`operation_process`)."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._received = b""
        self._log = (base / "operations.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.operation_process"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def run(self, operation: Operation) -> RunResult:
        """Run an operation without a fault."""
        return self._run(operation, lambda _process, _threads: contextlib.nullcontext())

    def trace(self, operation: Operation, calls: str = CHANGES) -> tuple[list[Call], object]:
        """Run an operation without a fault; return its calls in the order in which they began, and its answer."""
        log = self._base / "calls"
        known: list[int] = []

        def strace(process: int, threads: list[int]) -> contextlib.AbstractContextManager[None]:
            known.extend(threads)
            return attached("-f", "-y", "-s", "64", "-o", str(log), "-e", f"trace={calls}", process=process)

        result = self._run(operation, strace)
        assert result.is_acknowledged, result
        return read_calls(log, known), result.output["answer"]

    def run_with_fault(self, operation: Operation, call: Call, effect: str) -> RunResult:
        """Run an operation with one call replaced by `effect`: `error=EIO`, or `signal=KILL` just before the call.

        strace counts the calls of each name and of each thread separately.
        """
        inject = f"inject={call.name}:{effect}:when={call.nth}"

        def strace(_: int, threads: list[int]) -> contextlib.AbstractContextManager[None]:
            return attached("-o", "/dev/null", "-e", f"trace={call.name}", "-e", inject, process=threads[call.thread])

        return self._run(operation, strace)

    def _run(
        self, operation: Operation, observer: Callable[[int, list[int]], contextlib.AbstractContextManager[None]]
    ) -> RunResult:
        self._write_line(json.dumps(asdict(operation)))
        child = self._read_line()
        assert "process" in child, self._with_log(child)
        result = RunResult()
        with observer(child["process"], child["threads"]):
            self._write_line("start")
            try:
                while result.code is None:
                    output = self._read_line()
                    result.code = output.pop("exit_code", None)
                    result.output |= output
            except TimeoutError:
                os.kill(child["process"], signal.SIGKILL)
                result = RunResult({"hung": True}, self._read_line()["exit_code"])
        return result

    def _write_line(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    def _read_line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        end = time.monotonic() + SECONDS
        while b"\n" not in self._received:
            if not select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            more = os.read(self._process.stdout.fileno(), 65536)
            assert more, self._with_log("the process has ended")
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        values: dict[str, Any] = json.loads(line)
        return values

    def _with_log(self, problem: object) -> str:
        return f"{problem}; its log:\n{(self._base / 'operations.log').read_text()}"
