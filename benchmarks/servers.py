"""Servers as processes of their own, the load that wrk puts on them, and what they say of themselves."""

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
from typing import Any

from .measure import BENCH, PROJECT, Measures, Unavailable

PREFIX = "/static/uploads"
ONE_CORE = "one core for the server, another for wrk"
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


@dataclass(frozen=True)
class Server:
    """A server on loopback."""

    port: int
    pid: int

    def url(self, path: str) -> str:
        """The URL of a path."""
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body, over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def state(self) -> Any:
        """What `apps/hooks.py` counted in the server's process."""
        return json.loads(self.get("/state")[1])

    def megabytes(self, what: str) -> float:
        """`VmRSS` (memory now) or `VmHWM` (its peak) of the server's process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith(what)).split()[1]) / 1024


def program(name: str, package: str | None = None) -> str:
    """The path of a program; raises `Unavailable`."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise Unavailable(f"{name} is not installed; run: apt-get install {package or name}")
    return found


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def uvicorn(app: str, **environment: object) -> contextlib.AbstractContextManager[Server]:
    """`app:make` on one process of uvicorn, with uvloop and httptools and without an access log."""
    arguments = "--loop uvloop --http httptools --no-access-log --log-level warning --factory".split()
    python = environment.pop("python", sys.executable)
    return _running([python, "-m", "uvicorn", *arguments, f"benchmarks.apps.{app}:make", "--port", "{port}"], environment)


def granian(app: str, **environment: object) -> contextlib.AbstractContextManager[Server]:
    """`app:make` on one worker of granian."""
    arguments = "--interface asgi --workers 1 --loop uvloop --no-ws --log-level warning --factory".split()
    return _running(
        [sys.executable, "-m", "granian", *arguments, f"benchmarks.apps.{app}:make", "--port", "{port}"], environment
    )


def script(python: object, module: str, *arguments: str, **environment: object) -> contextlib.AbstractContextManager[Server]:
    """A module that is a server by itself; one of its arguments is `{port}`."""
    return _running([python, "-m", module, *arguments], environment)


@contextlib.contextmanager
def nginx(directory: Path) -> Iterator[Server]:
    """One worker of nginx with sendfile, serving `directory` below the prefix."""
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
    log = tempfile.TemporaryFile()
    process = subprocess.Popen(
        [str(part).format(port=port) for part in command],
        cwd=PROJECT,
        env={**os.environ, **own, "PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: _prepare(core),
        start_new_session=True,
    )
    try:
        _wait_for(process, port, log)
        yield Server(port, process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Any) -> None:
    end = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > end:
            log.seek(0)
            raise RuntimeError(f"the server did not start:\n{log.read().decode(errors='replace')}")
        time.sleep(0.05)


def _prepare(core: object) -> None:
    """In the child: its core (None: any), and as many descriptors as it may have."""
    if core is not None and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {int(str(core))})
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


# -- load -----------------------------------------------------------------------------------------------------------


def wrk(url: str, *, seconds: float, connections: int = 64) -> Measures:
    """Requests per second and latencies; raises if an answer was not a 2xx or a connection broke."""
    with loading(url, seconds=seconds, connections=connections) as process:
        said = process.communicate()[0].decode()
    if "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"wrk {url} said:\n{said}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", said)
    if found is None:
        raise RuntimeError(f"wrk {url} said:\n{said}")
    rate = float(found[1])
    if rate * seconds < connections and seconds < 60:
        return wrk(url, seconds=seconds * 4, connections=connections)  # too slow to say anything in so little time
    return {"requests/s": rate, **{f"p{p} ms": _latency(said, p) for p in (50, 99)}}


@contextlib.contextmanager
def loading(
    url: str, *, seconds: float, connections: int = 64, lua: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """wrk at work; stopped at the end."""
    command = [program("wrk"), "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--latency", "--timeout", "30s"]
    if lua is not None:
        command += ["-s", lua]
    process = subprocess.Popen([*command, url], stdout=subprocess.PIPE, preexec_fn=lambda: _prepare(1))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _latency(said: str, percentile: int) -> float:
    found = re.search(rf"^\s+{percentile}%\s+([\d.]+)(us|ms|s|m)$", said, re.MULTILINE)
    return float(found[1]) * _UNITS[found[2]] if found else float("nan")


def peer(name: str, *packages: str) -> Path:
    """The Python of a peer's own environment, made at first use."""
    place = BENCH / "peers" / name
    python = place / "bin" / "python"
    ready = place / ".ready"
    if not ready.exists():
        print(f"making an environment for {name} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages], check=False
        )
        if done.returncode:
            raise Unavailable(f"{name} could not be installed; run: pip install {' '.join(packages)}")
        ready.touch()
    return python
