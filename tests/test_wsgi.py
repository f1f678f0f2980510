"""`selfheal.wsgi.SelfHealMiddleware`: what is particular to WSGI. The tests of the ASGI middleware run over it too."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest

from selfheal import Kind, SettingsError, UploadStore
from selfheal.disk.open_file import PIECE
from selfheal.wsgi import SelfHealMiddleware
from tests.support.asgi import scope_of
from tests.support.constants import set_constants
from tests.support.faults import BrokenDisk
from tests.support.files import noise, write_file
from tests.support.middleware import PICTURE, PREFIX
from tests.support.open_files import open_below
from tests.support.uploads import STREAMED
from tests.support.waiting import wait_until
from tests.support.wsgi import environ_of

LARGE = noise(3 * PIECE + 7)
Reply = tuple[str, dict[str, str], bytes]


@pytest.fixture
def sync_store(directory: Path, sqlite_url: str) -> Iterator[UploadStore]:
    """A store of an app without an event loop, with its tables."""
    store = UploadStore(directory, sqlite_url)
    store.sync.database.create_tables()
    yield store
    store.sync.close()


def wrapped(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer 404 as a small app does."""
    start_response("404 Not Found", [("Content-Type", "text/plain"), ("Cache-Control", "max-age=60")])
    return [b"wrapped"]


def environ(name: str, *lines: tuple[str, str], method: str = "GET", **more: Any) -> WSGIEnvironment:
    """Return the environment of a request for an upload."""
    return environ_of(scope_of(f"{PREFIX}/{name}", headers=lines, method=method)) | more


def ask(app: WSGIApplication, request: WSGIEnvironment) -> Reply:
    """Return the status line, the headers and the body of an answer."""
    begun: list[Any] = []

    def start_response(*given: Any) -> Any:
        begun[:] = given[:2]
        return lambda _: None

    answer = app(request, start_response)
    try:
        body = b"".join(answer)
    finally:
        if hasattr(answer, "close"):
            answer.close()
    return begun[0], {key.lower(): value for key, value in begun[1]}, body


# -- the protocol ------------------------------------------------------------------------------------------------------


def test_the_rules_of_wsgi(sync_store: UploadStore) -> None:
    """Every answer keeps the rules of PEP 3333, from disk, from the database and from the wrapped app."""
    app = validator(SelfHealMiddleware(wrapped, sync_store))
    for name, data in (("small.png", PICTURE), ("large.png", LARGE), ("empty.png", b"")):
        sync_store.sync.save(name, data)
        for on_disk in (True, False):
            for method in ("GET", "HEAD"):
                if not on_disk:
                    sync_store.disk.path_of(name).unlink()
                status, headers, body = ask(app, environ(name, method=method))
                assert (status, headers["content-length"]) == ("200 OK", str(len(data)))
                assert body == (data if method == "GET" else b"")
    assert ask(app, environ("small.png", ("Range", "bytes=1-9")))[::2] == ("206 Partial Content", PICTURE[1:10])
    assert ask(app, environ("small.png", ("If-None-Match", "*")))[::2] == ("304 Not Modified", b"")
    assert ask(app, environ("none.png"))[1:] == (
        {"content-type": "text/plain", "cache-control": "no-store"},
        b"wrapped",
    )
    assert ask(app, environ(".selfheal-disk"))[0] == "404 Not Found"
    assert ask(app, environ("a.png") | {"PATH_INFO": "/other"})[1]["cache-control"] == "max-age=60"


def test_it_needs_no_more_than_the_protocol(sync_store: UploadStore) -> None:
    """A server that tells no raw path and has no `wsgi.file_wrapper` serves the same."""
    sync_store.sync.save("a b.png", LARGE)
    bare = environ("a%20b.png")
    del bare["RAW_URI"], bare["wsgi.file_wrapper"]
    assert ask(SelfHealMiddleware(wrapped, sync_store), bare)[2] == LARGE


@pytest.mark.parametrize("key", ["RAW_URI", "REQUEST_URI"])
def test_an_encoded_slash(sync_store: UploadStore, key: str) -> None:
    """An encoded slash is no separator, if the server tells how the path was written; in the query it is nothing."""
    sync_store.sync.save("cats/tom.png", PICTURE)
    request = environ("cats/tom.png")
    del request["RAW_URI"]
    app = SelfHealMiddleware(wrapped, sync_store)
    assert ask(app, request | {key: f"{PREFIX}/cats/tom.png?x=%2F"})[2] == PICTURE
    assert ask(app, request | {key: f"http://test{PREFIX}/cats%2Ftom.png"})[2] == b"wrapped"


