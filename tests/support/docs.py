"""The documentation as a reader uses it: its code blocks, and a shell, a server and Python to run them with."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import httpx

from tests.support import ROOT
from tests.support.sockets import free_port
from tests.support.waiting import wait_until

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SECONDS = 60.0
_SERVERS = ("uvicorn ", "selfheal serve ")
_SCHEDULE = re.compile(r"^(?:\S+ +){5}")  # of a line of cron


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str
    language: str
    text: str

    @property
    def first_line(self) -> str:
        """What tells it from the other blocks of its page."""
        return self.text.partition("\n")[0]

    @property
    def file(self) -> str | None:
        """The file that it is the content of: a first line `# main.py` names it."""
        found = re.fullmatch(r"# ([\w/]+\.py)", self.first_line)
        return found[1] if found else None


def blocks_of(page: str) -> list[Block]:
    """Return the code blocks of a page in their order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [Block(page, language, text) for language, text in found]


@dataclass
class Reader:
    """Runs blocks one after the other in the directory `home`; `names` are those that Python blocks know."""

    home: Path
    variables: dict[str, str] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)

    def write(self, block: Block) -> None:
        """Write a block that is a file."""
        assert block.file is not None
        path = self.home / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)

    async def python(self, block: Block) -> None:
        """Run a block as the body of an async function would run, or in a thread; commit the `session`, if any."""
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(block.text, block.page, "exec", flags=flags, dont_inherit=True)
        if "uploads.sync" in block.text:
            await asyncio.to_thread(self._run_in_thread, code)
            return
        result = eval(code, self.names)
        if inspect.isawaitable(result):
            await result
        if "session" in self.names:
            await self.names["session"].commit()

    def _run_in_thread(self, code: CodeType) -> None:
        with self.names["sync_session"] as session:
            exec(code, self.names | {"session": session})
            session.commit()

    def shell(self, text: str) -> str:
        """Run the lines of a block in a shell that stops at the first error; return what they print on both outputs."""
        lines = [line for line in text.splitlines() if not _is_installation(line)]
        done = subprocess.run(
            ["sh", "-eu", "-c", "\n".join(lines).replace("/srv/app", str(self.home))],
            cwd=self.home,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        return done.stdout

    def cron(self, text: str) -> str:
        """Run the commands of a crontab; return what they print."""
        return self.shell("\n".join(_SCHEDULE.sub("", line) for line in text.splitlines()))

    def nginx(self, text: str) -> None:
        """Let nginx check a block that belongs into a `server`."""
        whole = (
            f"pid {self.home}/nginx.pid; events {{}} http {{ access_log off; server {{ listen 127.0.0.1:1; {text} }} }}"
        )
        (self.home / "nginx.conf").write_text(whole)
        self.shell("nginx -t -e stderr -p . -c nginx.conf 2>&1 | grep 'syntax is ok'")

    @contextmanager
    def server(self, line: str) -> Iterator[str]:
        """Start the server of a line, on a free port; yield its URL when it answers."""
        port = free_port()
        command = [*shlex.split(line, comments=True), "--port", str(port)]
        log = self.home / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=self.home, env=self._environment(), stdout=output, stderr=output)
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                httpx.get(url, timeout=5)
            except httpx.TransportError:
                return False
            return True

        try:
            wait_until(answers, SECONDS)
            yield url
        finally:
            process.terminate()
            process.wait(SECONDS)
        assert "Traceback" not in log.read_text()

    def _environment(self) -> dict[str, str]:
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {
            "PATH": programs,
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "SELFHEAL_SETTLED_AFTER": "0",
            **self.variables,
        }


def is_server(line: str) -> bool:
    """Whether a line of a shell starts a server."""
    return line.startswith(_SERVERS)


def _is_installation(line: str) -> bool:
    """Whether a line installs packages: that takes a network. Ours must have its name and extras that there are."""
    if not line.startswith("pip install "):
        return False
    ours = [one for one in shlex.split(line, comments=True)[2:] if one.startswith("selfheal")]
    for one in ours:
        name, extras = re.fullmatch(r"([\w-]+)\[([\w,]+)\]", one).groups()  # type: ignore[union-attr]
        assert name == PROJECT["name"]
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    return True
