"""SelfHealStorage: Django's files, on disk and in the database."""

import contextlib
import errno
import io
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import urljoin

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files.base import File
from django.core.files.storage import Storage, storages
from django.db import connections
from django.db.transaction import TransactionManagementError
from django.utils.deconstruct import deconstructible
from django.utils.encoding import filepath_to_uri

from .. import names
from ..content.sources import CHUNK
from ..errors import DatabaseUnavailable, NameTaken, NotStored
from ..sql.models import Record
from ..store import UploadStore
from .configuration import sqlite_file, store_for

SUFFIX_AT_MOST = 16  # bytes that Django adds to a name that is taken, and some
TRIES = 3


@deconstructible(path="selfheal.django.SelfHealStorage")
class SelfHealStorage(Storage):  # type: ignore[misc]  # Django has no types
    """Keeps files in `directory` (default: `MEDIA_ROOT`) and in `database`, and restores those that are missing.

    `database` is a URL. By default it is `SELFHEAL_DATABASE_URL`, else what `DATABASES["default"]` says: that database
    of PostgreSQL; for SQLite, a file of its own beside Django's. `prefix` is the URL of the files (default:
    `MEDIA_URL`). Other `options` are those of `UploadStore`. A name outside the grammar is `SuspiciousFileOperation`,
    a missing file `FileNotFoundError`; `DatabaseUnavailable` means that nobody knows.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        database: str | None = None,
        prefix: str | None = None,
        **options: Any,
    ) -> None:
        self._options = {"directory": directory, "database": database, **options}
        self._prefix = prefix

    @property
    def uploads(self) -> UploadStore:
        """The store; storages of the same options share it."""
        return store_for(self._options, self._prefix or settings.MEDIA_URL)

    @property
    def location(self) -> str:
        """The absolute path of the directory."""
        return str(self.uploads.disk.path)

    @property
    def base_url(self) -> str:
        """The URL of the directory, with a slash at its end. Raises `ImproperlyConfigured` if there is none."""
        url: str = self._prefix or settings.MEDIA_URL
        if url in ("", "/"):
            raise ImproperlyConfigured("the uploads need a URL: set MEDIA_URL, or OPTIONS['prefix']")
        return url if url.endswith("/") else f"{url}/"

    def save(self, name: str | None, content: Any, max_length: int | None = None) -> str:
        """Save a file under a name that is free, and return that name. A deleted name is free."""
        for _ in range(TRIES - 1):
            try:
                return str(super().save(name, content, max_length=max_length))
            except NameTaken:
                continue  # by another save, since the name was found free
        return str(super().save(name, content, max_length=max_length))

    def _save(self, name: str, content: Any) -> str:
        store, name = self.uploads, _checked(name)
        _refuse_own_lock(store)
        return store.sync.create(name, _Contents(content)).name

    def _open(self, name: str, mode: str = "rb") -> Any:
        return _StoredFile(self, _checked(name), mode)

    def restored(self, name: str, mode: str) -> IO[Any]:
        """Open a file, restored if it is missing; a temporary one if the disk does not take it."""
        if mode not in ("r", "rt", "rb"):
            raise io.UnsupportedOperation(f"{name!r} cannot be opened in mode {mode!r}; call save() with the new bytes")
        try:
            file = self.uploads.sync.open(name)
        except NotStored:
            raise _no_such_file(name) from None
        return file if "b" in mode else io.TextIOWrapper(file, "utf-8")

    def _record(self, name: str) -> Record:
        record = self.uploads.sync.database.find(name)
        if record is None or record.is_deleted:
            raise _no_such_file(name)
        return record

    def path(self, name: str) -> str:
        """Return the absolute path of a file, restored if it is missing and stored."""
        store, name = self.uploads, _checked(name)
        with contextlib.suppress(NotStored):  # somebody may want to write it
            return str(store.sync.ensure(name))
        return str(store.disk.path_of(name))

    def delete(self, name: str) -> None:
        """Delete a file; `uploads.sync.undo(name)` brings it back. A missing file is no error."""
        if not name:
            raise ValueError("The name must be given to delete().")
        store, name = self.uploads, _checked(name)
        _refuse_own_lock(store)
        store.sync.delete(name)

    def exists(self, name: str) -> bool:
        """Whether a name is taken: by a record, even if its file is missing, or by what has no record yet."""
        store, name = self.uploads, _checked(name)
        is_on_disk = os.path.lexists(store.disk.path_of(name))
        try:
            record = store.sync.database.find(name)
        except DatabaseUnavailable:
            if is_on_disk:
                return True
            raise
        return is_on_disk if record is None else not record.is_deleted

    def listdir(self, path: str) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the files that are stored below `path`."""
        below = _checked(path.strip("/")) + "/" if path.strip("/") else ""
        store = self.uploads
        folders, files = store.home.call(store.database.catalogue.children, below)
        return sorted(folders), sorted(files)

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        there = self.uploads.disk.stat(_checked(name))
        return self._record(name).size if there is None else there.st_size

    def url(self, name: str) -> str:
        """Return the URL of a file; nobody is asked whether it exists."""
        return urljoin(self.base_url, str(filepath_to_uri(name)).lstrip("/"))

    def get_modified_time(self, name: str) -> datetime:
        """Return when a file changed last: aware if `USE_TZ`, else in local time."""
        there = self.uploads.disk.stat(_checked(name))
        return _moment((self._record(name).modified_ns if there is None else there.st_mtime_ns) / 1e9)

    def get_created_time(self, name: str) -> datetime:
        """Return when a name was first saved: aware if `USE_TZ`, else in local time."""
        return _moment(self._record(_checked(name)).created_at.timestamp())

    def get_valid_name(self, name: str) -> str:
        """Return a name in the grammar for a client's file name, with room for the suffix of a name that is taken."""
        valid: str = super().get_valid_name(name).strip(".")
        root, extension = os.path.splitext(valid)
        room = names.MAX_PART_BYTES - SUFFIX_AT_MOST - len(extension.encode())
        valid = root.encode()[: max(room, 1)].decode(errors="ignore") + extension
        return valid if names.is_valid(valid) else f"_{valid}"  # the name of a device, such as aux.png


