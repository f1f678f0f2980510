"""Run selfheal's commands as real processes, and check what every command promises about its output."""

from __future__ import annotations

import json
import os
import select
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from selfheal.content.sources import CHUNK
from tests.support.files import noise

MODULES = {
    "migrate": "selfheal.scripts.migrate_images",
    "verify": "selfheal.scripts.test_image_storage",
    "restore": "selfheal.scripts.restore_images",
}
PASSWORD = "hush-hush"
"""The password in database URLs; no command may print it."""
SECONDS = 60.0
"""How long a process may take."""
IMAGES = {"a.png": noise(5000), "cats/tom.jpg": noise(2 * CHUNK + 5), "empty.gif": b"", "日本.webp": noise(77)}
"""The uploads of `full_site`."""


SLOW_DISK = """if True:
    import os, time
    from pathlib import Path

    def slow(call, size_of):
        def slow_call(fd, *arguments):
            if size_of(arguments) > 10_000 and os.environ.get("SLOW"):
                Path(os.environ["SLOW"]).touch()
                time.sleep(size_of(arguments) / 2**20 * 0.3)
            return call(fd, *arguments)
        return slow_call

    os.pread = slow(os.pread, lambda arguments: arguments[0])
    os.pwrite = slow(os.pwrite, lambda arguments: len(arguments[0]))
"""
"""A disk that reads and writes 3 MB a second, and the file that says that it began."""


@dataclass(frozen=True)
class Done:
    """The exit code and the output of a process. No output may have a traceback, a warning or a password."""

    code: int
    out: str
    err: str

    def __post_init__(self) -> None:
        assert "Traceback" not in self.err, self.err
        assert "Warning" not in self.err, self.err
        assert PASSWORD not in self.out + self.err

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        report: dict[str, Any] = json.loads(self.out)
        return report

    @property
    def error_line(self) -> str:
        """The one line on standard error, which starts with `selfheal: `."""
        assert self.err.startswith("selfheal: "), self.err
        assert self.err.endswith("\n"), self.err
        assert self.err.count("\n") == 1, self.err
        assert len(self.err) > 25, "it says neither what is wrong nor what to do"
        return self.err


def environment(**variables: str) -> dict[str, str]:
    """Return an environment with these variables and none of selfheal's own.

    A `PYTHONPATH` of this process stays in it, so that the commands are those of the code under test.
    """
    paths = [path for path in (variables.get("PYTHONPATH"), os.environ.get("PYTHONPATH")) if path]
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "LANG": "C.UTF-8",
        "TERM": "xterm",
        "PYTHONWARNINGS": "default",  # not Python's development mode: asyncio logs each step of 0.1 s then
        "SELFHEAL_SETTLED_AFTER": "0",
        **variables,
        **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {}),
    }


def program(command: str | None, *arguments: str) -> list[str]:
    """Return what a shell runs: the module of a command, or `selfheal` if `command` is None."""
    if command is not None:
        return [sys.executable, "-m", MODULES[command], *arguments]
    return [sys.executable, str(Path(sys.executable).with_name("selfheal")), *arguments]


# -- many commands, one import ----------------------------------------------------------------------------------------

_FORKING = """
import json, os, resource, sys
import asyncpg, rich.progress, selfheal.scripts.cli, selfheal.sql.sqlite  # slow imports, done once
from selfheal.scripts import main
selfheal.sql.sqlite.SYNCHRONOUS = "OFF"  # as in the processes of the tests themselves
for line in sys.stdin:
    case = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    for fd, path in enumerate(case["files"]):
        os.dup2(os.open(path, os.O_RDWR), fd)
    for what, limit in case["limits"].items():
        resource.setrlimit(getattr(resource, what), (limit, limit))
    os.chdir(case["cwd"])
    os.environ.clear()
    os.environ.update(case["environment"])
    sys.argv = case["argv"]
    main(case["command"])
"""


class ForkServer:
    """A process that has imported selfheal and forks itself for each command: that saves the time of the imports."""

    def __init__(self, process: subprocess.Popen[str], base: Path) -> None:
        self._process = process
        self._base = base
        self._numbers = count()

    def run(
        self,
        *arguments: str,
        cwd: Path,
        command: str | None = None,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        terminal: str | None = None,
    ) -> Done:
        """Run `selfheal ARGUMENTS`, or the module of `command`. `terminal` is the path of its standard error."""
        number = next(self._numbers)
        files = [self._base / f"{number}.{name}" for name in ("in", "out", "err")]
        for file in files:
            file.write_bytes(stdin if file == files[0] else b"")
        case = {
            "argv": ["selfheal", *arguments],
            "command": command,
            "cwd": str(cwd),
            "environment": environment(**(env or {})),
            "files": [str(files[0]), str(files[1]), terminal or str(files[2])],
            "limits": limits or {},
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(case), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], SECONDS)
        assert ready, f"no end within {SECONDS} s: {arguments}"
        return Done(int(self._process.stdout.readline()), files[1].read_text(), files[2].read_text())


@contextmanager
def start_fork_server(base: Path) -> Iterator[ForkServer]:
    """Start a fork server that keeps the output of its commands below `base`; stop it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", _FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdin is not None
    assert process.stdout is not None
    yield ForkServer(process, base)
    process.stdin.close()
    assert process.wait(SECONDS) == 0
    process.stdout.close()


# -- the site of an app -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """The directory of an app, with its uploads directory and its database."""

    home: Path
    directory: Path
    database: str
    fork_server: ForkServer

    @property
    def flags(self) -> list[str]:
        """The flags for directory and database."""
        return ["--directory", str(self.directory), "--database", self.database]

    def run(self, *arguments: str, **how: Any) -> Done:
        """Run `selfheal COMMAND` with the flags of this site."""
        given, rest = arguments[:1], arguments[1:]
        return self.run_without_flags(*given, *self.flags, *rest, **how)

    def run_without_flags(self, *arguments: str, cwd: Path | None = None, **how: Any) -> Done:
        """Run `selfheal ARGUMENTS`, in the app's directory if `cwd` is None."""
        return self.fork_server.run(*arguments, cwd=cwd or self.home, **how)

    def execute(self, command: str | None, *arguments: str, **variables: str) -> Done:
        """Run a module, or `selfheal`, in a new interpreter."""
        done = subprocess.run(
            program(command, *arguments),
            cwd=self.home,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, command: str | None, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        """Start what `execute` runs, and do not wait for its end."""
        return subprocess.Popen(
            program(command, *arguments),
            cwd=self.home,
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "env": environment(),
                **more,
            },
            text=True,
        )

    def count_records(self) -> int:
        """Return the number of records in the SQLite database, opened read-only; 0 if there is none."""
        file = self.database.partition("///")[2]
        try:
            with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=SECONDS)) as connection:
                return int(connection.execute("SELECT count(*) FROM image_storage").fetchone()[0])
        except sqlite3.OperationalError:
            return 0
