"""Four real HTTP servers that run `two_store_app`, one process each, and a client that sends raw bytes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import environment
from tests.support.sockets import free_port
from tests.support.wire import Reply, parse_reply

COMMANDS = {
    "uvicorn-h11": "uvicorn --factory {app} --http h11 --host 127.0.0.1 --port {port} --no-access-log",
    "uvicorn-httptools": "uvicorn --factory {app} --http httptools --host 127.0.0.1 --port {port} --no-access-log",
    "granian": "granian --factory {app} --interface asgi --host 127.0.0.1 --port {port}",
    "hypercorn": "hypercorn {app}() --bind 127.0.0.1:{port}",
}
APP = "tests.support.two_store_app:app"
SECONDS = 30.0
"""The longest time a server may take to start, to answer or to stop."""


@dataclass(frozen=True)
class HttpServer:
    """A running server."""

    kind: str
    port: int
    log: Path

    def connect(self) -> socket.socket:
        """Open a connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def send(self, request: bytes) -> Reply:
        """Send raw bytes, and read until the server closes the connection."""
        with self.connect() as connection:
            connection.sendall(request)
            parts = []
            try:
                while part := connection.recv(1 << 20):
                    parts.append(part)
            except ConnectionResetError:
                pass
        return parse_reply(b"".join(parts))

    def get(self, target: bytes, *lines: bytes, method: bytes = b"GET", host: bytes = b"test") -> Reply:
        """Send one request whose target and header lines are raw bytes."""
        head = [method + b" " + target + b" HTTP/1.1", b"Host: " + host, b"Connection: close", *lines]
        return self.send(b"\r\n".join(head) + b"\r\n\r\n")

    def state(self) -> dict[str, Any]:
        """Return the tasks and open files of the server's process (`two_store_app.state`)."""
        state: dict[str, Any] = json.loads(self.get(b"/state").body)
        return state


@contextmanager
def all_running(base: Path, dead_port: int) -> Iterator[dict[str, HttpServer]]:
    """Run every server at once. At the end stop them, and fail if a log has an error or a leak."""
    with ExitStack() as stack:
        started = [stack.enter_context(_started(kind, base, dead_port)) for kind in COMMANDS]
        for server, process in started:
            _wait_for(server, process)
        yield {server.kind: server for server, _ in started}


@contextmanager
def _started(kind: str, base: Path, dead_port: int) -> Iterator[tuple[HttpServer, subprocess.Popen[bytes]]]:
    server = HttpServer(kind, free_port(), base / f"{kind}.log")
    variables = environment(TWO_STORES=str(base), TWO_STORES_DEAD_PORT=str(dead_port))
    command = [sys.executable, "-X", "dev", "-m", *COMMANDS[kind].format(app=APP, port=server.port).split(" ")]
    with server.log.open("wb") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield server, process
    finally:
        _stop(process)
    log = server.log.read_text()
    assert "Traceback" not in log, f"the log of {kind}:\n{log}"
    assert "ResourceWarning" not in log, f"the log of {kind}:\n{log}"
    assert "socket.send() raised" not in log, f"written to a closed connection again and again:\n{log}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


def _wait_for(server: HttpServer, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None, f"the server ended:\n{server.log.read_text()}"
        try:
            server.connect().close()
        except OSError:
            assert time.monotonic() < end, f"the server did not start:\n{server.log.read_text()}"
            time.sleep(0.05)
        else:
            return
