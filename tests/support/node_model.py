"""A node of the model: a process, and what must be on its disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from selfheal import SelfHealMiddleware, UploadStore
from selfheal.disk.open_file import Identity, identity_of
from tests.support.asgi import Wrapped
from tests.support.catalogue_model import NS, CatalogueModel, NameState


@dataclass
class FileCopy:
    """A file on a disk."""

    data: bytes
    modified_ns: int


class Node:
    """A process with a disk of its own, and what must be on that disk: `copies`."""

    def __init__(self, directory: Path, url: str, catalogue: CatalogueModel) -> None:
        self.directory = directory
        self.copies: dict[str, FileCopy] = {}
        self.followed: dict[str, int] = {}
        self._catalogue = catalogue
        self._url = url
        self.start()

    def start(self) -> None:
        """Start as a new process that remembers nothing of the one before."""
        self.store = UploadStore(self.directory, self._url, settled_after=0.0)
        self.app = SelfHealMiddleware(Wrapped(), self.store)
        self.seen: dict[str, Identity] = {}
        self.changing: set[str] = set()
        self.failed: set[str] = set()
        self.overwrites: dict[str, bool | None] = {}

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

    def lose_directory(self) -> None:
        """Forget what was on the disk: the files, the mark, and how far it followed."""
        self.copies.clear()
        self.followed.clear()

    def expect_restored(self, name: str) -> None:
        """Expect the recorded file on the disk, and a copy of other bytes among the versions."""
        self.expect_set_aside(name)
        state = self._catalogue.names[name]
        self.copies[name] = FileCopy(state.data, state.modified_ns)

    def expect_set_aside(self, name: str) -> None:
        """Expect no file on the disk, and its bytes in the database."""
        copy = self.copies.pop(name, None)
        if copy is not None:
            self._catalogue.set_aside(name, copy.data, copy.modified_ns)

    def has_recorded_size_and_time(self, name: str, state: NameState) -> bool:
        """Whether size and time are those of the record: then only a run that verifies reads the bytes."""
        return (self.copies[name].modified_ns, len(self.copies[name].data)) == (state.modified_ns, len(state.data))

    def mark(self) -> tuple[int, int] | None:
        """Return the inode number and the time of the disk's mark, None without one."""
        try:
            found = os.stat(self.directory / ".selfheal-disk")
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def foresee(self) -> None:
        """Note which copies are overwrites, before they are compared: their ctime tells, and that changes."""
        living = {name: self._catalogue.alive(name) for name in self.copies}
        self.overwrites = {name: self._is_overwrite(name, state) for name, state in living.items() if state}

    def _is_overwrite(self, name: str, state: NameState) -> bool | None:
        """Whether the app wrote this file after the record; None if that is a matter of milliseconds or of damage."""
        copy, mark, changed_ns = self.copies[name], self.mark(), self.identity(name)[3]
        if copy.data in [version.data for version in state.history]:
            return False
        if copy.modified_ns == state.modified_ns or not copy.data.strip(b"\0"):
            return False
        if copy.modified_ns < state.modified_ns and abs(changed_ns - copy.modified_ns) >= 2 * NS:
            return False
        if len(copy.data) < len(state.data) and state.data.startswith(copy.data):
            return None if state.data in self._catalogue.damaged else False
        if mark is None:
            return None
        if changed_ns < mark[1]:
            return False
        return True if copy.modified_ns > state.modified_ns else None
