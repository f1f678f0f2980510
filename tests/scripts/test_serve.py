"""`selfheal serve`: the uploads alone, around an app, with several workers."""

from __future__ import annotations

import http.client
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from tests.support.command_line import IMAGES, SECONDS, Done, Site
from tests.support.disk_files import contents_below
from tests.support.sockets import free_port
from tests.support.waiting import wait_until

SHOP = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise RuntimeError("no lifespan here, as with Django")
    body = b"shop"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
"""


@dataclass(frozen=True)
class Server:
    """A running `selfheal serve`."""

    port: int

    def get(self, path: str) -> tuple[int, bytes]:
        """Request a path over HTTP; return the status and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        with closing(connection):
            connection.request("GET", path, headers={"Connection": "close"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def is_up(self) -> bool:
        """Return whether it answers."""
        try:
            self.get("/")
        except OSError:
            return False
        return True


@contextmanager
def serving(site: Site, *arguments: str) -> Iterator[Server]:
    """Run `selfheal serve` until it answers; at the end, Ctrl-C must stop it."""
    server = Server(free_port())
    with site.start(None, "serve", "--port", str(server.port), *site.flags, *arguments) as process:
        try:
            wait_until(lambda: process.poll() is not None or server.is_up(), SECONDS)
            assert process.poll() is None, process.communicate()
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            try:
                out, err = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise
    if "--workers" in arguments:  # uvicorn's parent process leaves its socket to the garbage collector
        err = "\n".join(line for line in err.splitlines() if "ResourceWarning" not in line)
    Done(process.returncode, out, err)
    assert process.returncode == (0 if "--workers" in arguments else 130), err


def _with_shop(site: Site) -> Site:
    (site.home / "shop.py").write_text(SHOP)
    return site


def test_serving_the_uploads_alone(full_site: Site) -> None:
    """Without an app the uploads are served and healed, and everything else is a 404."""
    with serving(full_site) as server:
        assert server.get("/static/uploads/a.png") == (200, IMAGES["a.png"])
        shutil.rmtree(full_site.directory)
        assert server.get("/static/uploads/cats/tom.jpg") == (200, IMAGES["cats/tom.jpg"])
        assert server.get("/static/uploads/nope.png")[0] == 404
        assert server.get("/")[0] == 404
    assert contents_below(full_site.directory) == {"cats/tom.jpg": IMAGES["cats/tom.jpg"]}


def test_serving_an_app(full_site: Site) -> None:
    """An app of the current directory is wrapped: uploads are healed below --prefix, the rest is the app's own."""
    with serving(_with_shop(full_site), "shop:app", "--prefix", "/media") as server:
        shutil.rmtree(full_site.directory)
        assert server.get("/media/a.png") == (200, IMAGES["a.png"])
        assert server.get("/static/uploads/a.png") == (200, b"shop")
        assert server.get("/") == (200, b"shop")


def test_serving_with_workers(full_site: Site) -> None:
    """Worker processes serve the same app with the same flags."""
    with serving(_with_shop(full_site), "shop:app", "--workers", "2") as server:
        shutil.rmtree(full_site.directory)
        for _ in range(6):
            assert server.get("/static/uploads/a.png") == (200, IMAGES["a.png"])
            assert server.get("/") == (200, b"shop")


def test_a_port_that_is_taken(full_site: Site) -> None:
    """A server that cannot start exits with 1, not with 3, which would blame the database; there is no traceback."""
    with serving(full_site) as server:
        assert server.get("/static/uploads/a.png")[0] == 200
        done = full_site.execute(None, "serve", *full_site.flags, "--port", str(server.port))
    assert done.code == 1
    assert done.err.splitlines()[-1] == "selfheal: the server did not start; what it said is above"
