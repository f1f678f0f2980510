"""A store for synchronous code: each public method of `UploadStore`, from any thread. Its event loop does the work."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar

from .aio.home import HomeLoop
from .aio.streams import next_item
from .blobs.blob_store import READ_AT_ONCE
from .blobs.versions import GRACE, KEEP
from .content.sources import Source
from .db import ImageStorage
from .sql.models import Contents, Purged, Record, SmallFile, Version
from .sql.statistics import Statistics
from .sql.transactions import AnyConnection

if TYPE_CHECKING:
    from .store import Saved, Upload, UploadStore

T = TypeVar("T")
_CLOSING: set[asyncio.Task[None]] = set()
"""An event loop does not keep its tasks alive."""


class SyncUploadStore:
    """`UploadStore.sync`. The methods, their arguments and errors are those of `UploadStore`; none may be called in the
    thread of the event loop on which the store lives (`RuntimeError`). A `connection` is synchronous here.
    """

    def __init__(self, store: "UploadStore") -> None:
        self._store = store
        self._home = store.home
        self.database = SyncImageStorage(store.database)

    def __enter__(self) -> Self:
        self._home.call(self._store.open)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait up to 20 s for running tasks, then close connections, threads and descriptors."""
        self._home.call(self._store.close_at_home)
        self._home.leave_waiting()

    def save_uploaded_file(
        self, upload: "Upload", *, folder: str = "", connection: AnyConnection | None = None
    ) -> "Saved":
        """Save an upload under a UUID; see `UploadStore.save_uploaded_file`."""
        return _call(self._home, self._store.save_uploaded_file, upload, folder=folder, connection=connection)

    def save(self, name: str, source: Source, *, connection: AnyConnection | None = None) -> "Saved":
        """Save bytes, a path or a file object, on disk and in the database; see `UploadStore.save`."""
        return _call(self._home, self._store.save, name, source, connection=connection)

    def create(self, name: str, source: Source) -> "Saved":
        """Save under a name that is not stored; see `UploadStore.create`."""
        return self._home.call(self._store.create, name, source)

    def delete(self, name: str, *, connection: AnyConnection | None = None) -> bool:
        """Delete a name; see `UploadStore.delete`."""
        return _call(self._home, self._store.delete, name, connection=connection)

    def undo(self, name: str, generation: int | None = None) -> "Saved":
        """Undo the last overwrite or deletion; see `UploadStore.undo`."""
        return self._home.call(self._store.undo, name, generation)

    def restore(self, name: str) -> "Saved":
        """Restore a missing file; see `UploadStore.restore`."""
        return self._home.call(self._store.restore, name)

    def adopt(self, name: str) -> "Saved":
        """Store a file that is only on disk in the database; see `UploadStore.adopt`."""
        return self._home.call(self._store.adopt, name)

    def ensure(self, name: str) -> Path:
        """Return the path of a name's file, restored first if it was missing; see `UploadStore.ensure`."""
        return self._home.call(self._store.ensure, name)

    def open(self, name: str) -> BinaryIO:
        """Open a name's file to be read, restored first if it was missing; see `UploadStore.open`."""

        async def work() -> BinaryIO:
            return await self._store.open(name)

        return self._home.call(work)

    def url(self, name: str, *, versioned: bool = False) -> str:
        """Return the URL path of a name; see `UploadStore.url`."""
        return self.urls([name])[name] if versioned else self._store.url(name)

    def urls(self, wanted: Iterable[str]) -> dict[str, str]:
        """Return the URL path of each name with the digest of its bytes; see `UploadStore.urls`."""
        return self._home.call(self._store.urls, wanted)


