"""Hit cache: for paths that were answered before, all but the bytes is remembered.

Such a hit never waits for a disk. To find the name, measure the file and make its headers again costs a tenth of a
small hit: between two requests none of that code and data stays in the processor's caches.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Message, Scope

from ..disk.directory import UploadsDirectory
from ..disk.open_file import PIECE, Identity, OpenFile
from ..healing.reconcile import Judged
from .conditional import plan_of
from .headers import Head
from .sending import Responder, start_of
from .urls import immutable, is_version

Judgements = Callable[[str, Identity], Judged | None]
"""What the comparison of a name's file with its record found (`BackgroundChecks.judged`)."""
ENTRIES_AT_MOST = 8192
LONGEST = 1024
"""Characters of all that a server passes of a path, up to which it is remembered: clients choose it, and 2 KB for each
is enough.
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as it was when a path was requested. What the path means depends on all that the server passes of it."""

    name: str
    file: bytes
    identity: Identity
    size: int
    head: Head
    raw_path: bytes | None
    root_path: str | None


class HitCache:
    """The files of a directory, by the paths of the requests for them; the least recently added goes first."""

    def __init__(
        self, disk: UploadsDirectory, responder: Responder, judged: Judgements, limit: int = ENTRIES_AT_MOST
    ) -> None:
        self._disk = disk
        self._responder = responder
        self._judged = judged
        self._limit = limit
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def add(self, scope: Scope, name: str, file: OpenFile) -> Head:
        """Return the head of a request's file; remember both, unless a comparison with the record may change it."""
        path, raw_path, root_path = scope["path"], scope.get("raw_path"), scope.get("root_path")
        entry = self._entries.pop(path, None)
        if entry is not None and (entry.name, entry.identity) == (name, file.identity):
            head = entry.head
        else:
            judged = self._judged(name, file.identity)
            head = self._responder.head_of_file(name, file, judged)
            if judged is None and self._responder.needs_record(name):
                return head
        if len(path) + len(raw_path or b"") + len(root_path or "") <= LONGEST:
            if len(self._entries) >= self._limit:
                self._entries.popitem(last=False)
            self._entries[path] = Entry(name, os.fsencode(name), file.identity, file.size, head, raw_path, root_path)
        return head

    def answer(self, scope: Scope) -> tuple[Entry, Message, Message] | None:
        """Return the answer to a GET or HEAD, if its file is in the cache, unchanged, and its bytes are in memory."""
        entry = self._entries.get(scope["path"])
        if entry is None or entry.raw_path != scope.get("raw_path") or entry.root_path != scope.get("root_path"):
            return None
        if scope["method"] not in ("GET", "HEAD") or not isinstance(scope["headers"], list):
            return None  # another iterable could be read only once, and a later answer would find it empty
        plan = plan_of(scope["headers"], entry.head, entry.size, is_head=scope["method"] == "HEAD")
        if plan.stop - plan.start > PIECE:
            return None
        query = scope.get("query_string")
        if query:
            judged = self._judged(entry.name, entry.identity)
            plan = immutable(plan) if judged is not None and is_version(query, judged.sha256) else plan
        body = self._disk.read_again(entry.file, entry.identity, plan.start, plan.stop)
        return None if body is None else (entry, start_of(plan), {"type": "http.response.body", "body": body})
