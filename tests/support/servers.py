"""Real servers, one process each, on free loopback ports; and a client that sends bytes as they are."""

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

COMMANDS = {
    "uvicorn-h11": "uvicorn --factory {app} --http h11 --host 127.0.0.1 --port {port} --no-access-log",
    "uvicorn-httptools": "uvicorn --factory {app} --http httptools --host 127.0.0.1 --port {port} --no-access-log",
    "granian": "granian --factory {app} --interface asgi --host 127.0.0.1 --port {port}",
    "hypercorn": "hypercorn {app}() --bind 127.0.0.1:{port}",
}
APP = "tests.support.served:app"
SECONDS = 30.0


@dataclass(frozen=True)
class Reply:
    """An answer off the wire; `status` 0 if the server closed the connection without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def is_wrapped(self) -> bool:
        """Whether it was the wrapped app that answered."""
        return self.headers.get("x-wrapped") == "yes"


@dataclass(frozen=True)
class Server:
    """A server that runs `served.app`."""

    kind: str
    port: int
    log: Path

    def connect(self) -> socket.socket:
        """A connection to it."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def send(self, request: bytes) -> Reply:
        """Send bytes as they are, and read until the server closes."""
        with self.connect() as connection:
            connection.sendall(request)
            parts = []
            try:
                while part := connection.recv(1 << 20):
                    parts.append(part)
            except ConnectionResetError:
                pass
        return parse(b"".join(parts))

    def get(self, target: bytes, *lines: bytes, method: bytes = b"GET", host: bytes = b"test") -> Reply:
        """One request whose target and header lines are sent as they are."""
        head = [method + b" " + target + b" HTTP/1.1", b"Host: " + host, b"Connection: close", *lines]
        return self.send(b"\r\n".join(head) + b"\r\n\r\n")

    def state(self) -> dict[str, Any]:
        """What the server's process holds (`served.state`)."""
        state: dict[str, Any] = json.loads(self.get(b"/state").body)
        return state


def parse(data: bytes) -> Reply:
    """An answer from its bytes, chunked or not."""
    head, _, body = data.partition(b"\r\n\r\n")
    if not head:
        return Reply(0, {}, b"")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    assert headers.get("transfer-encoding") is None, "the length was known, and the server was not told"
    return Reply(int(first.split(" ")[1]), headers, body)


@contextmanager
def all_running(base: Path, dead_port: int) -> Iterator[dict[str, Server]]:
    """Every server, side by side; at the end they are stopped, and fail if they said anything of an error or a leak."""
    with ExitStack() as stack:
        started = [stack.enter_context(_started(kind, base, dead_port)) for kind in COMMANDS]
        for server, process in started:
            _wait_for(server, process)
        yield {server.kind: server for server, _ in started}


@contextmanager
def _started(kind: str, base: Path, dead_port: int) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    server = Server(kind, free_port(), base / f"{kind}.log")
    variables = environment(SERVED=str(base), SERVED_DEAD_PORT=str(dead_port))
    command = [sys.executable, "-X", "dev", "-m", *COMMANDS[kind].format(app=APP, port=server.port).split(" ")]
    with server.log.open("wb") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield server, process
    finally:
        _stop(process)
    said = server.log.read_text()
    assert "Traceback" not in said, f"{kind} said:\n{said}"
    assert "ResourceWarning" not in said, f"{kind} said:\n{said}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


def _wait_for(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None, f"the server ended:\n{server.log.read_text()}"
        try:
            server.connect().close()
        except OSError:
            assert time.monotonic() < end, f"the server never came up:\n{server.log.read_text()}"
            time.sleep(0.05)
        else:
            return
