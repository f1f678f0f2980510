"""SQLite's file, asked in the calling thread: a query takes less time than the way to another thread and back."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import DatabaseUnavailable


class Direct:
    """A connection for every thread that asks. It waits for no lock: who finds one goes the long way."""

    def __init__(self, path: Path) -> None:
        self._uri = f"{path.absolute().as_uri()}?mode=rw"
        self._own = threading.local()
        self._all: list[sqlite3.Connection] = []

    def rows(self, text: str, values: Sequence[Any]) -> list[Any]:
        """All rows of a query; raises `DatabaseUnavailable` if there is no answer at once."""
        try:
            return self._connection().execute(text, values).fetchall()
        except sqlite3.Error as error:
            raise DatabaseUnavailable(f"the database gave no answer: {error}") from error

    def close(self) -> None:
        """Close every connection; nobody may be asking."""
        connections, self._all, self._own = self._all, [], threading.local()
        for connection in connections:
            connection.close()

    def _connection(self) -> sqlite3.Connection:
        own: sqlite3.Connection | None = getattr(self._own, "connection", None)
        if own is None:
            own = self._own.connection = sqlite3.connect(self._uri, uri=True, timeout=0, check_same_thread=False)
            self._all.append(own)
        return own
