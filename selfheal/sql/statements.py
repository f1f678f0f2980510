"""Statements for the driver itself: through SQLAlchemy a query takes several hops to the driver's thread, not one."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Insert, Select
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncConnection

_KNOWN_DRIVERS = ("aiosqlite", "asyncpg")
_NOT_UTF8 = "Could not decode"
_COMPILED_AT_MOST = 64


class DeadConnection(ConnectionError):
    """The server had closed the connection."""


class Statements:
    """Queries, each compiled once for as long as it is the same object."""

    def __init__(self) -> None:
        self._compiled: dict[int, tuple[Select[Any], str, Sequence[str], dict[str, Any]]] = {}

    async def fetch(self, connection: AsyncConnection, query: Select[Any], values: dict[str, Any]) -> Any:
        """Ask the driver itself, where it is one that we know."""
        pooled = connection.sync_connection
        if pooled is None or connection.dialect.driver not in _KNOWN_DRIVERS:
            return (await connection.execute(query, values)).all()
        try:
            return await self.ask(pooled.connection.driver_connection, connection.dialect, query, values)
        except DeadConnection:
            await connection.invalidate()
            raise

    async def ask(self, driver: Any, dialect: Dialect, query: Select[Any], values: dict[str, Any]) -> Any:
        """Ask a connection of aiosqlite's or asyncpg's: one hop to its thread, or one round trip, not five."""
        text, positional = self.bind(dialect, query, values)
        if dialect.driver == "aiosqlite":
            try:
                return await driver.execute_fetchall(text, positional)
            except sqlite3.OperationalError as error:
                if not str(error).startswith(_NOT_UTF8):
                    raise
            before, driver.text_factory = driver.text_factory, _decode  # slower than SQLite's own: only where needed
            try:
                return await driver.execute_fetchall(text, positional)
            finally:
                driver.text_factory = before
        try:
            return await driver.fetch(text, *positional)
        except Exception as error:
            if driver.is_closed():
                raise DeadConnection(str(error)) from error
            raise

    def bind(self, dialect: Dialect, query: Select[Any], values: dict[str, Any]) -> tuple[str, list[Any]]:
        """A query as text, and its values in the order of their places in it."""
        compiled = self._compiled.get(id(query))
        if compiled is None or compiled[0] is not query:
            made = query.compile(dialect=dialect)
            if len(self._compiled) >= _COMPILED_AT_MOST:
                self._compiled.clear()
            compiled = self._compiled[id(query)] = (query, str(made), made.positiontup or (), dict(made.params))
        _, text, order, constants = compiled
        return text, [values[key] if key in values else constants[key] for key in order]


async def execute_many(connection: AsyncConnection, statement: Insert, rows: Sequence[dict[str, Any]]) -> None:
    """Execute an INSERT for each of `rows`, which have the same keys; SQLite's driver is given them itself."""
    if not rows:
        return
    if connection.dialect.driver != "aiosqlite":
        await connection.execute(statement, rows)
        return
    text, order = _compiled(statement, connection.dialect, tuple(rows[0]))
    driver: Any = (await connection.get_raw_connection()).driver_connection
    await (await driver.executemany(text, [[row[key] for key in order] for row in rows])).close()


@lru_cache(_COMPILED_AT_MOST)
def _compiled(statement: Insert, dialect: Dialect, keys: Sequence[str]) -> tuple[str, Sequence[str]]:
    made = statement.compile(dialect=dialect, column_keys=list(keys))
    return str(made), made.positiontup or ()


def _decode(text: bytes) -> str:
    """Text of a SQLite database in which somebody else wrote some that is no UTF-8; the grammar of names has none."""
    return text.decode(errors="surrogateescape")