class SyncImageStorage:
    """`ImageStorage` for synchronous code, as `UploadStore.sync.database`."""

    def __init__(self, database: ImageStorage) -> None:
        self._database = database
        self._home = database.home

    def create_tables(self) -> None:
        """Create the tables and indexes that are missing."""
        self._home.call(self._database.create_tables)

    def refuse_foreign_tables(self) -> None:
        """Raise `ForeignTables` if tables with our names are another app's."""
        self._home.call(self._database.refuse_foreign_tables)

    def find(self, name: str) -> Record | None:
        """Return the record of a name; see `ImageStorage.find`."""
        return self._home.call(self._database.find, name)

    def read(self, version: Contents, first: int = 0, *, at_once: int = READ_AT_ONCE) -> Iterator[bytes]:
        """Yield the bytes of a record; see `ImageStorage.read`."""
        return iterate(self._home, self._database.read(version, first, at_once=at_once))

    def digest(self, version: Contents) -> str:
        """Return the SHA-256 of the stored bytes; see `ImageStorage.digest`."""
        return self._home.call(self._database.digest, version)

    def history(self, name: str) -> list[Version]:
        """Return the versions of a name, newest first."""
        return self._home.call(self._database.history, name)

    def pages(self, *, deleted: bool | None = False, size: int = 1000) -> Iterator[list[Record]]:
        """Yield records in the order of names; see `ImageStorage.pages`."""
        return iterate(self._home, self._database.pages(deleted=deleted, size=size))

    def count(self) -> int:
        """Return the number of living records."""
        return self._home.call(self._database.count)

    def store_image(self, name: str, data: Source, *, connection: AnyConnection | None = None, **more: Any) -> Record:
        """Store bytes under a name; see `ImageStorage.store_image`."""
        return _call(self._home, self._database.store_image, name, data, connection=connection, **more)

    def store_many(self, files: Sequence[SmallFile]) -> set[str]:
        """Store files under new names; see `ImageStorage.store_many`."""
        return self._home.call(self._database.store_many, files)

    def bury(self, name: str, *, connection: AnyConnection | None = None) -> Record | None:
        """Make the record of a name a tombstone; see `ImageStorage.bury`."""
        return _call(self._home, self._database.bury, name, connection=connection)

    def undo(self, name: str, generation: int | None = None) -> Record:
        """Undo the last overwrite or deletion in the database; see `ImageStorage.undo`."""
        return self._home.call(self._database.undo, name, generation)

    def purge(self, keep: timedelta, *, grace: timedelta = GRACE, dry_run: bool = False) -> Purged:
        """Drop history older than `keep`; see `ImageStorage.purge`."""
        return self._home.call(self._database.purge, keep, grace=grace, dry_run=dry_run)

    def vacuum(self) -> int:
        """Write a SQLite file anew, without free space; see `ImageStorage.vacuum`."""
        return self._home.call(self._database.vacuum)

    def statistics(self, keep: timedelta = KEEP, *, grace: timedelta = GRACE) -> Statistics:
        """Count names, versions and bytes; see `ImageStorage.statistics`."""
        return self._home.call(self._database.statistics, keep, grace=grace)

    def version(self) -> str:
        """Return the name and the version of the database, for people."""
        return self._home.call(self._database.version)


def _call(
    home: HomeLoop,
    work: Callable[..., Coroutine[Any, Any, T]],
    /,
    *args: Any,
    connection: AnyConnection | None,
    **kwargs: Any,
) -> T:
    """Call at home; or in this thread, where the caller's connection must be used."""
    if connection is None:
        return home.call(work, *args, **kwargs)
    return asyncio.run(work(*args, connection=connection, **kwargs))


def iterate(home: HomeLoop, items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Yield what an async generator yields at home; it is closed there soon after."""
    try:
        while item := home.call(next_item, items):
            yield item[0]
    finally:
        home.release(lambda: _close(items))


def _close(items: AsyncGenerator[T, None]) -> None:
    with contextlib.suppress(RuntimeError):  # its loop has ended
        loop = asyncio.get_running_loop()
        _CLOSING.add(closing := loop.create_task(_closed(items)))
        closing.add_done_callback(_CLOSING.discard)


async def _closed(items: AsyncGenerator[T, None]) -> None:
    with contextlib.suppress(RuntimeError):  # a step that was broken off ends it
        await items.aclose()
