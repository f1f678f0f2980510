"""Servers as separate processes, the load that wrk puts on them, and their memory."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .measure import BENCH, PROJECT, Measures, Unavailable

PREFIX = "/static/uploads"
PATIENCE = 20.0
"""Longest measurement in seconds, for a server that answers almost nothing in the requested time."""
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


@dataclass(frozen=True)
class Server:
    """A server on the loopback interface."""

    port: int
    pid: int

    def url(self, path: str) -> str:
        """Return the URL of a path."""
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> tuple[int, bytes]:
        """Return status and body, over a new connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def state(self) -> Any:
        """Return the counts of `apps/hooks.py` in the process of the server."""
        return json.loads(self.get("/state")[1])

    def megabytes(self, what: str) -> float:
        """Return `VmRSS` (memory now) or `VmHWM` (peak memory) of the process, in MB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith(what)).split()[1]) / 1024


def program(name: str, package: str | None = None) -> str:
    """Return the path of a program. Raise `Unavailable` if it is not installed."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise Unavailable(f"{name} is not installed; run: apt-get install {package or name}")
    return found


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


UVICORN = ("--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning", "--factory")
GRANIAN = (
    "--interface",
    "asgi",
    "--workers",
    "1",
    "--loop",
    "uvloop",
    "--no-ws",
    "--log-level",
    "warning",
    "--factory",
)


def uvicorn(app: str, **environment: object) -> contextlib.AbstractContextManager[Server]:
    """Run `app:make` on one process of uvicorn, with uvloop and httptools, without an access log."""
    python = environment.pop("python", sys.executable)
    return _running([python, "-m", "uvicorn", *UVICORN, f"benchmarks.apps.{app}:make", "--port", "{port}"], environment)


def granian(app: str, **environment: object) -> contextlib.AbstractContextManager[Server]:
    """Run `app:make` on one worker of granian."""
    return _running(
        [sys.executable, "-m", "granian", *GRANIAN, f"benchmarks.apps.{app}:make", "--port", "{port}"], environment
    )


def script(
    python: object, module: str, *arguments: str, **environment: object
) -> contextlib.AbstractContextManager[Server]:
    """Run a module that is a server; one of its arguments is `{port}`."""
    return _running([python, "-m", module, *arguments], environment)


@contextlib.contextmanager
def nginx(directory: Path) -> Iterator[Server]:
    """Run one worker of nginx with sendfile that serves `directory` below the prefix."""
    path, port = program("nginx"), free_port()
    with tempfile.TemporaryDirectory() as place:
        config = Path(place, "nginx.conf")
        user = "user root;" if os.geteuid() == 0 else ""
        config.write_text(
            f"{user} worker_processes 1; daemon off; pid {place}/pid; error_log {place}/log;"
            "events { worker_connections 4096; } http { access_log off; sendfile on; tcp_nopush on;"
            f"keepalive_requests 1000000000; default_type application/octet-stream; server {{ listen 127.0.0.1:{port};"
            f"location {PREFIX}/ {{ alias {directory}/; }} }} }}"
        )
        with _running([path, "-c", str(config)], {}, port) as server:
            yield server


@contextlib.contextmanager
def _running(command: list[object], environment: dict[str, object], port: int | None = None) -> Iterator[Server]:
    port = port or free_port()
    core = environment.pop("core", 0)
    own = {f"BENCH_{key.upper()}": str(value) for key, value in environment.items()}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [str(part).format(port=port) for part in command],
            cwd=PROJECT,
            env={**os.environ, **own, "PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _place(process.pid, core)
        try:
            _wait_for(process, port, log)
            yield Server(port, process.pid)
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    end = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > end:
            log.seek(0)
            raise RuntimeError(f"the server did not start:\n{log.read().decode(errors='replace')}")
        time.sleep(0.05)


def _place(pid: int, core: object) -> None:
    """Pin a new process to a core (None: any), and raise its limit of open files to the maximum."""
    if core is not None and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(pid, {int(str(core))})
    limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, limit))


# -- load -----------------------------------------------------------------------------------------------------------


def wrk(url: str, *, seconds: float, connections: int = 64) -> Measures:
    """Measure requests per second and latencies. Raise `RuntimeError` for an answer but 2xx, or a socket error."""
    with loading(url, seconds=seconds, connections=connections) as process:
        said = process.communicate()[0].decode()
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    broken = re.search(r"Non-2xx|Socket errors: (?!connect 0, read 0, write 0)", said)  # timeouts are slow, not broken
    if broken or rate is None:
        raise RuntimeError(f"wrk {url} said:\n{said}")
    if float(rate[1]) * seconds < connections and seconds < PATIENCE:
        return wrk(url, seconds=min(seconds * 4, PATIENCE), connections=connections)
    return {"requests/s": float(rate[1])} | _latencies(said)


@contextlib.contextmanager
def loading(
    url: str, *, seconds: float, connections: int = 64, lua: str | None = None, nice: int = 0
) -> Iterator[subprocess.Popen[bytes]]:
    """Run wrk, and stop it at the end. A higher `nice` gives it a lower priority on its core."""
    command = [program("wrk"), "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--latency", "--timeout", "60s"]
    if lua is not None:
        command += ["-s", lua]
    process = subprocess.Popen(["nice", f"-n{nice}", *command, url], stdout=subprocess.PIPE)
    _place(process.pid, 1)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _latencies(said: str) -> Measures:
    """Return the median and the 99th percentile in ms; wrk prints none if it got too few answers."""
    found = re.findall(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s|m)\s*$", said, re.MULTILINE)
    return {f"p{percentile} ms": float(value) * _UNITS[unit] for percentile, value, unit in found}


def peer(name: str, *packages: str) -> Path:
    """Return the Python of a peer's own environment, created at first use. Raise `Unavailable` if that fails."""
    place = BENCH / "peers" / name
    python = place / "bin" / "python"
    ready = place / ".ready"
    if not ready.exists():
        print(f"creating an environment for {name} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages], check=False
        )
        if done.returncode:
            raise Unavailable(f"{name} could not be installed; run: pip install {' '.join(packages)}")
        ready.touch()
    return python
