"""Pure ASGI middleware: hits from disk, misses through the database, everything else to the wrapped app."""

from __future__ import annotations

import errno
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import names
from .disk.open_file import OpenFile, ReadFailed
from .errors import CorruptBlob, DatabaseUnavailable, DiskUnwritable, NotAFile, SchemaError
from .events import Kind, logger
from .http.hit_cache import Hits
from .http.sending import RETRY_AFTER, Headers, Responder, error_messages, never_stored
from .settings import DEFAULT_PREFIX, Settings, check_prefix
from .store import UploadStore

VISITED_EVERY = 0.1
"""Seconds, at least, between two times that the store is told of a visitor: telling it costs more than handing on."""
_HIT = Kind.HIT  # to look a member up in its class takes as long as to count it
_OURS = f"/{names.OWN_PREFIX}"
_BROKEN = frozenset(getattr(errno, name, errno.EIO) for name in ("EIO", "ESTALE", "EUCLEAN"))


class SelfHealMiddleware:
    """Serves an app's uploads and heals them.

    With `serve` it answers GET and HEAD below `prefix` itself; without, it only makes sure that the file is on disk and
    hands every request on. `adopt`: a file that is only on disk is brought into the database behind its first hit.
    `store=None` reads the environment (`SettingsError`).
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
        if store is None and prefix == DEFAULT_PREFIX:
            prefix = Settings.from_env().prefix
        self.app = app
        self.store = store or UploadStore.from_env()
        self._prefix = check_prefix(prefix)
        self._below = f"{prefix}/"
        self._visited_from = 0.0
        self._adopt = adopt
        self._responder = Responder(cache_control)
        self._hits = Hits(self.store.disk, self._responder)
        self._answer = self._serve if serve else self._hand_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._lifespan(scope, receive, send)
            else:
                await self.app(scope, receive, send)
            return
        now = time.monotonic()
        if now >= self._visited_from:
            self._visited_from = now + VISITED_EVERY
            self.store.follow()
        path = scope["path"]
        if self._below not in path and _OURS not in path:  # cheaper than where it stands, which the rest looks at
            await self.app(scope, receive, send)
            return
        answer = self._hits.answer(scope)
        if answer is None:
            await self._find_name(scope, receive, send)
            return
        known, start, body = answer
        await send(start)
        await send(body)
        self.store.events.emit(_HIT, known.name, known.size)
        self.store.noticed(known.name, known.identity, adopt=self._adopt)

    async def _find_name(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, root = scope["path"], scope.get("root_path")
        if root and path.startswith(f"{root}/"):
            path = path[len(root) :]
        if not path.startswith(self._below) or scope["method"] not in ("GET", "HEAD"):
            if _OURS in path:
                await self._refuse(scope, send, 404)
            else:
                await self.app(scope, receive, send)
            return
        name = names.from_path(path, self._prefix, scope.get("raw_path"))
        if name is not None:
            await self._answer(scope, receive, send, name)
        elif _OURS in path:
            await self._refuse(scope, send, 404)  # whatever the wrapped app serves, what we keep there is not for it
        else:
            await self.app(scope, receive, never_stored(send))

    # -- the two ways to answer -----------------------------------------------------------------------------------

    async def _serve(self, scope: Scope, receive: Receive, send: Send, name: str) -> None:
        try:
            file = await self._open(name)
        except (NotAFile, OSError) as error:
            if not _is_broken(error):
                await self._refuse_failed(scope, receive, send, name, error)
                return
            file = None
            await self._set_aside(name)
        if file is None:
            await self._miss(scope, receive, send, name)
            return
        identity = file.identity
        try:
            await self._hit(scope, receive, send, name, file)
        finally:
            file.close()
        self.store.noticed(name, identity, adopt=self._adopt)

    async def _hit(self, scope: Scope, receive: Receive, send: Send, name: str, file: OpenFile) -> None:
        try:
            plan, first = await self._responder.read_first(scope, self._hits.learn(scope, name, file), file)
        except OSError as error:
            if not _is_broken(error):
                raise
            await self._set_aside(name)
            await self._miss(scope, receive, send, name)
            return
        if len(first) == plan.stop - plan.start:
            file.close()  # a slow client of a small file holds nothing open
        try:
            await self._responder.send_file(scope, receive, send, file, plan, first)
        except ReadFailed as error:
            if _is_broken(error):
                await self._set_aside(name)
            raise
        self.store.events.emit(_HIT, name, file.size)

    async def _set_aside(self, name: str) -> None:
        try:
            await self.store.set_aside(name)
        except OSError as error:
            logger.error("%r cannot be read, nor moved away: %s", name, error)

    async def _miss(self, scope: Scope, receive: Receive, send: Send, name: str) -> None:
        try:
            body = await self.store.bring_back(name)
        except (DatabaseUnavailable, CorruptBlob, NotAFile, OSError) as error:
            await self._refuse_failed(scope, receive, send, name, error)
            return
        if body is None:
            await self.app(scope, receive, never_stored(send))
            return
        try:
            await self._responder.send_body(scope, receive, send, name, body)
        finally:
            body.close()

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send, name: str) -> None:
        """The wrapped app's own checks hold: bytes that the disk does not take are not sent around them."""
        identity = None
        try:
            file = await self._open(name)
            if file is not None:
                identity = file.identity
                file.close()
            else:
                await self.store.is_on_disk_again(name)
        except (DatabaseUnavailable, DiskUnwritable, CorruptBlob, NotAFile, OSError) as error:
            await self._refuse_failed(scope, receive, send, name, error)
            return
        await self.app(scope, receive, never_stored(send))
        if identity is not None:
            self.store.noticed(name, identity, adopt=self._adopt)

    async def _open(self, name: str) -> OpenFile | None:
        disk = self.store.disk
        try:
            return disk.open_cached(name)
        except BlockingIOError:
            return await disk.threads.run(disk.open, name)

    # -- answers without a file -----------------------------------------------------------------------------------

    async def _refuse_failed(self, scope: Scope, receive: Receive, send: Send, name: str, error: Exception) -> None:
        events = self.store.events
        if isinstance(error, NotAFile):
            await self.app(scope, receive, never_stored(send))
        elif isinstance(error, CorruptBlob):
            await self._refuse(scope, send, 500)
        elif isinstance(error, OSError):
            await self._refuse_unreadable(scope, send, name, error)
        else:
            level = logging.CRITICAL if isinstance(error, SchemaError) else logging.WARNING
            events.log_once(level, type(error).__name__, str(error))
            events.emit(Kind.UNKNOWN, name, detail=str(error))
            await self._refuse(scope, send, 503, [(b"retry-after", RETRY_AFTER)])

    async def _refuse_unreadable(self, scope: Scope, send: Send, name: str, error: OSError) -> None:
        events = self.store.events
        events.emit(Kind.UNREADABLE, name, detail=str(error))
        events.log_once(logging.ERROR, f"errno {error.errno}", f"{name!r} cannot be read: {error}")
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            await self._refuse(scope, send, 503, [(b"retry-after", RETRY_AFTER)])
        else:
            await self._refuse(scope, send, 500)

    async def _refuse(self, scope: Scope, send: Send, status: int, more: Headers | None = None) -> None:
        for message in error_messages(status, is_head=scope["method"] == "HEAD", more=more):
            await send(message)

    # -- lifespan -------------------------------------------------------------------------------------------------

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The store opens and closes with the app; an app that refuses lifespan (Django does) is served as well."""
        answered = False
        last: Message = {"type": ""}

        async def receive_and_note() -> Message:
            nonlocal last
            last = await receive()
            return last

        async def send_and_note(message: Message) -> None:
            nonlocal answered
            answered = True
            if message["type"].startswith("lifespan.shutdown."):
                await self.store.close()
            await send(message)

        await self.store.open()
        try:
            await self.app(scope, receive_and_note, send_and_note)
        except Exception:
            if answered:
                raise
            logger.debug("the wrapped app refuses lifespan", exc_info=True)
        finally:
            if answered:
                await self.store.close()
        if answered:
            return
        while last["type"] != "lifespan.shutdown":
            if last["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            last = await receive()
        await self.store.close()
        await send({"type": "lifespan.shutdown.complete"})


def _is_broken(error: Exception) -> bool:
    """Whether the disk itself says that it lost the file."""
    return isinstance(error, OSError) and error.errno in _BROKEN
