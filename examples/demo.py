"""A photo gallery loses its files, and every picture comes back: `python -m examples.demo`.

It uses a real server, real pictures and real HTTP, and writes to `.demo` below the current directory. On a terminal the
gallery stays open until Ctrl-C. The exit code is 0 only if every byte came back.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from examples.pictures import pictures

HOME = Path(".demo")
UPLOADS = HOME / "uploads"
DATABASE = HOME / "gallery.db"
PREFIX = "/static/uploads"
PATIENCE = 20.0
"""Seconds to wait for an answer of the server, and for its background work after an answer."""


@dataclass(frozen=True)
class Seen:
    """The answer to a request for a picture. `ms`, its duration in milliseconds, is not compared."""

    status: int
    sha256: str
    etag: str | None
    modified: str | None
    size: int
    ms: float = field(compare=False)


def wipe() -> None:
    """Delete all uploads, as a deploy, a `git clean` or a new node does."""
    shutil.rmtree(UPLOADS)


def main(lose: Callable[[], None] = wipe) -> int:
    """Run the demo; `lose` deletes the files. Return 0 if everything came back, 1 if not, 130 if it was stopped."""
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    print(bold("\nselfheal: a photo gallery loses its disk\n"))
    came_back = False
    try:
        with serving() as (server, url), httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as browser:
            came_back = run(browser, lose)
            print(green("\nEverything came back.\n") if came_back else red("\nNot everything came back.\n"))
            if came_back and sys.stdout.isatty():
                stay_open(server, url)
    except httpx.HTTPError as error:
        print(red(f"\nThe gallery gives no answer: {error}\n"))
    except KeyboardInterrupt:
        return 130
    return 0 if came_back else 1


def run(browser: httpx.Client, lose: Callable[[], None]) -> bool:
    """Run the steps. Return True if every picture came back and the deleted picture did not."""
    step(1, f"A real server: examples/starlette_app.py at {browser.base_url}", f"with {UPLOADS} and {DATABASE}")
    originals = pictures()
    places = upload(browser, originals)
    before = look_at_all(browser, places)
    step(2, f"{len(places)} of {len(originals)} pictures uploaded through its form, {size(before)}")
    lose()
    gone = sum(not file_of(place).exists() for place in places.values())
    step(3, f"rm -r {UPLOADS}: {gone} of {len(places)} files are gone")
    step(4, "Every picture is requested again, over HTTP:\n")
    after = look_at_all(browser, places)
    same = show(before, after, look_at_all(browser, places))
    return same == len(originals) and stays_deleted(browser, "moon.jpg", places["moon.jpg"])


@contextmanager
def serving() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run the gallery in its own process; yield it and its URL. Early requests wait in the queue of the socket."""
    settings = {
        "SELFHEAL_DIRECTORY": str(UPLOADS),
        "SELFHEAL_DATABASE_URL": f"sqlite+aiosqlite:///{DATABASE}",
        "SELFHEAL_PREFIX": PREFIX,
    }
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # uvicorn does not set it: it treats an --fd as a Unix socket
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port, fd = listener.getsockname()[1], listener.fileno()
        command = [sys.executable, "-m", "uvicorn", "examples.starlette_app:app", "--fd", str(fd)]
        command += ["--app-dir", str(Path(__file__).parents[1]), "--log-level", "warning"]
        server = subprocess.Popen(command, env=os.environ | settings, pass_fds=[fd])
    with server:
        try:
            yield server, f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def upload(browser: httpx.Client, originals: dict[str, bytes]) -> dict[str, str]:
    """Upload pictures through the form of the gallery. Return the path of each; the bytes tell which is which."""
    form = [("pictures", (name, data)) for name, data in reversed(originals.items())]
    page = browser.post("/upload", files=form, follow_redirects=True).raise_for_status().text
    names = {hashlib.sha256(data).hexdigest(): name for name, data in originals.items()}
    paths = re.findall(f'src="({PREFIX}/[^"]+)"', page)
    return {names[seen.sha256]: path for path in paths if (seen := look(browser, path)).sha256 in names}


