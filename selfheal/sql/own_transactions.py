"""The open transactions of a write's own callers: to wait for their locks would be to wait for ever."""

from collections.abc import Iterator
from weakref import WeakKeyDictionary, WeakSet

import sqlalchemy as sa
from sqlalchemy.engine import URL

from ..aio.callers import current_caller, waiting_callers
from .backend import Backend

_CHANGES = "selfheal_changes"  # in the `info` of a connection: rows it had changed when its transaction began
_begun: "WeakKeyDictionary[object, WeakSet[sa.Connection]]" = WeakKeyDictionary()


def watch() -> None:
    """Note from now on which task or thread begins a transaction, on all engines of SQLAlchemy in this process."""
    if not sa.event.contains(sa.Engine, "begin", _note):
        sa.event.listen(sa.Engine, "begin", _note)


def own_transactions(backend: Backend, url: URL) -> Iterator[sa.Connection]:
    """Yield the open transactions, on the database of a URL, of the callers that the running task works for."""
    for caller in waiting_callers():
        for connection in list(_begun.get(caller, ())):
            is_open = not connection.closed and connection.in_transaction() and connection.dialect.name == backend.name
            if is_open and _are_the_same(backend, connection.engine.url, url):
                yield connection


def _are_the_same(backend: Backend, one: URL, other: URL) -> bool:
    return one == other or backend.place(one) == backend.place(other)  # which asks the disk


def changed_rows(connection: sa.Connection) -> bool:
    """Whether an open transaction has changed rows, if the driver counts them, as SQLite's do."""
    driver = connection.connection.driver_connection
    return getattr(driver, "in_transaction", False) and _changes(connection) > connection.info.get(_CHANGES, 0)


def _note(connection: sa.Connection) -> None:
    connection.info[_CHANGES] = _changes(connection)
    _begun.setdefault(current_caller(), WeakSet()).add(connection)


def _changes(connection: sa.Connection) -> int:
    return int(getattr(connection.connection.driver_connection, "total_changes", 0))
