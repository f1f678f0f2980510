"""A node of the model: a process, and what must be on its disk."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from selfheal import SelfHealMiddleware, UploadStore
from selfheal.disk.open_file import Identity, identity_of
from tests.support.asgi import Wrapped
from tests.support.catalogue_model import NameState


@dataclass
class FileCopy:
    """A file on a disk."""

    data: bytes
    modified_ns: int


class Node:
    """A process with a disk of its own, and what must be on that disk: `copies`, and the bytes in quarantine."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.copies: dict[str, FileCopy] = {}
        self.quarantine: Counter[bytes] = Counter()
        self._url = url
        self.start()

    def start(self) -> None:
        """Start as a new process that remembers nothing of the one before."""
        self.started_ns = time.time_ns()
        self.store = UploadStore(self.directory, self._url)
        self.app = SelfHealMiddleware(Wrapped(), self.store)
        self.seen: dict[str, Identity] = {}
        self.changing: set[str] = set()

    def path(self, name: str) -> Path:
        """Return the path of a name's file."""
        return self.directory / name

    def identity(self, name: str) -> Identity:
        """Return the identity of the file that is on the disk."""
        return identity_of(os.stat(self.path(name)))

    def forget(self, name: str) -> None:
        """Let the next hit of a name count as the first."""
        self.seen.pop(name, None)

    def replace_file(self, name: str, data: bytes, modified_ns: int) -> None:
        """Write a file in place of another with a time of its own, as an app, a deploy or a backup does."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name("new file").write_bytes(data)
        os.utime(path.with_name("new file"), ns=(modified_ns, modified_ns))
        path.with_name("new file").rename(path)
        self.store.disk.root()  # as after the second in which the store does not look for a lost directory again
        self.copies[name] = FileCopy(data, modified_ns)

    def expect_restored(self, name: str, state: NameState) -> None:
        """Expect the recorded file on the disk, and a copy of other bytes in quarantine if they are not recorded."""
        self.expect_set_aside(name, state)
        self.copies[name] = FileCopy(state.data, state.modified_ns)

    def expect_set_aside(self, name: str, state: NameState) -> None:
        """Expect no file on the disk, and its bytes in quarantine if they are not recorded."""
        copy = self.copies.pop(name, None)
        if copy is not None and not state.is_recorded(copy.data):
            self.quarantine[copy.data] += 1

    def has_recorded_size_and_time(self, name: str, state: NameState) -> bool:
        """Whether size and time are those of the record: then only a run that verifies reads the bytes."""
        return (self.copies[name].modified_ns, len(self.copies[name].data)) == (state.modified_ns, len(state.data))

    def is_overwrite(self, name: str, state: NameState) -> bool:
        """Whether the app wrote this file: after its process started and after the record, and not an old version."""
        copy = self.copies[name]
        old = {(version.data, version.modified_ns) for version in state.history}
        newer = copy.modified_ns > max(self.started_ns, state.modified_ns)
        return newer and (copy.data, copy.modified_ns) not in old