# -- the file that a server sends itself -------------------------------------------------------------------------------


class SentBySystem:
    """A file wrapper as of uWSGI: it sends the whole file of the descriptor, wherever that is, as long as it is now."""

    def __init__(self, file: Any, size: int) -> None:
        self.file = file

    def __iter__(self) -> Iterator[bytes]:
        fd = self.file.fileno()
        yield os.pread(fd, os.fstat(fd).st_size, 0)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def test_a_server_sends_exactly_the_planned_bytes(sync_store: UploadStore) -> None:
    """A server gets the file itself only if all of it is to be sent; a part is read for it."""
    sync_store.sync.save("a.png", LARGE)
    app, more = SelfHealMiddleware(wrapped, sync_store), {"wsgi.file_wrapper": SentBySystem}
    whole = app(environ("a.png", **more), lambda *_: lambda _: None)
    assert isinstance(whole, SentBySystem)
    whole.close()
    assert ask(app, environ("a.png", **more))[2] == LARGE
    for start, stop in ((0, len(LARGE) - 1), (1, len(LARGE)), (PIECE, 3 * PIECE)):
        assert ask(app, environ("a.png", ("Range", f"bytes={start}-{stop - 1}"), **more))[2] == LARGE[start:stop]


@pytest.mark.parametrize("wrapper", [FileWrapper, SentBySystem])
def test_a_file_that_grows_while_it_is_sent(sync_store: UploadStore, wrapper: type) -> None:
    """No more bytes than the headers promise are sent of a file that an app writes to at that moment."""
    path = sync_store.sync.save("a.png", LARGE).path
    more = {"wsgi.file_wrapper": wrapper} | ({"uwsgi.version": b"2.0"} if wrapper is SentBySystem else {})
    answer = SelfHealMiddleware(wrapped, sync_store)(environ("a.png", **more), lambda *_: lambda _: None)
    with path.open("ab") as file:
        file.write(b"more")
    assert b"".join(answer) == LARGE
    answer.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("lines", [(), (("Range", f"bytes=1-{2 * PIECE}"),)], ids=["whole", "part"])
@pytest.mark.parametrize("pieces", [0, 1])
def test_a_client_that_leaves(sync_store: UploadStore, lines: tuple[tuple[str, str], ...], pieces: int) -> None:
    """`close` closes the file, also if nothing of it was read."""
    sync_store.sync.save("a.png", LARGE)
    before = open_below(sync_store.disk.path)
    answer = SelfHealMiddleware(wrapped, sync_store)(environ("a.png", *lines), lambda *_: lambda _: None)
    wait_until(lambda: len(open_below(sync_store.disk.path)) == len(before) + 1)  # it is compared with its record too
    assert sum(1 for _ in zip(answer, range(pieces), strict=False)) == pieces
    answer.close()  # type: ignore[attr-defined]
    wait_until(lambda: open_below(sync_store.disk.path) == before)


@pytest.mark.parametrize("pieces", [0, 1, 9999])
@pytest.mark.parametrize("restores", [False, True])
def test_an_answer_that_nobody_closes(sync_store: UploadStore, restores: bool, pieces: int) -> None:
    """A middleware around this one that forgets to call `close` leaves no file open."""
    saved = sync_store.sync.save("a.png", noise(STREAMED))
    if restores:
        saved.path.unlink()
    request = environ("a.png", ("Range", "bytes=1-"))
    answer = SelfHealMiddleware(wrapped, sync_store)(request, lambda *_: lambda _: None)
    assert sum(len(piece) for _, piece in zip(range(pieces), answer, strict=False)) < STREAMED
    del answer
    wait_until(lambda: not open_below(sync_store.disk.path))


