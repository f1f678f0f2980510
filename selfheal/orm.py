"""Uploads of an app's own rows (SQLAlchemy ORM): saved in the row's transaction, and deleted with the row."""

from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection, Dialect, String, TypeDecorator, event, inspect, select
from sqlalchemy.orm import Mapper, Session, object_session

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
    their row, or gives it another upload; `undo` brings them back. One that another row gets in the same flush stays.
    Two rows must not name the same upload.

    Only the ORM's unit of work is seen (`session.delete`, a changed attribute): not `delete(Model).where(…)`, not what
    the database does itself (ON DELETE CASCADE).
    """
    rows = _Rows(uploads)
    event.listen(base, "before_insert", rows.inserted, propagate=True)
    event.listen(base, "before_update", rows.updated, propagate=True)
    event.listen(base, "before_delete", rows.deleted, propagate=True)
    event.listen(Session, "before_flush", rows.begin_flush)
    event.listen(Session, "after_flush", rows.end_flush)
    event.listen(Session, "after_commit", rows.committed)


@dataclass(eq=False)
class _Changes:
    """The names that rows lose and get in one flush, and those that were deleted since the last commit."""

    lost: dict[str, Connection] = field(default_factory=dict)
    gained: set[str] = field(default_factory=set)
    buried: set[str] = field(default_factory=set)


class _Rows:
    def __init__(self, uploads: UploadStore) -> None:
        self._uploads = uploads

    def inserted(self, mapper: Mapper[Any], _: Connection, row: Any) -> None:
        for key, _column in _columns(mapper):
            self._changes(row).gained.update(inspect(row).attrs[key].history.added or ())

    def updated(self, mapper: Mapper[Any], connection: Connection, row: Any) -> None:
        for key, column in _columns(mapper):
            history = inspect(row).attrs[key].history
            if history.added or history.deleted:
                self._lose(connection, row, history.deleted or [_stored(mapper, connection, row, column)])
                self._changes(row).gained.update(history.added or ())

    def deleted(self, mapper: Mapper[Any], connection: Connection, row: Any) -> None:
        for key, column in _columns(mapper):
            history = inspect(row).attrs[key].history
            before = history.unchanged or history.deleted or [_stored(mapper, connection, row, column)]
            self._lose(connection, row, [*before, *(history.added or ())])

    def begin_flush(self, session: Session, *_: Any) -> None:
        """Forget what a flush that failed has left."""
        changes = session.info.get(self)
        if changes is not None:
            changes.lost, changes.gained = {}, set()

    def end_flush(self, session: Session, _: Any) -> None:
        """Delete what no row got."""
        changes: _Changes = session.info.get(self) or _Changes()
        for name in changes.lost.keys() - changes.gained:
            _run_without_waiting(self._uploads.database.bury(name, connection=changes.lost[name]))
            self._uploads.home.soon(self._uploads.background.expect, name)
            changes.buried.add(name)

    def committed(self, session: Session) -> None:
        """Compare the files of what was deleted, unless only a savepoint was released."""
        changes = session.info.get(self)
        if changes is not None and not session.in_nested_transaction():
            while changes.buried:
                self._uploads.home.soon(self._uploads.background.compare_now, changes.buried.pop())

    def _lose(self, connection: Connection, row: Any, lost: list[Any]) -> None:
        valid = [name for name in lost if isinstance(name, str) and names.is_valid(name)]
        self._changes(row).lost.update(dict.fromkeys(valid, connection))

    def _changes(self, row: Any) -> _Changes:
        session = object_session(row)
        assert session is not None  # noqa: S101 - it is being flushed
        changes: _Changes = session.info.setdefault(self, _Changes())
        return changes


def _columns(mapper: Mapper[Any]) -> Iterator[tuple[str, Any]]:
    for attribute in mapper.column_attrs:
        column = attribute.columns[0]
        if isinstance(column.type, UploadName):
            yield attribute.key, column


def _stored(mapper: Mapper[Any], connection: Connection, row: Any, column: Any) -> Any:
    """Return the name in the table: the row's attribute was not loaded."""
    key = zip(mapper.primary_key, inspect(row).identity or (), strict=True)
    query = select(column).select_from(mapper.persist_selectable)  # the tables of joined inheritance belong together
    return connection.scalar(query.where(*(part == value for part, value in key)))


def _run_without_waiting(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits: all it does is to use a synchronous connection."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("the work waits for something")
