"""Hits that wait for nothing: what was answered before and is in memory, of which all but the bytes is known.

Between two requests nothing of ours is in the processor's caches, and each step costs several times what it costs in a
loop of its own: to look for the name, measure the file and make its headers anew was a tenth of a small hit.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass

from starlette.types import Message, Scope

from ..disk.directory import UploadsDirectory
from ..disk.open_file import PIECE, Identity, OpenFile
from .sending import Head, Responder, plan_of, start_of

KNOWN_AT_MOST = 8192
LONGEST = 1024
"""Characters of all that a server says of a path, together, up to which it is remembered: it may be a client's choice,
and 2 KB for each is enough.
"""


@dataclass(frozen=True, slots=True)
class Known:
    """A file as it was when a path was asked for. What the path means depends on all that the server says of it."""

    name: str
    file: bytes
    identity: Identity
    size: int
    head: Head
    raw_path: bytes | None
    root_path: str | None


class Hits:
    """The files of a directory, by the paths at which they were asked for."""

    def __init__(self, disk: UploadsDirectory, responder: Responder) -> None:
        self._disk = disk
        self._responder = responder
        self._known: OrderedDict[str, Known] = OrderedDict()

    def learn(self, scope: Scope, name: str, file: OpenFile) -> Head:
        """What is said of the file that this request asks for; the next one finds it."""
        path, raw_path, root_path = scope["path"], scope.get("raw_path"), scope.get("root_path")
        known = self._known.pop(path, None)
        is_same = known is not None and (known.name, known.identity) == (name, file.identity)
        head = known.head if known is not None and is_same else self._responder.head_of(name, file)
        if len(path) + len(raw_path or b"") + len(root_path or "") <= LONGEST:
            if len(self._known) >= KNOWN_AT_MOST:
                self._known.popitem(last=False)
            self._known[path] = Known(name, os.fsencode(name), file.identity, file.size, head, raw_path, root_path)
        return head

    def answer(self, scope: Scope) -> tuple[Known, Message, Message] | None:
        """The answer to a GET or HEAD of a path, in one piece, if its file is known, unchanged, and in memory."""
        known = self._known.get(scope["path"])
        if known is None or known.raw_path != scope.get("raw_path") or known.root_path != scope.get("root_path"):
            return None
        if scope["method"] not in ("GET", "HEAD") or not isinstance(scope["headers"], list):
            return None  # of other iterables than a list, nothing would be left for who answers in our place
        plan = plan_of(scope["headers"], known.head, known.size, is_head=scope["method"] == "HEAD")
        if plan.stop - plan.start > PIECE:
            return None
        body = self._disk.read_again(known.file, known.identity, plan.start, plan.stop)
        return None if body is None else (known, start_of(plan), {"type": "http.response.body", "body": body})