def test_a_start_that_fails_leaves_no_open_file(sync_store: UploadStore) -> None:
    """A server that refuses the headers leaves no file open."""
    sync_store.sync.save("a.png", LARGE)
    before = open_below(sync_store.disk.path)

    def start_response(*_: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        SelfHealMiddleware(wrapped, sync_store)(environ("a.png"), start_response)
    wait_until(lambda: open_below(sync_store.disk.path) == before)


@pytest.mark.parametrize("at", [0, PIECE])
@pytest.mark.parametrize("lines", [(), (("Range", "bytes=0-"),), (("Range", "bytes=0-9"),)])
def test_a_disk_that_lost_a_file(
    sync_store: UploadStore, monkeypatch: pytest.MonkeyPatch, at: int, lines: tuple[tuple[str, str], ...]
) -> None:
    """A file that the disk has lost is answered from the database, or broken off; the next client gets it whole."""
    path = sync_store.sync.save("a.png", LARGE).path
    broken, pread = path.stat().st_ino, os.pread

    def failing(fd: int, size: int, start: int) -> bytes:
        if os.fstat(fd).st_ino == broken and start + size > at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, size, start)

    monkeypatch.setattr(os, "pread", failing)
    app, request = SelfHealMiddleware(wrapped, sync_store), environ("a.png", *lines)
    del request["wsgi.file_wrapper"]
    size = 10 if lines and lines[0][1].endswith("9") else len(LARGE)
    if at < size and at:
        with pytest.raises(OSError, match="Input/output"):
            ask(app, request)
    assert ask(app, request)[2] == LARGE[:size]
    if at < size:
        assert path.stat().st_ino != broken
        assert sync_store.events.counters[Kind.QUARANTINED] == 1


@pytest.mark.parametrize("stays", [True, False], ids=["whole", "client leaves"])
def test_a_large_file_is_sent_while_it_is_restored(
    sync_store: UploadStore, broken_disk: BrokenDisk, stays: bool
) -> None:
    """The first bytes are sent before the restore ends, and a client that leaves does not end it."""
    saved, data = sync_store.sync.save("a.png", noise(STREAMED)), noise(STREAMED)
    saved.path.unlink()
    held = broken_disk.hold("pwrite", after=8)
    answer = SelfHealMiddleware(wrapped, sync_store)(environ("a.png"), lambda *_: lambda _: None)
    pieces = iter(answer)
    first = next(pieces)
    assert data.startswith(first)
    assert not saved.path.exists()
    held.release()
    if stays:
        assert first + b"".join(pieces) == data
    answer.close()  # type: ignore[attr-defined]
    wait_until(lambda: saved.path.exists() and not open_below(sync_store.disk.path))
    assert saved.path.read_bytes() == data


def test_an_answer_without_bytes_gives_the_file_back(sync_store: UploadStore) -> None:
    """HEAD restores a large file too, and leaves nothing open."""
    sync_store.sync.save("a.png", noise(STREAMED)).path.unlink()
    app = SelfHealMiddleware(wrapped, sync_store)
    status, headers, body = ask(app, environ("a.png", method="HEAD"))
    assert (status, headers["content-length"], body) == ("200 OK", str(STREAMED), b"")
    wait_until(lambda: not open_below(sync_store.disk.path))


# -- processes and threads ---------------------------------------------------------------------------------------------


def test_hits_ask_no_event_loop(sync_store: UploadStore) -> None:
    """A hit that was compared before is answered while the store's own loop is busy."""
    sync_store.sync.save("a.png", PICTURE)
    app = SelfHealMiddleware(wrapped, sync_store)
    ask(app, environ("a.png"))
    wait_until(lambda: sync_store.background.judged("a.png", _identity(sync_store, "a.png")) is not None)
    busy, over = threading.Event(), threading.Event()
    sync_store.home.soon(lambda: (busy.set(), over.wait(20)))
    assert busy.wait(20)
    assert ask(app, environ("a.png"))[2] == PICTURE
    assert not over.is_set()
    over.set()