class _StoredFile(File):  # type: ignore[misc]  # Django has no types
    """An open file that can be opened again after it was closed, as `FieldFile.open()` does; then it is restored."""

    def __init__(self, storage: SelfHealStorage, name: str, mode: str) -> None:
        super().__init__(storage.restored(name, mode), name)
        self._storage, self.mode = storage, mode

    def open(self, mode: str | None = None) -> Self:
        mode = mode or self.mode
        if self.closed or mode != self.mode:
            self.close()
            self.file, self.mode = self._storage.restored(self.name, mode), mode
        self.seek(0)
        return self


class _Contents:
    """A Django file as a source: from its start, in chunks; text is encoded, as Django's own storage does."""

    def __init__(self, content: Any) -> None:
        self._chunks = content.chunks(CHUNK)

    def read(self, _size: int, /) -> bytes:
        chunk = next(self._chunks, b"")
        return chunk.encode() if isinstance(chunk, str) else bytes(chunk)


def uploads(alias: str = "default") -> UploadStore:
    """Return the store of a storage in `STORAGES`: for the middleware, and for `uploads().sync` in views."""
    storage = storages[alias]
    if not isinstance(storage, SelfHealStorage):
        raise ImproperlyConfigured(
            f"STORAGES[{alias!r}] is a {type(storage).__name__}; its BACKEND must be selfheal.django.SelfHealStorage"
        )
    return storage.uploads


def _checked(name: str) -> str:
    name = str(name).replace("\\", "/")
    why = names.fault(name)
    if why:
        raise SuspiciousFileOperation(f"{name!r} is not a valid name: {why}")
    return name


def _no_such_file(name: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "there is no such file, neither on disk nor in the database", name)


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, tz=UTC if settings.USE_TZ else None)


def _refuse_own_lock(store: UploadStore) -> None:
    """Raise `TransactionManagementError` if a change would wait for this thread's own transaction, and so for ever."""
    file = sqlite_file(store)
    for connection in connections.all(initialized_only=True) if file else ():
        if connection.vendor == "sqlite" and connection.in_atomic_block:
            name = str(connection.settings_dict["NAME"])
            if Path(name).resolve() == file:
                raise TransactionManagementError(
                    f"the open transaction has locked {name}, where the uploads are too: give them a file of their "
                    "own (OPTIONS['database']), or save and delete outside of transaction.atomic()"
                )
