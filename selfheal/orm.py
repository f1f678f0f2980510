"""Uploads of an app's own rows (SQLAlchemy ORM): saved in the row's transaction, and deleted with the row."""

from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from sqlalchemy import Connection, Dialect, String, TypeDecorator, event, inspect, select
from sqlalchemy.orm import Mapper, object_session

from . import names
from .store import UploadStore

T = TypeVar("T")


class UploadName(TypeDecorator[str]):
    """The type of a column that holds the name of an upload: `Saved.name`, or NULL. Raises `InvalidName`."""

    impl = String(names.MAX_NAME_BYTES)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002 - SQLAlchemy's signature
        """Check a name before it is stored."""
        return None if value is None else names.check(value)


def delete_with_rows(base: type[Any], uploads: UploadStore) -> None:
    """Delete the uploads named in `UploadName` columns of `base` and its subclasses in the transaction that deletes
    their row, or gives it another upload; `undo` brings them back. Two rows must not name the same upload.

    Only the ORM's unit of work is seen (`session.delete`, a changed attribute): not `delete(Model).where(…)`, not what
    the database does itself (ON DELETE CASCADE).
    """
    rows = _Rows(uploads)
    event.listen(base, "after_delete", rows.deleted, propagate=True)
    event.listen(base, "before_update", rows.updated, propagate=True)


class _Rows:
    def __init__(self, uploads: UploadStore) -> None:
        self._uploads = uploads

    def deleted(self, mapper: Mapper[Any], connection: Connection, row: Any) -> None:
        for key, column in _columns(mapper):
            name = inspect(row).dict.get(key) or self._stored(mapper, connection, row, column)
            self._bury(connection, row, name)

    def updated(self, mapper: Mapper[Any], connection: Connection, row: Any) -> None:
        for key, column in _columns(mapper):
            history = inspect(row).attrs[key].history
            if not history.added and not history.deleted:
                continue
            before = history.deleted[0] if history.deleted else self._stored(mapper, connection, row, column)
            if before not in history.added:
                self._bury(connection, row, before)

    def _stored(self, mapper: Mapper[Any], connection: Connection, row: Any, column: Any) -> str | None:
        """Return the name in the table: the row's attribute was not loaded."""
        key = zip(mapper.primary_key, mapper.primary_key_from_instance(row), strict=True)
        name: str | None = connection.scalar(select(column).where(*(part == value for part, value in key)))
        return name

    def _bury(self, connection: Connection, row: Any, name: str | None) -> None:
        if name is None or not names.is_valid(name):
            return
        _run_without_waiting(self._uploads.database.bury(name, connection=connection))
        background, soon = self._uploads.background, self._uploads.home.soon
        soon(background.expect, name)
        session = object_session(row)
        if session is not None:
            event.listen(session, "after_commit", lambda _session: soon(background.compare_now, name), once=True)


def _columns(mapper: Mapper[Any]) -> Iterator[tuple[str, Any]]:
    for attribute in mapper.column_attrs:
        column = attribute.columns[0]
        if isinstance(column.type, UploadName):
            yield attribute.key, column


def _run_without_waiting(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits: all it does is to use a synchronous connection."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("the work waits for something")
