"""A uvicorn process that runs `faulty_app` with faults injected, and a client for it that can read slowly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from tests.support import environment
from tests.support.process_faults import Faults
from tests.support.wire import Reply, parse_reply

PREFIX = "/static/uploads"
SECONDS = 60.0
"""The longest time that a step may take before a test fails."""


class Request:
    """One request on its own connection; the test decides when its answer is read."""

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
        """Read until `size` bytes of the answer have arrived, or its end; return all bytes so far."""
        with contextlib.suppress(ConnectionError):
            while len(self._read) < size and (piece := await self.reader.read(65536)):
                self._read += piece
        return self._read

    async def answer(self) -> Reply:
        """Read the answer to its end."""
        return parse_reply(await self.read(1 << 60))


@dataclass
class FaultyServer:
    """A server process. The methods send HTTP requests or signals to it."""

    faults: Faults
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @asynccontextmanager
    async def request(self, target: str, *lines: str, method: str = "GET", buffer: int = 0) -> AsyncIterator[Request]:
        """Send the head of a request; `buffer` limits the bytes that the kernel accepts before the test reads them."""
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
        """Send a GET for a name, whose answer the test reads step by step."""
        return self.request(f"{PREFIX}/{name}", *lines, buffer=buffer)

    async def get(self, name: str, *lines: str) -> Reply:
        """Return the answer to a GET for a name."""
        async with asyncio.timeout(SECONDS), self.visit(name, *lines) as request:
            return await request.answer()

    async def get_many(self, names: list[str]) -> list[Reply]:
        """Return the answers to a GET for each name, all sent at once."""
        return await asyncio.gather(*(self.get(name) for name in names))

    async def ask(self, method: str, path: str, body: bytes = b"") -> Reply:
        """Send a request to the wrapped app, and return its answer."""
        async with asyncio.timeout(SECONDS), self.request(path, f"Content-Length: {len(body)}", method=method) as asked:
            with contextlib.suppress(ConnectionError):
                asked.writer.write(body)
                await asked.writer.drain()
            return await asked.answer()

    async def state(self) -> dict[str, Any]:
        """Return what the process has open and has done (`faulty_app.App.state`)."""
        state: dict[str, Any] = json.loads((await self.ask("GET", "/state")).body)
        return state

    async def count(self, table: str) -> int:
        """Return how many statements with a table's name the process has sent to its database."""
        return sum(table in statement for statement in (await self.state())["statements"])

    def stderr(self) -> str:
        """Return its standard error so far."""
        return self.log.read_text(errors="replace")

    def lines_with(self, words: str) -> list[str]:
        """Return the lines of its standard error that contain `words`."""
        return [line for line in self.stderr().splitlines() if words in line]

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """Send SIGTERM, and do not wait."""
        self.process.send_signal(signal.SIGTERM)

    async def wait(self) -> None:
        """Wait for the end; fail with a dump of all stacks if it does not come."""
        try:
            await asyncio.to_thread(self.process.wait, SECONDS)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait()
            raise AssertionError(f"the server does not stop:\n{self.stderr()}") from None


@asynccontextmanager
async def running_server(base: Path, faults: Faults, *, may_fail: bool = False) -> AsyncIterator[FaultyServer]:
    """Run a server until the end of the block. Fail if its log has an error or a leak, unless it `may_fail`."""
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
    server = FaultyServer(faults, port, process, log)
    try:
        yield server
    except BaseException:
        print(f"the log of the server:\n{server.stderr()}")
        raise
    finally:
        if process.poll() is None:
            server.terminate()
        await server.wait()
    if not may_fail:
        for complaint in ("Traceback", "ResourceWarning", "never retrieved", "was never awaited", "Task was destroyed"):
            assert complaint not in server.stderr(), server.stderr()


class Gate:
    """A file at which calls of a server wait while it exists (`Faults.hold`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    async def met(self) -> None:
        """Return as soon as a call waits."""
        end = time.monotonic() + SECONDS
        while not Path(f"{self.path}.met").exists():
            assert time.monotonic() < end, "no call reached the gate"
            await asyncio.sleep(0.01)

    def open(self) -> None:
        """Let the calls go on."""
        self.path.unlink()
