"""The example apps, each with a real uvicorn server, an HTTP client and a directory of its own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import httpx

from tests.support import ROOT

APPS = ["starlette_app", "fastapi_app"]
PREFIX = "/static/uploads"
MIB = 1024 * 1024


@dataclass(frozen=True)
class Server:
    """An example app on a real server, a client for it, and its uploads directory."""

    browser: httpx.Client
    directory: Path
    pid: int

    def add(self, *files: tuple[str, bytes]) -> httpx.Response:
        """Send files through the form of the gallery."""
        return self.browser.post("/upload", files=[("pictures", file) for file in files])

    def shown(self) -> set[str]:
        """Return the paths of the pictures on the page."""
        return {unescape(found) for found in re.findall(r'<img src="([^"]+)"', self.browser.get("/").text)}

    def added(self, name: str, data: bytes) -> str:
        """Send one picture and return its path."""
        before = self.shown()
        assert self.add((name, data)).status_code == 303
        (path,) = self.shown() - before
        return path

    def file(self, path: str) -> Path:
        """Return the file of a path."""
        return self.directory / path.removeprefix(f"{PREFIX}/")

    def peak(self) -> int:
        """Return the peak memory of the server process, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


@contextmanager
def serving(app: str, home: Path, database: str | None = None) -> Iterator[Server]:
    """Run an app in a process of its own, with its directory and, by default, a SQLite database in `home`.

    A traceback or a warning in its log fails the test.
    """
    directory = home / "uploads"
    environ = {
        "SELFHEAL_DIRECTORY": str(directory),
        "SELFHEAL_DATABASE_URL": database or f"sqlite+aiosqlite:///{home}/gallery.db",
        "SELFHEAL_PREFIX": PREFIX,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(home))),
    }
    with socket.create_server(("127.0.0.1", 0)) as listener, (home / "log").open("w") as log:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port, fd = listener.getsockname()[1], listener.fileno()
        command = [sys.executable, "-X", "dev", "-m", "uvicorn", app, "--fd", str(fd), "--no-access-log"]
        process = subprocess.Popen(command, env=os.environ | environ, pass_fds=[fd], cwd=home, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as browser:
            yield Server(browser, directory, process.pid)
    finally:
        process.terminate()
        process.wait(30)
    log_text = (home / "log").read_text()
    assert "Traceback" not in log_text, log_text
    assert "Warning" not in log_text, log_text
