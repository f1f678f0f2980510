"""The middleware for WSGI apps (Flask, Django): a hit is answered in the request's own thread, from the disk alone.

A file that is missing is restored on the event loop where the store lives, as for ASGI.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from .aio.home import HomeLoop
from .aio.loop_thread import refuse_green_threads
from .disk.open_file import PIECE, OpenFile
from .events import Kind
from .healing.bodies import Body
from .healing.restore import is_broken
from .http.conditional import plan_of
from .http.failures import FAILURES, status_of
from .http.headers import Head, Plan
from .http.prefix import OURS, Prefix
from .http.sending import Responder
from .http.urls import kept_for_ever
from .http.wsgi import Pieces, WholeFile, conditions_of, never_stored, refuse, scope_of, start
from .settings import DEFAULT_PREFIX
from .store import UploadStore
from .sync import iterate

CALL_EVERY = 0.1
"""Seconds, at least, between two calls of `BackgroundChecks.follow`."""
Opening = Callable[[str], OpenFile | Body | None]
"""How a name is opened."""


class SelfHealMiddleware:
    """Serves the uploads of a WSGI app and heals them: the options are those of `selfheal.SelfHealMiddleware`.

    The store opens at the first request in each process, and closes when the process ends. Raises `RuntimeError` if
    gevent or eventlet has replaced the threads.
    """

    def __init__(
        self,
        app: WSGIApplication,
        store: UploadStore | None = None,
        *,
        prefix: str = DEFAULT_PREFIX,
        serve: bool = True,
        adopt: bool = True,
        cache_control: str | None = None,
    ) -> None:
        refuse_green_threads()
        self.app = app
        self.store = store or UploadStore.from_env()
        self._prefix = Prefix(self.store.share_prefix(prefix))
        self._below = self._prefix.below.encode().decode("latin-1")  # as an environment has it
        self._adopt = adopt
        self._responder = Responder(cache_control)
        self._respond = self._serve if serve else self._hand_on
        self._home = self.store.home
        self._pid = -1
        self._counting = threading.Lock()
        self._follow_from = 0.0
        self._keep_up = self.store.upkeep.start if adopt else lambda: None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The WSGI entry point."""
        if self._pid != os.getpid():
            self._open_store()
        now = time.monotonic()
        if now >= self._follow_from:
            self._follow_from = now + CALL_EVERY
            self._work_in_background()
        path = environ.get("PATH_INFO", "")
        if self._below not in path and OURS not in path and not environ.get("SCRIPT_NAME"):
            if not self._prefix.is_settled:
                self._prefix.note_miss(scope_of(environ))
            return self.app(environ, start_response)
        route = self._prefix.route(scope_of(environ))
        if route.name is not None:
            return self._answer(environ, start_response, route.name, self._open)
        if route.is_ours:
            return refuse(environ, start_response, 404)
        return self.app(environ, never_stored(start_response) if route.is_below else start_response)

    def _open_store(self) -> None:
        """This process is new, maybe forked."""
        self._pid, self._counting = os.getpid(), threading.Lock()
        try:
            self._home.call(self.store.open)
        except OSError as error:
            self._note_no_loop(error)
        except BaseException:
            self._pid = -1
            raise

    def _work_in_background(self) -> None:
        try:
            self.store.background.follow(adopt=self._adopt)
            self._keep_up()
        except OSError as error:
            self._note_no_loop(error)

    def _note_no_loop(self, error: OSError) -> None:
        """There are no descriptors for an event loop: hits and the wrapped app need none."""
        self.store.events.log_once(logging.WARNING, "home", f"no event loop can be started: {error}")

    def _answer(
        self, environ: WSGIEnvironment, start_response: StartResponse, name: str, opening: Opening
    ) -> Iterable[bytes]:
        try:
            body = opening(name)
        except FAILURES as error:
            return self._refuse_failed(environ, start_response, name, error)
        if body is None:
            return self._pass_on(environ, start_response, name, 404)
        return self._respond(environ, start_response, name, body)

    def _open(self, name: str) -> OpenFile | Body | None:
        try:
            file = self.store.disk.open(name)
        except OSError:  # what it means is found out at home
            file = None
        return file or self._home.call(self.store.restorer.open, name)

    def _restore(self, name: str) -> OpenFile | Body | None:
        return self._home.call(self.store.restorer.restore, name)

    def _pass_on(
        self, environ: WSGIEnvironment, start_response: StartResponse, name: str, status: int
    ) -> Iterable[bytes]:
        """Let the wrapped app answer, unless it would serve a file that is known to be wrong."""
        if self.store.disk.has_distrusted and self.store.disk.is_distrusted(name):
            return refuse(environ, start_response, status)
        return self.app(environ, never_stored(start_response))

    def _serve(
        self, environ: WSGIEnvironment, start_response: StartResponse, name: str, body: OpenFile | Body
    ) -> Iterable[bytes]:
        if isinstance(body, OpenFile):
            try:
                return self._serve_file(environ, start_response, name, body)
            except BaseException:
                body.close()
                raise
        plan = _plan(environ, self._responder.head_of_body(name, body), body.size, body.sha256)
        answer = _Relayed(self._home, body, plan)
        try:
            start(start_response, plan.status, plan.headers)
        except BaseException:
            answer.close()
            raise
        return answer

    def _serve_file(
        self, environ: WSGIEnvironment, start_response: StartResponse, name: str, file: OpenFile
    ) -> Iterable[bytes]:
        judged = self.store.background.judged(name, file.identity)
        head = self._responder.head_of_file(name, file, judged)
        plan = _plan(environ, head, file.size, "" if judged is None else judged.sha256)
        size = plan.stop - plan.start
        try:
            first = file.read_waiting(plan.start, size if size <= PIECE else 1)
        except OSError as error:
            if not is_broken(error):
                raise
            file.close()
            self._set_aside(name, error)
            return self._answer(environ, start_response, name, self._restore)
        start(start_response, plan.status, plan.headers)
        self._note_hit(name, file)
        if len(first) == size:
            file.close()  # a slow client of a small file holds no descriptor
            return [first]
        failed = partial(self._set_aside, name)
        # uWSGI sends the file to where it ends then, whatever the headers say
        if size == file.size and "wsgi.file_wrapper" in environ and "uwsgi.version" not in environ:
            return environ["wsgi.file_wrapper"](WholeFile(file, failed), PIECE)  # type: ignore[no-any-return]
        return Pieces(file, plan, failed)

    def _hand_on(
        self, environ: WSGIEnvironment, start_response: StartResponse, name: str, body: OpenFile | Body
    ) -> Iterable[bytes]:
        """The wrapped app may refuse the request: bytes that the disk does not take are not sent past its checks."""
        try:
            if isinstance(body, OpenFile):
                body.close()
            else:
                self._home.call(_on_disk, body)
        except FAILURES as error:
            return self._refuse_failed(environ, start_response, name, error)
        answer = self._pass_on(environ, start_response, name, 503)
        if isinstance(body, OpenFile):
            self._note_hit(name, body)
        return answer

    def _note_hit(self, name: str, file: OpenFile) -> None:
        with self._counting:  # to count is not atomic
            self.store.events.emit(Kind.HIT, name, file.size)
        try:
            self.store.background.hit(name, file.identity, adopt=self._adopt)
        except OSError as error:
            self._note_no_loop(error)

    def _set_aside(self, name: str, error: OSError) -> None:
        if is_broken(error):
            self._home.call(self.store.restorer.set_aside_unreadable, name)

    def _refuse_failed(
        self, environ: WSGIEnvironment, start_response: StartResponse, name: str, error: Exception
    ) -> Iterable[bytes]:
        status = status_of(error, name, self.store.events)
        if status is None:
            return self.app(environ, never_stored(start_response))
        return refuse(environ, start_response, status)


class _Relayed:
    """The planned bytes of a body, read on the store's event loop; given back by the server, or with the last reference
    to it.
    """

    def __init__(self, home: HomeLoop, body: Body, plan: Plan) -> None:
        self._home = home
        self._body: Body | None = body
        self._pieces = iterate(home, body.pieces(plan.start, plan.stop))
        self._is_empty = plan.start == plan.stop

    def __iter__(self) -> Iterator[bytes]:
        return iter(()) if self._is_empty else self._pieces

    def close(self) -> None:
        """Give the body back, once."""
        body, self._body = self._body, None
        try:
            self._pieces.close()
        finally:
            if body is not None:
                self._home.release(body.close)

    def __del__(self) -> None:
        self.close()


async def _on_disk(body: Body) -> None:
    try:
        await body.on_disk()
    finally:
        body.close()


def _plan(environ: WSGIEnvironment, head: Head, size: int, sha256: str) -> Plan:
    plan = plan_of(conditions_of(environ), head, size, is_head=environ["REQUEST_METHOD"] == "HEAD")
    return kept_for_ever(plan, environ.get("QUERY_STRING", "").encode("latin-1", "replace"), sha256)
