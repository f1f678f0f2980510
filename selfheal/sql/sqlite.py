"""SQLite's file, asked in the calling thread: a query takes less time than the way to another thread and back."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DatabaseUnavailable

IDLE_AT_MOST = 5
"""Connections that stay open while nobody asks, as many as in a pool."""


class Direct:
    """As many connections as threads ask at once. It waits for no lock: who finds one goes the long way."""

    def __init__(self, path: Path) -> None:
        self._uri = f"{path.absolute().as_uri()}?mode=rw"
        self._idle: list[sqlite3.Connection] = []

    def rows(self, text: str, values: Sequence[Any]) -> list[Any]:
        """All rows of a query; raises `DatabaseUnavailable` if there is no answer at once."""
        try:
            connection = self._connection()
        except sqlite3.Error as error:
            raise DatabaseUnavailable(f"the database gave no answer: {error}") from error
        try:
            rows = connection.execute(text, values).fetchall()
        except sqlite3.Error as error:
            connection.close()
            raise DatabaseUnavailable(f"the database gave no answer: {error}") from error
        self._give_back(connection)
        return rows

    def close(self) -> None:
        """Close every connection; nobody may be asking."""
        while self._idle:
            self._idle.pop().close()

    def _connection(self) -> sqlite3.Connection:
        try:
            return self._idle.pop()
        except IndexError:
            return sqlite3.connect(self._uri, uri=True, timeout=0, check_same_thread=False)

    def _give_back(self, connection: sqlite3.Connection) -> None:
        self._idle.append(connection)
        if len(self._idle) > IDLE_AT_MOST:
            with contextlib.suppress(IndexError):  # others took all of them meanwhile
                self._idle.pop().close()
