"""Pure ASGI middleware: hits from disk, misses through a restore, everything else to the wrapped app."""

import time
from collections.abc import Awaitable

from starlette.types import ASGIApp, Receive, Scope, Send

from .disk.open_file import OpenFile, ReadFailed
from .events import Kind
from .healing.bodies import Body
from .healing.restore import is_broken
from .http.failures import FAILURES, status_of
from .http.headers import error_messages, never_stored
from .http.hit_cache import HitCache
from .http.lifespan import run_lifespan
from .http.prefix import OURS, Prefix
from .http.sending import Responder, send_all, send_pieces
from .settings import DEFAULT_PREFIX
from .store import UploadStore

CALL_EVERY = 0.1
"""Seconds, at least, between two calls of `BackgroundChecks.follow`: a call costs more than handing a request on."""
_HIT = Kind.HIT  # to look up a member of an enum takes as long as to count it


class SelfHealMiddleware:
    """Serves an app's uploads and heals them.

    With `serve` it answers GET and HEAD below `prefix` itself; without, it only makes sure that the file is on disk and
    hands every request on. `adopt`: files that are only on disk are stored in the database, after their first hit, or
    by the store's sweep.
    `prefix`: by default the store's. `store=None` reads the environment (`SettingsError`).
    """

    def __init__(
        self,
        app: ASGIApp,
        store: UploadStore | None = None,
        *,
        prefix: str = DEFAULT_PREFIX,
        serve: bool = True,
        adopt: bool = True,
        cache_control: str | None = None,
    ) -> None:
        self.app = app
        self.store = store or UploadStore.from_env()
        self._prefix = Prefix(self.store.share_prefix(prefix))
        self._below = self._prefix.below
        self._adopt = adopt
        self._responder = Responder(cache_control)
        self._hit_cache = HitCache(self.store.disk, self._responder, self.store.background.judged)
        self._cached_answer = self._hit_cache.answer if serve else lambda _scope: None
        self._respond = self._serve if serve else self._hand_on
        self._restorer = self.store.restorer
        self._background = self.store.background
        self._events = self.store.events
        self._follow_from = 0.0
        self._keep_up = self.store.upkeep.start if adopt else lambda: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await run_lifespan(self.app, self._open_store, self.store.close, scope, receive, send)
            else:
                await self.app(scope, receive, send)
            return
        now = time.monotonic()
        if now >= self._follow_from:
            self._follow_from = now + CALL_EVERY
            self._background.follow(adopt=self._adopt)
            self._keep_up()
        path = scope["path"]
        if self._below not in path and OURS not in path and not scope.get("root_path"):
            if not self._prefix.is_settled:  # all this is faster than to find out where the path begins
                self._prefix.note_miss(scope)
            await self.app(scope, receive, send)
            return
        answer = self._cached_answer(scope)
        if answer is None:
            await self._find_name(scope, receive, send)
            return
        entry, start, body = answer
        try:
            await send(start)
            await send(body)
        except OSError:
            return  # the client is gone (ASGI 2.4)
        self._events.emit(_HIT, entry.name, entry.size)
        self._background.hit(entry.name, entry.identity, adopt=self._adopt)

    async def _open_store(self) -> None:
        await self.store.open()
        self._keep_up()

    async def _find_name(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._prefix.route(scope)
        if route.name is not None:
            await self._answer(scope, receive, send, route.name)
        elif route.is_ours:
            await self._refuse(scope, send, 404)
        else:
            await self.app(scope, receive, never_stored(send) if route.is_below else send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, name: str) -> None:
        body = await self._open(self._restorer.open(name), scope, receive, send, name)
        if body is not None and await self._respond(scope, receive, send, name, body) and isinstance(body, OpenFile):
            self._events.emit(_HIT, name, body.size)
            self._background.hit(name, body.identity, adopt=self._adopt)

    async def _open(
        self, opening: Awaitable[OpenFile | Body | None], scope: Scope, receive: Receive, send: Send, name: str
    ) -> OpenFile | Body | None:
        """Return what was opened; None if the request is answered: with an error, or by the app for an absent name."""
        try:
            body = await opening
        except FAILURES as error:
            await self._refuse_failed(scope, receive, send, name, error)
            return None
        if body is None:
            await self._pass_on(scope, receive, never_stored(send), name, 404)
        return body

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, name: str, status: int) -> None:
        """Let the wrapped app answer, unless it would serve a file that is known to be wrong."""
        if await self._restorer.is_distrusted(name):
            await self._refuse(scope, send, status)
        else:
            await self.app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, name: str, body: OpenFile | Body) -> bool:
        try:
            if isinstance(body, OpenFile):
                return await self._serve_file(scope, receive, send, name, body)
            await self._responder.send_body(scope, receive, send, name, body)
            return False
        finally:
            body.close()

    async def _serve_file(self, scope: Scope, receive: Receive, send: Send, name: str, file: OpenFile) -> bool:
        try:
            head, judged = self._hit_cache.add(scope, name, file), self._background.judged(name, file.identity)
            plan, first = await self._responder.read_first(scope, head, file, judged)
        except OSError as error:
            if not is_broken(error):
                raise
            await self._restorer.set_aside_unreadable(name)
            restored = await self._open(self._restorer.restore(name), scope, receive, send, name)
            return restored is not None and await self._serve(scope, receive, send, name, restored)
        if len(first) == plan.stop - plan.start:
            file.close()  # a slow client of a small file holds no descriptor
        try:
            await send_pieces(receive, send, plan, file, first)
        except ReadFailed as error:
            if is_broken(error):
                await self._restorer.set_aside_unreadable(name)
            raise
        return True

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send, name: str, body: OpenFile | Body) -> bool:
        """The wrapped app may refuse the request: bytes that the disk does not take are not sent past its checks."""
        try:
            if not isinstance(body, OpenFile):
                await body.on_disk()
        except FAILURES as error:
            await self._refuse_failed(scope, receive, send, name, error)
            return False
        finally:
            body.close()
        await self._pass_on(scope, receive, never_stored(send), name, 503)
        return True

    async def _refuse_failed(self, scope: Scope, receive: Receive, send: Send, name: str, error: Exception) -> None:
        status = status_of(error, name, self._events)
        if status is None:
            await self.app(scope, receive, never_stored(send))
        else:
            await self._refuse(scope, send, status)

    async def _refuse(self, scope: Scope, send: Send, status: int) -> None:
        await send_all(send, error_messages(status, is_head=scope["method"] == "HEAD"))