def look(browser: httpx.Client, place: str) -> Seen:
    """Request a picture as a browser does."""
    start = time.perf_counter()
    answer = browser.get(place)
    ms = (time.perf_counter() - start) * 1000
    digest, said = hashlib.sha256(answer.content).hexdigest(), answer.headers
    return Seen(answer.status_code, digest, said.get("ETag"), said.get("Last-Modified"), len(answer.content), ms)


def look_at_all(browser: httpx.Client, places: dict[str, str]) -> dict[str, Seen]:
    return {name: look(browser, place) for name, place in places.items()}


def file_of(place: str) -> Path:
    """Return the file on disk that is served at a path."""
    return UPLOADS / place.removeprefix(f"{PREFIX}/")


def stays_deleted(browser: httpx.Client, name: str, place: str) -> bool:
    """Delete a picture and copy its file back: the file is removed again. Then undo the deletion.

    Return True if the picture stayed deleted, and the undo restored it unchanged.
    """
    file, before = file_of(place), look(browser, place)
    data = file.read_bytes()
    browser.post("/delete", data={"name": file.name})
    file.write_bytes(data)
    os.utime(file, (1e9, 1e9))
    statuses = [browser.get(place).status_code]
    end = time.monotonic() + PATIENCE
    while statuses[-1] == 200 and time.monotonic() < end:
        time.sleep(0.05)
        statuses.append(browser.get(place).status_code)
    browser.post("/undo", data={"name": file.name})
    after = look(browser, place)
    step(5, f"{name} is deleted, and its file is copied back, as a deploy does:")
    print(f"   GET returns {statuses[0]}, then {statuses[-1]}: the database remembers the deletion")
    print(f"   and {after.status} after an undo: {'the same' if after == before else 'a different'} picture")
    return statuses[-1] == 404 and after == before


def stay_open(server: subprocess.Popen[bytes], url: str) -> None:
    """Keep the gallery open until Ctrl-C."""
    try:
        print(f"The gallery: {bold(url)}  (Ctrl-C ends it; delete any file below {UPLOADS})")
        server.wait()
    except KeyboardInterrupt:
        print()


def step(number: int, title: str, *more: str) -> None:
    print(f"{bold(str(number))}  {title}", *(f"   {line}" for line in more), sep="\n", flush=True)


def show(before: dict[str, Seen], after: dict[str, Seen], again: dict[str, Seen]) -> int:
    """Print the answers. Return how many pictures have the same status, bytes, ETag and Last-Modified as before."""
    print(bold(f"   {'picture':14} {'GET':>4} {'size':>7} {'time':>8}   bytes   ETag   Last-Modified"))
    for name, was in before.items():
        now = after[name]
        marks = verdict(was.sha256, now.sha256), verdict(was.etag, now.etag), verdict(was.modified, now.modified)
        print(f"   {name:14} {now.status:>4} {kb(now.size):>7} {now.ms:>5.1f} ms ", *marks)
    same = sum(after[name] == was for name, was in before.items())
    count = f"{same} of {len(before)} came back, {size(after)} in {took(after)}"
    print(f"\n   {count}; the second time, from disk, in {took(again)}\n")
    return same


def verdict(was: str | None, now: str | None) -> str:
    return green(f"{'same':>6}") if was == now else red(f"{'OTHER':>6}")


def size(seen: dict[str, Seen]) -> str:
    return kb(sum(one.size for one in seen.values()))


def took(seen: dict[str, Seen]) -> str:
    return f"{sum(one.ms for one in seen.values()):.0f} ms"


def kb(count: int) -> str:
    return f"{count / 1024:.0f} KB"


def painted(code: int) -> Callable[[str], str]:
    """Return a function that colours text, on terminals only."""
    return lambda text: f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


bold, red, green = painted(1), painted(31), painted(32)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
