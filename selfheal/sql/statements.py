"""Compiled statements: each is compiled once, and passed to the driver as text and values."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Insert, Select
from sqlalchemy.engine import Dialect


class DeadConnection(ConnectionError):
    """The server had closed the connection."""


@lru_cache(256)
def compiled(
    statement: Select[Any] | Insert, dialect: Dialect, columns: tuple[str, ...] | None = None
) -> tuple[str, Sequence[str], dict[str, Any]]:
    """Compile a statement once, as long as it is the same object: its text, its parameters in order, its constants."""
    made = statement.compile(dialect=dialect, column_keys=None if columns is None else list(columns))
    return str(made), made.positiontup or (), dict(made.params)


def bind(query: Select[Any], dialect: Dialect, values: dict[str, Any]) -> tuple[str, list[Any]]:
    """Return a query as text, and its values in the order of its parameters."""
    text, order, constants = compiled(query, dialect)
    return text, [values[key] if key in values else constants[key] for key in order]
