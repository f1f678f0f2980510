"""Reads of a SQLite file in the calling thread."""

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .backend import Reader, Rows
from .forks import no_fork_in_thread
from .sqlite_file import Identity, existing, identity_of

KEPT_AT_MOST = 5  # idle connections of a reader


class _Connection(sqlite3.Connection):
    """A connection, and the file that it was opened to."""

    identity: Identity = None


class SQLiteReader(Reader):
    """Reads a file in the calling thread, which is faster than a hop to another; it waits for no lock."""

    can_read_in_thread = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[_Connection] = []

    def rows_in_thread(self, text: str, values: Sequence[Any]) -> Rows:
        with no_fork_in_thread():
            connection = self._take()
            try:
                rows = connection.execute(text, values).fetchall()
            except sqlite3.Error:
                connection.close()
                raise
        self._give_back(connection)
        return rows

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> _Connection:
        identity = identity_of(self._path)
        with contextlib.suppress(IndexError):
            while True:
                connection = self._idle.pop()
                if connection.identity == identity:
                    return connection
                connection.close()
        uri = existing(self._path)
        connection = sqlite3.connect(uri, uri=True, timeout=0, check_same_thread=False, factory=_Connection)
        connection.identity = identity
        return connection

    def _give_back(self, connection: _Connection) -> None:
        self._idle.append(connection)
        if len(self._idle) > KEPT_AT_MOST:
            with contextlib.suppress(IndexError):  # other threads have taken all of them meanwhile
                self._idle.pop().close()


def read_part(
    path: Path, schema: str | None, table: str, column: str, rowid: int, start: int, size: int
) -> tuple[bytes, int] | None:
    """Return a part of a value, and the number of all its bytes; None if it cannot be opened, or is not there."""
    with contextlib.closing(sqlite3.connect(existing(path), uri=True)) as connection:
        try:
            blob = connection.blobopen(table, column, rowid, readonly=True, name=schema or "main")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:  # also a virtual table
                return None
            raise
        with blob:
            blob.seek(start)
            return blob.read(size), len(blob)
