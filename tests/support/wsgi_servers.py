"""Real WSGI servers, each in processes of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support import environment
from tests.support.example_apps import PREFIX
from tests.support.sockets import free_port

_GUNICORN = "-m gunicorn {app} --bind 127.0.0.1:{port} --no-control-socket --graceful-timeout 20"
_REFERENCE = """
import importlib, signal, sys
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIServer, make_server
from wsgiref.validate import validator

class Server(ThreadingMixIn, WSGIServer):
    request_queue_size = 128

signal.signal(signal.SIGTERM, lambda *_: sys.exit())
module, _, name = sys.argv[1].partition(":")
app = validator(getattr(importlib.import_module(module), name))
with make_server("127.0.0.1", int(sys.argv[2]), app, server_class=Server) as server:
    server.serve_forever()
"""
COMMANDS = {
    "gunicorn sync": f"{_GUNICORN} --workers 2",
    "gunicorn gthread": f"{_GUNICORN} --workers 2 --threads 8",
    "gunicorn preload": f"{_GUNICORN} --workers 2 --threads 8 --preload",
    "waitress": "-m waitress --listen 127.0.0.1:{port} --threads 8 {app}",
    "wsgiref": "-c {code} {app} {port}",
}
SECONDS = 60.0
_WARNINGS = [f"-W{one}:ResourceWarning" for one in ("always:", "ignore:unclosed <socket", "ignore:<aiosqlite")]
"""A file that is left open is shown; not the listening sockets of servers, nor connections of a parent process, which
nobody may close.
"""


@dataclass(frozen=True)
class Server:
    """A running server, a client for it, and the app's uploads directory."""

    kind: str
    browser: httpx.Client
    port: int
    directory: Path
    pid: int

    def url(self, name: str) -> str:
        """Return the path of an upload."""
        return f"{PREFIX}/{name}"

    def processes(self) -> list[int]:
        """Return the ids of the server's processes."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]

    def open_uploads(self) -> list[str]:
        """Return the uploads that the server's processes have open."""
        found = []
        for pid in self.processes():
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found.append(str(link.readlink()))
        return [path for path in found if path.startswith(f"{self.directory}/")]


@contextmanager
def serving(kind: str, app: str, home: Path, database: str | None = None) -> Iterator[Server]:
    """Run an app on a server, with a directory and, by default, a SQLite database in `home`. At the end the server must
    stop by itself, without a traceback or a warning in its log.
    """
    port, log, directory = free_port(), home / "log", home / "uploads"
    words = [word.format(app=app, port=port, code=_REFERENCE) for word in COMMANDS[kind].split()]
    variables = environment(
        SELFHEAL_DIRECTORY=str(directory), SELFHEAL_DATABASE_URL=database or f"sqlite:///{home}/gallery.db"
    )
    with log.open("w") as output:
        command = [sys.executable, *_WARNINGS, *words]
        process = subprocess.Popen(command, env=variables, cwd=home, stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS, trust_env=False) as browser:
            _wait_for(browser, process, log)
            yield Server(kind, browser, port, directory, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{kind} did not stop:\n{log.read_text()}") from None
    text = log.read_text()
    assert "Traceback" not in text, text
    assert "Warning" not in text, text


def _wait_for(browser: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            browser.get("/nothing")
            return
        except httpx.TransportError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
