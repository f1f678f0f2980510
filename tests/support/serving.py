"""A real server process on a real socket that runs `faulty_app`, a client that tells a whole answer from a torn one,
and a connection to PostgreSQL that breaks at the worst moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from tests.support import environment
from tests.support.faulty_app import Faults

PREFIX = "/static/uploads"
SECONDS = 60.0
"""How long anything may take before a test fails."""


@dataclass(frozen=True)
class Answer:
    """What came back; `status` 0 if nothing did."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def is_whole(self) -> bool:
        """Whether every promised byte has come."""
        return self.status > 0 and len(self.body) == int(self.headers["content-length"])

    @property
    def is_wrapped(self) -> bool:
        """Whether it is the wrapped app's own answer about a name that is not there."""
        return self.status == 404 and self.headers.get("x-wrapped") == "yes"


class Request:
    """One request on a connection of its own, whose answer is read as slowly as the test likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._read = b""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def read(self, size: int) -> bytes:
        """All that has come once at least `size` bytes have, or all there is."""
        with contextlib.suppress(ConnectionError):
            while len(self._read) < size and (piece := await self.reader.read(65536)):
                self._read += piece
        return self._read

    async def answer(self) -> Answer:
        """The answer, read to its end."""
        head, _, body = (await self.read(1 << 60)).partition(b"\r\n\r\n")
        if not head:
            return Answer(0, {}, b"")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        return Answer(int(first.split(" ")[1]), headers, body)


@dataclass
class Server:
    """A server process. Its methods speak HTTP to it, or signals."""

    faults: Faults
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @asynccontextmanager
    async def request(self, target: str, *lines: str, method: str = "GET", buffer: int = 0) -> AsyncIterator[Request]:
        """Send a request's head; `buffer` bounds, in bytes, what the kernel takes in while nobody reads."""
        end = socket.socket()
        if buffer:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        end.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(end, ("127.0.0.1", self.port))
        except BaseException:
            end.close()
            raise
        reader, writer = await asyncio.open_connection(sock=end, limit=2**16)
        async with Request(reader, writer) as request:
            head = [f"{method} {quote(target, safe='/?=&')} HTTP/1.1", "Host: test", "Connection: close", *lines]
            writer.write("\r\n".join([*head, "\r\n"]).encode())
            yield request

    def visit(self, name: str, *lines: str, buffer: int = 0) -> contextlib.AbstractAsyncContextManager[Request]:
        """A visitor's request for a name, to be read by and by."""
        return self.request(f"{PREFIX}/{name}", *lines, buffer=buffer)

    async def get(self, name: str, *lines: str) -> Answer:
        """What a visitor gets for a name."""
        async with asyncio.timeout(SECONDS), self.visit(name, *lines) as request:
            return await request.answer()

    async def get_many(self, names: list[str]) -> list[Answer]:
        """What as many visitors at once get."""
        return await asyncio.gather(*(self.get(name) for name in names))

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """What the wrapped app answers."""
        async with asyncio.timeout(SECONDS), self.request(path, f"Content-Length: {len(body)}", method=method) as asked:
            with contextlib.suppress(ConnectionError):
                asked.writer.write(body)
                await asked.writer.drain()
            return await asked.answer()

    async def state(self) -> dict[str, Any]:
        """What the process holds, and what it has done (`faulty_app.App.state`)."""
        state: dict[str, Any] = json.loads((await self.ask("GET", "/state")).body)
        return state

    async def count(self, table: str) -> int:
        """How many statements about a table the process has given to its database."""
        return sum(table in statement for statement in (await self.state())["statements"])

    def said(self) -> str:
        """Its standard error so far."""
        return self.log.read_text(errors="replace")

    def lines_with(self, words: str) -> list[str]:
        """The lines of its standard error that hold `words`."""
        return [line for line in self.said().splitlines() if words in line]

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self.process.send_signal(signal.SIGTERM)

    async def wait(self) -> None:
        """Wait for its end."""
        try:
            await asyncio.to_thread(self.process.wait, SECONDS)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait()
            raise AssertionError(f"the server does not end:\n{self.said()}") from None


@asynccontextmanager
async def serving(base: Path, faults: Faults, *, may_fail: bool = False) -> AsyncIterator[Server]:
    """A server; stopped at the end if it still runs. What it leaks or raises fails the test, unless it `may_fail`."""
    number = len(list(base.glob("server-*.log")))
    log = base / f"server-{number}.log"
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    port = listener.getsockname()[1]
    faults = replace(faults, socket=listener.fileno())
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-W", "default", "-m", "tests.support.faulty_app"],
            env=environment(FAULTS=faults.to_env()),
            pass_fds=[listener.fileno()],
            stderr=errors,
        )
    listener.close()
    server = Server(faults, port, process, log)
    try:
        yield server
    except BaseException:
        print(f"the server said:\n{server.said()}")
        raise
    finally:
        if process.poll() is None:
            server.terminate()
        await server.wait()
    if not may_fail:
        for complaint in ("Traceback", "ResourceWarning", "never retrieved", "was never awaited", "Task was destroyed"):
            assert complaint not in server.said(), server.said()


def command(*arguments: str, directory: Path, database: str) -> tuple[int, dict[str, Any]]:
    """Run one of the scripts with --json; its exit code and its report."""
    where = {"SELFHEAL_DIRECTORY": str(directory), "SELFHEAL_DATABASE_URL": database}
    module, *flags = arguments
    done = subprocess.run(
        [sys.executable, "-m", f"selfheal.scripts.{module}", "--json", *flags],
        env={**os.environ, **where}, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


def outcomes(report: dict[str, Any]) -> Counter[str]:
    """How many names had which outcome."""
    return Counter({outcome: count for outcome, count in report["counts"].items() if count})


class CommitsUnheard:
    """Stands before PostgreSQL; while `is_armed` a COMMIT arrives, but its answer does not: the connection breaks."""

    def __init__(self, target: int) -> None:
        self.is_armed = False
        self.broken = 0
        self._target = target

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        answers = asyncio.create_task(self._pass_on(server_reader, writer))
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                if self.is_armed and b"COMMIT" in piece:
                    answers.cancel()
                    await asyncio.gather(answers, return_exceptions=True)
                    server_writer.write(piece)
                    await server_reader.read(65536)  # it has committed
                    self.broken += 1
                    break
                server_writer.write(piece)
                await server_writer.drain()
        answers.cancel()
        await asyncio.gather(answers, return_exceptions=True)
        for end in (writer, server_writer):
            end.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
        writer.close()  # what the server ends is ended


class Gate:
    """A file that holds up calls of a server (`Faults.hold`) as long as it exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    async def met(self) -> None:
        """Wait until a call waits."""
        end = time.monotonic() + SECONDS
        while not Path(f"{self.path}.met").exists():
            assert time.monotonic() < end, "no call came"
            await asyncio.sleep(0.01)

    def open(self) -> None:
        """Let the calls go on."""
        self.path.unlink()