def test_no_descriptors_for_an_event_loop(sync_store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without descriptors for the store's loop no request hangs: hits are served, misses are 503, later 200."""
    for name in ("hit.png", "miss.png"):
        sync_store.sync.save(name, PICTURE)
    sync_store.disk.path_of("miss.png").unlink()
    sync_store.sync.close()
    app, other = SelfHealMiddleware(wrapped, sync_store), environ("x") | {"PATH_INFO": "/other"}

    def fail() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(asyncio.events, "new_event_loop", fail)
        answers = [ask(app, request)[0][:3] for request in (other, environ("hit.png"), environ("miss.png"))]
    assert answers == ["404", "200", "503"]
    assert ask(app, environ("miss.png"))[2] == PICTURE


def _identity(store: UploadStore, name: str) -> Any:
    with store.disk.open(name) as file:  # type: ignore[union-attr]
        return file.identity


def test_a_fork_after_the_first_request(sync_store: UploadStore) -> None:
    """A process that is forked from one that served serves, heals and saves."""
    sync_store.sync.save("a.png", PICTURE)
    app = SelfHealMiddleware(wrapped, sync_store)
    assert ask(app, environ("a.png"))[2] == PICTURE
    sync_store.disk.path_of("a.png").unlink()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if ask(app, environ("a.png"))[2] == PICTURE == ask(app, environ("a.png"))[2] else 2
            sync_store.sync.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ask(app, environ("a.png"))[2] == PICTURE


def test_every_hit_is_counted(sync_store: UploadStore) -> None:
    """Hits in many threads are all counted, and files that are only on disk are adopted after them."""
    write_file(sync_store.disk.path / "lonely.png", PICTURE)
    app = SelfHealMiddleware(wrapped, sync_store)

    def visit() -> None:
        for _ in range(50):
            assert ask(app, environ("lonely.png"))[2] == PICTURE

    threads = [threading.Thread(target=visit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sync_store.events.counters[Kind.HIT] == 400
    wait_until(lambda: sync_store.sync.database.find("lonely.png") is not None)


@pytest.mark.parametrize("adopt", [True, False])
def test_files_that_nobody_asks_for(
    directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, adopt: bool
) -> None:
    """Any request starts the sweep, which stores what is only on disk, unless nothing is to be adopted."""
    set_constants(monkeypatch, START_AFTER=0.2)
    write_file(directory / "lonely.png", PICTURE)
    with UploadStore(directory, sqlite_url).sync as uploads:
        uploads.database.create_tables()
        app = SelfHealMiddleware(wrapped, store := UploadStore(directory, sqlite_url), adopt=adopt)
        ask(app, environ("a.png") | {"PATH_INFO": "/"})
        if adopt:
            wait_until(lambda: uploads.database.find("lonely.png") is not None)
        else:
            time.sleep(1)
            assert uploads.database.find("lonely.png") is None
        store.sync.close()


def test_an_address_with_a_digest(sync_store: UploadStore) -> None:
    """The answer to a versioned address is kept for ever by caches, from the database and from disk."""
    saved = sync_store.sync.save("a.png", PICTURE)
    saved.path.unlink()
    app = SelfHealMiddleware(wrapped, sync_store)
    for _ in range(2):
        versioned = ask(app, environ("a.png", QUERY_STRING=f"v={saved.sha256}"))
        assert (versioned[1]["cache-control"], versioned[2]) == ("public, max-age=31536000, immutable", PICTURE)
        ask(app, environ("a.png"))
        wait_until(lambda: sync_store.background.judged("a.png", _identity(sync_store, "a.png")) is not None)
    assert "cache-control" not in ask(app, environ("a.png", QUERY_STRING="v=0"))[1]


@pytest.fixture
def claimed_tables() -> None:
    """Two stores of this process may not share tables, as in an app."""


def test_a_store_that_cannot_open(directory: Path, sqlite_url: str, tmp_path: Path, claimed_tables: None) -> None:
    """A store whose tables another store uses is refused at every request, until it is mended."""
    first, second = UploadStore(directory, sqlite_url), UploadStore(tmp_path / "other", sqlite_url)
    first.sync.database.create_tables()
    app = SelfHealMiddleware(wrapped, second)
    for _ in range(2):
        with pytest.raises(SettingsError):
            ask(app, environ("a.png"))
    first.sync.close()
    assert ask(app, environ("a.png"))[2] == b"wrapped"
    second.sync.close()


GREEN_THREADS = [
    ("gevent.monkey", "is_module_patched", "threading"),
    ("eventlet.patcher", "is_monkey_patched", "thread"),
]


@pytest.mark.parametrize(("module", "question", "threads"), GREEN_THREADS)
def test_threads_that_were_replaced(
    directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, module: str, question: str, threads: str
) -> None:
    """Where a library has replaced the threads, the worker does not start, and one line says which one would."""
    store = UploadStore(directory, sqlite_url)
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{question: lambda name: name == threads}))
    for start in (lambda: SelfHealMiddleware(wrapped, store), lambda: store.sync.url("a.png", versioned=True)):
        with pytest.raises(RuntimeError, match=r"has replaced Python's threads.*--worker-class gthread"):
            start()
